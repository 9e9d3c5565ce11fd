"""Search for epsilon: the plan that gives the lowest perplexity on held-out calibration text."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from lib.calibration.hidden import enter_blocks
from lib.core import processes
from lib.core.digests import digest
from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity_by_blocks
from lib.models.weights import Weights
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import Pruner
from lib.pruning.walk import walk

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

WINDOWS = 8  # of calibration and as many held out: enough to distinguish epsilons, a sixteenth of a full calibration
STEP = 0.05


class Trial(NamedTuple):
    """A tried ``epsilon`` and the resulting ``perplexity`` on the held-out windows."""

    epsilon: float
    perplexity: float


def epsilon_grid(largest: float) -> list[float]:
    """Return 0 (uniform) and the multiples of 0.05 up to ``largest``, above which a ratio would have to be capped."""
    return [round(STEP * i, 2) for i in range(math.floor(largest / STEP + 1e-9) + 1)]


def try_epsilons(
    weights: Weights,
    plan_of: Callable[[float], SparsityPlan],
    grid: Sequence[float],
    pruner: Pruner,
    windows: tuple[Tensor, Tensor],
    dense: Mapping[str, Tensor] | None = None,
    tried: dict[str, float] | None = None,
) -> list[Trial]:
    """Return the perplexity after pruning with each epsilon of ``grid``; the weights are dense again afterwards.

    Epsilons that lead to the same plan (all of them, if every metric is the same) are tried once. Several processes
    each try different plans, on all windows.

    Args:
        plan_of: returns the plan for an epsilon.
        windows: calibration and held-out windows, each [samples, tokens].
        dense: the caller's snapshot of the weights; without one, a copy is held in CPU memory meanwhile.
        tried: perplexities by plan from an earlier run; each new one is added as soon as it is known.
    """
    dense = weights.snapshot() if dense is None else dense
    found = {} if tried is None else tried
    plans = {epsilon: plan_of(epsilon) for epsilon in grid}
    keys = {epsilon: digest(plan) for epsilon, plan in plans.items()}
    untried = {keys[epsilon]: plan for epsilon, plan in plans.items() if keys[epsilon] not in found}
    for start in tqdm(range(0, len(untried), processes.count()), desc="epsilon", unit="trial", disable=None):
        own = list(untried.items())[start + processes.rank() :][:1]
        with processes.single_process():
            results = [(key, _try(weights, plan, pruner, windows, dense)) for key, plan in own]
        for some in processes.gathered(results):
            for key, value in some:
                found[key] = value
    return [Trial(epsilon, found[keys[epsilon]]) for epsilon in grid]


def _try(
    weights: Weights, plan: SparsityPlan, pruner: Pruner, windows: tuple[Tensor, Tensor], dense: Mapping[str, Tensor]
) -> float:
    """Return the perplexity on the held-out windows after pruning; the weights are dense again afterwards."""
    calibration, held_out = windows
    try:
        walk(weights, plan, pruner, enter_blocks(weights, calibration) if pruner.statistic else None)
        return perplexity_by_blocks(weights, held_out)
    finally:
        weights.restore(dense)


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the lowest perplexity; of equals, the one with the smallest epsilon.

    Raises:
        UserError: no perplexity is finite.
    """
    finite = [trial for trial in trials if math.isfinite(trial.perplexity)]
    if not finite:
        raise UserError("epsilon", "auto: the perplexity is not finite after any epsilon; lower --sparsity_ratio")
    return min(finite, key=lambda trial: (trial.perplexity, trial.epsilon))
