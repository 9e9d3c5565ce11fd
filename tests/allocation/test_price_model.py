"""Prices of a language model against finite differences, and a walk over the blocks that leaves nothing behind."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lib.allocation.price import EFFORTS
from lib.allocation.price_model import BAND, LanguagePriceModel, band_price, pruned_copy, row_ranks
from lib.core.errors import UserError
from lib.models import memory
from lib.models.layers import Layer
from lib.models.weights import weights_of
from lib.pruning.pruners import magnitude, wanda
from lib.recovery import block_walk

WINDOWS = torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(1))
HELD = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(2))


def float64_norm(self, hidden: torch.Tensor) -> torch.Tensor:
    """Return what transformers' norm computes in float32 only, whose noise would drown a difference."""
    return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def exact_weights():
    return weights_of(tiny_llama().double())


def prices_of(weights, windows=(WINDOWS, WINDOWS), effort=EFFORTS["full"], dtype=None, by_magnitude=False):
    """Return the price model of ``weights`` for these windows: of calibration, and held out."""
    return LanguagePriceModel(weights, windows, effort, dtype, by_magnitude)


def some_ratios(weights, seed: int = 3) -> dict[str, float]:
    draw = random.Random(seed)
    return {layer.name: draw.uniform(0.2, 0.8) for layer in weights.layers}


class PriceOracle:
    """Ranks by a plain sort, and prices by differences of a KL that a subclass defines.

    Attributes:
        dense: weights by layer name.
        scores: by layer name, as lists: rows of scores that compete with each other.
    """

    def __init__(self, dense: dict[str, torch.Tensor], scores: dict[str, list[list[float]]]) -> None:
        self.dense, self.scores, self.ranks = dense, scores, {}
        for name, score in scores.items():
            self.ranks[name] = rank = torch.zeros(len(score), len(score[0]), dtype=torch.long)
            for i, row in enumerate(score):
                for place, column in enumerate(sorted(range(len(row)), key=lambda j: (row[j], j))):
                    rank[i, column] = place

    def masked(self, ratios: dict[str, float]) -> dict[str, torch.Tensor]:
        kept = {name: rank >= int(rank.shape[1] * ratios[name]) for name, rank in self.ranks.items()}
        return {name: weight * kept[name].view_as(weight) for name, weight in self.dense.items()}

    def price(self, name: str, ratios: dict[str, float], batch: list[int]) -> float:
        """Return the central difference of the KL along the weights in the band around the threshold.

        Its error is step^2 of a third derivative of order 1, by the width: 1e-7.
        """
        step, masked, dense, rank = 1e-4, self.masked(ratios), self.dense[name], self.ranks[name]
        columns = rank.shape[1]
        middle, half = int(columns * ratios[name]), max(1, int(BAND / 2 * columns))
        low, high = max(0, middle - half), min(columns, middle + half)
        band = dense * ((rank >= low) & (rank < high)).view_as(dense)
        kls = [self.kl(masked | {name: masked[name] - sign * step * band}, batch) for sign in (1, -1)]
        return (kls[0] - kls[1]) / (2 * step) * columns / (high - low)


