"""Weights of a model, lent block by block: the only module that knows where they are stored."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from lib.core import digests
from lib.core.errors import UserError, flag_name
from lib.core.lazy import torch, transformers
from lib.models import safetensors_io
from lib.models.experts import COUNTS, ROLES, bound_experts, is_experts, matrices
from lib.models.layers import Layer, Layout, find_blocks, prunable_layers, published_layout, stored_tensors


class Block(NamedTuple):
    """A block on its compute ``device``, lent by ``Weights.visit``; valid only inside the loop's body."""

    index: int
    module: torch.nn.Module
    linears: dict[str, torch.nn.Module]  # of its prunable layers, by their full names; a 1x1 convolution is one of them
    device: torch.device
    experts: dict[str, torch.nn.Module] = {}  # whose matrices, ``NAME.NUMBER.ROLE``, are among ``linears``


class Weights:
    """The weights of a model in memory, or spread by accelerate over GPUs and the CPU.

    Attributes:
        model: the whole model, for the parts around the blocks.
        modules: the blocks.
        layers: the prunable layers, in the model's order.
        save_dtype: the dtype of the checkpoint, or None for the dtype of the computation. Pruned weights are rounded to
            it, so that the weights measured are the weights saved.
        streamed: whether the weights live on disk.
        expert_weighting: a name of EXPERT_WEIGHTING, for statistics.
    """

    streamed, expert_weighting = False, "auto"

    def __init__(
        self, model: torch.nn.Module, modules: Iterable[torch.nn.Module], layers: Sequence[Layer], save_dtype=None
    ) -> None:
        self.model, self.modules, self.layers, self.save_dtype = model, modules, tuple(layers), save_dtype
        names = {module: name for name, module in model.named_modules()}
        self._prefixes = [f"{names[module]}." for module in modules]
        self._linears: dict[int, dict[str, torch.nn.Module]] = defaultdict(dict)
        self._experts: dict[int, dict[str, torch.nn.Module]] = defaultdict(dict)
        for layer in self.layers:
            owner, *matrix = layer.name.rsplit(".", 2)
            module = model.get_submodule(owner)
            if is_experts(module):  # whose matrices are not in the model's tree
                self._experts[layer.block][owner] = module
                self._linears[layer.block][layer.name] = matrices(module)[".".join(matrix)]
            else:
                self._linears[layer.block][layer.name] = model.get_submodule(layer.name)

    @cached_property
    def device(self) -> torch.device:
        """The device on which the first block is computed."""
        with self._lent(0, write=False) as device:
            return device

    @property
    def in_memory(self) -> bool:
        """Whether every block stays in place after its visit."""
        return not any(_offloaded(module.modules()) for module in self.modules)

    def visit(self, write: bool = False, backwards: bool = False, by_matrix: bool = True) -> Iterator[Block]:
        """Lend the blocks one by one, in order; with ``write``, changes to their weights are kept.

        Experts are computed ``by_matrix``, or as the model's configuration says, in another order of additions.
        """
        indices = range(len(self.modules))
        for index in reversed(indices) if backwards else indices:
            bound = bound_experts(self.modules[index]) if by_matrix else nullcontext()
            with self._lent(index, write) as device, bound:
                yield Block(index, self.modules[index], self._linears[index], device, self._experts[index])

    @contextmanager
    def _lent(self, index: int, write: bool) -> Iterator[torch.device]:
        """Hold a block's weights on its compute device, yield that device, then take the weights back."""
        with _lent_by_accelerate(self.modules[index].modules(), write):
            yield next(self.modules[index].parameters()).device

    @cached_property
    def layout(self) -> list[Layout]:
        """What a saved checkpoint holds of each block, and last of what is around them, by its names there."""
        return self.by_block(published_layout(self.model))

    def by_block(self, layout: Layout) -> list[Layout]:
        """Return the part of a ``layout`` for each block, and last for what is around them."""
        parts: list[Layout] = [{} for _ in (*self.modules, None)]
        for name, stored in layout.items():
            index = next((i for i, prefix in enumerate(self._prefixes) if stored.name.startswith(prefix)), -1)
            parts[index][name] = stored
        return parts

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which each parameter and buffer is saved, by its name in the model.

        Buffers, and what the library holds in float32, keep theirs: they decide the routing in a mixture.
        """
        dtype = self.save_dtype or next(self.model.parameters()).dtype
        saved = {name: dtype for name, _ in self.model.named_parameters()} | held_dtypes(self.model, dtype)
        return saved | {name: buffer.dtype for name, buffer in self.model.named_buffers()}

    def save_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """Return the dtype in which the tensors of a block, or around the blocks (-1), are saved."""
        return {name: self.dtypes[stored.name] for name, stored in self.layout[index].items()}

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers of a lent block by their names in a checkpoint."""
        return {name: stored.view(self.model) for name, stored in self.layout[index].items()}

    def load_block(self, index: int, path: Path) -> None:
        """Replace the parameters of a lent block by those in the safetensors file ``path``."""
        entries = safetensors_io.read_header(path)
        for name, tensor in self.tensors(index).items():
            tensor.copy_(safetensors_io.read_tensor(entries[name]))
        self.set_block_file(index, path)

    def set_block_file(self, index: int, path: Path) -> None:
        """Record that a block, as currently lent, is stored in the file ``path``."""

    def use_scratch(self, folder: Path) -> None:
        """Store changed blocks that no journal records (those of a search's trials) inside ``folder``, if on disk."""

    @contextmanager
    def outer_parameters(self) -> Iterator[None]:
        """Hold the parameters around the blocks on their compute devices."""
        inside = {module for block in self.modules for module in block.modules()}
        with _lent_by_accelerate((module for module in self.model.modules() if module not in inside), write=False):
            yield

    def outer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters and buffers around the blocks by their names in a checkpoint, one at a time."""
        with self.outer_parameters():
            yield from ((name, stored.view(self.model)) for name, stored in self.layout[-1].items())

    def pruned_tensors(self) -> set[str]:
        """Return the names in a checkpoint of all tensors that hold prunable layers."""
        names = {f"{layer.name}.weight" for layer in self.layers}
        names |= {f"{owner}.{fused}" for experts in self._experts.values() for owner in experts for fused in ROLES}
        return {name for block in self.layout for name, stored in block.items() if stored.name in names}

    def keeping(self, keep: Mapping[str, Sequence[int]]) -> Weights:
        """Return the weights of a smaller model, with the experts ``keep`` of each experts module, by their numbers.

        It takes the place of this one, whose tensors are given up one by one.
        """
        if any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            problem = "the model is spread over GPUs and the CPU"
            raise UserError("drop_experts", None, problem, f"add {flag_name('stream')} always")
        small = with_fewer_experts(self.model, len(next(iter(keep.values()))))
        for name, empty in [*small.named_parameters(), *small.named_buffers()]:
            if empty.is_meta:
                tensor = attrgetter(name)(self.model).detach()
                replace_tensor(small, name, without_experts(name, tensor, empty.shape, keep))
                replace_tensor(self.model, name, empty)
        return weights_of(small, self.save_dtype)

    def map(self, function: Callable[[str, torch.Tensor], object]) -> dict:
        """Return ``function(name, weight)`` of every layer by name."""
        linears = (pair for block in self.visit() for pair in block.linears.items())
        return {name: function(name, linear.weight.detach()) for name, linear in linears}

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each layer by name."""
        return self.map(lambda _, weight: digests.fingerprint(weight))

    def zeros(self) -> dict[str, int]:
        """Return the number of zeros of each layer by name."""
        return self.map(lambda _, weight: int((weight == 0).sum()))

    def sparsity(self) -> float:
        """Return the measured fraction of zeros over all layers."""
        return sum(self.zeros().values()) / sum(layer.size for layer in self.layers)

    def snapshot(self) -> Mapping[str, torch.Tensor]:
        """Return a copy of every layer's weight in the CPU's memory, for ``restore``."""
        return self.map(lambda _, weight: weight.to("cpu", copy=True))

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Put the weights of a ``snapshot`` back."""
        for block in self.visit(write=True):
            for name, linear in block.linears.items():
                linear.weight.data.copy_(snapshot[name])


class Packed(Weights):
    """The weights of a packed model, which is in memory as a whole and cannot be changed."""

    def __init__(self, model: torch.nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__(model, [], layers)

    def zeros(self) -> dict[str, int]:
        counts = {}
        for layer in self.layers:
            module = self.model.get_submodule(layer.name)
            kept = getattr(module, "sparsity", None)
            counts[layer.name] = int((module.weight == 0).sum()) if kept is None else round(kept * layer.size)
        return counts


def weights_of(model: torch.nn.Module, save_dtype: torch.dtype | None = None) -> Weights:
    """Return a language model's weights, rounded for saving: a checkpoint may be of more bits than its config says."""
    weights = Weights(model, find_blocks(model)[1], prunable_layers(model), save_dtype)
    for name, parameter in model.named_parameters() if save_dtype is not None else ():
        if not parameter.is_meta and parameter.is_floating_point():
            parameter.data.copy_(parameter.data.to(weights.dtypes[name]))
    return weights


