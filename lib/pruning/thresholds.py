"""Order statistics of non-negative numbers, exact and without sorting: the k-th smallest overall or per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from lib.core.lazy import numpy, torch

# The bits of non-negative floats, read as an integer, are in the order of the floats; so their upper half is counted
# first, and then the lower half of those whose upper half is the wanted one. Both counts fit into a CPU's cache.
_HALF = 2**16  # values of half of the bits
_CHUNK = 2**20  # numbers counted at a time on a CPU: temporaries stay in its cache
_GPU_CHUNK = 2**24  # numbers counted at a time on a GPU: enough to fill it, few beside a matrix of a large model
_ROWS = 64  # rows partitioned at a time on a CPU


def nth_smallest(values: torch.Tensor, index: int) -> torch.Tensor:
    """Return the ``index``-th (from 0) of the sorted ``values``, as a scalar tensor.

    They are not negative, of any shape, in float32, float16 or bfloat16.
    """
    if values.is_cuda:
        return _nth_by_counts(values, index)
    bits = _bits(values)
    copy = (bits & torch.iinfo(bits.dtype).max).numpy()  # without the sign, which only a NaN has
    copy.partition(index)
    return torch.from_numpy(copy[index : index + 1]).view(values.dtype)[0]


def threshold(parts: Callable[[], Iterable[torch.Tensor]], rank: float) -> tuple[float, list[int], list[int]]:
    """Return the smallest number at or below which ``rank`` numbers of all parts together lie (from 1, so a median of
    n is rank n / 2 or (n + 1) / 2), how many numbers of each part are below it, and how many are equal to it.

    ``parts`` yields the non-negative parts each time it is called (twice), so that only one need be in memory.
    """
    upper = [_counts(part).cpu() for part in parts()]
    total = sum(upper)
    high, rank = _bucket(total, min(max(1, math.ceil(rank)), int(total.sum())))
    lower = [_counts(part, high.item()).cpu() for part in parts()]
    low, _ = _bucket(sum(lower), rank)
    below = [u[:high].sum().item() + part[:low].sum().item() for u, part in zip(upper, lower, strict=True)]
    return _joined(high, low).item(), below, [part[low].item() for part in lower]


def row_smallest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the ``count`` smallest per row of ``score`` [out, in], >= 0; of equals, the lower columns."""
    if count == 0 or count == score.shape[1]:
        return torch.full_like(score, bool(count), dtype=torch.bool)
    cut, tied = _row_thresholds(score, count) if score.device.type == "cpu" else _row_thresholds_on_gpu(score, count)
    mask = score <= cut
    rows = tied.nonzero()[:, 0]  # the one synchronisation
    if len(rows):
        below, equal = score[rows] < cut[rows], score[rows] == cut[rows]
        room = count - below.sum(dim=1, keepdim=True)
        mask[rows] = below | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return mask


def smallest(score: torch.Tensor, ratio: float, nm: tuple[int, int] | None) -> torch.Tensor:
    """Return a mask of the ``score``, >= 0, up to the int(n * ratio)-th (from 0), inclusive (published), or by N:M."""
    if nm is not None:
        return group_smallest(score, nm)
    return score <= nth_smallest(score, min(int(score.numel() * ratio), score.numel() - 1))


def group_smallest(score: torch.Tensor, nm: tuple[int, int]) -> torch.Tensor:
    """Return a mask of the M - N smallest of every M columns of ``score`` [out, in]; of equals, the lower columns."""
    ranks = group_ranks(score.reshape(-1, nm[1]).T.contiguous())
    return (ranks < nm[1] - nm[0]).T.reshape(score.shape)


def group_ranks(score: torch.Tensor) -> torch.Tensor:
    """Return for each of ``score`` [M, groups] how many in its column are smaller; of equals, the upper ones count."""
    ranks = torch.zeros_like(score, dtype=torch.int16)  # M may be more than 256
    for i in range(1, len(score)):
        before = score[:i] <= score[i]
        ranks[i] = before.sum(dim=0, dtype=torch.int16)
        ranks[:i] += ~before
    return ranks


def _row_thresholds(score: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's ``count``-th smallest [out, 1], and whether a number outside them equals it [out]."""
    bits = _bits(score).view(score.shape).numpy()
    cut, tied = numpy.empty((len(bits), 1), bits.dtype), numpy.empty(len(bits), bool)
    for top in range(0, len(bits), _ROWS):
        rows = slice(top, top + _ROWS)
        ordered = numpy.partition(bits[rows], count - 1, axis=1)
        cut[rows] = ordered[:, count - 1 : count]
        tied[rows] = ordered[:, count:].min(axis=1) == cut[rows, 0]
    return torch.from_numpy(cut).view(score.dtype), torch.from_numpy(tied)


def _row_thresholds_on_gpu(score: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same as ``_row_thresholds``; on a GPU, kthvalue is a radix selection, with a multiprocessor per row."""
    cut = score.kthvalue(count, dim=1, keepdim=True).values
    return cut, (score <= cut).sum(dim=1) > count


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().flatten().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def _nth_by_counts(values: torch.Tensor, index: int) -> torch.Tensor:
    """Do the same as ``nth_smallest`` in little memory and without synchronising."""
    high, rank = _bucket(_counts(values), index + 1)
    low, _ = _bucket(_counts(values, high), rank)
    return _joined(high, low).to(values.dtype)


def _joined(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the float32 number of these halves of its bits."""
    return (high << 16 | low).to(torch.int32).view(torch.float32)


def _counts(values: torch.Tensor, high: torch.Tensor | int | None = None) -> torch.Tensor:
    """Return how often each upper half occurs in ``values`` as float32, or each lower half of those with ``high``."""
    counts = torch.zeros(2 * _HALF, dtype=torch.int64, device=values.device)
    for chunk in values.detach().flatten().split(_GPU_CHUNK if values.is_cuda else _CHUNK):
        bits = chunk.float().view(torch.int32) & 0x7FFFFFFF  # without the sign, which only a NaN has
        halves = bits >> 16
        if not values.is_cuda:
            members = halves if high is None else (bits & 0xFFFF)[halves == high]
            counts += torch.bincount(members, minlength=len(counts))
            continue
        if high is not None:
            # The others are counted too, in a second half: in a single bin they would all wait for each other.
            halves = (bits & 0xFFFF) + (halves != high) * _HALF
        # Not bincount, which would wait for the largest value.
        counts.scatter_add_(0, halves.long(), counts.new_ones(1).expand(len(chunk)))
    return counts[:_HALF]


def _bucket(counts: torch.Tensor, rank: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bucket that contains the ``rank``-th smallest (from 1), and its rank within the bucket."""
    ends = counts.cumsum(0)
    index = torch.searchsorted(ends, rank)
    return index, rank - ends.take(index) + counts.take(index)
