"""Dense weights, and statistics of their inputs, become the numbers that other papers share the sparsity out by."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from lib import UserError
from lib.models import PrunableLayer, resident
from lib.selection import threshold

# -------------------------------------------------------------------------------------------- a number for each block


def outlier_ratio(scores: Sequence[Tensor], multiple: float) -> float:
    """Return the percentage of a block's scores that exceed ``multiple`` times their mean (OWL: Yin et al., 2024)."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return 100 * sum((score > multiple * mean).sum().item() for score in scores) / count


def median_score(scores: Sequence[Tensor]) -> float:
    """Return the median of a block's scores, the lower one of two (DLP: Chen et al., 2025)."""
    return threshold(lambda: scores, sum(score.numel() for score in scores) / 2).value


# ------------------------------------------------------------------------------- one threshold over the whole model


def magnitude_score(weight: Tensor) -> Tensor:
    """Return |W| in float32."""
    return weight.detach().float().abs()


def lamp_score(weight: Tensor) -> Tensor:
    """Return w^2 over the sum of squares of the weights at least as large in its layer (LAMP: Lee et al., 2021)."""
    squares = weight.detach().double().square().flatten()
    ordered, order = squares.sort()
    at_least = ordered.flip(0).cumsum(0).flip(0)
    at_least = at_least[torch.searchsorted(ordered, ordered)]  # of equal ones each counts all of them
    score = torch.where(ordered > 0, ordered / at_least, 0)
    return torch.empty_like(score).scatter_(0, order, score).float().view(weight.shape)


def shares_below(
    blocks: nn.ModuleList, layers: Sequence[PrunableLayer], target: float, score: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Return the share of each layer's weights that are among the model's ``target`` with the smallest scores.

    The weights are visited twice, see ``selection.threshold``. Of those on the threshold, each layer loses the same
    share.
    """

    def parts() -> Iterator[Tensor]:
        for index, group in groupby(layers, key=lambda layer: layer.block):
            with resident(blocks[index]):
                for layer in group:
                    if not torch.isfinite(layer.module.weight).all():
                        raise UserError(f"{layer.name}: its weights are not finite; the checkpoint is damaged")
                    yield score(layer.module.weight)

    sizes = [layer.module.weight.numel() for layer in layers]
    _, below, equal = threshold(parts, target * sum(sizes))
    share = (target * sum(sizes) - sum(below)) / sum(equal)  # of those on the threshold
    removed = [b + share * e for b, e in zip(below, equal, strict=True)]
    return {layer.name: gone / size for layer, gone, size in zip(layers, removed, sizes, strict=True)}
