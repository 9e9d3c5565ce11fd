"""Dense weights, and statistics of their inputs, become the numbers that other papers share the sparsity out by."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from lib import UserError
from lib.models import PrunableLayer, resident

_BUCKETS = 2**16  # of the upper half of a float32's bits, and then of the lower half

# -------------------------------------------------------------------------------------------- a number for each block


def outlier_ratio(scores: Sequence[Tensor], multiple: float) -> float:
    """Return the percentage of a block's scores that exceed ``multiple`` times their mean (OWL: Yin et al., 2024)."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return 100 * sum((score > multiple * mean).sum().item() for score in scores) / count


def median_score(scores: Sequence[Tensor]) -> float:
    """Return the median of a block's scores, the lower one of two (DLP: Chen et al., 2025)."""
    rank = (sum(score.numel() for score in scores) + 1) // 2  # from 1
    # By counting bits, as below: a block of a large model has a thousand million scores, too many to sort beside it.
    bits = [score.contiguous().view(torch.int32).flatten() for score in scores]
    high, rank = _bucket(sum(_count(b >> 16) for b in bits), rank)
    low, _ = _bucket(sum(_count(b[(b >> 16) == high] & 0xFFFF) for b in bits), rank)
    return torch.tensor([high << 16 | low], dtype=torch.int32).view(torch.float32).item()


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

    The threshold is exact and needs no memory to speak of: two counts over the bits of the float32 scores, which are in
    the order of the scores since none is negative. Of the weights that lie on it, each layer loses the same share.
    """

    def bits() -> Iterator[tuple[PrunableLayer, Tensor]]:
        for index, group in groupby(layers, key=lambda layer: layer.block):
            with resident(blocks[index]):
                for layer in group:
                    if not torch.isfinite(layer.module.weight).all():
                        raise UserError(f"{layer.name}: its weights are not finite; the checkpoint is damaged")
                    yield layer, score(layer.module.weight).contiguous().view(torch.int32).flatten()

    total = sum(layer.module.weight.numel() for layer in layers)
    wanted = target * total
    upper = {layer.name: _count(b >> 16) for layer, b in bits()}
    high, wanted = _bucket(sum(upper.values()), wanted)
    lower = {layer.name: _count(b[(b >> 16) == high] & 0xFFFF) for layer, b in bits()}
    low, wanted = _bucket(sum(lower.values()), wanted)
    share = wanted / sum(part[low].item() for part in lower.values())  # of those on the threshold
    shares = {}
    for layer in layers:
        above, on = upper[layer.name], lower[layer.name]
        removed = above[:high].sum().item() + on[:low].sum().item() + share * on[low].item()
        shares[layer.name] = removed / layer.module.weight.numel()
    return shares


def _count(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=_BUCKETS).cpu()


def _bucket(counts: Tensor, wanted: float) -> tuple[int, float]:
    """Return the bucket in which the ``wanted``-th smallest lies, and how many of the bucket are wanted."""
    ends = counts.cumsum(0)
    index = int(torch.searchsorted(ends.double(), wanted).clamp(max=len(counts) - 1))
    return index, wanted - (ends[index] - counts[index]).item()
