"""The search by itself against closed forms, then on a model that has learnt something, and the command."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import settings, tiny_llama
from test_price_model import HELD, WINDOWS, prices_of

import main
from lib.allocation import price
from lib.allocation.price import EFFORTS, MAX_RATIO, MIN_RATIO, SearchOptions, next_logits, search, within_budget
from lib.core.errors import UserError
from lib.models.layers import Layer
from lib.models.weights import weights_of
from lib.run.language import LanguageModel
from scripts.table import forward_passes

FULL = EFFORTS["full"]


def searched(weights, windows, target: float, options: SearchOptions = FULL, **how):
    model = prices_of(weights, windows, options, **how)
    return search(model, weights.layers, target, options)


def test_only_magnitude_is_searched_with_masks_by_magnitude():
    for method, by_magnitude in (("magnitude_price --refit 2", True), ("magnitude_price", True), ("alps_price", False)):
        task = settings(f"--model x --sparsity_ratio 0.5 --prune_method {method}").task()
        assert task.by_magnitude is by_magnitude


@pytest.mark.parametrize("target", [0.0005, 0.01, 0.3, 0.5, 0.7, 0.95, 0.97, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_met_to_rounding(seed, target):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 10**8) for _ in range(200)]
    ratios = within_budget([draw.gauss(0, 5 * seed) for _ in sizes], sizes, target)
    assert math.fsum(n * s for n, s in zip(sizes, ratios, strict=True)) / sum(sizes) == pytest.approx(target, abs=1e-12)
    usual = 0.004 <= target <= 0.96
    assert all(MIN_RATIO <= s <= MAX_RATIO if usual else 0 < s < 1 for s in ratios)
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


class Bowl:
    """A price model whose KL is the sum of cost * size * ratio^2: at the optimum, all cost * ratio are equal."""

    samples, dtype, advice = 8, torch.float32, "give up"

    def __init__(self, costs: list[float]) -> None:
        self.layers = [Layer(f"m{i}", i, (i + 1, 10)) for i in range(len(costs))]
        self.costs = dict(zip((layer.name for layer in self.layers), costs, strict=True))

    def kl(self, ratios):
        return sum(self.costs[layer.name] * layer.size * ratios[layer.name] ** 2 for layer in self.layers)

    def prices(self, ratios, batch):
        return self.kl(ratios), {x.name: 2 * self.costs[x.name] * x.size * ratios[x.name] for x in self.layers}


def test_prices_are_equal_at_the_end():
    bowl = Bowl([1.0, 1.3, 1.6, 2.0])
    result = search(bowl, bowl.layers, 0.5, FULL._replace(steps=200))
    ratios = [result.ratios[layer.name] for layer in bowl.layers]
    expected = [1 / cost for cost in bowl.costs.values()]
    scale = 0.5 * 100 / sum(layer.size * x for layer, x in zip(bowl.layers, expected, strict=True))
    assert ratios == pytest.approx([scale * x for x in expected], abs=2e-3)
    assert result.kept == "end"
    assert [step["spread"] for step in result.steps] == sorted((step["spread"] for step in result.steps), reverse=True)


def test_an_expert_that_seems_free_keeps_half_of_its_uniform_share():
    bowl = Bowl([1e-6, 1.0, 2.0])
    bowl.layers[0] = bowl.layers[0]._replace(expert="experts.0")
    ratios = search(bowl, bowl.layers, 0.6, FULL._replace(steps=200)).ratios
    assert ratios["m0"] == pytest.approx(0.8, abs=1e-9) and ratios["m1"] > ratios["m2"]
    assert sum(x.size * ratios[x.name] for x in bowl.layers) == pytest.approx(0.6 * 60)


@pytest.mark.parametrize("kept", ["end", "uniform"])
def test_the_better_of_end_and_uniform_is_kept(kept, monkeypatch):
    bowl = Bowl([1.0, 2.0])
    plans = {name: {"m0": ratio, "m1": ratio} for name, ratio in (("uniform", 0.5), ("end", 0.9))}
    kls = {name: float(name != kept) for name in plans}
    monkeypatch.setattr(bowl, "kl", lambda ratios: next(kls[name] for name in plans if plans[name] == ratios))
    monkeypatch.setattr(price, "_descend", lambda *_: (plans["end"], [{"spread": 0.5, "fit": 1.0, "held": kls["end"]}]))
    result = search(bowl, bowl.layers, 0.5, FULL._replace(steps=1))
    assert (result.kept, result.held, result.ratios) == (kept, kls, plans[kept])


@pytest.mark.parametrize("method", ["kl", "prices"])
def test_what_is_not_finite_is_an_error(method, monkeypatch):
    bowl = Bowl([1.0, 2.0])
    broken = {"kl": lambda _: math.nan, "prices": lambda *_: (1.0, {"m0": 1.0, "m1": math.inf})}[method]
    monkeypatch.setattr(bowl, method, broken)
    with pytest.raises(UserError, match="not finite; .*give up"):
        search(bowl, bowl.layers, 0.5, FULL)


def trained() -> tuple:
    """Return a tiny model that has learnt to continue arithmetic sequences, and windows of these."""
    draw = torch.Generator().manual_seed(0)
    starts, strides = torch.randint(0, 300, (400, 1), generator=draw), torch.randint(1, 6, (400, 1), generator=draw)
    windows = 3 + (starts + strides * torch.arange(24)) % 290
    model = tiny_llama()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        batch = windows[(step * 16) % 368 :][:16]
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return weights_of(model.eval()), windows[-24:-8], windows[-8:]


def test_a_search_improves_on_uniform_and_says_what_it_kept():
    weights, fit, held = trained()
    result = searched(weights, (fit, held), 0.5, FULL._replace(steps=12))
    uniform, model = dict.fromkeys(result.ratios, 0.5), prices_of(weights, (fit, held))
    assert result.held == {"uniform": model.kl(uniform), "end": model.kl(result.ratios)}
    assert result.kept == "end" and result.held["end"] < 0.9 * result.held["uniform"]
    assert result.steps[-1]["held"] == result.held["end"]
    assert [step["held"] is None for step in result.steps] == [i % 4 != 3 for i in range(12)]
    assert all(0 <= step["spread"] <= 1 for step in result.steps)
    assert result.steps[0]["fit"] == pytest.approx(model.prices(uniform, random.Random(0).sample(range(16), 16)[:2])[0])


def test_a_search_repeats_itself_and_leaves_the_weights_as_they_were():
    weights = weights_of(tiny_llama())
    parameters = dict(weights.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    result = [searched(weights, (WINDOWS, HELD), 0.6, FULL._replace(steps=3)) for _ in range(2)]
    assert result[0] == result[1]  # every bit of it
    assert len(result[0].steps) == 3
    now = dict(weights.model.named_parameters())
    assert all(now[name] is parameters[name] and torch.equal(now[name], before[name]) for name in before)
    assert all(p.grad is None for p in now.values()) and not any(m._forward_hooks for m in weights.model.modules())


@pytest.mark.parametrize("options", [FULL._replace(steps=5), EFFORTS["quick"]._replace(steps=9)])
def test_passes_are_those_that_a_search_makes(options):
    weights, calls = weights_of(tiny_llama()), []
    draw = torch.Generator().manual_seed(0)
    counts = price.FIT_WINDOWS, options.held_out_windows
    fit, held = (torch.randint(3, 300, (count, 8), generator=draw) for count in counts)
    for block in weights.visit():
        block.module.mlp.register_forward_pre_hook(lambda *_: calls.append(3 if torch.is_grad_enabled() else 1))
    searched(weights, (fit, held), 0.5, options)
    assert sum(calls) == len(weights.modules) * forward_passes(options)


@pytest.fixture
def run(tiny_folder, tiny_text, other_text, tmp_path, monkeypatch, few_windows):
    monkeypatch.chdir(tmp_path)

    def work(flags: str, status: int = 0, evaluate: Path = other_text) -> dict:
        command = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {evaluate} --seqlen 32 --nsamples 4"
        assert main.main(f"{command} --eval_windows 8 --save save {flags}".split()) == status
        records = sorted(Path("save").glob("run_*.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(records[-1].read_text()) if records else {}

    return work


def test_a_run_records_the_search_and_its_plan_can_be_used_again(run):
    record = run("--prune_method wanda_price --sparsity_ratio 0.6 --price_steps 4 --save_plan plan.json")
    outcome = record["price_search"]
    assert len(outcome["steps"]) == 4 and outcome["kept"] == min(outcome["held_out_kl"], key=outcome["held_out_kl"].get)
    assert Path("save/price_wanda_price_sparsity_0.6.png").read_bytes().startswith(b"\x89PNG")
    again = run("--prune_method wanda --plan plan.json")
    assert (again["perplexity"], again["sparsity"]) == (record["perplexity"], record["sparsity"])
    assert "price_search" not in again


@pytest.mark.parametrize("flags", ["magnitude_price --sparsity_ratio 0.5", "wanda_price --sparsity_type 4:8"])
def test_other_forms(flags, run, machine):
    machine("plain")
    record = run(f"--prune_method {flags} --price_steps 2")
    search = record["price_search"]
    assert list(search["held_out_kl"]) == ["uniform", "end"] and search["dtype"] == "float32"
    assert record["sparsity"] == pytest.approx(0.5, abs=1 / 32)


def test_the_evaluation_text_is_not_searched_on(run, tiny_text, capsys):
    flags = "--prune_method wanda_price --sparsity_ratio 0.5 --price_steps 1"
    run(flags, 2, tiny_text)
    assert "would see the evaluation text" in capsys.readouterr().err
    run(f"{flags} --eval_wikitext false", 0, tiny_text)


@pytest.mark.usefixtures("few_windows")
def test_a_search_with_the_same_settings_is_made_once(tiny_folder, tiny_text, tmp_path, monkeypatch):
    made, descend = [], price._descend
    monkeypatch.setattr(price, "_descend", lambda *args: made.append(1) or descend(*args))
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_wikitext false --seqlen 32 --nsamples 4 "
    flags += f"--save {tmp_path} --price_steps 2 --prune_method"
    runs = (("wanda", 0.5), ("sparsegpt", 0.5), ("wanda", 0.6))
    planned = [settings(f"{flags} {pruner}_price --sparsity_ratio {ratio}") for pruner, ratio in runs]
    subject = LanguageModel(planned)
    kept = [main.run(run, subject)["price_search"] for run in planned]
    assert len(made) == 2 and kept[0] == kept[1] != kept[2]
