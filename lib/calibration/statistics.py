"""Statistics of the inputs of linear layers: squared norms and Hessians, summed over samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
# Whether the tokens of an expert count as much as the router weights them; auto: for norms (MoE-Pruner: arXiv
# 2410.12013), where the gain is published, and not for Hessians.
EXPERT_WEIGHTING = ("auto", "router", "none")


class InputStatistic(NamedTuple):
    """Statistic that ``layers`` share, since they share their input; of an expert's, of how many ``tokens`` it is."""

    layers: list[str]
    value: torch.Tensor
    tokens: int | None = None


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
    for top in range(0, size, height) if len(x) else ():  # few windows have a token for each expert
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

    With ``stop``, each pass after the first ends once as many layers have been called as in the first. With
    ``weighted``, rows of an expert's input are multiplied by their weights in the router before.
    """

    def __init__(self, statistic: str, stop: bool, weighted: bool) -> None:
        self.add, self.stop, self.weighted = STATISTICS[statistic], stop, weighted
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
            self._add(name, x.reshape(-1, x.shape[-1]), getattr(module, "row_weights", None))
        self.calls += 1
        if self.stop and self.calls == self.enough:
            raise PassEnded

    def see_mixture(self, name: str, _: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Add what enters all experts of a block, each token once; a forward pre-hook of an experts module."""
        hidden, _, top_k_weights = (*args, *kwargs.values())
        self._add(name, hidden, top_k_weights.float().square().mean(1, keepdim=True).sqrt())

    def _add(self, name: str, x: torch.Tensor, row_weights: torch.Tensor | None) -> None:
        with torch.autocast(x.device.type, enabled=False):  # sums keep their precision
            weighted = x if row_weights is None or not self.weighted else x.float() * row_weights.float()
            self.sums[name] = self.add(weighted, self.sums.get(name))
        self.tokens[name] += len(x)

    def end_pass(self) -> None:
        self.seen.clear()
        self.calls, self.enough = 0, self.enough or self.calls


def input_statistics(
    block: Block, inputs: BlockInputs, statistic: str, keep: bool, names: Sequence[str] | None = None
) -> list[InputStatistic]:
    """Pass the samples through a block and return the mean of a statistic of its layers, once per distinct input.

    The layers are those of ``names``, None for all. The statistic of an expert's matrix is over the tokens that are
    routed to the expert, and ``with_pseudo_tokens``.

    With ``keep``, the block's output replaces its inputs. Without it, each pass ends before the product of the last
    layer: in a LLaMA this saves an eighth of a block's products. A statistic that is not finite, or a layer that was
    not reached, is a UserError.
    """
    published = inputs.expert_weighting == "auto" and statistic == "squared_norms"
    totals = _Totals(statistic, not keep, published or inputs.expert_weighting == "router")
    names = list(block.linears) if names is None else names
    hooks = [block.linears[name].register_forward_pre_hook(partial(totals.see, name)) for name in names]
    for name, experts in block.experts.items():
        hooks.append(experts.register_forward_pre_hook(partial(totals.see_mixture, name), with_kwargs=True))
    try:
        if hooks or keep:
            pass_samples(block, inputs, keep, totals.end_pass)
    finally:
        for handle in hooks:
            handle.remove()
    for name in names:
        if name not in totals.leaders:
            raise UserError(None, name, "the forward pass does not reach this layer", "the model is not supported")

    tokens = sum(processes.gathered(totals.tokens), Counter()) if block.experts or not inputs.samples else Counter()
    mixtures = {name: processes.sum_(totals.sums.pop(name)).div_(tokens[name]) for name in block.experts}
    result = []
    for leader in list(totals.sums):
        value = processes.sum_(totals.sums.pop(leader))
        mixture, *matrix = leader.rsplit(".", 2)
        if mixture in mixtures:
            shared = None if matrix[-1] == "down_proj" else mixtures[mixture]
            value = with_pseudo_tokens(value, tokens[leader], shared)
        value = as_float32(value.div_(inputs.samples or tokens[leader]))
        # A Hessian's diagonal suffices: X'X is positive semi-definite, so that |H_ij| <= max H_ii.
        if not torch.isfinite(value.diagonal() if value.ndim == 2 else value).all():
            fix = "try --dtype bfloat16 or --dtype float32"
            raise UserError(None, leader, "its input overflows (not finite)", fix)
        layers = [name for name, adder in totals.leaders.items() if adder == leader]
        result.append(InputStatistic(layers, value, tokens[leader] if mixture in mixtures else None))
    return result


def with_pseudo_tokens(total: torch.Tensor, tokens: int, shared: torch.Tensor | None) -> torch.Tensor:
    """Add to a sum over the ``tokens`` of an expert as many pseudo-tokens as it has columns; return it.

    An expert that sees fewer tokens than it has columns would be pruned by chance, and one that sees none in the order
    of its columns, or whole. Where a token is an input of all experts of the block, pseudo-tokens are the mean over
    these inputs, ``shared``. The columns of a down projection are neurons of its own expert: there they are the mean
    square of its inputs on the diagonal, or 1 where there are none, so that magnitude decides.
    """
    if shared is not None:
        return total.add_(shared, alpha=len(total))
    diagonal = total.diagonal() if total.ndim == 2 else total
    diagonal += diagonal.sum() / tokens if tokens else 1
    return total