class Oracle(PriceOracle):
    """KL of a pruned copy of the tiny model, in plain loops over whole models in float64."""

    def __init__(self, windows: torch.Tensor, by_magnitude: bool = False, every: int = 2) -> None:
        self.model, self.windows, self.counted = tiny_llama().double(), windows, slice(every - 1, None, every)
        self.layers = {n: m for n, m in self.model.model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.layers = {f"model.{name}": module for name, module in self.layers.items()}
        squares = dict.fromkeys(self.layers, 0)

        def add(_, args, name: str) -> None:
            squares[name] = squares[name] + args[0].detach().flatten(0, 1).square().sum(0)

        hooks = [module.register_forward_pre_hook(partial(add, name=name)) for name, module in self.layers.items()]
        with torch.no_grad():
            self.logits = [self.model(window[None]).logits[0, self.counted] for window in windows]
        for handle in hooks:
            handle.remove()
        dense = {name: module.weight.detach().clone() for name, module in self.layers.items()}
        scores = {name: (weight.abs() * squares[name].sqrt()).tolist() for name, weight in dense.items()}
        if by_magnitude:
            scores = {name: [weight.abs().flatten().tolist()] for name, weight in dense.items()}
        super().__init__(dense, scores)

    def kl(self, weights: dict[str, torch.Tensor], batch: list[int]) -> float:
        for name, module in self.layers.items():
            module.weight.data = weights[name]
        total = []
        with torch.no_grad():
            for i in batch:
                ours = torch.log_softmax(self.model(self.windows[i][None]).logits[0, self.counted], -1)
                dense = torch.log_softmax(self.logits[i], -1)
                total.append((dense.exp() * (dense - ours)).sum(-1).mean().item())
        return sum(total) / len(total)


@pytest.mark.parametrize(("by_magnitude", "effort"), [(False, "full"), (True, "quick")])
def test_prices_are_derivatives_along_the_band(by_magnitude, effort, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)
    effort = EFFORTS[effort]
    weights, oracle, batch = exact_weights(), Oracle(WINDOWS, by_magnitude, effort.token_stride), [4, 1]
    ratios = some_ratios(weights)
    model = prices_of(weights, effort=effort, by_magnitude=by_magnitude)
    for name, rank in oracle.ranks.items():
        assert torch.equal(model.masks.ranks[name].long(), rank), name
    loss, prices = model.prices(ratios, batch)
    assert loss == pytest.approx(oracle.kl(oracle.masked(ratios), batch), rel=1e-11)
    for name in oracle.dense:
        assert prices[name] == pytest.approx(oracle.price(name, ratios, batch), rel=1e-5, abs=1e-7), name


@pytest.mark.slow
def test_prices_tell_what_a_change_of_ratio_costs():
    # With everything else dense KL is nearly quadratic in what is removed, where the mean of both ends is exact but for
    # what differs between the halves of the band; so is the whole model's in the sum, over wider bands of one matrix.
    weights, oracle, batch = exact_weights(), Oracle(WINDOWS), list(range(len(WINDOWS)))
    model = prices_of(weights)
    wanted, prices = [], []
    for name, dense in oracle.dense.items():
        ratios = dict.fromkeys(oracle.dense, 0.0) | {name: 0.5}
        half = max(1, int(BAND / 2 * dense.shape[1])) / dense.shape[1]
        ends = [oracle.kl(oracle.masked(ratios | {name: 0.5 + sign * half}), batch) for sign in (1, -1)]
        wanted.append((ends[0] - ends[1]) / (2 * half))
        prices.append(model.prices(ratios, batch)[1][name])
    assert all(x > 0 for x in wanted)
    assert np.corrcoef(np.log(wanted), np.log(prices))[0, 1] > 0.99
    assert sum(prices) == pytest.approx(sum(wanted), rel=0.1)


def test_what_costs_nothing_has_no_price():
    model = tiny_llama().double()
    nothing = {layer.name: 0.0 for layer in weights_of(model).layers}
    prices = prices_of(weights_of(model))
    loss, slopes = prices.prices(nothing, [0])
    assert prices.kl(nothing) == loss == 0 and all(abs(slope) < 1e-12 for slope in slopes.values())  # a minimum

    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    _, slopes = prices_of(weights_of(model)).prices(some_ratios(weights_of(model)), [0, 1])
    assert all((slope == 0) == (".1." in name) for name, slope in slopes.items())  # block 1 changes nothing


def test_half_precision_neither_underflows_nor_overflows():
    models = [tiny_llama() for _ in range(2)]
    for model in models:
        model.lm_head.weight.data.mul_(2e-3)  # gradients of 1e-7 and less, which float16 does not have
    exact, half = prices_of(weights_of(models[0].double())), prices_of(weights_of(models[1].half()))
    ratios = some_ratios(exact.weights)
    half.masks.ranks = exact.masks.ranks
    wanted, prices = exact.prices(ratios, [0, 1])[1], half.prices(ratios, [0, 1])[1]
    assert max(abs(value) for value in wanted.values()) < 1e-4
    size = math.sqrt(sum(value**2 for value in wanted.values()))
    # float16's 2^-11 at each of some tens of roundings on the way, against the prices' size
    assert math.dist(list(wanted.values()), [prices[name] for name in wanted]) < 0.02 * size


def test_ranks_by_pencil():
    score = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert row_ranks(score).tolist() == [[3, 0, 2, 1], [0, 1, 2, 3]]
    assert row_ranks(score).dtype == torch.int16
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert pruned_copy(weight, row_ranks(score[:1]), 0.5).tolist() == [[5, 0, 7, 0]]
    # The band of 4 columns at 0.5 is ranks 1 and 2: -(7 * 10 + 8 * 100) / (2 / 4).
    gradient = torch.tensor([[1.0, 1e6, 10.0, 100.0]])
    assert band_price(gradient, weight, row_ranks(score[:1]), 0.5).item() == -1740
    assert band_price(gradient, weight, row_ranks(score[:1]), 0.0).item() == -6e6 * 4  # cut: rank 0 alone
    assert row_ranks(torch.zeros(1, 2**15 + 1))[0, -1] == 2**15  # int16 would not hold it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ranks_of_every_dtype_are_those_of_a_plain_sort(dtype):
    score = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype).abs()
    score[:, ::7], score[1, :9], score[2, 3] = score[:, :1], 0, torch.finfo(dtype).max
    for row, ranks in zip(score.tolist(), row_ranks(score).tolist(), strict=True):
        assert [ranks[j] for j in sorted(range(300), key=lambda j: (row[j], j))] == list(range(300))


