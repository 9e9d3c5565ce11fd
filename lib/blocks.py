"""Weights of a model, lent block by block: the only module that knows where they are stored."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib import UserError, stream
from lib.layers import Layer, find_blocks, linear_modules, prunable_layers
from lib.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Block(NamedTuple):
    """A block on its compute ``device``, lent by ``Weights.visit``; valid only inside the loop's body.

    ``linears`` holds the modules of its prunable layers by their full names; a 1x1 convolution is one of them.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Module]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the block is computed in."""
        return next(self.module.parameters()).dtype


class Weights:
    """The weights of a model in memory, or spread by accelerate over GPUs and the CPU.

    Attributes:
        model: the whole model, for the parts around the blocks.
        layers: the prunable layers, in the model's order.
        stored: the dtype of the checkpoint, or None for the dtype of the computation. Pruned weights are rounded to it,
            so that the weights measured are the weights saved.
        streamed: whether the weights live on disk.
    """

    streamed = False

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        layers: Sequence[Layer],
        linears: Sequence[Mapping[str, nn.Module]],
        stored: torch.dtype | None = None,
        prefix: str = "",
    ) -> None:
        self.model, self.modules, self.layers, self.stored = model, modules, tuple(layers), stored
        self.prefix = prefix  # of the blocks' names
        self._linears = linears

    @property
    def in_memory(self) -> bool:
        """Whether every block stays in place after its visit, so that its work need not finish first."""
        return not any(_offloaded(module.modules()) for module in self.modules)

    def visit(self, write: bool = False, backwards: bool = False) -> Iterator[Block]:
        """Lend the blocks one by one, in order; with ``write``, changes to their weights are kept."""
        for index in reversed(range(len(self.modules))) if backwards else range(len(self.modules)):
            with self._lent(index, write) as device:
                yield Block(index, self.modules[index], dict(self._linears[index]), device)

    @contextmanager
    def _lent(self, index: int, write: bool) -> Iterator[torch.device]:
        """Hold a block's weights on its compute device, yield that device, then take the weights back."""
        with _lent_by_accelerate(list(self.modules[index].modules()), write):
            yield next(self.modules[index].parameters()).device

    def block_names(self, index: int) -> list[str]:
        """Return the full names of a block's parameters."""
        return [f"{self.prefix}.{index}.{name}" for name, _ in self.modules[index].named_parameters()]

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a lent block by their full names."""
        values = (parameter.data for _, parameter in self.modules[index].named_parameters())
        return dict(zip(self.block_names(index), values, strict=True))

    def adopt(self, index: int, path: Path) -> None:
        """Replace the parameters of a lent block by those in the safetensors file ``path``."""
        entries = stream.read_header(path)
        for name, tensor in self.tensors(index).items():
            tensor.copy_(stream.read_tensor(entries[name]))
        self.keep(index, path)

    def keep(self, index: int, path: Path) -> None:
        """Record that a block, as currently lent, is stored in the file ``path``."""

    def moved(self, old: Path, new: Path) -> None:
        """Record that the blocks' files have moved with their folder."""

    def outside(self) -> list[str]:
        """Return the names of the parameters around the blocks: embedding, final norm and head."""
        inside = {name for i in range(len(self.modules)) for name in self.block_names(i)}
        return [name for name, _ in self.model.named_parameters() if name not in inside]

    @contextmanager
    def edges(self) -> Iterator[None]:
        """Hold the parameters around the blocks on their compute devices."""
        within = {id(part) for module in self.modules for part in module.modules()}
        with _lent_by_accelerate([part for part in self.model.modules() if id(part) not in within], write=False):
            yield

    def edge_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters around the blocks by name, one at a time."""
        with self.edges():
            for name in self.outside():
                yield name, self.model.get_parameter(name).data

    def map(self, function: Callable[[str, Tensor], object]) -> dict:
        """Return ``function(name, weight)`` of every layer by name."""
        results = {}
        for block in self.visit():
            for name, linear in block.linears.items():
                results[name] = function(name, linear.weight.detach())
        return results

    def zeros(self) -> dict[str, int]:
        """Return the number of zeros of each layer by name."""
        # One synchronisation per block, not one per matrix.
        counts = {}
        for block in self.visit():
            found = [(linear.weight == 0).sum() for linear in block.linears.values()]
            counts |= dict(zip(block.linears, torch.stack(found).tolist() if found else [], strict=True))
        return counts

    def sparsity(self) -> float:
        """Return the measured fraction of zeros over all layers."""
        return sum(self.zeros().values()) / sum(layer.size for layer in self.layers)

    def snapshot(self) -> Mapping[str, Tensor]:
        """Return a copy of every layer's weight in the CPU's memory, for ``restore``."""
        return self.map(lambda _, weight: weight.to("cpu", copy=True))

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the weights of a ``snapshot`` back."""
        for block in self.visit(write=True):
            for name, linear in block.linears.items():
                linear.weight.data.copy_(snapshot[name])


