"""Streamed weights: blocks read from a checkpoint's files one at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models import safetensors_io
from lib.models.layers import find_blocks, prunable_layers
from lib.models.weights import Weights, _linears_by_block

if TYPE_CHECKING:
    from torch import Tensor, nn


def _check_tied(model: nn.Module, checkpoint: safetensors_io.Checkpoint) -> None:
    """Refuse a checkpoint with differing tensors that its config ties; loaded as a whole, both would be used."""
    entries = checkpoint.entries
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if one in entries and other in entries:
            if not torch.equal(safetensors_io.read_tensor(entries[one]), safetensors_io.read_tensor(entries[other])):
                text = f"{checkpoint.folder}: {one} and {other} differ, and its config ties them"
                raise UserError("model", f"{text}; set tie_word_embeddings to false there, or use --stream never")


class Streamed(Weights):
    """The weights of a checkpoint on disk: one block at a time is in memory while the next one is being read.

    Changed blocks are written to separate files and read from there afterwards. ``model`` is on the meta device except
    for its buffers; the parameters around the blocks are in memory only inside ``edges``.
    """

    in_memory, streamed = False, True

    def __init__(
        self, model: nn.Module, checkpoint: safetensors_io.Checkpoint, device: torch.device, stored: torch.dtype
    ) -> None:
        prefix, modules = find_blocks(model)
        super().__init__(model, modules, prunable_layers(model), _linears_by_block(prefix, modules), stored, prefix)
        self.checkpoint, self.device, self.compute = checkpoint, device, model.dtype
        self.changed: dict[int, Path] = {}  # block -> the file that holds it now
        self._scratch = tempfile.TemporaryDirectory(prefix="streamed-", ignore_cleanup_errors=True)
        self._keys = _checkpoint_names(model, checkpoint)
        _check_tied(model, checkpoint)
        self._outside = self.outside()
        self._next: tuple[int, Future] | None = None
        self._reader = ThreadPoolExecutor(1)
        self._held = 0  # nested uses of ``edges``
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def scratch(self, folder: Path) -> None:
        """Keep changed blocks that no journal records (those of a search's trials) in a folder inside ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=".streamed-", dir=folder, ignore_cleanup_errors=True)

    def keep(self, index: int, path: Path) -> None:
        self.changed[index] = path

    def moved(self, old: Path, new: Path) -> None:
        self.changed = {i: new / path.name if path.parent == old else path for i, path in self.changed.items()}
        self._next = None

    def snapshot(self) -> Mapping[str, Tensor]:
        """Return nothing: the dense weights remain on disk."""
        return {}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Forget what was changed."""
        self.changed.clear()

    def edge_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._outside:  # as they are on disk, in their own dtype
            yield name, safetensors_io.read_tensor(self.checkpoint.entries[self._keys[name]])

    def _read(self, index: int) -> dict[str, Tensor]:
        names = self.block_names(index)
        if index in self.changed:
            entries = safetensors_io.read_header(self.changed[index])
            return {name: safetensors_io.read_tensor(entries[name]) for name in names}
        return {name: self._parameter(self.checkpoint.entries[self._keys[name]]) for name in names}

    def _parameter(self, entry: safetensors_io.Entry) -> Tensor:
        tensor = safetensors_io.read_tensor(entry)
        return tensor.to(self.stored) if self._too_wide(entry) else tensor

    def _too_wide(self, entry: safetensors_io.Entry) -> bool:
        """Return whether a tensor has more bits than ``stored``, to which it is rounded, as by ``weights_of``."""
        return entry.code.startswith("F") and entry.size > math.prod(entry.shape) * self.stored.itemsize

    @contextmanager
    def _lent(self, index: int, write: bool) -> Iterator[torch.device]:
        ahead, self._next = self._next, None
        tensors = ahead[1].result() if ahead and ahead[0] == index else self._read(index)
        if index + 1 < len(self.modules):
            self._next = (index + 1, self._reader.submit(self._read, index + 1))
        module = self.modules[index]
        for name in list(tensors):  # freed one by one: beside the block itself no copy of it stays
            _assign(module, name.removeprefix(f"{self.prefix}.{index}."), tensors.pop(name), self.device, self.compute)
        before = self.changed.get(index)
        try:
            yield self.device
            if write and self.changed.get(index) is before:
                path = Path(self._scratch.name) / f"{index}.safetensors"
                safetensors_io.write_shard(path, self.tensors(index), self.stored)
                self.changed[index] = path
        finally:
            _to_meta(module)

    @contextmanager
    def edges(self) -> Iterator[None]:
        outside = self._outside
        if not self._held:
            for name in outside:
                entry = self.checkpoint.entries[self._keys[name]]
                kind = self.stored if self._too_wide(entry) else self.compute
                value = safetensors_io.read_converted(entry, self.device, kind)
                _assign(self.model, name, value, self.device, self.compute)
                del value
            self.model.tie_weights()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                for name in outside:
                    parent, _, leaf = name.rpartition(".")
                    _forget(self.model.get_submodule(parent), leaf)
                self.model.tie_weights()


def _assign(module: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    value = tensor.to(device, dtype if tensor.is_floating_point() else None)
    module.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def _to_meta(module: nn.Module) -> None:
    for part in module.modules():
        for name in part._parameters:
            _forget(part, name)


def _forget(module: nn.Module, name: str) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        empty = torch.empty_like(parameter, device="meta")
        module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)


def _checkpoint_names(model: nn.Module, checkpoint: safetensors_io.Checkpoint) -> dict[str, str]:
    """Return the checkpoint's name of each of the model's parameters.

    Raises:
        UserError: a parameter has no tensor there, or one of another shape.
    """
    base = f"{model.base_model_prefix}."
    names = {}
    for name, parameter in model.named_parameters():  # of tied ones the first
        found = next((n for n in (name, name.removeprefix(base), base + name) if n in checkpoint.entries), None)
        if found is None or checkpoint.entries[found].shape != tuple(parameter.shape):
            text = f"the tensors in {checkpoint.folder} are not named as the model's ({name}); use --stream never"
            raise UserError(None, text)
        names[name] = found
    return names
