"""Allocations: formulas that distribute the overall sparsity over the layers, within the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from lib.core.errors import UserError
from lib.models.layers import Layer

log = logging.getLogger(__name__)

# What shares a ratio, and the mean of the metric: all matrices of a block; those of each expert of a mixture, and the
# rest of its block; or each matrix alone.
MAPPINGS: dict[str, Callable[[Layer], object]] = {
    "block_wise": lambda layer: layer.block,
    "expert_wise": lambda layer: (layer.block, layer.expert),
    "layer_wise": lambda layer: layer.name,
}
# Fraction of the weights by which mixed N:M may miss the target.
_NM_TOLERANCE = 1e-3

# Numbers by layer name.
Values = Mapping[str, float]
Ratios = dict[str, float]


def uniform(layers: Sequence[Layer], target: float, values: Values | None = None) -> Ratios:
    """Return the same ratio for every layer."""
    return {layer.name: target for layer in layers}


def heavy_tailed(layers: Sequence[Layer], target: float, values: Values, epsilon: float, mapping_type: str) -> Ratios:
    """Return ratios that grow linearly with a metric such as alpha (paper, section 3.2).

    With x the metric scaled to [0, 1]: ratio = (1 - epsilon + 2 epsilon x) * c, with c chosen such that the mean ratio,
    weighted by layer size, is the target. ``epsilon`` is the half width of the map before scaling, in [0, 1], and
    ``mapping_type`` a name of MAPPINGS.
    """
    groups, x = _scaled_groups(layers, values, mapping_type)
    _warn_if_capped("epsilon", epsilon, largest_epsilon(layers, target, values, mapping_type))
    return _spread(groups, [1 - epsilon + 2 * epsilon * value for value in x], target)


def largest_epsilon(layers: Sequence[Layer], target: float, values: Values, mapping_type: str) -> float:
    """Return the largest epsilon, at most 1, with which ``heavy_tailed`` needs no cap: (1 - s) / (1 + s - 2 mean x)."""
    groups, x = _scaled_groups(layers, values, mapping_type)
    sizes = _sizes(groups)
    # The largest x is 1, or 1/2 where all are the same, which need no cap.
    room = 1 + target * (2 * max(x) - 1) - 2 * sum(n * value for n, value in zip(sizes, x, strict=True)) / sum(sizes)
    return 1.0 if room <= 1 - target else (1 - target) / room


def _scaled_groups(layers: Sequence[Layer], values: Values, mapping_type: str) -> tuple[list[list[Layer]], list[float]]:
    """Return the groups that share a ratio, and the mean metric of each, scaled to [0, 1]."""
    groups = _grouped(layers, mapping_type)
    return groups, _scaled([sum(values[layer.name] for layer in group) / len(group) for group in groups])


def outlier_weighted(layers: Sequence[Layer], target: float, values: Values, owl_lambda: float) -> Ratios:
    """Return block ratios that fall linearly with the outlier ratio, +- ``owl_lambda`` (OWL: Yin et al., 2024)."""
    groups = _grouped(layers)
    x = _scaled([values[group[0].name] for group in groups])
    return _around(groups, target, [-2 * owl_lambda * value for value in x], "owl_lambda", owl_lambda)


def dynamic(layers: Sequence[Layer], target: float, values: Values, dlp_alpha: float) -> Ratios:
    """Return block ratios that fall with 1 - median score / sum of these, +- ``dlp_alpha`` (DLP: Chen et al., 2025)."""
    groups = _grouped(layers)
    scores = [values[group[0].name] for group in groups]
    if not sum(scores) > 0:
        problem = "every block's median score is zero: the checkpoint is pruned by half already"
        raise UserError(None, "_dlp", problem, "use _owl")
    x = _scaled([1 - score / sum(scores) for score in scores])
    return _around(groups, target, [-2 * dlp_alpha * value for value in x], "dlp_alpha", dlp_alpha)


def arithmetic(layers: Sequence[Layer], target: float, values: None, atp_beta: float) -> Ratios:
    """Return target - beta (L-1)/2 + beta i for block i of L, with beta = ``atp_beta`` (ATP: arXiv 2502.14770)."""
    groups = _grouped(layers)
    return _around(groups, target, [atp_beta * i for i in range(len(groups))], "atp_beta", atp_beta)


def erdos_renyi(
    layers: Sequence[Layer], target: float, values: Values | None = None, dense_end: bool = False
) -> Ratios:
    """Return ratios, densities proportional to (n_in + n_out) / (n_in n_out), none above 1 (Mocanu et al., 2018).

    With ``dense_end``, the layers of the last block stay dense (ER-plus: Liu et al., 2022).
    """
    dense = [layer for layer in layers if dense_end and layer.block == layers[-1].block]
    groups = [[layer] for layer in layers[: len(layers) - len(dense)]]
    size, kept = sum(_sizes(groups)), sum(layer.size for layer in dense)
    budget = (1 - target) * (size + kept) - kept  # of weights to keep in ``groups``
    if budget < 0 or not groups:
        raise UserError("sparsity_ratio", target, "cannot be met with the last block kept dense", "lower it")
    shapes = [layer.shape[:2] for (layer,) in groups]  # a 1x1 convolution has four dimensions
    densities = _spread(groups, [(n_out + n_in) / (n_out * n_in) for n_out, n_in in shapes], budget / size)
    return {name: 1 - density for name, density in densities.items()} | {layer.name: 0.0 for layer in dense}


def from_shares(layers: Sequence[Layer], target: float, values: Values) -> Ratios:
    """Return ``values``, the fraction of each layer's weights to remove, scaled to meet the target to the last bit."""
    return _spread([[layer] for layer in layers], [values[layer.name] for layer in layers], target)


