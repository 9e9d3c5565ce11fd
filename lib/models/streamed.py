"""Streamed weights: blocks read from a checkpoint's files one at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lib.core.errors import UserError, flag_name
from lib.core.lazy import torch
from lib.models import safetensors_io
from lib.models.layers import find_blocks, prunable_layers
from lib.models.weights import Weights, linears_by_block


def _check_tied(model: torch.nn.Module, checkpoint: safetensors_io.Checkpoint) -> None:
    """Refuse a checkpoint with differing tensors that its config ties; loaded as a whole, both would be used."""
    entries = checkpoint.entries
    for one, two in getattr(model, "all_tied_weights_keys", {}).items():
        if one in entries and two in entries:
            if not torch.equal(safetensors_io.read_tensor(entries[one]), safetensors_io.read_tensor(entries[two])):
                problem = f"{one} and {two} differ, and its config ties them"
                fix = f"set tie_word_embeddings to false there, or use {flag_name('stream')} never"
                raise UserError("model", checkpoint.folder, problem, fix)


class Streamed(Weights):
    """The weights of a checkpoint on disk: one block at a time is in memory while the next one is being read.

    Changed blocks are written to separate files and read from there afterwards. ``model`` is on the meta device except
    for its buffers; the parameters around the blocks are in memory only inside ``outer_parameters``.
    """

    in_memory, streamed = False, True

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoint: safetensors_io.Checkpoint,
        device: torch.device,
        save_dtype: torch.dtype,
    ) -> None:
        prefix, modules = find_blocks(model)
        super().__init__(model, modules, prunable_layers(model), linears_by_block(prefix, modules), save_dtype, prefix)
        self.checkpoint, self.device, self.compute = checkpoint, device, model.dtype
        self.changed: dict[int, Path] = {}  # block -> the file that holds it now
        self._scratch = tempfile.TemporaryDirectory(prefix="streamed-", ignore_cleanup_errors=True)
        self._keys = _checkpoint_names(model, checkpoint)
        _check_tied(model, checkpoint)
        self._outer_names = self.outer_names()
        self._next: tuple[int, Future] | None = None
        self._reader = ThreadPoolExecutor(1)
        self._holders = 0  # uses of ``outer_parameters`` at the same time
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def scratch(self, folder: Path) -> None:
        """Keep changed blocks that no journal records (those of a search's trials) in a folder inside ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=".streamed-", dir=folder, ignore_cleanup_errors=True)

    def set_block_file(self, index: int, path: Path) -> None:
        self.changed[index] = path

    def rebase_files(self, old: Path, new: Path) -> None:
        self.changed = {i: new / path.name if path.parent == old else path for i, path in self.changed.items()}
        self._next = None

    def snapshot(self) -> Mapping[str, torch.Tensor]:
        """Return nothing: the dense weights remain on disk."""
        return {}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Forget what was changed."""
        self.changed.clear()

    def outer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._outer_names:  # as they are on disk, in their own dtype
            yield name, safetensors_io.read_tensor(self.checkpoint.entries[self._keys[name]])

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        names = self.block_names(index)
        if index in self.changed:
            entries = safetensors_io.read_header(self.changed[index])
            return {name: safetensors_io.read_tensor(entries[name]) for name in names}
        return {name: self._parameter(self.checkpoint.entries[self._keys[name]]) for name in names}

    def _parameter(self, entry: safetensors_io.Entry) -> torch.Tensor:
        tensor = safetensors_io.read_tensor(entry)
        return tensor.to(self.save_dtype) if self._too_wide(entry) else tensor

    def _too_wide(self, entry: safetensors_io.Entry) -> bool:
        """Return whether a tensor has more bits than ``save_dtype``, to which it is rounded, as by ``weights_of``."""
        return entry.code.startswith("F") and entry.size > math.prod(entry.shape) * self.save_dtype.itemsize

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
                safetensors_io.write_shard(path, self.tensors(index), self.save_dtype)
                self.changed[index] = path
        finally:
            _to_meta(module)

    @contextmanager
    def outer_parameters(self) -> Iterator[None]:
        if not self._holders:
            for name in self._outer_names:
                entry = self.checkpoint.entries[self._keys[name]]
                dtype = self.save_dtype if self._too_wide(entry) else self.compute
                value = safetensors_io.read_converted(entry, self.device, dtype)
                _assign(self.model, name, value, self.device, self.compute)
                del value
            self.model.tie_weights()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                for name in self._outer_names:
                    parent, _, leaf = name.rpartition(".")
                    _forget(self.model.get_submodule(parent), leaf)
                self.model.tie_weights()


def _assign(module: torch.nn.Module, name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
    parent, _, leaf = name.rpartition(".")
    value = tensor.to(device, dtype if tensor.is_floating_point() else None)
    module.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def _to_meta(module: torch.nn.Module) -> None:
    for submodule in module.modules():
        for name in submodule._parameters:
            _forget(submodule, name)


def _forget(module: torch.nn.Module, name: str) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        empty = torch.empty_like(parameter, device="meta")
        module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)


def _checkpoint_names(model: torch.nn.Module, checkpoint: safetensors_io.Checkpoint) -> dict[str, str]:
    """Return the checkpoint's name of each of the model's parameters.

    Raises:
        UserError: a parameter has no tensor there, or one of another shape.
    """
    base = f"{model.base_model_prefix}."
    names = {}
    for name, parameter in model.named_parameters():  # of tied ones the first
        stored_as = next((n for n in (name, name.removeprefix(base), base + name) if n in checkpoint.entries), None)
        if stored_as is None or checkpoint.entries[stored_as].shape != tuple(parameter.shape):
            problem = f"its tensors are not named as the model's ({name})"
            raise UserError(None, checkpoint.folder, problem, f"use {flag_name('stream')} never")
        names[name] = stored_as
    return names
