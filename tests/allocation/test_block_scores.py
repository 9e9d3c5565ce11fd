"""The allocations of other papers and mixed N:M: definitions written slowly, and cases that a pencil can check."""

import math
import random

import pytest
import torch
from conftest import tiny_llama
from test_formulas import budget_of, layers_of, llama_like
from test_price_model import Oracle
from torch import nn

from lib.allocation import block_scores
from lib.allocation.formulas import ALLOCATIONS, mixed_nm
from lib.calibration.hidden import enter_blocks
from lib.core.errors import UserError
from lib.models.layers import Layer
from lib.models.weights import Weights, weights_of

EXACT = 1e-9  # sums of at most a few hundred float64


def square_blocks(count: int) -> list[Layer]:
    return layers_of([[(8, 8)]] * count)


def by_block(layers, ratios) -> list[float]:
    return [ratios[next(x.name for x in layers if x.block == b)] for b in range(1 + layers[-1].block)]


@pytest.mark.parametrize(("name", "flag"), [("owl", "owl_lambda"), ("dlp", "dlp_alpha")])
def test_owl_and_dlp_by_the_papers_formulas(name, flag):
    draw, layers, width = random.Random(0), llama_like(12), 0.08
    scores = [draw.uniform(1, 9) for _ in range(12)]
    ratios = ALLOCATIONS[name].share(layers, 0.7, {x.name: scores[x.block] for x in layers}, **{flag: width})
    importance = scores if name == "owl" else [1 - score / sum(scores) for score in scores]
    low, high = min(importance), max(importance)
    density = [2 * width * (i - low) / (high - low) for i in importance]
    assert by_block(layers, ratios) == pytest.approx([1 - (d - sum(density) / 12 + 0.3) for d in density], abs=EXACT)
    # OWL prunes the block with the most outliers least, DLP the one with the largest median most.
    pruned_most = max(range(12), key=by_block(layers, ratios).__getitem__)
    assert scores[pruned_most] == (min(scores) if name == "owl" else max(scores))


def test_atp_is_an_arithmetic_progression():
    layers = llama_like(30)
    ratios = by_block(layers, ALLOCATIONS["atp"].share(layers, 0.7, None, atp_beta=0.005))
    assert ratios == pytest.approx([0.7 - 0.005 * 29 / 2 + 0.005 * i for i in range(30)], abs=EXACT)


def test_erdos_renyi_by_bisection():
    layers = llama_like(3, width=64, inner=172, kv=16)
    ratios = ALLOCATIONS["er"].share(layers, 0.6)
    shapes = {x.name: x.shape for x in layers}
    low, high = 0.0, 1e9
    for _ in range(200):
        scale = (low + high) / 2
        density = {name: min(1.0, scale * (a + b) / (a * b)) for name, (a, b) in shapes.items()}
        kept = budget_of(layers, density)
        low, high = (scale, high) if kept < 0.4 else (low, scale)
    assert ratios == pytest.approx({name: 1 - d for name, d in density.items()}, abs=1e-9)
    large, small = layers[4].name, layers[1].name
    assert ratios[large] > ratios[small]


def test_erdos_renyi_plus_keeps_the_last_block():
    layers = llama_like(4, width=64, inner=172)
    ratios = ALLOCATIONS["er_plus"].share(layers, 0.5)
    assert {ratios[x.name] for x in layers if x.block == 3} == {0.0}
    rest = [x for x in layers if x.block < 3]
    assert {x.name: ratios[x.name] for x in rest} == pytest.approx(ALLOCATIONS["er"].share(rest, 0.5 * 4 / 3), abs=1e-9)
    with pytest.raises(UserError, match="last block"):
        ALLOCATIONS["er_plus"].share(layers, 0.8)


def filled(*matrices) -> Weights:
    """Return the weights of a model each of whose blocks is one linear layer."""
    blocks = nn.ModuleList()
    for values in matrices:
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(torch.as_tensor(values, dtype=torch.float32).clone(), requires_grad=False)
        blocks.append(linear)
    layers = [Layer(f"blocks.{i}", i, tuple(block.weight.shape)) for i, block in enumerate(blocks)]
    return Weights(nn.ModuleDict({"blocks": blocks}), blocks, layers)


