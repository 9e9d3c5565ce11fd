"""Statistics of the inputs of linear layers: squared norms and Hessians, summed over samples."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import NamedTuple

from lib.calibration.hidden import BlockInputs, PassEnded, pass_samples
from lib.core import processes
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models.weights import Block

# The dtypes in which the Hessians of windows are added up.
HESSIANS = "float64"
GPU_HESSIANS = "float32"
# Rows of a Hessian that are added at a time, by one product.
STRIP = 192
GPU_STRIP = 1024


class InputStatistic(NamedTuple):
    """A statistic and the names of the layers that share it because they share their input."""

    layers: list[str]
    value: torch.Tensor


def squared_norms(x: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    """Add to ``total`` [in] the sum over tokens of x^2, x: [tokens, in] of any dtype, in float32 (Wanda).

    Windows are added up in float64, so that the mean does not depend on their order, nor on how processes share them.
    """
    norms = x.float().square().sum(0).double()
    return norms if total is None else total.add_(norms)


def hessian(x: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    """Add to ``total`` [in, in] 2 X'X, x: [tokens, in] of any dtype (SparseGPT; there X is [in, tokens]).

    Computes only the upper triangle, and the part of the lower one inside its strips: half of the work, which
    ``as_float32`` completes. A window's products are float32. On the CPU, windows are added up in float64, as in
    ``squared_norms`` and for the same reason. On a GPU memory is scarcer, and sums stay in float32; half-precision
    values are multiplied on tensor cores: their products are exact in float32.
    """
    size = x.shape[1]
    if total is None:
        dtype = getattr(torch, GPU_HESSIANS if x.is_cuda else HESSIANS)
        total = torch.zeros(size, size, dtype=dtype, device=x.device)
    # mm has had an out_dtype since torch 2.8, and on CUDA only.
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


def as_float32(total: torch.Tensor) -> torch.Tensor:
    """Return a sum of STATISTICS as pruners take it: norms [in], or a Hessian [in, in] with both triangles."""
    total = total.float()
    for left in range(0, len(total), STRIP) if total.ndim == 2 else ():
        right = left + STRIP
        total[right:, left:right] = total[left:right, right:].T
        square = total[left:right, left:right]
        square.copy_(square.triu() + square.triu(1).T)
    return total


# Statistics of a layer's input that a pruner may need: summed over the samples, then divided by their number.
STATISTICS = {"squared_norms": squared_norms, "hessian": hessian}


class _Totals:
    """Sums over samples of a statistic of each layer's input, added up once per distinct input.

    With ``stop``, each pass after the first ends once as many layers have been called as in the first.
    """

    def __init__(self, statistic: str, stop: bool) -> None:
        self.add, self.stop = STATISTICS[statistic], stop
        self.calls, self.enough = 0, 0  # in this pass, and in the first one
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self.leaders: dict[str, str] = {}  # layer -> the layer that adds its input, which is the same
        self.seen: list[tuple[torch.Tensor, str]] = []  # inputs of this pass; references keep identities unique

    def see(self, name: str, module: torch.nn.Module, args: tuple) -> None:
        """Add the input of a layer, unless another layer with the same input does; a forward pre-hook."""
        (x,) = args
        if name not in self.leaders:
            self.leaders[name] = next((leader for tensor, leader in self.seen if tensor is x), name)
            self.seen.append((x, self.leaders[name]))
        if self.leaders[name] == name:
            x = x.movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else x  # [batch, in, h, w]: channels last
            x = x.reshape(-1, x.shape[-1])
            with torch.autocast(x.device.type, enabled=False):  # sums keep their precision
                self.sums[name] = self.add(x, self.sums.get(name))
            self.tokens[name] += len(x)
        self.calls += 1
        if self.stop and self.calls == self.enough:
            raise PassEnded

    def end_pass(self) -> None:
        self.seen.clear()
        self.calls, self.enough = 0, self.enough or self.calls


def input_statistics(block: Block, inputs: BlockInputs, statistic: str, keep: bool) -> list[InputStatistic]:
    """Pass the samples through a block and return the mean of a statistic of its layers, once per distinct input.

    With ``keep``, the block's output replaces its inputs. Without it, each pass ends before the product of the last
    layer: in a LLaMA this saves an eighth of a block's products. A statistic that is not finite, or a layer that was
    not reached, is a UserError.
    """
    totals = _Totals(statistic, stop=not keep)
    hooks = [linear.register_forward_pre_hook(partial(totals.see, name)) for name, linear in block.linears.items()]
    try:
        if hooks or keep:
            pass_samples(block, inputs, keep, totals.end_pass)
    finally:
        for handle in hooks:
            handle.remove()
    for name in block.linears:
        if name not in totals.leaders:
            raise UserError(None, name, "the forward pass does not reach this layer", "the model is not supported")

    result = []
    for leader in list(totals.sums):
        samples = inputs.samples or sum(processes.gathered(totals.tokens[leader]))
        value = as_float32(processes.sum_(totals.sums.pop(leader)).div_(samples))
        # A Hessian's diagonal suffices: X'X is positive semi-definite, so that |H_ij| <= max H_ii.
        if not torch.isfinite(value.diagonal() if value.ndim == 2 else value).all():
            fix = "try --dtype bfloat16 or --dtype float32"
            raise UserError(None, leader, "its input overflows (not finite)", fix)
        layers = [name for name, adder in totals.leaders.items() if adder == leader]
        result.append(InputStatistic(layers, value))
    return result
