"""Numbers become ratios that add up to the budget."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from lib import UserError
from lib.models import PrunableLayer

log = logging.getLogger(__name__)

MAPPINGS = ("block_wise", "layer_wise")


class SparsityPlan(NamedTuple("SparsityPlan", [("target", float), ("ratios", dict), ("nm", tuple | None)])):
    """What is to be removed: ``ratios`` by layer name, and the ``target`` that they add up to, weighted by size.

    With ``nm`` = (N, M), N of every M columns are kept and the ratios are all 1 - N/M.
    """

    def __new__(cls, target: float, ratios: dict[str, float], nm: tuple[int, int] | None = None):
        for name, ratio in ratios.items():
            if not 0 <= ratio <= 1:  # a NaN fails too
                raise ValueError(f"{name}: a ratio of {ratio} is outside [0, 1]")
        return super().__new__(cls, target, ratios, nm)


def uniform(layers: Sequence[PrunableLayer], target: float, **_) -> dict[str, float]:
    """Return the target for every layer."""
    return {layer.name: target for layer in layers}


def heavy_tailed(
    layers: Sequence[PrunableLayer], target: float, values: Mapping[str, float], epsilon: float, mapping: str, **_
) -> dict[str, float]:
    """Return a lower ratio for a small metric, a higher one for a large metric (paper, section 3.2).

    With x the metric scaled to [0, 1]: ratio = (1 - epsilon + 2 epsilon x) * c, c such that the ratios, weighted by the
    layers' sizes, add up to the target.

    Args:
        values: the metric by layer name.
        epsilon: half width of the map before scaling, in [0, 1].
        mapping: ``block_wise`` (each matrix of a block gets the block's mean metric) or ``layer_wise``.
    """
    groups = [[layer] for layer in layers]
    if mapping == "block_wise":
        groups = [list(group) for _, group in groupby(layers, key=lambda layer: layer.block)]
    metric = [sum(values[layer.name] for layer in group) / len(group) for group in groups]
    sizes = [sum(layer.module.weight.numel() for layer in group) for group in groups]
    low, high = min(metric), max(metric)
    x = [(m - low) / (high - low) if high > low else 0.5 for m in metric]
    ratios = spread([1 - epsilon + 2 * epsilon * value for value in x], sizes, target)
    _warn_of_cap([group[0] for group in groups], ratios, x, sizes, target, mapping)
    return {layer.name: ratio for group, ratio in zip(groups, ratios, strict=True) for layer in group}


# How the overall target is shared out, by the suffix of the method: <pruner>[_<allocation>].
ALLOCATIONS: dict[str, Callable[..., dict[str, float]]] = {"": uniform, "ww": heavy_tailed}


def spread(shape: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """Return ratios in proportion to ``shape`` whose mean weighted by ``sizes`` is ``target``, none above 1.

    What is cut off at 1 is spread over the others in proportion, until none is above 1.
    """
    budget = target * sum(sizes)
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(shape)) if i not in capped]
        room = budget - sum(sizes[i] for i in capped)
        weight = math.fsum(sizes[i] * shape[i] for i in free)
        if room > 0 and not weight:  # what is left has shape 0: proportion says nothing there
            raise UserError(f"a sparsity of {target} cannot be met with this --epsilon; lower it")
        scale = room / weight if weight else 0
        over = [i for i in free if scale * shape[i] > 1]
        if not over:
            return [1.0 if i in capped else scale * shape[i] for i in range(len(shape))]
        capped.update(over)


def _warn_of_cap(
    firsts: Sequence[PrunableLayer], ratios: list[float], x: list[float], sizes: list[int], target: float, mapping: str
) -> None:
    capped = [layer for layer, ratio in zip(firsts, ratios, strict=True) if ratio == 1]
    if not capped:
        return
    what = "blocks" if mapping == "block_wise" else "layers"
    names = [str(layer.block) if mapping == "block_wise" else layer.name for layer in capped]
    mean_x = sum(n * value for n, value in zip(sizes, x, strict=True)) / sum(sizes)
    log.warning(
        "%s %s would be pruned by more than all: capped at 1, the rest spread over the others; the largest --epsilon "
        "that needs no cap is %.4f",
        what,
        ", ".join(names),
        math.floor(1e4 * (1 - target) / (1 + target - 2 * mean_x)) / 1e4,  # rounded up it would bring the cap back
    )
