"""Streamed weights: blocks read from a checkpoint's files one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lib.core.errors import UserError, flag_name
from lib.core.lazy import torch
from lib.models import safetensors_io
from lib.models.layers import find_blocks, prunable_layers
from lib.models.load import Dtypes, empty_llm
from lib.models.weights import Weights


class Streamed(Weights):
    """The weights of a checkpoint on disk: one block at a time is in memory while the next one is being read.

    Changed blocks are written to separate files and read from there afterwards. The model is on the meta device except
    for its buffers; the parameters around the blocks are in memory only inside ``outer_parameters``.
    """

    in_memory, streamed = False, True

    def __init__(self, folder: Path, dtypes: Dtypes, device: torch.device) -> None:
        """Open the checkpoint in ``folder``, whose blocks are lent on ``device``.

        Raises:
            UserError: its tensors are not those of its config's model.
        """
        model = empty_llm(folder, dtypes.compute)
        super().__init__(model, find_blocks(model)[1], prunable_layers(model), dtypes.save)
        self.device, self.compute = device, dtypes.compute
        self.changed: dict[int, Path] = {}  # block -> the file that holds it now
        self._scratch = tempfile.TemporaryDirectory(prefix="streamed-", ignore_cleanup_errors=True)
        self._entries = _find_tensors(model, folder)
        self._next: tuple[int, Future] | None = None
        self._reader = ThreadPoolExecutor(1)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)

    def use_scratch(self, folder: Path) -> None:
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
        for name in self._outer_names():  # as they are on disk, in their own dtype
            yield name, safetensors_io.read_tensor(self._entries[name])

    def _read_block(self, index: int) -> dict[str, torch.Tensor]:
        if index in self.changed:
            entries = safetensors_io.read_header(self.changed[index])
            return {name: safetensors_io.read_tensor(entries[name]) for name in self._names(index)}
        return {name: self._read(name) for name in self._names(index)}

    def _read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor of the checkpoint, rounded to ``save_dtype``, as by ``weights_of``, if it has more bits."""
        entry = self._entries[name]
        rounded = entry.dtype.is_floating_point and entry.dtype.itemsize > self.save_dtype.itemsize
        return safetensors_io.read_tensor(entry, device, self.save_dtype if rounded else dtype)

    @contextmanager
    def _lent(self, index: int, write: bool) -> Iterator[torch.device]:
        ahead, self._next = self._next, None
        tensors = ahead[1].result() if ahead and ahead[0] == index else self._read_block(index)
        if index + 1 < len(self.modules):
            self._next = (index + 1, self._reader.submit(self._read_block, index + 1))
        for name in list(tensors):  # freed one by one: beside the block itself no copy of it stays
            self._assign(name, tensors.pop(name))
        before = self.changed.get(index)
        try:
            yield self.device
            if write and self.changed.get(index) is before:
                path = Path(self._scratch.name) / f"{index}.safetensors"
                safetensors_io.write_shard(path, self.tensors(index), self.save_dtype)
                self.changed[index] = path
        finally:
            self._forget(self._names(index))

    @contextmanager
    def outer_parameters(self) -> Iterator[None]:
        for name in self._outer_names():
            self._assign(name, self._read(name, self.device, self.compute))
        self.model.tie_weights()
        try:
            yield
        finally:
            self._forget(self._outer_names())
            self.model.tie_weights()

    def _assign(self, name: str, tensor: torch.Tensor) -> None:
        """Make ``tensor`` the model's parameter ``name``, on the device and in the dtype of the computation."""
        _set_parameter(self.model, name, tensor.to(self.device, self.compute if tensor.is_floating_point() else None))

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            _set_parameter(self.model, name, torch.empty_like(self.model.get_parameter(name), device="meta"))


def _set_parameter(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def _find_tensors(model: torch.nn.Module, folder: Path) -> dict[str, safetensors_io.Entry]:
    """Return where the checkpoint in ``folder`` holds each of the model's parameters.

    Raises:
        UserError: a parameter has no tensor there, or one of another shape; or tensors differ that the config ties,
            both of which would be used if it were loaded as a whole.
    """
    stored, base = safetensors_io.checkpoint_entries(folder), f"{model.base_model_prefix}."
    entries = {}
    for name, parameter in model.named_parameters():  # of tied ones the first
        stored_name = next((n for n in (name, name.removeprefix(base), base + name) if n in stored), None)
        if stored_name is None or stored[stored_name].shape != tuple(parameter.shape):
            problem = f"its tensors are not named as the model's ({name})"
            raise UserError(None, folder, problem, f"use {flag_name('stream')} never")
        entries[name] = stored[stored_name]
    for one, two in getattr(model, "all_tied_weights_keys", {}).items():
        pair = [safetensors_io.read_tensor(stored[name]) for name in (one, two) if name in stored]
        if len(pair) == 2 and not torch.equal(*pair):
            problem = f"{one} and {two} differ, and its config ties them"
            fix = f"set tie_word_embeddings to false there, or use {flag_name('stream')} never"
            raise UserError("model", folder, problem, fix)
    return entries
