"""Adam on the weights that pruning left: float32 values packed by the mask, their moments in float32 or eight bits."""

from __future__ import annotations

import numpy as np

from lib.core import processes
from lib.core.lazy import torch

TRAINED = ("surviving", "low_rank", "norms")
STATES = ("float32", "8bit")
BETAS = (0.9, 0.95)
EPSILON = 1e-8
# Numbers that share a scale where moments have eight bits.
_GROUP = 256


class Trained:
    """A matrix that is trained where it is not zero, or a whole vector.

    Attributes:
        place: a module and the parameter's name in it.
        values: in float32 what is left of the matrix [n], or two factors, [out, rank] and [rank, in].
        base: what is left of the matrix [n], to which the factors' product is added; None without factors.
        moments: of each of the values Adam's running means of gradient and squared gradient, as ``_packed`` keeps them.
    """

    def __init__(
        self,
        place: tuple[torch.nn.Module, str],
        dtype: torch.dtype | None,
        states: str,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """Take up the parameter at ``place``; it is saved in ``dtype``, None for its own. ``states``: one of STATES."""
        self.place, self.states = place, states
        weight = self.weight
        self.dtype = dtype or weight.dtype
        left = weight.take(_indices(weight))
        self.values, self.base = [left.float()], None
        if rank is not None:
            rows, columns = weight.shape
            draw = torch.randn(rank, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
            self.values, self.base = [torch.zeros(rows, rank, device=weight.device), draw.to(weight.device)], left
        self.moments = [[_packed(torch.zeros_like(x), states, root) for root in (False, True)] for x in self.values]

    @property
    def weight(self) -> torch.Tensor:
        """The parameter, while its block is lent."""
        return getattr(*self.place).detach()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that a resumed run needs."""
        moments = [tensor for pair in self.moments for packed in pair for tensor in packed]
        return [*self.values, *moments] + ([] if self.base is None else [self.base])

    def step(self, gradient: torch.Tensor, scale: torch.Tensor, rate: float, count: int) -> None:
        """Step for the ``count``-th time: AdamW without weight decay (arXiv:1711.05101).

        The ``gradient``, of the parameter's shape, is ``scale`` times the loss's; each process has one summand of it.
        """
        weight, scale = self.weight, scale.to(gradient.device)
        indices = _indices(weight)
        if self.base is None:
            slopes = [gradient.take(indices).float() / scale]
        else:
            gradient = torch.where(weight != 0, gradient, 0).float() / scale
            left, right = self.values
            slopes = [gradient @ right.T, left.T @ gradient]
        for i, (value, slope) in enumerate(zip(self.values, slopes, strict=True)):
            slope = processes.sum_(slope)
            first, second = (_unpacked(packed, value, root) for root, packed in enumerate(self.moments[i]))
            first.lerp_(slope, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
            root = (second / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
            value.addcdiv_(first, root, value=-rate / (1 - BETAS[0] ** count))
            self.moments[i] = [_packed(first, self.states, False), _packed(second, self.states, True)]
        self.write(indices)

    def write(self, indices: torch.Tensor | None = None) -> None:
        """Replace what is left of the parameter, which is at ``indices``, by the values, rounded for saving.

        What rounds to zero becomes the smallest normal number instead: the mask is read off the weight itself.
        """
        weight, values = self.weight, self.values[0]
        indices = _indices(weight) if indices is None else indices
        if self.base is not None:
            values = self.base + (values @ self.values[1]).take(indices)
        rounded = values.to(self.dtype)
        if weight.ndim > 1:
            rounded = torch.where(rounded == 0, torch.finfo(self.dtype).tiny, rounded)
        weight.put_(indices, rounded.to(weight.dtype))


def _indices(weight: torch.Tensor) -> torch.Tensor:
    """Return the indices [n] of what is trained of a flattened weight."""
    if weight.ndim == 1:
        return torch.arange(len(weight), device=weight.device)
    is_left = weight.flatten() != 0
    # NumPy's is several times faster on the CPU.
    return is_left.nonzero().squeeze(1) if weight.is_cuda else torch.from_numpy(np.flatnonzero(is_left.numpy()))


def _packed(numbers: torch.Tensor, states: str, root: bool) -> tuple[torch.Tensor, ...]:
    """Return the ``numbers``, or bytes [groups, _GROUP] and a float32 scale for each group; a name of STATES decides.

    With ``root`` the bytes are of the square root, rounded up, so that no step gets larger by the rounding.
    """
    if states == "float32":
        return (numbers,)
    numbers = numbers.sqrt() if root else numbers
    groups = torch.nn.functional.pad(numbers.flatten(), (0, -numbers.numel() % _GROUP)).view(-1, _GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / 127
    units = groups / scale
    return (units.ceil_().clamp_(max=127) if root else units.round_()).to(torch.int8), scale


def _unpacked(packed: tuple[torch.Tensor, ...], like: torch.Tensor, root: bool) -> torch.Tensor:
    """Return the numbers that were ``packed``, in the shape of ``like``."""
    if len(packed) == 1:
        return packed[0]
    numbers = packed[0] * packed[1]
    numbers = numbers.square_() if root else numbers
    return numbers.view(-1)[: like.numel()].view_as(like)
