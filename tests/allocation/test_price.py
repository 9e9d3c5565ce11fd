"""Prices against finite differences, the budget, and a search that leaves nothing behind."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings, tiny_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import main
from lib.allocation import price
from lib.allocation.price import (
    BAND,
    EFFORTS,
    LEAST,
    MOST,
    Options,
    Prices,
    next_logits,
    pruned,
    row_ranks,
    search,
    within_budget,
)
from lib.core.errors import UserError
from lib.models.layers import Layer
from lib.models.weights import weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS, magnitude, wanda
from lib.pruning.walk import walk

WINDOWS = torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(1))
HELD = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def exact(monkeypatch):
    """Let the norms keep to float64, which transformers' own leave for float32: its noise would drown a difference."""

    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def exact_weights():
    return weights_of(tiny_llama().double())


def some_ratios(weights, seed: int = 3) -> dict[str, float]:
    draw = random.Random(seed)
    return {layer.name: draw.uniform(0.2, 0.8) for layer in weights.layers}


# -------------------------------------------------------------------------------------------------- slow and by itself


class Oracle:
    """KL of a pruned copy of the tiny model, and its ranks, in plain loops over whole models in float64."""

    def __init__(self, windows: torch.Tensor, by_magnitude: bool = False, every: int = 2) -> None:
        self.model, self.windows, self.counted = tiny_llama().double(), windows, slice(every - 1, None, every)
        self.layers = {n: m for n, m in self.model.model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.layers = {f"model.{name}": module for name, module in self.layers.items()}
        self.dense = {name: module.weight.detach().clone() for name, module in self.layers.items()}
        squares = {}

        def watch(name):
            def hook(_, args):
                squares[name] = squares.get(name, 0) + args[0].detach().flatten(0, 1).square().sum(0)

            return hook

        hooks = [module.register_forward_pre_hook(watch(name)) for name, module in self.layers.items()]
        with torch.no_grad():
            self.logits = [self.model(window[None]).logits[0, self.counted] for window in windows]
        for hook in hooks:
            hook.remove()
        self.ranks = {}
        for name, weight in self.dense.items():
            score = (weight.abs() * squares[name].sqrt()).tolist()
            if by_magnitude:
                score = [weight.abs().flatten().tolist()]
            rank = torch.zeros(len(score), len(score[0]), dtype=torch.long)
            for i, row in enumerate(score):
                for place, column in enumerate(sorted(range(len(row)), key=lambda j: (row[j], j))):
                    rank[i, column] = place
            self.ranks[name] = rank

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

    def masked(self, ratios: dict[str, float]) -> dict[str, torch.Tensor]:
        kept = {name: rank >= int(rank.shape[1] * ratios[name]) for name, rank in self.ranks.items()}
        return {name: weight * kept[name].view_as(weight) for name, weight in self.dense.items()}


@pytest.mark.parametrize(("by_magnitude", "effort"), [(False, "full"), (True, "quick")])
def test_prices_are_derivatives_along_the_band(exact, by_magnitude, effort):
    every = EFFORTS[effort].every
    weights, oracle, batch = exact_weights(), Oracle(WINDOWS, by_magnitude, every), [4, 1]
    ratios = some_ratios(weights)
    options = Options(by_magnitude=by_magnitude, effort=EFFORTS[effort])
    mine = Prices(weights, WINDOWS, options)
    for name, rank in oracle.ranks.items():
        assert torch.equal(mine.ranks[name].long(), rank), name
    loss, found = mine.prices(ratios, batch)
    masked = oracle.masked(ratios)
    assert loss == pytest.approx(oracle.kl(masked, batch), rel=1e-11)
    step = 1e-4
    for name, dense in oracle.dense.items():
        columns = oracle.ranks[name].shape[1]
        middle, half = int(columns * ratios[name]), max(1, int(BAND / 2 * columns))
        inside = (oracle.ranks[name] >= middle - half) & (oracle.ranks[name] < middle + half)
        band = dense * inside.view_as(dense)
        kls = [oracle.kl(masked | {name: masked[name] - sign * step * band}, batch) for sign in (1, -1)]
        share = min(columns, middle + half) - max(0, middle - half)
        # The error of a central difference is step^2 of a third derivative of order 1, by the width: 1e-7.
        assert found[name] == pytest.approx((kls[0] - kls[1]) / (2 * step) * columns / share, rel=1e-5, abs=1e-7), name


def test_prices_tell_what_a_change_of_ratio_costs():
    # With everything else dense KL is nearly quadratic in what is removed, where the mean of both ends is exact but for
    # what differs between the halves of the band; so is the whole model's in the sum, over wider bands of one matrix.
    weights, oracle, batch = exact_weights(), Oracle(WINDOWS), list(range(len(WINDOWS)))
    mine = Prices(weights, WINDOWS, Options())
    wanted, found = [], []
    for name, dense in oracle.dense.items():
        ratios = dict.fromkeys(oracle.dense, 0.0) | {name: 0.5}
        half = max(1, int(BAND / 2 * dense.shape[1])) / dense.shape[1]
        ends = [oracle.kl(oracle.masked(ratios | {name: 0.5 + sign * half}), batch) for sign in (1, -1)]
        wanted.append((ends[0] - ends[1]) / (2 * half))
        found.append(mine.prices(ratios, batch)[1][name])
    assert all(x > 0 for x in wanted)
    assert np.corrcoef(np.log(wanted), np.log(found))[0, 1] > 0.99
    assert sum(found) == pytest.approx(sum(wanted), rel=0.1)


def test_nothing_removed_is_no_loss_and_no_price_beyond_its_band():
    weights = exact_weights()
    nothing = dict.fromkeys((layer.name for layer in weights.layers), 0.0)
    mine = Prices(weights, WINDOWS, Options())
    assert mine.kl(nothing) == 0
    loss, found = mine.prices(nothing, [0])
    assert loss == 0 and all(abs(value) < 1e-12 for value in found.values())  # a minimum


def test_permuting_hidden_units_changes_no_price(exact):
    one, other = tiny_llama().double(), tiny_llama().double()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for block in other.model.layers:
        block.mlp.gate_proj.weight.data = block.mlp.gate_proj.weight.data[order]
        block.mlp.up_proj.weight.data = block.mlp.up_proj.weight.data[order]
        block.mlp.down_proj.weight.data = block.mlp.down_proj.weight.data[:, order]
    ratios = some_ratios(weights_of(one))
    prices = [Prices(weights_of(model), WINDOWS, Options()).prices(ratios, [0, 3])[1] for model in (one, other)]
    assert prices[0] == pytest.approx(prices[1], rel=1e-9)


def test_what_does_not_matter_is_free_and_equal():
    model = tiny_llama().double()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    _, found = Prices(weights_of(model), WINDOWS, Options()).prices(some_ratios(weights_of(model)), [0, 1])
    dead = {value for name, value in found.items() if ".1." in name}
    assert {abs(value) for value in dead} == {0.0} and all(found[name] for name in found if ".1." not in name)


def test_half_precision_neither_underflows_nor_overflows():
    # Gradients of 1e-7 and less, which float16 does not have: the head is small.
    def model(dtype):
        made = tiny_llama()
        made.lm_head.weight.data.mul_(2e-3)
        return weights_of(made.to(dtype))

    exact = Prices(model(torch.float64), WINDOWS, Options())
    ratios = some_ratios(exact.weights)
    half = Prices(model(torch.float16), WINDOWS, Options(), {name: rank.clone() for name, rank in exact.ranks.items()})
    wanted, found = exact.prices(ratios, [0, 1])[1], half.prices(ratios, [0, 1])[1]
    assert max(abs(value) for value in wanted.values()) < 1e-4
    size = math.sqrt(sum(value**2 for value in wanted.values()))
    # float16's 2^-11 at each of some tens of roundings on the way, against the prices' size
    assert math.dist(list(wanted.values()), [found[name] for name in wanted]) < 0.02 * size


# ------------------------------------------------------------------------------------------------- ranks and the budget


def test_ranks_by_pencil():
    score = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert row_ranks(score).tolist() == [[3, 0, 2, 1], [0, 1, 2, 3]]
    assert row_ranks(score).dtype == torch.int16
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert pruned(weight, row_ranks(score[:1]), 0.5).tolist() == [[5, 0, 7, 0]]
    # The band of 4 columns at 0.5 is ranks 1 and 2: -(7 * 10 + 8 * 100) / (2 / 4).
    gradient = torch.tensor([[1.0, 1e6, 10.0, 100.0]])
    assert price.band_price(gradient, weight, row_ranks(score[:1]), 0.5).item() == -1740
    assert price.band_price(gradient, weight, row_ranks(score[:1]), 0.0).item() == -6e6 * 4  # cut: rank 0 alone
    assert row_ranks(torch.zeros(1, 2**15 + 1))[0, -1] == 2**15  # int16 would not hold it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ranks_of_every_dtype_are_those_of_a_plain_sort(dtype):
    score = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype).abs()
    score[:, ::7], score[1, :9], score[2, 3] = score[:, :1], 0, torch.finfo(dtype).max
    for row, ranks in zip(score.tolist(), row_ranks(score).tolist(), strict=True):
        assert [ranks[j] for j in sorted(range(300), key=lambda j: (row[j], j))] == list(range(300))


