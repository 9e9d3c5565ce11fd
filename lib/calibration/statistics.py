"""Statistics of the inputs of linear layers: squared norms and Hessians, summed over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from lib.calibration.hidden import PassEnded
from lib.core import processes
from lib.core.errors import UserError
from lib.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

HESSIANS, GPU_HESSIANS = "float64", "float32"  # dtypes in which windows' Hessians are added up
STRIP, GPU_STRIP = 192, 1024  # rows of a Hessian that are added at a time: a product each


class InputStatistic(NamedTuple):
    """A statistic and the names of the layers that share it because they share their input."""

    layers: list[str]
    value: Tensor


def squared_norms(x: Tensor, total: Tensor | None) -> Tensor:
    """Add to ``total`` [in] the sum over tokens of x^2, x: [tokens, in] of any dtype, in float32 (Wanda).

    Windows are added up in float64, so that the mean does not depend on their order, nor on how processes share them.
    """
    norms = x.float().square().sum(0).double()
    return norms if total is None else total.add_(norms)


def hessian(x: Tensor, total: Tensor | None) -> Tensor:
    """Add to ``total`` [in, in] 2 X'X, x: [tokens, in] of any dtype (SparseGPT; there X is [in, tokens]).

    Computes only the upper triangle, and the part of the lower one inside its strips: half of the work, which
    ``symmetric`` completes. A window's products are float32. On the CPU, windows are added up in float64, as in
    ``squared_norms`` and for the same reason. On a GPU memory is scarcer, and sums stay in float32; half-precision
    values are multiplied on tensor cores: their products are exact in float32.
    """
    size = x.shape[1]
    if total is None:
        dtype = getattr(torch, GPU_HESSIANS if x.is_cuda else HESSIANS)
        total = torch.zeros(size, size, dtype=dtype, device=x.device)
    # mm's out_dtype: since torch 2.8, and on CUDA only
    halves = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and "dtype" in torch.ops.aten.mm.overloads()
    x = x if halves else x.float()
    height = GPU_STRIP if x.is_cuda else STRIP
    for top in range(0, size, height):
        left, right = x[:, top : top + height], x[:, top:]
        strip = total[top : top + height, top:]
        if halves:  # addmm adds in place only in some versions of torch
            strip.add_(torch.mm(left.T, right, out_dtype=torch.float32), alpha=2)
        elif total.dtype == x.dtype:
            strip.addmm_(left.T, right, alpha=2)
        else:
            strip.add_(left.T @ right, alpha=2)
    return total


def symmetric(total: Tensor) -> Tensor:
    """Return ``total`` [in, in] with its upper triangle mirrored, in place."""
    for left in range(0, len(total), STRIP):
        right = min(left + STRIP, len(total))
        total[right:, left:right] = total[left:right, right:].T
        square = total[left:right, left:right]
        square.copy_(square.triu() + square.triu(1).T)
    return total


def completed(total: Tensor) -> Tensor:
    """Return a sum of STATISTICS as pruners take it, in float32: norms [in], or a Hessian [in, in] with both halves."""
    return symmetric(total.float()) if total.ndim == 2 else total.float()


# Statistics of a layer's input that a pruner may need: summed over the samples, then divided by their number.
STATISTICS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"squared_norms": squared_norms, "hessian": hessian}


class _Totals:
    """Sums over samples of a statistic of each layer's input, added up once per distinct input.

    With ``stop``, each pass after the first ends once as many layers have been called as in the first.
    """

    def __init__(self, statistic: str, stop: bool) -> None:
        self.add, self.stop = STATISTICS[statistic], stop
        self.calls, self.enough = 0, 0  # in this pass, and in the first one
        self.total: dict[str, Tensor | None] = {}
        self.tokens: dict[str, int] = {}
        self.sharing: dict[str, list[str]] = {}  # layer that does the adding -> the layers with the same input
        self.seen: list[tuple[Tensor, str]] = []  # inputs of the current pass; references keep identities unique
        self.followers: set[str] = set()

    def hook(self, name: str) -> Callable:
        def see(module: nn.Module, args: tuple) -> None:
            (x,) = args
            self.calls += 1
            with torch.autocast(x.device.type, enabled=False):  # sums keep their precision
                self.take(name, module, x)
            if self.stop and self.calls == self.enough:
                raise PassEnded

        return see

    def take(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Add the input ``x`` of a layer, unless another layer with the same input does."""
        if name in self.followers:
            return
        leader = next((leader for tensor, leader in self.seen if tensor is x), None)
        if leader is not None:
            self.sharing[leader].append(name)
            self.followers.add(name)
            return
        self.seen.append((x, name))
        self.sharing.setdefault(name, [name])
        x = x.movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else x  # [batch, in, h, w]: channels last
        x = x.reshape(-1, x.shape[-1])
        self.total[name] = self.add(x, self.total.get(name))
        self.tokens[name] = self.tokens.get(name, 0) + len(x)

    def end_pass(self) -> None:
        self.seen.clear()
        self.calls, self.enough = 0, self.enough or self.calls


def input_statistics(
    linears: dict[str, nn.Module], statistic: str, samples: int | None, steps: Iterable[object], stop: bool = False
) -> list[InputStatistic]:
    """Return the mean over samples of a statistic of each layer's input, once per distinct input.

    Args:
        linears: the layers by name; 1x1 convolutions are the linear layers that they are.
        statistic: a name of STATISTICS.
        samples: the total number of samples in the steps; None for the mean over tokens.
        steps: an iterable that makes one forward pass through the layers at each step.
        stop: end each pass before the product of the last layer, which is possible if ``passes`` does not keep the
            block's output: in a LLaMA this saves an eighth of a block's products.

    Raises:
        UserError: a statistic is not finite, or a layer was not reached.
    """
    totals = _Totals(statistic, stop)
    hooks = [module.register_forward_pre_hook(totals.hook(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            for _ in steps:
                totals.end_pass()
    finally:
        for handle in hooks:
            handle.remove()
    unreached = set(linears) - totals.followers - set(totals.sharing)
    if unreached:
        text = f"{sorted(unreached)[0]}: the forward pass does not reach this layer; the model is not supported"
        raise UserError(None, text)
    result = []
    for leader, names in totals.sharing.items():
        value = processes.sum_(totals.total.pop(leader)).div_(samples or sum(processes.gathered(totals.tokens[leader])))
        value = completed(value)
        # A Hessian's diagonal suffices: X'X is positive semi-definite, so that |H_ij| <= max H_ii.
        if not torch.isfinite(value.diagonal() if value.ndim == 2 else value).all():
            text = f"{names[0]}: its input overflows (not finite); try --dtype bfloat16 or --dtype float32"
            raise UserError(None, text)
        result.append(InputStatistic(names, value))
    return result
