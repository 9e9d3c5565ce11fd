"""Pruners that zero a given ratio of one weight matrix: magnitude, Wanda, SparseGPT and ALPS."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from lib.core.lazy import torch
from lib.pruning import alps, sparsegpt
from lib.pruning.sparsegpt import NM
from lib.pruning.thresholds import group_smallest, row_smallest, smallest

log = logging.getLogger(__name__)

VARIANT_TOLERANCE = 0.001  # how near the sparsity of Wanda's variant must come to the ratio, published


class Pruner(NamedTuple):
    """How to prune one matrix."""

    # Of weight [out, in], prepared, ratio and N:M: the new weight, of the same shape and dtype.
    prune: Callable[[torch.Tensor, object, float, NM | None], torch.Tensor]
    statistic: str | None = None  # name in ``calibration.STATISTICS`` of the input statistic that it needs
    # Turns that statistic into what is prepared, once for all layers that share an input.
    prepare: Callable[[torch.Tensor], object] = lambda statistic: statistic
    # Prunes all of these layers at once, all by name, if that is cheaper than one after another.
    group: Callable[..., dict[str, torch.Tensor]] | None = None
    # Float32 matrices of the block's largest weight's size that it holds at most, besides Hessians; layers that it
    # prunes at once are twice that size, as gate and up are.
    copies: float = 4

    def prune_all(
        self, weights: Mapping[str, torch.Tensor], prepared: object, ratios: Mapping[str, float], nm: Mapping
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the new weight of each of ``weights``, layers that share an input."""
        if self.group is not None:
            yield from self.group(weights, prepared, ratios, nm).items()
            return
        for name, weight in weights.items():
            yield name, self.prune(weight, prepared, ratios[name], nm[name])


def magnitude(weight: torch.Tensor, _: None, ratio: float, nm: NM | None) -> torch.Tensor:
    """Zero everything <= the int(n * ratio)-th (from 0) of the sorted |W|, one threshold for the matrix."""
    return weight.masked_fill(smallest(weight.abs(), ratio, nm), 0)


def wanda(weight: torch.Tensor, squared_norms: torch.Tensor, ratio: float, nm: NM | None) -> torch.Tensor:
    """Zero, per output row, the int(columns * ratio) smallest |W| * sqrt(s) (Wanda: Sun et al., 2024).

    The ``squared_norms`` s [in], float32, are the mean over samples of the sum over tokens of x^2.
    """
    score = weight.abs() * squared_norms.sqrt()
    drop = group_smallest(score, nm) if nm else row_smallest(score, int(weight.shape[1] * ratio))
    return weight.masked_fill(drop, 0)


def wanda_variant(weight: torch.Tensor, squared_norms: torch.Tensor, ratio: float, nm: NM | None) -> torch.Tensor:
    """Zero, per row, the smallest scores whose cumulative sum stays within a share of the row's total.

    The share is one for the matrix, found by bisection in [0, 0.8] from 0.4 on, until the sparsity is within 0.001 of
    ``ratio`` (published); if no share achieves that, the closest is used, with a warning.
    """
    if nm is not None:
        return wanda(weight, squared_norms, ratio, nm)
    score = weight.abs() * squared_norms.sqrt()
    ordered, order = score.sort(dim=1, stable=True)
    cumulative, total = ordered.cumsum(dim=1), score.sum(dim=1, keepdim=True)
    low, high, miss = 0.0, 0.8, math.inf
    while miss > VARIANT_TOLERANCE and high - low > VARIANT_TOLERANCE / 2:
        share = (low + high) / 2
        within = cumulative <= share * total
        sparsity = within.sum().item() / within.numel()
        if abs(sparsity - ratio) < miss:
            miss, best = abs(sparsity - ratio), within
        low, high = (low, share) if sparsity > ratio else (share, high)
    if miss > VARIANT_TOLERANCE:
        log.warning("Wanda's variant misses %.4f by %.4f in a matrix of %dx%d", ratio, miss, *weight.shape)
    return weight.masked_fill(torch.zeros_like(best).scatter_(1, order, best), 0)


PRUNERS: dict[str, Pruner] = {
    "magnitude": Pruner(magnitude),
    "wanda": Pruner(wanda, "squared_norms"),
    "sparsegpt": Pruner(sparsegpt.repair, "hessian", sparsegpt.inverse_factor, sparsegpt.repair_group),
    "alps": Pruner(alps.alps, "hessian", alps.prepare, alps.alps_group, copies=8.55),
}
# What --use_variant puts in a pruner's place.
VARIANTS: dict[str, Pruner] = {"wanda": Pruner(wanda_variant, "squared_norms")}
# Pruners that --damping and --pruner_iterations are for.
DAMPED, ITERATED = ("sparsegpt", "alps"), ("alps",)


def configured(
    name: str, table: Mapping[str, Pruner], iterations: int | None, damping: float | None, refit: int | None
) -> Pruner:
    """Return the pruner ``name`` of ``table`` with those options that are not None in place of its defaults.

    They are ``iterations`` of ADMM, ``damping`` as a share of the Hessian's mean diagonal, and ``refit``, a number of
    conjugate-gradient steps on the mask.
    """
    pruner = table[name]
    if damping is not None and name in DAMPED:
        pruner = pruner._replace(prepare=partial(pruner.prepare, damping=damping))
    if name in ITERATED:
        options = {"iterations": iterations, "steps": refit}
        options = {key: value for key, value in options.items() if value is not None}
        return pruner._replace(prune=partial(pruner.prune, **options), group=partial(pruner.group, **options))
    return refitted(pruner, refit, alps.ALPS_DAMPING if damping is None else damping) if refit else pruner


def refitted(pruner: Pruner, steps: int, damping: float = alps.ALPS_DAMPING) -> Pruner:
    """Return ``pruner`` followed by ``steps`` of ``alps.refit`` on its masks, which needs the Hessian.

    Wanda's squared norms are half of the Hessian's diagonal; magnitude ignores them.
    """

    def prepare(hessian: torch.Tensor) -> tuple[object, alps.Problem]:
        statistic = hessian.clone() if pruner.statistic == "hessian" else hessian.diagonal() / 2
        return pruner.prepare(statistic), alps.prepare(hessian, damping)

    def prune(weight: torch.Tensor, prepared: tuple[object, alps.Problem], ratio: float, nm: NM | None) -> torch.Tensor:
        prepared, problem = prepared
        return alps.refit(weight, pruner.prune(weight, prepared, ratio, nm), problem, steps)

    return Pruner(prune, "hessian", prepare, copies=max(pruner.copies, 6))