class Allocation(NamedTuple):
    """How the overall target is distributed over the layers."""

    share: Callable[..., Ratios]  # of layers, target, values and hyper-parameters
    # What the values are: ``metric`` (--ww_metric), ``price`` (ratios of equal price), a name of BLOCK_SCORES (from a
    # calibration pass) or WEIGHT_SCORES (fractions below one threshold), or None.
    wants: str | None = None
    flags: tuple[str, ...] = ()  # names of the hyper-parameters


# Allocations by the suffix of the method: <pruner>[_<allocation>].
ALLOCATIONS: dict[str, Allocation] = {
    "": Allocation(uniform),
    "ww": Allocation(heavy_tailed, "metric", ("epsilon", "mapping_type")),
    "owl": Allocation(outlier_weighted, "outlier_ratio", ("owl_lambda",)),
    "dlp": Allocation(dynamic, "median_score", ("dlp_alpha",)),
    "atp": Allocation(arithmetic, None, ("atp_beta",)),
    "er": Allocation(erdos_renyi),
    "er_plus": Allocation(partial(erdos_renyi, dense_end=True)),
    "lamp": Allocation(from_shares, "lamp_score"),
    "global": Allocation(from_shares, "magnitude_score"),
    "price": Allocation(from_shares, "price"),
}


def _around(
    groups: Sequence[Sequence[Layer]], target: float, offsets: Sequence[float], flag: str, width: float
) -> Ratios:
    """Return target + offset, shifted so that the mean weighted by size is the target, within [0, 1]."""
    sizes = _sizes(groups)
    mean = math.fsum(n * offset for n, offset in zip(sizes, offsets, strict=True)) / sum(sizes)
    offsets = [offset - mean for offset in offsets]
    if min(offsets) < 0 < max(offsets):
        _warn_if_capped(flag, width, width * min((1 - target) / max(offsets), target / -min(offsets)))
    return _spread(groups, [max(0.0, target + offset) for offset in offsets], target)


def _warn_if_capped(flag: str, width: float, largest: float) -> None:
    if width > largest:
        typed = math.floor(1e4 * largest) / 1e4  # rounded up, it would bring the cap back
        line = "ratios are capped, the rest spread over the others; the largest --%s that needs no cap is %.4f"
        log.warning(line, flag, typed)


def _grouped(layers: Sequence[Layer], mapping_type: str = "block_wise") -> list[list[Layer]]:
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(MAPPINGS[mapping_type](layer), []).append(layer)
    return list(groups.values())


def _sizes(groups: Sequence[Sequence[Layer]]) -> list[int]:
    return [sum(layer.size for layer in group) for group in groups]


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _spread(groups: Sequence[Sequence[Layer]], shape: Sequence[float], target: float) -> Ratios:
    """Return ratios in proportion to ``shape``, one for each group, whose mean weighted by size is ``target``.

    What exceeds 1 is spread over the others in proportion, until none is above 1.
    """
    sizes = _sizes(groups)
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(groups)) if i not in capped]
        room = target * sum(sizes) - sum(sizes[i] for i in capped)
        weight = math.fsum(sizes[i] * shape[i] for i in free)
        if room > 0 and not weight:  # the others have shape 0, and so no proportions
            fix = "lower it, or the allocation's width (epsilon)"
            raise UserError("sparsity_ratio", target, "cannot be met by this allocation", fix)
        scale = room / weight if weight else 0
        over = [i for i in free if scale * shape[i] > 1]
        if not over:
            ratios = [1.0 if i in capped else scale * shape[i] for i in range(len(groups))]
            return {layer.name: ratio for group, ratio in zip(groups, ratios, strict=True) for layer in group}
        capped.update(over)


def mixed_nm(layers: Sequence[Layer], ratios: Ratios, target: float, group: int) -> dict[str, tuple[int, int]]:
    """Return (N, M = ``group``) for each layer, N close to its ratio and the total within 1/1000 of the target.

    M - N starts as the integer part of M * ratio; the rest of the budget goes to the layers with the largest
    remainders, and single steps then correct any excess or shortfall. At least one of M is kept.
    """
    sizes = {layer.name: layer.size for layer in layers}
    total = sum(sizes.values())
    removed = {name: min(group - 1, math.floor(group * ratio + 1e-9)) for name, ratio in ratios.items()}
    left = target * group * total - sum(sizes[name] * count for name, count in removed.items())
    for name in sorted(ratios, key=lambda name: removed[name] - group * ratios[name]):  # largest remainder first
        if ratios[name] > 0 and removed[name] < group - 1 and abs(left - sizes[name]) < abs(left):
            removed[name] += 1
            left -= sizes[name]
    while abs(left) > _NM_TOLERANCE * group * total:
        step = 1 if left > 0 else -1
        # What an allocation keeps dense stays dense.
        able = [name for name in ratios if 0 <= removed[name] + step < group and (step < 0 or ratios[name] > 0)]
        best = min(able, key=lambda name: abs(left - step * sizes[name]), default=None)
        if best is None or abs(left - step * sizes[best]) >= abs(left):
            line = "mixed N:%d reaches a sparsity of %.4f where %.4f was asked for"
            log.warning(line, group, target - left / (group * total), target)
            break
        removed[best] += step
        left -= step * sizes[best]
    return {name: (group - count, group) for name, count in removed.items()}
