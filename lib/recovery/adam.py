"""Adam on the weights that pruning left: master copy and moments packed by the mask, in float32 or eight bits."""

from __future__ import annotations

from lib.core import processes
from lib.core.lazy import torch

TRAINED = ("surviving", "low_rank", "norms")
STATES = ("float32", "8bit")
BETAS = (0.9, 0.95)
EPSILON = 1e-8
# Numbers that share a scale where moments have eight bits.
_GROUP = 256


def survivors(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the entries of ``tensor`` where the matrix ``weight`` is not zero, [n]; of a vector all of them."""
    return tensor.masked_select(weight != 0) if weight.ndim > 1 else tensor


def put_survivors(weight: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Replace the non-zero entries of ``weight`` by ``values`` [n], rounded to ``dtype``; of a vector all entries.

    An entry that rounds to zero becomes the smallest normal number instead: the mask is read off the weight itself.
    """
    rounded = values.to(dtype)
    if weight.ndim == 1:
        weight.copy_(rounded)
        return
    rounded = torch.where(rounded == 0, torch.finfo(dtype).tiny, rounded)
    weight.masked_scatter_(weight != 0, rounded.to(weight.dtype))


class Moments:
    """Adam's two running means of a parameter's gradient and of its square, by which ``step`` moves the parameter.

    With eight bits, _GROUP numbers share a float32 scale; of the second moment the root is stored, rounded up, so that
    no step gets larger by the rounding.

    Attributes:
        tensors: all that is stored, by name.
    """

    def __init__(self, parameter: torch.Tensor, states: str) -> None:
        shape, self.bytes = parameter.shape, states == "8bit"
        self.tensors = {name: torch.zeros(shape, device=parameter.device) for name in ("first", "second")}
        if self.bytes:
            for name, zeros in list(self.tensors.items()):
                self._store(name, zeros)

    def step(self, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, count: int) -> None:
        """Move a float32 ``parameter`` for the ``count``-th time; AdamW without weight decay (arXiv:1711.05101)."""
        first, second = (self._read(name, parameter) for name in ("first", "second"))
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        root = (second / (1 - BETAS[1] ** count)).sqrt_().add_(EPSILON)
        parameter.addcdiv_(first, root, value=-rate / (1 - BETAS[0] ** count))
        if self.bytes:
            self._store("first", first)
            self._store("second", second)

    def _read(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        if not self.bytes:
            return self.tensors[name]
        numbers = self.tensors[name] * self.tensors[f"{name}_scale"]
        numbers = numbers.square_() if name == "second" else numbers
        return numbers.view(-1)[: parameter.numel()].view_as(parameter)

    def _store(self, name: str, numbers: torch.Tensor) -> None:
        numbers = numbers.sqrt() if name == "second" else numbers
        groups = torch.nn.functional.pad(numbers.flatten(), (0, -numbers.numel() % _GROUP)).view(-1, _GROUP)
        scale = groups.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        units = groups / scale
        self.tensors[name] = (units.ceil_().clamp_(max=127) if name == "second" else units.round_()).to(torch.int8)
        self.tensors[f"{name}_scale"] = scale


class Survivors:
    """The non-zero entries of a matrix, or a vector, trained: a float32 master copy [n] and its moments."""

    def __init__(self, weight: torch.Tensor, states: str) -> None:
        self.master = survivors(weight.detach(), weight).float().clone()
        self.moments = Moments(self.master, states)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs, by name."""
        return {"master": self.master, **self.moments.tensors}

    def step(self, weight: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, rate: float, count: int) -> None:
        """Step by a gradient [out, in], ``scale`` times the loss's, of which the processes hold one summand each."""
        gradient = processes.sum_(survivors(gradient, weight).float() / scale.to(gradient.device))
        self.moments.step(self.master, gradient, rate, count)

    def write(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """Replace the non-zero entries of ``weight``, rounded to ``dtype``."""
        put_survivors(weight, self.master, dtype)


class LowRank:
    """A matrix trained by the product of two small ones, [out, rank] and [rank, in], added where it is not zero."""

    def __init__(self, weight: torch.Tensor, states: str, rank: int, seed: int) -> None:
        rows, columns = weight.shape
        draw = torch.randn(rank, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
        self.base = survivors(weight.detach(), weight).clone()
        self.factors = [torch.zeros(rows, rank, device=weight.device), draw.to(weight.device)]
        self.moments = [Moments(factor, states) for factor in self.factors]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        pairs = enumerate(zip(self.factors, self.moments, strict=True))
        return {"base": self.base} | {
            f"{i}.{name}": tensor
            for i, (factor, m) in pairs
            for name, tensor in {"factor": factor, **m.tensors}.items()
        }

    def step(self, weight: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor, rate: float, count: int) -> None:
        gradient = torch.where(weight != 0, gradient, 0).float() / scale.to(gradient.device)
        left, right = self.factors
        gradients = [processes.sum_(gradient @ right.T), processes.sum_(left.T @ gradient)]
        for factor, moments, slope in zip(self.factors, self.moments, gradients, strict=True):
            moments.step(factor, slope, rate, count)

    def write(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        put_survivors(weight, self.base + survivors(self.factors[0] @ self.factors[1], weight), dtype)
