"""Streamed weights: blocks read from a checkpoint's files one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

from lib.core.errors import UserError, flag_name
from lib.core.lazy import torch
from lib.models import safetensors_io
from lib.models.experts import Place
from lib.models.layers import find_blocks, own_layout, prunable_layers
from lib.models.load import Dtypes, empty_llm
from lib.models.safetensors_io import Entry
from lib.models.weights import Weights, replace_tensor, with_fewer_experts, without_experts


class Streamed(Weights):
    """The weights of a checkpoint on disk: one block at a time is in memory while the next one is being read.

    Changed blocks are written to separate files and read from there afterwards. The model is on the meta device except
    for the buffers that checkpoints do not hold; what is around the blocks is in memory only inside
    ``outer_parameters``.
    """

    in_memory, streamed = False, True

    def __init__(
        self, folder: Path, dtypes: Dtypes, device: torch.device, small: torch.nn.Module | None = None
    ) -> None:
        """Open the checkpoint in ``folder``, whose blocks are lent on ``device``.

        ``small`` is its model with fewer experts, if some are left out (``keeping``). Tensors that are not those of its
        config's model are a UserError.
        """
        model = small or empty_llm(folder, dtypes.compute)
        super().__init__(model, find_blocks(model)[1], prunable_layers(model), dtypes.save)
        self._opened, self.device = (folder, dtypes, device), device
        self.changed: dict[int, Path] = {}  # block -> the file that holds it now
        self._scratch = tempfile.TemporaryDirectory(prefix="streamed-", ignore_cleanup_errors=True)
        self._stored = None if small else _find_tensors(self, folder)
        self._whole, self._keep = model, {}
        self._next: tuple[int, Future] | None = None
        self._reader = ThreadPoolExecutor(1)
        persistent = {stored.name for part in self.layout for stored in part.values()}
        for name, buffer in list(model.named_buffers()):
            replace_tensor(model, name, buffer.to("meta" if name in persistent else device))

    def keeping(self, keep: Mapping[str, Sequence[int]]) -> Streamed:
        small = Streamed(*self._opened, with_fewer_experts(self.model, len(next(iter(keep.values())))))
        small._stored, small._whole, small._keep = self._stored, self.model, keep
        return small

    def use_scratch(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=".streamed-", dir=folder, ignore_cleanup_errors=True)

    def set_block_file(self, index: int, path: Path) -> None:
        self.changed[index] = path
        if self._next and self._next[0] == index:  # read ahead from another file
            self._next = None

    def snapshot(self) -> Mapping[str, torch.Tensor]:
        """Return nothing: the dense weights remain on disk."""
        return {}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Forget what was changed."""
        self.changed.clear()

    def outer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        entries = {stored.name: entry for stored, entry in self._stored[-1]}
        for name, stored in self.layout[-1].items():  # as they are on disk, in their own dtype
            yield name, safetensors_io.read_tensor(entries[stored.name])

    def _read_block(self, index: int) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers of a block by their names in the model."""
        model, found = self._whole, self._stored[index]
        if index in self.changed:
            entries = safetensors_io.read_header(self.changed[index])
            model, found = self.model, [(stored, entries[name]) for name, stored in self.layout[index].items()]
        tensors: dict[str, torch.Tensor] = {}
        for stored, entry in found:
            tensor = self._read(stored.name, entry)
            if stored.expert is None:
                tensors[stored.name] = tensor
                continue
            if stored.name not in tensors:  # allocated once, so that no second copy of a block's experts is made
                tensors[stored.name] = torch.empty(attrgetter(stored.name)(model).shape, dtype=tensor.dtype)
            stored.view(model, tensors[stored.name]).copy_(tensor)
        shapes = {name: attrgetter(name)(self.model).shape for name in tensors}
        return {name: without_experts(name, tensors.pop(name), shapes[name], self._keep) for name in shapes}

    def _read(
        self, name: str, entry: Entry, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return a tensor of the checkpoint, rounded, as by ``weights_of``, if it has more bits than will be saved."""
        rounded = entry.dtype.is_floating_point and entry.dtype.itemsize > self.dtypes[name].itemsize
        return safetensors_io.read_tensor(entry, device, self.dtypes[name] if rounded else dtype)

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
                safetensors_io.write_shard(path, self.tensors(index), self.save_dtypes(index))
                self.changed[index] = path
        finally:
            self._forget(index)

    @contextmanager
    def outer_parameters(self) -> Iterator[None]:
        for stored, entry in self._stored[-1]:
            dtype = attrgetter(stored.name)(self.model).dtype
            self._assign(stored.name, self._read(stored.name, entry, self.device, dtype))
        self.model.tie_weights()
        try:
            yield
        finally:
            self._forget(-1)
            self.model.tie_weights()

    def _assign(self, name: str, tensor: torch.Tensor) -> None:
        """Make ``tensor`` the model's parameter or buffer ``name``, on its device and in its dtype there."""
        replace_tensor(self.model, name, tensor.to(self.device, attrgetter(name)(self.model).dtype))

    def _forget(self, index: int) -> None:
        for name in {stored.name for stored in self.layout[index].values()}:
            replace_tensor(self.model, name, torch.empty_like(attrgetter(name)(self.model), device="meta"))


def _find_tensors(weights: Weights, folder: Path) -> list[list[tuple[Place, Entry]]]:
    """Return where the checkpoint in ``folder`` holds the tensors of the model of ``weights``.

    Its names are the published ones, or the model's own, and are with or without the prefix of what the head is put on,
    or with that of the text model beside images.
    A tensor that is missing or has another shape is a UserError, and so are tensors that differ though the config ties
    them: both would be used if it were loaded as a whole.
    """
    model, entries = weights.model, safetensors_io.checkpoint_entries(folder)
    base = f"{model.base_model_prefix}."
    for one, two in getattr(model, "all_tied_weights_keys", {}).items():
        pair = [safetensors_io.read_tensor(entries[name]) for name in (one, two) if name in entries]
        if len(pair) == 2 and not torch.equal(*pair):
            problem = f"{one} and {two} differ, and its config ties them"
            fix = f"set tie_word_embeddings to false there, or use {flag_name('stream')} never"
            raise UserError("model", folder, problem, fix)

    def find(name: str, stored: Place) -> tuple[Place, Entry]:
        spellings = (name, name.removeprefix(base), base + name, name.replace(base, f"{base}language_model.", 1))
        entry = next((entries[spelling] for spelling in spellings if spelling in entries), None)
        if entry is None or entry.shape != tuple(stored.view(model).shape):
            missing.append(name)
        return stored, entry

    for layout in (weights.layout, weights.by_block(own_layout(model))):
        missing = []
        found = [[find(name, stored) for name, stored in part.items()] for part in layout]
        if not missing:
            return found
    problem = f"its tensors are not named as the model's ({missing[0]})"
    raise UserError(None, folder, problem, f"use {flag_name('stream')} never")