def test_ranks_prune_what_wanda_prunes():
    draw = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(7, 40, generator=draw), torch.rand(40, generator=draw)
    weight = (weight * 4).round()  # ties
    rank = row_ranks(weight.abs() * norms.sqrt())
    for ratio in (0.0, 0.01, 0.3, 0.55, 0.999, 1.0):
        assert torch.equal(pruned_copy(weight, rank, ratio), wanda(weight, norms, ratio, None)), ratio


def test_ranks_by_magnitude_prune_what_magnitude_prunes():
    model = tiny_llama()
    ratios = some_ratios(weights_of(model))
    ranks = prices_of(weights_of(model), by_magnitude=True).masks.ranks
    for block in weights_of(model).visit():
        for name, linear in block.linears.items():
            ours = pruned_copy(linear.weight.detach(), ranks[name], ratios[name]) == 0
            theirs = magnitude(linear.weight.detach(), None, ratios[name], None) == 0
            assert (ours <= theirs).all() and theirs.sum() == ours.sum() + 1, name  # its threshold is inclusive


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_prices_are_the_same_to_the_bit_whether_activations_are_kept_or_not(dtype):
    weights = weights_of(tiny_llama())
    ratios, calls, model = some_ratios(weights), [], prices_of(weights, dtype=dtype)
    for block in weights.visit():
        block.module.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    prices = []
    for keeps in (False, True):
        model.walk = model.walk._replace(keeps_activations=keeps)
        calls.clear()
        prices.append(model.prices(ratios, [4, 1]))
        blocks = 1 + weights.layers[-1].block
        assert sorted(calls) == [False] * (0 if keeps else 2 * blocks) + [True] * 2 * blocks
    assert prices[0] == prices[1]
    assert all(p.grad is None for p in weights.model.parameters())


@pytest.mark.parametrize("effort", EFFORTS.values())
def test_activations_are_kept_where_there_is_room(effort, monkeypatch):
    weights = weights_of(tiny_llama())
    layers, step, windows = weights.layers, effort.windows_per_step, len(WINDOWS) + len(HELD)
    need = memory.rank_bytes(layers)
    need += memory.price_working_set(weights.model, layers, torch.float32, 24, step, windows)
    every = need + memory.activation_bytes(layers, torch.float32, 24 * step)
    limit = block_walk.KEEP_WITHIN
    for free, keeps in ((need, False), (every / limit - 1, False), (every / limit + 1, True)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: {"cpu": free})
        assert prices_of(weights, (WINDOWS, HELD), effort).walk.keeps_activations is keeps
    copies = 4 * sum(layer.size for layer in layers)
    assert memory.activation_bytes(layers, torch.float32, 48 * step) - copies == 2 * (every - need - copies)


def test_what_does_not_fit_is_refused(monkeypatch):
    weights = weights_of(tiny_llama())
    monkeypatch.setattr(memory, "free_memory", lambda _: {"cpu": 10_000})
    with pytest.raises(UserError, match=r"_price: .* are needed in the CPU's memory .* are free"):
        prices_of(weights)
    monkeypatch.setattr(type(weights), "in_memory", False)
    with pytest.raises(UserError, match="streamed or offloaded"):
        prices_of(weights)


def test_ranks_take_two_bytes_where_they_fit():
    layers = weights_of(tiny_llama()).layers
    assert memory.rank_bytes(layers) == 2 * sum(layer.size for layer in layers)
    assert memory.rank_bytes([Layer("wide", 0, (3, 2**15 + 1))]) == 4 * 3 * (2**15 + 1)
    assert memory.rank_bytes([Layer("narrow", 0, (2**8, 2**8))], whole=True) == 4 * 2**16
