"""Epsilon, searched: the plan that gives the lowest perplexity on held-out calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tqdm import tqdm

from lib.calibration.hidden import enter_blocks
from lib.core import processes
from lib.core.digests import digest
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.evaluation.perplexity import perplexity_by_blocks
from lib.models.weights import Weights
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import Pruner
from lib.pruning.walk import walk

# Windows of calibration, and as many held out: enough to tell epsilons apart, a sixteenth of a full calibration.
WINDOWS = 8
# Distance of the epsilons that are tried.
EPSILON_STEP = 0.05


def epsilon_grid(largest: float) -> list[float]:
    """Return 0 (uniform) and the multiples of EPSILON_STEP up to ``largest``, above which a ratio would be capped."""
    return [round(EPSILON_STEP * i, 2) for i in range(math.floor(largest / EPSILON_STEP + 1e-9) + 1)]


def try_epsilons(
    weights: Weights,
    plans: Mapping[float, SparsityPlan],
    pruner: Pruner,
    windows: tuple[torch.Tensor, torch.Tensor],
    dense: Mapping[str, torch.Tensor] | None = None,
    tried: Mapping[str, float] | None = None,
    remember: Callable[[Mapping[str, float]], None] | None = None,
) -> dict[float, float]:
    """Return the perplexity after pruning with the plan of each epsilon; the weights are dense again afterwards.

    Epsilons with the same plan are tried once. Several processes each try different plans, on all ``windows``, those of
    calibration and held-out ones, each [samples, tokens]. Without ``dense``, the caller's snapshot of the weights, a
    copy is held in CPU memory meanwhile. ``tried`` are perplexities by plan from an earlier run, replaced by what
    ``remember`` is called with.
    """
    dense = weights.snapshot() if dense is None else dense
    perplexities = dict(tried or {})
    keys = {epsilon: digest(plan) for epsilon, plan in plans.items()}
    untried = {keys[epsilon]: plan for epsilon, plan in plans.items() if keys[epsilon] not in perplexities}
    calibration, held_out = windows
    for start in tqdm(range(0, len(untried), processes.count()), desc="epsilon", unit="trial", disable=None):
        results = []
        for key, plan in list(untried.items())[start + processes.rank() :][:1]:  # one trial for each process
            with processes.single_process():
                try:
                    walk(weights, plan, pruner, enter_blocks(weights, calibration) if pruner.statistic else None)
                    results.append((key, perplexity_by_blocks(weights, held_out)))
                finally:
                    weights.restore(dense)
        perplexities |= dict(result for share in processes.gathered(results) for result in share)
        if remember:
            remember(perplexities)
    return {epsilon: perplexities[key] for epsilon, key in keys.items()}


def best(trials: Mapping[float, float]) -> float:
    """Return the epsilon of the lowest perplexity, of equals the smallest; a UserError if none is finite."""
    finite = [(perplexity, epsilon) for epsilon, perplexity in trials.items() if math.isfinite(perplexity)]
    if not finite:
        raise UserError("epsilon", "auto", "the perplexity is not finite after any of them", "lower --sparsity_ratio")
    return min(finite)[1]