@pytest.mark.parametrize("seed", range(3))
def test_ranks_prune_what_wanda_prunes(seed):
    draw = torch.Generator().manual_seed(seed)
    weight, norms = torch.randn(7, 40, generator=draw), torch.rand(40, generator=draw)
    weight = (weight * 4).round()  # ties
    rank = row_ranks(weight.abs() * norms.sqrt())
    for ratio in (0.0, 0.01, 0.3, 0.55, 0.999, 1.0):
        assert torch.equal(pruned(weight, rank, ratio), wanda(weight, norms, ratio, None)), ratio


def test_ranks_by_magnitude_prune_what_magnitude_prunes():
    model = tiny_llama()
    ratios = some_ratios(weights_of(model))
    mine = Prices(weights_of(model), WINDOWS, Options(by_magnitude=True))
    for block in weights_of(model).visit():
        for name, linear in block.linears.items():
            ours = pruned(linear.weight.detach(), mine.ranks[name], ratios[name]) == 0
            theirs = magnitude(linear.weight.detach(), None, ratios[name], None) == 0
            assert (ours <= theirs).all() and theirs.sum() == ours.sum() + 1, name  # its threshold is inclusive


def test_a_search_for_magnitude_looks_at_magnitudes_masks():
    for method, own in (("magnitude_price --refit 2", True), ("magnitude_price", True), ("alps_price", False)):
        assert settings(f"--model x --sparsity_ratio 0.5 --prune_method {method}").task().by_magnitude is own
    weights = weights_of(tiny_llama())
    found = search(weights, (WINDOWS, HELD), 0.5, None, Options(1, by_magnitude=True))
    uniform = dict.fromkeys(found.ratios, 0.5)
    mine, wandas = (Prices(weights, WINDOWS, Options(by_magnitude=own)).ranks for own in (True, False))
    assert found.held["uniform"] == Prices(weights, HELD, Options(), mine).kl(uniform)
    assert found.held["uniform"] != Prices(weights, HELD, Options(), wandas).kl(uniform)


