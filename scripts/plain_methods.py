"""Plain formulations of the pruners and of the walk over blocks, as published, as a baseline for the benchmarks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

BLOCK, DAMPING = 128, 0.01  # columns at a time, and share of the Hessian's mean diagonal

Groups = tuple[int, int] | None  # (N, M): keep N of every M columns


def magnitude(weight: Tensor, _: None, ratio: float, nm: Groups) -> Tensor:
    """Return ``weight`` without the entries that are at most the int(n * ratio)-th of all |W|, sorted."""
    score = weight.abs()
    if nm is not None:
        return _drop(weight, _group_mask(score, nm))
    return _drop(weight, score <= score.flatten().sort().values[int(score.numel() * ratio)])


def wanda(weight: Tensor, squared_norms: Tensor, ratio: float, nm: Groups) -> Tensor:
    """Return ``weight`` without the first int(columns * ratio) of each row's stably sorted scores."""
    score = weight.abs() * squared_norms.sqrt()
    if nm is not None:
        return _drop(weight, _group_mask(score, nm))
    first = score.sort(dim=-1, stable=True).indices[:, : int(score.shape[1] * ratio)]
    return _drop(weight, torch.zeros_like(score, dtype=torch.bool).scatter_(1, first, True))


def sparsegpt(weight: Tensor, hessian: Tensor, ratio: float, nm: Groups) -> Tensor:
    """Return the repaired ``weight``: three factorisations, then one column of W at a time (SparseGPT's own loop)."""
    repaired = weight.float().clone()
    upper, dead = inverse_factor(hessian.clone())
    repaired[:, dead] = 0
    for left in range(0, repaired.shape[1], BLOCK):
        right = min(left + BLOCK, repaired.shape[1])
        errors = _repair_block(repaired[:, left:right], upper[left:right, left:right], ratio, nm)
        repaired[:, right:] -= errors @ upper[left:right, right:]
    return repaired.to(weight.dtype)


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the inverse of the damped ``hessian``, and which columns are dead."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True), dead


def _repair_block(part: Tensor, upper: Tensor, ratio: float, nm: Groups) -> Tensor:
    """Prune and repair the columns ``part`` [out, block] in place, and return their errors [out, block]."""
    errors, pivots = torch.zeros_like(part), upper.diagonal()
    remove = torch.zeros_like(part, dtype=torch.bool)
    if nm is None:
        score = (part / pivots).square()
        remove = score <= score.flatten().sort().values[int(score.numel() * ratio)]
    for i in range(part.shape[1]):
        if nm is not None and i % nm[1] == 0:
            score = (part[:, i : i + nm[1]] / pivots[i : i + nm[1]]).square()
            remove.scatter_(1, i + score.topk(nm[1] - nm[0], dim=1, largest=False).indices, True)
        column = part[:, i].clone()
        kept = torch.where(remove[:, i], 0, column)
        errors[:, i] = (column - kept) / upper[i, i]
        part[:, i:] -= errors[:, i, None] @ upper[None, i, i:]
        part[:, i] = kept
    return errors


def _group_mask(score: Tensor, nm: tuple[int, int]) -> Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    for left in range(0, score.shape[1], nm[1]):
        lowest = score[:, left : left + nm[1]].topk(nm[1] - nm[0], dim=1, largest=False).indices
        mask.scatter_(1, left + lowest, True)
    return mask


def _drop(weight: Tensor, mask: Tensor) -> Tensor:
    pruned = weight.clone()
    pruned[mask] = 0
    return pruned


# ------------------------------------------------------------------------------------------------------ statistics


def squared_norms(x: Tensor, mean: Tensor | None, seen: int) -> Tensor:
    """Return the mean [in] of the squared norms of the columns of ``seen`` samples and of x [tokens, in]."""
    norms = x.float().T.norm(p=2, dim=1) ** 2
    return norms if mean is None else (mean * seen + norms) / (seen + 1)


def hessian(x: Tensor, mean: Tensor | None, seen: int) -> Tensor:
    """Return the mean [in, in] of 2 X'X over ``seen`` samples and x [tokens, in], multiplied in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no tensor cores
    try:
        scaled = x.float() * (2 / (seen + 1)) ** 0.5
        product = scaled.T @ scaled
    finally:
        torch.set_float32_matmul_precision(before)
    return product if mean is None else mean * (seen / (seen + 1)) + product


class Method(NamedTuple):
    """A pruner as ``prune(weight, statistic, ratio, nm)``, and the ``statistic`` that it needs of a layer's input."""

    prune: Callable[[Tensor, Tensor | None, float, Groups], Tensor]
    statistic: Callable[[Tensor, Tensor | None, int], Tensor] | None = None


METHODS = {
    "magnitude": Method(magnitude),
    "wanda": Method(wanda, squared_norms),
    "sparsegpt": Method(sparsegpt, hessian),
}


# -------------------------------------------------------------------------------------------------------- the walk


class _Caught(Exception):
    pass


@torch.no_grad()
def walk(model: nn.Module, windows: Tensor, method: Method, ratio: float) -> None:
    """Prune a LLaMA in place: a statistic for each layer, and all ``windows`` [samples, tokens] twice per block."""
    blocks = model.model.layers
    hidden, arguments = enter(model, blocks[0], windows) if method.statistic else ([], {})
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        means = dense_pass(block, hidden, arguments, layers, method.statistic)
        for layer in layers:
            layer.weight.data = method.prune(layer.weight.data, means.pop(layer, None), ratio, None)
        hidden = pruned_pass(block, hidden, arguments)


def dense_pass(
    block: nn.Module, hidden: list[Tensor], arguments: dict, layers: list[nn.Module], statistic: Callable | None
) -> dict[nn.Module, Tensor]:
    """Return the ``statistic`` of each layer's input."""
    means: dict[nn.Module, Tensor] = {}
    for seen, x in enumerate(hidden):
        hooks = [layer.register_forward_pre_hook(_adder(means, statistic, seen)) for layer in layers]
        block(x, **arguments)
        for hook in hooks:
            hook.remove()
    return means


def pruned_pass(block: nn.Module, hidden: list[Tensor], arguments: dict) -> list[Tensor]:
    """Return the output of ``block`` for each window."""
    return [block(x, **arguments) for x in hidden]


def _adder(means: dict, statistic: Callable, seen: int) -> Callable:
    def add(layer: nn.Module, args: tuple) -> None:
        means[layer] = statistic(args[0].flatten(0, 1), means.get(layer), seen)

    return add


def enter(model: nn.Module, first: nn.Module, windows: Tensor) -> tuple[list[Tensor], dict]:
    """Return the input of the ``first`` block for each window, and the other arguments of its last call."""
    hidden, arguments = [], {}

    def catch(_, args: tuple, kwargs: dict) -> None:
        hidden.append(args[0])
        arguments.update(kwargs)
        raise _Caught

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        try:
            model(window[None], use_cache=False)
        except _Caught:
            pass
    hook.remove()
    return hidden, arguments
