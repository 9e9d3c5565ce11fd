"""Weights, lent block by block: the one room that knows where a model's weights live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from lib import UserError
from lib.layers import Layer, find_blocks, linear_modules, prunable_layers
from lib.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Block(NamedTuple):
    """A block on its compute ``device``, lent by ``Weights.visit``: valid inside the loop's body only.

    ``linears`` holds the modules of its prunable layers by their full names; a 1x1 convolution is one of them.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Module]
    device: torch.device


class Weights:
    """The weights of a model in memory, or spread by accelerate over GPUs and the CPU.

    Attributes:
        model: the whole model, for what stands around the blocks.
        layers: the prunable layers, in the model's order.
        stored: the dtype that the checkpoint is written in, or None for the dtype of the computation. Pruned weights
            are rounded to it, so that what is measured is what is saved.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        layers: Sequence[Layer],
        linears: Sequence[Mapping[str, nn.Module]],
        stored: torch.dtype | None = None,
    ) -> None:
        self.model, self.modules, self.layers, self.stored = model, modules, tuple(layers), stored
        self._linears = linears

    @property
    def in_memory(self) -> bool:
        """Whether every block stays where it is after its visit, so that work on it need not be waited for."""
        return not any(_offloaded(module) for module in self.modules)

    def visit(self, write: bool = False) -> Iterator[Block]:
        """Lend the blocks one by one, in order; with ``write``, what was changed of their weights is kept."""
        for index, module in enumerate(self.modules):
            with _on_device(module, write) as device:
                yield Block(index, module, dict(self._linears[index]), device)

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

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of every layer's weight in the CPU's memory, for ``restore``."""
        return self.map(lambda _, weight: weight.to("cpu", copy=True))

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put the weights of a ``snapshot`` back."""
        for block in self.visit(write=True):
            for name, linear in block.linears.items():
                linear.weight.data.copy_(snapshot[name])


def weights_of(model: nn.Module, stored: torch.dtype | None = None) -> Weights:
    """Return the weights of a causal language model."""
    prefix, modules = find_blocks(model)
    linears = [
        {f"{prefix}.{i}.{name}": linear for name, linear in linear_modules(module).items()}
        for i, module in enumerate(modules)
    ]
    return Weights(model, modules, prunable_layers(model), linears, stored)


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that holds values that are not finite."""
    if not torch.isfinite(weight).all():
        raise UserError(None, f"{name}: its weights are not finite; the checkpoint is damaged")


def _offloaded(module: nn.Module) -> list[nn.Module]:
    from accelerate.utils import has_offloaded_params

    return [part for part in module.modules() if has_offloaded_params(part)]


@contextmanager
def _on_device(module: nn.Module, write: bool) -> Iterator[torch.device]:
    """Hold a block's weights on its compute device, yield that device, and give the weights back.

    accelerate keeps offloaded weights outside the modules and fetches them at each call. Here they are fetched once per
    visit. The hooks stay attached and are told that nothing is offloaded: detaching and attaching them would move each
    weight again and empty the GPU's cache each time.
    """
    away = _offloaded(module)
    for part in away:
        hook = part._hf_hook
        for name, parameter in part.named_parameters(recurse=False):
            value = hook.weights_map[name].to(hook.execution_device, non_blocking=True)
            part._parameters[name] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
        hook.offload = False
    try:
        yield next(module.parameters()).device
    finally:
        for part in away:
            hook = part._hf_hook
            for name, parameter in part.named_parameters(recurse=False):
                if write:
                    hook.weights_map[name].copy_(parameter.data)
                empty = torch.empty_like(parameter, device="meta")
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            hook.offload = True