class Packed(Weights):
    """The weights of a packed model, which is in memory as a whole and cannot be changed."""

    in_memory = True

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__(model, [], layers, [])

    def zeros(self) -> dict[str, int]:
        counts = {}
        for layer in self.layers:
            module = self.model.get_submodule(layer.name)
            kept = getattr(module, "sparsity", None)
            counts[layer.name] = int((module.weight == 0).sum()) if kept is None else round(kept * layer.size)
        return counts


def _check_tied(model: nn.Module, checkpoint: stream.Checkpoint) -> None:
    """Refuse a checkpoint with differing tensors that its config ties; loaded as a whole, both would be used."""
    entries = checkpoint.entries
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if one in entries and other in entries:
            if not torch.equal(stream.read_tensor(entries[one]), stream.read_tensor(entries[other])):
                text = f"{checkpoint.folder}: {one} and {other} differ, and its config ties them"
                raise UserError("model", f"{text}; set tie_word_embeddings to false there, or use --stream never")


class Streamed(Weights):
    """The weights of a checkpoint on disk: one block at a time is in memory while the next one is being read.

    Changed blocks are written to separate files and read from there afterwards. ``model`` is on the meta device except
    for its buffers; the parameters around the blocks are in memory only inside ``edges``.
    """

    in_memory, streamed = False, True

    def __init__(
        self, model: nn.Module, checkpoint: stream.Checkpoint, device: torch.device, stored: torch.dtype
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
            yield name, stream.read_tensor(self.checkpoint.entries[self._keys[name]])

    def _read(self, index: int) -> dict[str, Tensor]:
        names = self.block_names(index)
        if index in self.changed:
            entries = stream.read_header(self.changed[index])
            return {name: stream.read_tensor(entries[name]) for name in names}
        return {name: self._parameter(self.checkpoint.entries[self._keys[name]]) for name in names}

    def _parameter(self, entry: stream.Entry) -> Tensor:
        tensor = stream.read_tensor(entry)
        return tensor.to(self.stored) if self._too_wide(entry) else tensor

    def _too_wide(self, entry: stream.Entry) -> bool:
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
                stream.write_shard(path, self.tensors(index), self.stored)
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
                value = stream.read_converted(entry, self.device, kind)
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


def _checkpoint_names(model: nn.Module, checkpoint: stream.Checkpoint) -> dict[str, str]:
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


def weights_of(model: nn.Module, stored: torch.dtype | None = None) -> Weights:
    """Return the weights of a causal language model.

    All of its parameters are rounded to ``stored``: a checkpoint may be of more bits than its config says, and what is
    measured is what will be saved.
    """
    for parameter in model.parameters() if stored is not None else ():
        if not parameter.is_meta and parameter.is_floating_point():
            parameter.data.copy_(parameter.data.to(stored))
    prefix, modules = find_blocks(model)
    return Weights(model, modules, prunable_layers(model), _linears_by_block(prefix, modules), stored, prefix)


def _linears_by_block(prefix: str, modules: Sequence[nn.Module]) -> list[dict[str, nn.Module]]:
    return [
        {f"{prefix}.{i}.{name}": linear for name, linear in linear_modules(module).items()}
        for i, module in enumerate(modules)
    ]


def is_finite(values: Tensor) -> bool:
    """Return whether all ``values`` are finite: the minimum and maximum reveal any NaN or infinity, in one pass."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all())


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight with non-finite values."""
    if not is_finite(weight):
        raise UserError(None, f"{name}: its weights are not finite; the checkpoint is damaged")


def _offloaded(modules: Iterable[nn.Module]) -> list[nn.Module]:
    from accelerate.utils import has_offloaded_params

    return [part for part in modules if has_offloaded_params(part)]


@contextmanager
def _lent_by_accelerate(modules: Iterable[nn.Module], write: bool) -> Iterator[None]:
    """Hold the weights of ``modules`` themselves on their compute devices, then return them.

    accelerate keeps offloaded weights outside the modules and fetches them at each call. Here they are fetched once per
    visit. The hooks stay attached, marked as having nothing offloaded: detaching and re-attaching them would move
    each weight again and empty the GPU's cache each time.
    """
    away = _offloaded(modules)
    for part in away:
        hook = part._hf_hook
        for name, parameter in part.named_parameters(recurse=False):
            value = hook.weights_map[name].to(hook.execution_device, non_blocking=True)
            part._parameters[name] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
        hook.offload = False
    try:
        yield
    finally:
        for part in away:
            hook = part._hf_hook
            for name, parameter in part.named_parameters(recurse=False):
                if write:
                    hook.weights_map[name].copy_(parameter.data)
                empty = torch.empty_like(parameter, device="meta")
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            hook.offload = True
