"""Candidate plans become the one after which held-out text is predicted best."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lib import UserError
from lib.allocation import SparsityPlan
from lib.eval import perplexity
from lib.models import PrunableLayer
from lib.prune import prune_model, restore, snapshot
from lib.pruners import Pruner

log = logging.getLogger(__name__)

WINDOWS = 8  # of calibration and as many held out: enough to tell epsilons apart, a sixteenth of a full calibration
STEP = 0.05


class Trial(NamedTuple):
    """An ``epsilon`` that was tried, and the ``perplexity`` on the held-out windows after it."""

    epsilon: float
    perplexity: float


def epsilon_grid(largest: float) -> list[float]:
    """Return 0 (uniform), and the multiples of 0.05 up to ``largest``, above which a ratio would have to be capped."""
    return [round(STEP * i, 2) for i in range(math.floor(largest / STEP + 1e-9) + 1)]


def try_epsilons(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    layers: Sequence[PrunableLayer],
    plan_of: Callable[[float], SparsityPlan],
    grid: Sequence[float],
    pruner: Pruner,
    windows: tuple[Tensor, Tensor],
) -> list[Trial]:
    """Return the perplexity after pruning with each epsilon of ``grid``; the model's weights are given back unpruned.

    Args:
        plan_of: the plan that an epsilon leads to.
        windows: of calibration and held out, each [samples, tokens].
    """
    calibration, held_out = windows
    dense = snapshot(blocks, layers)
    trials = []
    for epsilon in tqdm(grid, desc="epsilon", unit="trial", disable=None):
        try:
            prune_model(model, blocks, layers, plan_of(epsilon), pruner, calibration)
            trials.append(Trial(epsilon, perplexity(model, held_out)))
        finally:
            restore(blocks, layers, dense)
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the lowest perplexity, of equals the one with the smallest epsilon.

    Raises:
        UserError: no perplexity is finite.
    """
    finite = [trial for trial in trials if math.isfinite(trial.perplexity)]
    if not finite:
        raise UserError("--epsilon auto: the perplexity is not finite after any epsilon; lower --sparsity_ratio")
    return min(finite, key=lambda trial: (trial.perplexity, trial.epsilon))
