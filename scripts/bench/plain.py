"""Plain formulations of metrics, pruners, prices and the walk, as published and without lib: oracles and baselines."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch

BLOCK = 128  # columns that SparseGPT repairs at a time
DAMPING = 0.01  # share of the Hessian's mean diagonal that SparseGPT adds to it

Groups = tuple[int, int] | None  # (N, M): keep N of every M columns


def spectrum(weight: torch.Tensor) -> torch.Tensor:
    """Return the squared float32 singular values of ``weight``, ascending."""
    return torch.linalg.svdvals(weight.float()).square().flip(0)


def tail_fit(eigs: torch.Tensor, logs: torch.Tensor, start: int) -> tuple[float, float]:
    """Return alpha and the Kolmogorov-Smirnov distance of the power law fitted to ``eigs[start:]``, given its logs."""
    count = len(eigs) - start
    alpha = 1 + count / (logs[start:].sum() - count * logs[start])
    model = (eigs[start:] / eigs[start]) ** (1 - alpha)
    empirical = torch.arange(count, device=eigs.device) / count
    return alpha.item(), (1 - model - empirical).abs().max().item()


def best_fit(eigs: torch.Tensor, starts: Sequence[int]) -> tuple[int, float]:
    """Return the start with the smallest distance, the first of equals, and its alpha: a loop over all ``starts``."""
    logs = eigs.log()
    fits = {start: tail_fit(eigs, logs, start) for start in starts}
    fits = {start: fit for start, fit in fits.items() if 1 < fit[0] < math.inf}
    best = min(fits, key=lambda start: fits[start][1])
    return best, fits[best][0]


def magnitude(weight: torch.Tensor, _: None, ratio: float, nm: Groups) -> torch.Tensor:
    """Return ``weight`` without the entries that are at most the int(n * ratio)-th of all |W|, sorted."""
    score = weight.abs()
    if nm is not None:
        return _without(weight, _lowest_of_groups(score, nm))
    return _without(weight, score <= score.flatten().sort().values[int(score.numel() * ratio)])


def wanda(weight: torch.Tensor, squared_norms: torch.Tensor, ratio: float, nm: Groups) -> torch.Tensor:
    """Return ``weight`` without the first int(columns * ratio) of each row's stably sorted scores."""
    score = weight.abs() * squared_norms.sqrt()
    if nm is not None:
        return _without(weight, _lowest_of_groups(score, nm))
    first = score.sort(dim=-1, stable=True).indices[:, : int(score.shape[1] * ratio)]
    return _without(weight, torch.zeros_like(score, dtype=torch.bool).scatter_(1, first, True))


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, ratio: float, nm: Groups) -> torch.Tensor:
    """Return the repaired ``weight``: three factorisations, then one column of W at a time (SparseGPT's own loop)."""
    repaired = weight.float().clone()
    upper, dead = inverse_factor(hessian.clone())
    repaired[:, dead] = 0
    for left in range(0, repaired.shape[1], BLOCK):
        right = min(left + BLOCK, repaired.shape[1])
        errors = _repair_block(repaired[:, left:right], upper[left:right, left:right], ratio, nm)
        repaired[:, right:] -= errors @ upper[left:right, right:]
    return repaired.to(weight.dtype)


def inverse_factor(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the upper Cholesky factor of the inverse of the damped ``hessian``, and which columns are dead."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True), dead


def _repair_block(columns: torch.Tensor, upper: torch.Tensor, ratio: float, nm: Groups) -> torch.Tensor:
    """Prune and repair ``columns`` [out, block] in place, and return their errors [out, block]."""
    errors, pivots = torch.zeros_like(columns), upper.diagonal()
    remove = torch.zeros_like(columns, dtype=torch.bool)
    if nm is None:
        score = (columns / pivots).square()
        remove = score <= score.flatten().sort().values[int(score.numel() * ratio)]
    for i in range(columns.shape[1]):
        if nm is not None and i % nm[1] == 0:
            score = (columns[:, i : i + nm[1]] / pivots[i : i + nm[1]]).square()
            remove.scatter_(1, i + score.topk(nm[1] - nm[0], dim=1, largest=False).indices, True)
        column = columns[:, i].clone()
        kept = torch.where(remove[:, i], 0, column)
        errors[:, i] = (column - kept) / upper[i, i]
        columns[:, i:] -= errors[:, i, None] @ upper[None, i, i:]
        columns[:, i] = kept
    return errors


def _lowest_of_groups(score: torch.Tensor, nm: tuple[int, int]) -> torch.Tensor:
    """Return a mask of all but the N highest of every M columns of ``score``, of equals the lower columns first."""
    keep, group = nm
    grouped = score.unflatten(1, (-1, group))  # [out, in / M, M]
    first = grouped.sort(dim=-1, stable=True).indices[..., : group - keep]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, first, True).flatten(1)