def test_lamp_by_pencil():
    # Squares 1 4 9 16, suffix sums 30 29 25 16.
    expected = torch.tensor([[16 / 16, 9 / 25, 1 / 30, 4 / 29]])
    assert torch.allclose(block_scores.lamp_score(torch.tensor([[4.0, -3.0, 1.0, 2.0]])), expected, rtol=1e-7)
    # Of equal weights each counts all of them, and a layer of zeros has no score.
    equal = torch.tensor([[1.0, -1.0, 1.0]])
    assert torch.allclose(block_scores.lamp_score(equal), torch.full((1, 3), 1 / 3), rtol=1e-7)
    assert block_scores.lamp_score(torch.zeros(2, 2)).eq(0).all()


@pytest.mark.parametrize("score", block_scores.WEIGHT_SCORES.values(), ids=block_scores.WEIGHT_SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # half precision: thousands of equal weights
def test_shares_below_are_those_of_a_sort(score, dtype):
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(30 + 7 * i, 40, generator=generator).mul(0.1 + i).to(dtype).float() for i in range(4)]
    weights = filled(*matrices)
    every = torch.cat([score(w).flatten() for w in matrices]).double()
    for target in (0.1, 0.5, 0.77, 0.95):
        shares = block_scores.shares_below(weights, target, score)
        assert budget_of(weights.layers, shares) == pytest.approx(target, abs=1e-12)
        threshold = every.sort().values[math.ceil(target * len(every)) - 1]
        for weight, share in zip(matrices, shares.values(), strict=True):
            scores = score(weight).double()
            below, upto = (mask.double().mean().item() for mask in (scores < threshold, scores <= threshold))
            assert below - 1e-12 <= share <= upto + 1e-12


def test_block_scores_by_pencil():
    scores = [torch.tensor([[1.0, 1.0], [1.0, 17.0]]), torch.tensor([[0.0, 2.0]])]
    assert block_scores.outlier_ratio(scores, 2) == pytest.approx(100 / 6)  # the mean is 22 / 6
    assert block_scores.outlier_ratio(scores, 5) == 0
    assert block_scores.median_score(scores) == 1.0  # of 0 1 1 1 2 17, the lower one


def test_dense_statistics_are_those_of_whole_passes(tiny_windows):
    weights, scores = weights_of(tiny_llama()), Oracle(tiny_windows).scores
    before, layers = weights.snapshot(), weights.layers
    medians = block_scores.score_blocks(weights, enter_blocks(weights, tiny_windows), block_scores.median_score)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.snapshot().items())
    for layer in layers:
        block = sorted(sum((row for x in layers if x.block == layer.block for row in scores[x.name]), []))
        # The oracle's sums are of all windows, in float64; lib's are means over them, in float32.
        wanted = block[(len(block) - 1) // 2] / math.sqrt(len(tiny_windows))
        assert medians[layer.name] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("keep", "group"), [(4, 8), (2, 8), (5, 8), (2, 4), (8, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_mixed_nm_keeps_the_budget(keep, group, seed, caplog):
    draw = random.Random(seed)
    layers = llama_like(32)
    target = 1 - keep / group
    values = {x.name: draw.uniform(1, 9) for x in layers}
    ratios = ALLOCATIONS["ww"].share(layers, target, values, epsilon=0.3, mapping_type="block_wise")
    nm = mixed_nm(layers, ratios, target, group)
    assert all(m == group and 0 < n <= m for n, m in nm.values())
    assert len(set(nm.values())) > 1
    reached = {name: 1 - n / m for name, (n, m) in nm.items()}
    assert budget_of(layers, reached) == pytest.approx(target, abs=1e-3)
    assert all(abs(reached[x.name] - ratios[x.name]) < 1.5 / group for x in layers if ratios[x.name] < 1 - 1 / group)
    assert not [r for r in caplog.records if "mixed" in r.getMessage()]


def test_mixed_nm_by_pencil():
    layers = square_blocks(4)
    ratios = dict(zip([x.name for x in layers], [0.30, 0.45, 0.55, 0.70], strict=True))
    # Eighths 2.4 3.6 4.4 5.6: two steps are left for the largest remainders.
    assert [n for n, _ in mixed_nm(layers, ratios, 0.5, 8).values()] == [6, 4, 4, 2]


def test_mixed_nm_warns_when_the_budget_is_out_of_reach(caplog):
    layers = square_blocks(1)
    mixed_nm(layers, {layers[0].name: 0.3}, 0.3, 4)
    assert "0.2500" in caplog.text and "0.3000" in caplog.text