def replace_tensor(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` in the place of the parameter or buffer ``name`` of a model."""
    module, leaf = parameter_place(model, name)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


def with_fewer_experts(model: torch.nn.Module, count: int) -> torch.nn.Module:
    """Return ``model`` with ``count`` experts a block; it shares the tensors that keep their shape, others are meta."""
    config = copy.deepcopy(model.config)
    sizes = {name: getattr(config, name, None) or 0 for name in COUNTS}
    for name in (name for name, size in sizes.items() if size == max(sizes.values())):
        setattr(config, name, count)
    with torch.device("meta"):
        small = type(model)._from_config(config, dtype=config.dtype).eval()
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        whole = attrgetter(name)(model).detach()
        replace_tensor(small, name, whole if whole.shape == tensor.shape else tensor.to(whole.dtype))
    small.requires_grad_().tie_weights()
    small.generation_config = model.generation_config
    return small


def without_experts(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], keep: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    """Return what stays of the ``tensor`` of this name in a smaller model, where it has the ``shape``.

    Which experts stay is said for each experts module in ``keep``; the tensors beside it are the router's.
    """
    for dimension, size in enumerate(shape):
        if tensor.shape[dimension] != size:
            kept = next(kept for owner, kept in keep.items() if name.startswith(owner.rpartition(".")[0] + "."))
            return tensor.index_select(dimension, torch.tensor(kept, device=tensor.device))
    return tensor


def held_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype in which ``from_pretrained`` holds each float tensor of a ``model`` asked for ``dtype``.

    Some stay in float32, routers above all; asked for that, all do, and none is returned.
    """
    if not isinstance(model, transformers.PreTrainedModel) or dtype == torch.float32:
        return {}
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    planned = getattr(empty, "_get_dtype_plan", lambda _: {})(dtype)
    exact = re.compile("|".join(planned).replace("*", ".*") or "$^")
    return {
        name: torch.float32 if exact.search(name) else tensor.dtype
        for name, tensor in stored_tensors(empty)
        if tensor.is_floating_point()
    }


def is_finite(values: torch.Tensor) -> bool:
    """Return whether all ``values`` are finite: the minimum and maximum reveal any NaN or infinity, in one pass."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all())


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight with non-finite values."""
    if not is_finite(weight):
        raise UserError(None, name, "its weights are not finite", "the checkpoint is damaged")


def swapped_weights(
    block: Block, copies: Mapping[str, torch.Tensor]
) -> AbstractContextManager[dict[str, torch.nn.Parameter]]:
    """Replace a block's weights by ``copies`` meanwhile, as parameters, which are yielded by layer name."""
    return swapped_parameters({name: (block.linears[name], "weight") for name in copies}, copies)


@contextmanager
def swapped_parameters(
    places: Mapping[str, tuple[torch.nn.Module, str]], copies: Mapping[str, torch.Tensor]
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Do the same with parameters of any kind, whose ``places`` are a module and the parameter's name in it."""
    originals = {name: getattr(*place) for name, place in places.items()}
    leaves = {name: torch.nn.Parameter(copy) for name, copy in copies.items()}
    try:
        for name, place in places.items():
            setattr(*place, leaves[name])
        yield leaves
    finally:
        for name, place in places.items():
            setattr(*place, originals[name])


def parameter_place(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return the place of a parameter by its full ``name``, for ``swapped_parameters``."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _offloaded(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    from accelerate.utils import has_offloaded_params

    return [module for module in modules if has_offloaded_params(module)]


@contextmanager
def _lent_by_accelerate(modules: Iterable[torch.nn.Module], write: bool) -> Iterator[None]:
    """Hold the weights of ``modules`` themselves on their compute devices, then return them.

    accelerate fetches offloaded weights at each call, and this once per visit. Its hooks stay attached, marked as
    having nothing offloaded: attaching them anew would move each weight again and empty the GPU's cache.
    """
    away = _offloaded(modules)
    for module in away:
        hook = module._hf_hook
        for name, parameter in module.named_parameters(recurse=False):
            value = hook.weights_map[name].to(hook.execution_device, non_blocking=True)
            module._parameters[name] = torch.nn.Parameter(value, parameter.requires_grad)
        hook.offload = False
    try:
        yield
    finally:
        for module in away:
            hook = module._hf_hook
            for name, parameter in module.named_parameters(recurse=False):
                if write:
                    hook.weights_map[name].copy_(parameter.data)
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
            hook.offload = True
