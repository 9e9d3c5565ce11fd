"""Scores of dense weights by which OWL, DLP, LAMP and global magnitude distribute the sparsity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from lib.calibration.hidden import BlockInputs
from lib.calibration.statistics import input_statistics
from lib.core.lazy import torch
from lib.models.weights import Block, Weights, check_finite
from lib.pruning.thresholds import threshold

# Bytes for each weight of the largest matrix: float64 and int64 copies and a sort's workspace, estimated.
LAMP_BYTES = 80


def outlier_ratio(scores: Sequence[torch.Tensor], multiple: float) -> float:
    """Return the percentage of a block's scores that exceed ``multiple`` times their mean (OWL: Yin et al., 2024)."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return 100 * sum((score > multiple * mean).sum().item() for score in scores) / count


def median_score(scores: Sequence[torch.Tensor]) -> float:
    """Return the median of a block's scores, the lower one of two (DLP: Chen et al., 2025)."""
    return threshold(lambda: scores, sum(score.numel() for score in scores) / 2)[0]


def lamp_score(weight: torch.Tensor) -> torch.Tensor:
    """Return w^2 over the sum of squares of the weights at least as large in its layer (LAMP: Lee et al., 2021)."""
    squares = weight.detach().double().square().flatten()
    ordered, order = squares.sort()
    at_least = ordered.flip(0).cumsum(0).flip(0)
    at_least = at_least[torch.searchsorted(ordered, ordered)]  # of equal ones each counts all of them
    score = torch.where(ordered > 0, ordered / at_least, 0)
    return torch.empty_like(score).scatter_(0, order, score).float().view(weight.shape)


# Values that an allocation may need (``Allocation.wants``): a number for each block, from a dense calibration pass,
BLOCK_SCORES: dict[str, Callable[..., float]] = {"outlier_ratio": outlier_ratio, "median_score": median_score}
# or a score of each weight, for one threshold over the whole model.
WEIGHT_SCORES = {"lamp_score": lamp_score, "magnitude_score": lambda weight: weight.detach().float().abs()}


def shares_below(weights: Weights, target: float, score: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Return the share of each layer's weights that are among the model's fraction ``target`` with the smallest scores.

    The threshold is exact and needs the memory of one layer: two counts over the bits of the float32 scores, which sort
    like the scores since none is negative. Of the weights exactly at the threshold, each layer loses the same share.
    """

    def scores() -> Iterator[torch.Tensor]:
        for block in weights.visit():
            for name, linear in block.linears.items():
                check_finite(name, linear.weight)
                yield score(linear.weight)

    wanted = target * sum(layer.size for layer in weights.layers)
    _, below, equal = threshold(scores, wanted)
    share = (wanted - sum(below)) / sum(equal)  # of the weights at the threshold
    removed = [b + share * e for b, e in zip(below, equal, strict=True)]
    return {layer.name: count / layer.size for layer, count in zip(weights.layers, removed, strict=True)}


def score_blocks(
    weights: Weights, inputs: BlockInputs, number: Callable[[list[torch.Tensor]], float]
) -> dict[str, float]:
    """Return, by layer name, ``number`` of the scores [out, in] of its block; ``inputs`` are modified in place."""
    values = {}
    for block in tqdm(weights.visit(), "dense statistics", len(weights.modules), unit="block", disable=None):
        scores = [score for _, score in wanda_scores(block, inputs)]
        if scores:
            values |= dict.fromkeys(block.linears, number(scores))
    return values


def wanda_scores(block: Block, inputs: BlockInputs) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the scores |W| * sqrt(s), [out, in], of each layer; the block's output replaces its inputs."""
    for name, linear in block.linears.items():
        check_finite(name, linear.weight)
    for names, squares, _ in input_statistics(block, inputs, "squared_norms", keep=True):
        for name in names:
            yield name, block.linears[name].weight.detach().flatten(1).abs() * squares.sqrt()