def _without(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    pruned = weight.clone()
    pruned[mask] = 0
    return pruned


def squared_norms(x: torch.Tensor, mean: torch.Tensor | None, seen: int) -> torch.Tensor:
    """Return the mean [in] of the squared norms of the columns of ``seen`` samples and of x [tokens, in]."""
    norms = x.float().T.norm(p=2, dim=1) ** 2
    return norms if mean is None else (mean * seen + norms) / (seen + 1)


def hessian(x: torch.Tensor, mean: torch.Tensor | None, seen: int) -> torch.Tensor:
    """Return the mean [in, in] of 2 X'X over ``seen`` samples and x [tokens, in], multiplied in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # Tensor cores would round the factors.
    try:
        scaled = x.float() * (2 / (seen + 1)) ** 0.5
        product = scaled.T @ scaled
    finally:
        torch.set_float32_matmul_precision(before)
    return product if mean is None else mean * (seen / (seen + 1)) + product


class Method(NamedTuple):
    """A pruner as ``prune(weight, statistic, ratio, nm)``, and the ``statistic`` that it needs of a layer's input."""

    prune: Callable[[torch.Tensor, torch.Tensor | None, float, Groups], torch.Tensor]
    statistic: Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor] | None = None


METHODS = {
    "magnitude": Method(magnitude),
    "wanda": Method(wanda, squared_norms),
    "sparsegpt": Method(sparsegpt, hessian),
}


class _Caught(Exception):
    """Ends a forward pass once the first block's arguments are known."""


@torch.no_grad()
def walk(model: torch.nn.Module, windows: torch.Tensor, method: Method, ratio: float) -> None:
    """Prune a LLaMA in place: a statistic for each layer, and all ``windows`` [samples, tokens] twice per block."""
    blocks = model.model.layers
    hidden, arguments = _enter(model, blocks[0], windows) if method.statistic else ([], {})
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        means: dict[torch.nn.Module, torch.Tensor] = {}
        for seen, x in enumerate(hidden):
            add = partial(_add, means, method.statistic, seen)
            hooks = [layer.register_forward_pre_hook(add) for layer in layers]
            block(x, **arguments)
            for hook in hooks:
                hook.remove()
        for layer in layers:
            layer.weight.data = method.prune(layer.weight.data, means.pop(layer, None), ratio, None)
        hidden = [block(x, **arguments) for x in hidden]


def _add(means: dict, statistic: Callable, seen: int, layer: torch.nn.Module, args: tuple) -> None:
    means[layer] = statistic(args[0].flatten(0, 1), means.get(layer), seen)


def _enter(model: torch.nn.Module, first: torch.nn.Module, windows: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    """Return the input of the ``first`` block for each window, and the other arguments of its last call."""
    hidden, arguments = [], {}

    def catch(_, args: tuple, kwargs: dict) -> None:
        hidden.append(args[0])
        arguments.update(kwargs)
        raise _Caught

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with suppress(_Caught):
            model(window[None], use_cache=False)
    hook.remove()
    return hidden, arguments


def row_ranks(score: torch.Tensor) -> torch.Tensor:
    """Return the place of each entry of ``score`` [out, in] in its ascending row, of equals the lower column first."""
    return score.argsort(dim=1, stable=True).argsort(dim=1)


def prices(
    model: torch.nn.Module,
    windows: torch.Tensor,
    ranks: Mapping[str, torch.Tensor],
    ratios: Mapping[str, float],
    every: int,
    band: float,
) -> dict[str, float]:
    """Return d KL(dense || pruned) / d ratio by layer name: one backward pass through the whole pruned model.

    Args:
        windows: token ids [samples, tokens], of which one of ``every`` tokens counts.
        band: share of a row around the threshold from which a price is read.
    """
    counted = slice(every - 1, None, every)
    layers = {name: model.get_submodule(name) for name in ranks}
    dense = {name: layer.weight for name, layer in layers.items()}
    with torch.no_grad():
        wanted = model(windows, use_cache=False).logits[:, counted].log_softmax(-1)

    middles = {name: int(rank.shape[1] * ratios[name]) for name, rank in ranks.items()}
    for name, layer in layers.items():
        layer.weight = torch.nn.Parameter(dense[name].detach() * (ranks[name] >= middles[name]))
    logits = model(windows, use_cache=False).logits[:, counted].log_softmax(-1)
    loss = (wanted.exp() * (wanted - logits)).sum(-1).mean()
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])

    slopes = {}
    for (name, rank), gradient in zip(ranks.items(), gradients, strict=True):
        layers[name].weight = dense[name]
        columns, middle = rank.shape[1], middles[name]
        half = max(1, int(band / 2 * columns))
        low, high = max(0, middle - half), min(columns, middle + half)
        worth = (gradient * dense[name].detach())[(rank >= low) & (rank < high)].sum().item()
        slopes[name] = -worth * columns / (high - low)
    return slopes
