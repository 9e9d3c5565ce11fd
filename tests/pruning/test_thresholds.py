"""Selections against plain sorts, on numbers of every size, with ties, and by the path that a GPU takes."""

import math

import pytest
import torch

from lib.pruning import thresholds as selection
from lib.pruning.thresholds import nth_smallest, row_smallest, threshold

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = {"cpu": nth_smallest, "gpu": selection._nth_by_counts}  # the second is plain torch: it runs here too


def numbers(kind: str, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=draw).abs()
    if kind == "scales":  # subnormal to nearly the largest
        x = x * 2.0 ** torch.randint(-140, 120, (count,), generator=draw)
    if kind == "ties":
        x = (2 * x).round()
    if kind == "close":  # all alike in the upper half of their bits
        x = 1 + x.clamp(max=7) * 2.0**-11
    if kind == "zeros":
        x[torch.rand(count, generator=draw) < 0.7] = 0
    if kind == "equal":
        x = torch.full((count,), 0.3)
    if kind == "infinite":
        x[::3] = math.inf
    return x.to(dtype)


KINDS = ["normal", "scales", "ties", "close", "zeros", "equal", "infinite"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last of them shorter, without large tensors."""
    monkeypatch.setattr(selection, "_CHUNK", 300)
    monkeypatch.setattr(selection, "_GPU_CHUNK", 400)
    monkeypatch.setattr(selection, "_ROWS", 5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nth_smallest_is_that_of_a_sort(kind, dtype, way):
    for count in (1, 2, 299, 1001):
        values = numbers(kind, count, dtype)
        ordered = values.sort().values
        for index in {0, count // 3, count // 2, count - 1}:
            found = WAYS[way](values, index)
            assert found.shape == () and found.dtype == dtype
            assert found.item() == ordered[index].item()


@pytest.mark.parametrize("way", WAYS)
def test_nth_smallest_of_unusual_matrices(way):
    values = numbers("normal", 600).view(20, 30).T  # not contiguous
    assert WAYS[way](values, 77).item() == sorted(values.flatten().tolist())[77]
    for sign in (1, -1):  # a NaN is the largest, whatever its sign
        values = torch.tensor([3.0, sign * math.nan, 1.0, 2.0])
        assert [WAYS[way](values, i).item() for i in range(3)] == [1, 2, 3]
        assert math.isnan(WAYS[way](values, 3).item())


@pytest.mark.parametrize("thresholds", [selection._row_thresholds, selection._row_thresholds_on_gpu])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_row_smallest_is_that_of_a_stable_sort(kind, dtype, thresholds, monkeypatch):
    monkeypatch.setattr(selection, "_row_thresholds", thresholds)
    for shape in ((1, 1), (3, 2), (13, 40), (7, 129)):
        score = numbers(kind, shape[0] * shape[1], dtype).view(shape)
        before = score.clone()
        for count in {0, 1, shape[1] // 2, shape[1] - 1, shape[1]}:
            order = score.sort(dim=1, stable=True).indices[:, :count]
            expected = torch.zeros(shape, dtype=torch.bool).scatter_(1, order, True)
            assert torch.equal(row_smallest(score, count), expected)
        assert torch.equal(score, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_of_parts_is_that_of_a_sort(kind, dtype):
    parts = [numbers(kind, count, dtype, seed=count) for count in (1, 700, 333)]
    parts[1] = parts[1].view(20, 35)
    every = torch.cat([part.flatten() for part in parts]).float().sort().values
    for rank in (-1, 0, 0.5, 1, 1.5, 2, 400.01, len(every) / 2, len(every) - 0.5, len(every), len(every) + 7):
        value, below, equal = threshold(lambda: iter(parts), rank)
        assert value == every[min(max(math.ceil(rank), 1), len(every)) - 1].item()
        assert below == [(part < value).sum().item() for part in parts]
        assert equal == [(part == value).sum().item() for part in parts]


@pytest.mark.gpu
def test_selections_on_cuda_do_as_on_the_cpu():
    for dtype in DTYPES:
        for kind in KINDS:
            score = numbers(kind, 8 * 125, dtype).view(8, 125)
            assert nth_smallest(score.cuda(), 400).item() == nth_smallest(score, 400).item()
            assert torch.equal(row_smallest(score.cuda(), 50).cpu(), row_smallest(score, 50))
            assert threshold(lambda score=score: [score.cuda()], 400) == threshold(lambda score=score: [score], 400)