@pytest.mark.parametrize("target", [0.0005, 0.01, 0.3, 0.5, 0.7, 0.95, 0.97, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_met_to_rounding(seed, target):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 10**8) for _ in range(200)]
    ratios = within_budget([draw.gauss(0, 5 * seed) for _ in sizes], sizes, target)
    assert math.fsum(n * s for n, s in zip(sizes, ratios, strict=True)) / sum(sizes) == pytest.approx(target, abs=1e-12)
    usual = 0.004 <= target <= 0.96
    assert all(LEAST <= s <= MOST if usual else 0 < s < 1 for s in ratios)
    if not seed:
        assert ratios == pytest.approx([target] * len(sizes), abs=1e-12)


def test_a_step_by_pencil():
    # Weights of n s (1 - s): 1 and 1, so the mean price is 2; logs of 1/2 and 3/2, at logits of 0.
    logits, spread = next_logits([0.5, 0.5], [1.0, 3.0], [4, 4], 0.5, 0.25)
    assert logits == pytest.approx([0.25 * math.log(2), -0.25 * math.log(1.5)])
    assert spread == pytest.approx((math.log(2) + math.log(1.5)) / 2)
    # No price moves a logit by more than the step; one that is not positive counts as cheapest.
    logits, _ = next_logits([0.5] * 4, [-1.0, 0.0, 1e9, 1.0], [1] * 4, 0.5, 0.25)
    assert logits == pytest.approx([0.25, 0.25, -0.25, 0.25])


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_equal_prices_move_nothing_and_scale_does_not_matter(scale):
    ratios, sizes = [0.2, 0.5, 0.9], [10, 20, 30]
    logits, spread = next_logits(ratios, [scale] * 3, sizes, 0.6, 0.25)
    assert [1 / (1 + math.exp(-x)) for x in logits] == pytest.approx(ratios, abs=1e-12) and spread < 1e-12
    moved, _ = next_logits(ratios, [scale, 2 * scale, 3 * scale], sizes, 0.6, 0.25)
    assert moved == pytest.approx(next_logits(ratios, [1, 2, 3], sizes, 0.6, 0.25)[0], abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- the search


def trained() -> tuple:
    """Return a tiny model that has learnt to continue arithmetic sequences, and windows of these."""
    draw = torch.Generator().manual_seed(0)
    starts, strides = torch.randint(0, 300, (400, 1), generator=draw), torch.randint(1, 6, (400, 1), generator=draw)
    windows = 3 + (starts + strides * torch.arange(24)) % 290
    model = tiny_llama()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(120):
        batch = windows[(step * 16) % 368 :][:16]
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return weights_of(model.eval()), windows[-24:-8], windows[-8:]


def test_a_search_improves_on_uniform_and_says_what_it_kept():
    weights, fit, held = trained()
    found = search(weights, (fit, held), 0.5, None, Options(12))
    uniform = dict.fromkeys(found.ratios, 0.5)
    mine = Prices(weights, fit, Options())
    assert found.kept == "end" and mine.kl(found.ratios) < 0.9 * mine.kl(uniform)
    others = Prices(weights, held, Options(), mine.ranks)
    assert found.held == {"uniform": others.kl(uniform), "end": others.kl(found.ratios)}
    assert found.held["end"] < found.held["uniform"] and found.steps[-1].held == found.held["end"]
    assert [step.held is None for step in found.steps] == [i % 4 != 3 for i in range(12)]
    assert all(0 <= step.spread <= 1 for step in found.steps)
    assert found.steps[0].fit == pytest.approx(mine.prices(uniform, random.Random(0).sample(range(16), 16)[:2])[0])


@pytest.mark.parametrize("refresh", [0, 2])
@pytest.mark.parametrize("start", [None, 0.9])
def test_a_search_repeats_itself_and_leaves_the_weights_as_they_were(refresh, start):
    weights = weights_of(tiny_llama())
    parameters = dict(weights.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    first = start and {x.name: (start if x.block else 0.1) for x in weights.layers}
    found = [search(weights, (WINDOWS, HELD), 0.6, first, Options(3, refresh)) for _ in range(2)]
    assert found[0] == found[1]  # every bit of it
    total = sum(layer.size for layer in weights.layers)
    if found[0].kept not in ("start", "uniform"):
        assert sum(x.size * found[0].ratios[x.name] for x in weights.layers) / total == pytest.approx(0.6, abs=1e-12)
    assert all(LEAST <= ratio <= MOST for ratio in found[0].ratios.values())
    assert len(found[0].steps) == 3 + refresh
    now = dict(weights.model.named_parameters())
    assert all(now[name] is parameters[name] and torch.equal(now[name], before[name]) for name in before)
    assert all(p.grad is None for p in now.values()) and not any(m._forward_hooks for m in weights.model.modules())


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("options", [Options(4), Options(5, 3), Options(9, effort=EFFORTS["quick"])])
def test_passes_are_those_that_a_search_makes(options, started):
    weights = weights_of(tiny_llama())
    draw = torch.Generator().manual_seed(0)
    fit, held = (torch.randint(3, 300, (count, 8), generator=draw) for count in (price.FIT, options.effort.held))
    calls = []
    for block in weights.visit():
        block.module.register_forward_pre_hook(lambda *_: calls.append(3 if torch.is_grad_enabled() else 1))
    blocks = 1 + weights.layers[-1].block
    start = {layer.name: 0.4 for layer in weights.layers} if started else None
    search(weights, (fit, held), 0.5, start, options)
    assert sum(calls) == blocks * price.forward_passes(options, started)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_prices_are_the_same_to_the_bit_whether_activations_are_held_or_not(dtype):
    weights = weights_of(tiny_llama())
    ratios, calls = some_ratios(weights), []
    for block in weights.visit():
        block.module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = []
    for holds in (False, True):
        mine = Prices(weights, WINDOWS, Options(dtype=dtype), holds=holds)
        calls.clear()
        found.append(mine.prices(ratios, [4, 1]))
        blocks = 1 + weights.layers[-1].block
        assert sorted(calls) == [False] * (0 if holds else 2 * blocks) + [True] * 2 * blocks
    assert found[0] == found[1]
    assert all(p.grad is None for p in weights.model.parameters())


@pytest.mark.parametrize("effort", EFFORTS.values())
def test_activations_are_held_where_there_is_room(effort, monkeypatch):
    weights = weights_of(tiny_llama())
    work = price.working_set(weights.model, weights.layers, torch.float32, 24, effort)
    need, tokens = price.rank_bytes(weights.layers) + work, 24 * effort.batch
    every = need + price.held_bytes(weights.layers, torch.float32, tokens)
    for free, holds in ((need, False), (every / price.HOLD_WITHIN - 1, False), (every / price.HOLD_WITHIN + 1, True)):
        monkeypatch.setattr(price, "free_memory", lambda _, free=free: {"cpu": free})
        assert price.check_memory(weights, 24, Options(effort=effort)) is holds
    copies = 4 * sum(layer.size for layer in weights.layers)
    assert price.held_bytes(weights.layers, torch.float32, 2 * tokens) - copies == 2 * (every - need - copies)


def test_quick_windows_are_half_as_long():
    assert [EFFORTS["quick"].length(n) for n in (2, 3, 512)] == [1, 2, 256]
    assert [EFFORTS["full"].length(n) for n in (2, 3, 512)] == [2, 3, 512]


def test_an_error_leaves_the_weights_as_they_were(monkeypatch):
    weights = weights_of(tiny_llama())
    parameters = dict(weights.model.named_parameters())
    mine = Prices(weights, WINDOWS, Options())

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(price, "band_price", fail)
    with pytest.raises(KeyboardInterrupt):
        mine.prices(some_ratios(weights), [0])
    assert all(p is parameters[name] for name, p in weights.model.named_parameters())


def test_one_gradient_of_a_matrix_is_alive_at_a_time(monkeypatch):
    weights, alive, leaves = weights_of(tiny_llama()), [], []
    parameter, appraise = torch.nn.Parameter, price.band_price

    def noted(*args):
        leaves.append(parameter(*args))
        return leaves[-1]

    def counted(gradient, *rest):
        alive.append(sum(leaf.grad is not None for leaf in leaves))
        return appraise(gradient, *rest)

    mine = Prices(weights, WINDOWS, Options())
    monkeypatch.setattr(torch.nn, "Parameter", noted)
    monkeypatch.setattr(price, "band_price", counted)
    mine.prices(some_ratios(weights), [0, 1, 2])
    assert alive == [1] * len(weights.layers) and not any(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("worst", ["end", "uniform", "start"])
def test_the_best_of_start_end_and_uniform_is_kept(worst, monkeypatch):
    weights = exact_weights()
    layers = weights.layers
    good, bad = dict.fromkeys((x.name for x in layers), 0.3), dict.fromkeys((x.name for x in layers), 0.9)
    end = bad if worst == "end" else good
    steps = [price.Step(0.5, 1.0, 9.0 if worst == "end" else 1e-9)]
    monkeypatch.setattr(price, "_descend", lambda *_: (end, steps))
    start = bad if worst == "start" else good
    found = search(weights, (WINDOWS, HELD), 0.95 if worst == "uniform" else 0.4, start, Options(1))
    assert found.kept == min(found.held, key=found.held.get) != worst
    assert set(found.held) == {"uniform", "start", "end"}
    assert found.ratios == {"uniform": dict.fromkeys(good, 0.4), "start": start, "end": end}[found.kept]


def test_ranks_on_the_pruned_path_are_those_of_the_pruning_walk():
    from lib.calibration.hidden import enter_blocks

    weights = weights_of(tiny_llama())
    ratios = some_ratios(weights)
    ranks = Prices(weights, WINDOWS, Options()).renewed_ranks(ratios)
    expected = weights.map(lambda name, weight: pruned(weight, ranks[name], ratios[name]))
    target = sum(x.size * ratios[x.name] for x in weights.layers) / sum(x.size for x in weights.layers)
    walk(weights, SparsityPlan(target, ratios), PRUNERS["wanda"], enter_blocks(weights, WINDOWS))
    assert all(weights.map(lambda name, weight: torch.equal(weight, expected[name])).values())


# ---------------------------------------------------------------------------------------------------- memory, in words


def test_what_does_not_fit_is_refused_in_one_line(monkeypatch, caplog):
    weights = weights_of(tiny_llama())
    monkeypatch.setattr(price, "free_memory", lambda _: {"cpu": 10_000})
    with pytest.raises(UserError, match=r"_price: .* are needed in the CPU's memory .* are free") as caught:
        search(weights, (WINDOWS, HELD), 0.5)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(type(weights), "in_memory", False)
    with pytest.raises(UserError, match="streamed or offloaded"):
        search(weights, (WINDOWS, HELD), 0.5)


def test_the_need_is_told_before_the_search(caplog):
    weights = weights_of(tiny_llama())
    with caplog.at_level("INFO"):
        search(weights, (WINDOWS, HELD), 0.5, None, Options(1))
    ranks = 2 * sum(layer.size for layer in weights.layers)
    assert price.rank_bytes(weights.layers) == ranks
    assert price.rank_bytes([Layer("wide", 0, (3, 2**15 + 1))]) == 4 * 3 * (2**15 + 1)
    assert price.rank_bytes([Layer("narrow", 0, (2**8, 2**8))], whole=True) == 4 * 2**16
    assert "the price search needs" in caplog.records[0].getMessage()


# --------------------------------------------------------------------------------------------------- the command itself


@pytest.fixture
def run(tiny_folder, tiny_text, other_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work(flags: str, status: int = 0, evaluate: Path = other_text) -> dict:
        texts = ["--calib_data", str(tiny_text), "--eval_data", str(evaluate), "--seqlen", "32", "--nsamples", "4"]
        texts += ["--eval_windows", "8"]
        assert main.main(["--model", str(tiny_folder), *texts, "--save", "save", *flags.split()]) == status
        found = sorted(Path("save").glob("run_*.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(found[-1].read_text()) if found else {}

    return work


def test_a_run_records_the_search_and_its_plan_can_be_used_again(run):
    record = run("--prune_method wanda_price --sparsity_ratio 0.6 --price_steps 5 --save_plan plan.json")
    found = record["price_search"]
    assert len(found["steps"]) == 5 and found["kept"] == min(found["held_out_kl"], key=found["held_out_kl"].get)
    assert Path("save/price_wanda_price_sparsity_0.6.png").read_bytes().startswith(b"\x89PNG")
    again = run("--prune_method wanda --plan plan.json")
    assert (again["perplexity"], again["sparsity"]) == (record["perplexity"], record["sparsity"])
    assert "price_search" not in again


@pytest.mark.parametrize(
    "flags",
    [
        "--prune_method magnitude_price --sparsity_ratio 0.5 --price_start owl --owl_m 3",
        "--prune_method wanda_price --sparsity_ratio 0.5 --price_start ww --epsilon 0.2 --ww_metric entropy",
        "--prune_method magnitude_price --sparsity_ratio 0.5 --price_start atp --price_refresh 1",
        "--prune_method wanda_price --sparsity_type 4:8",
    ],
)
def test_other_starts_and_forms(flags, run):
    record = run(f"{flags} --price_steps 2 --price_dtype float32")
    names = ["uniform", "start", "end"] if "start" in flags else ["uniform", "end"]
    names += ["before refresh", "refreshed"] if "refresh" in flags else []
    assert list(record["price_search"]["held_out_kl"]) == names and record["price_search"]["dtype"] == "float32"
    assert record["sparsity"] == pytest.approx(0.5, abs=1 / 32)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prune_method wanda --sparsity_ratio 0.5 --price_steps 3", "--price_steps does nothing with wanda"),
        ("--prune_method wanda_price --sparsity_ratio 0.5 --price_start price", "--price_start price: invalid choice"),
        ("--prune_method wanda_price --sparsity_ratio 0.5 --epsilon 0.2", "--epsilon does nothing with wanda_price"),
        ("--prune_method wanda_price --sparsity_ratio 0.5 --price_start ww --epsilon auto", "--epsilon auto with"),
        ("--prune_method wanda_price --sparsity_ratio 0.5 --stream always --save_model kept", "--stream always, and"),
        ("--prune_method wanda_price --sparsity_ratio 0.5 --price_steps 0", "--price_steps 0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(flags, words, run, capsys):
    run(flags, 2)
    assert words in capsys.readouterr().err.splitlines()[-1] and not Path("save").exists()


def test_the_evaluation_text_is_not_searched_on(run, tiny_text, capsys):
    flags = "--prune_method wanda_price --sparsity_ratio 0.5 --price_steps 1"
    run(flags, 2, tiny_text)
    assert "would see the evaluation text" in capsys.readouterr().err
    run(f"{flags} --eval_wikitext false", 0, tiny_text)


def test_a_search_with_the_same_settings_is_made_once(tiny_folder, tiny_text, tmp_path, monkeypatch):
    from rich.console import Console

    from lib.run.language import LanguageModel

    made = []
    monkeypatch.setattr(price, "_descend", lambda *args: made.append(1) or _real(*args))
    _real = _descend
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_wikitext false --seqlen 32 --nsamples 4 "
    flags += f"--save {tmp_path} --price_steps 2 --prune_method"
    runs = [("wanda_price", 0.5), ("sparsegpt_price", 0.5), ("wanda_price", 0.6)]
    planned = [settings(f"{flags} {method} --sparsity_ratio {ratio}") for method, ratio in runs]
    subject = LanguageModel(planned)
    kept = [main.run(run, Console(quiet=True), subject)["price_search"] for run in planned]
    assert len(made) == 2 and kept[0] == kept[1] != kept[2]


_descend = price._descend
