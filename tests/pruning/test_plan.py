"""Plans to and from files, the recipe for another program, mixed N:M and --epsilon auto, through main.py."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import across, fast, saved_tensors, settings, tiny_llama

import main
from lib.allocation import epsilon
from lib.allocation.formulas import ALLOCATIONS, uniform
from lib.core.errors import UserError
from lib.models.layers import prunable_layers
from lib.pruning.plan import SparsityPlan, llm_compressor_recipe, load_plan, save_plan
from lib.pruning.pruners import PRUNERS


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_folder, tiny_text, other_text):
    """Return a function that runs main.py on the tiny model in a folder of its own and returns the record."""
    monkeypatch.chdir(tmp_path)
    size = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {other_text} --seqlen 32 --nsamples 5"
    return lambda flags: main.run(settings(f"{size} --eval_windows 8 --save save {flags}"))


def table_of(path: str) -> list[dict[str, str]]:
    header, *rows = (line.split("\t") for line in Path(path).read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("flags", ["--sparsity_ratio 0.6", "--sparsity_type 4:8"])
def test_a_plan_comes_back_and_prunes_the_same(flags, run):
    first = run(f"--prune_method wanda_ww {flags} --mapping_type layer_wise --save_plan plans/p.json --save_model kept")
    again = run("--prune_method wanda --plan plans/p.json --save_model kept")
    assert again["method"] == "wanda_plan" and again["target_sparsity"] == first["target_sparsity"]
    assert (again["perplexity"], again["sparsity"]) == (first["perplexity"], first["sparsity"])
    tables = [table_of(f"save/layers_{m}_sparsity_{first['target_sparsity']}.tsv") for m in ("wanda_ww", "wanda_plan")]
    planned = [[(row["name"], row["planned_ratio"], row["type"]) for row in table] for table in tables]
    assert planned[0] == planned[1]


def test_a_plans_file_names_every_layer(tmp_path):
    layers = prunable_layers(tiny_llama())
    plan = SparsityPlan(0.5, uniform(layers, 0.5), (2, 4))
    save_plan(tmp_path / "p.json", plan, "m", layers, {"method": "x"})
    rows = json.loads((tmp_path / "p.json").read_text())["layers"]
    assert list(rows) == [layer.name for layer in layers] and rows[layers[0].name]["nm"] == [2, 4]
    assert load_plan(tmp_path / "p.json", "m", layers) == plan
    rows[layers[0].name]["nm"] = [1, 4]
    content = json.loads((tmp_path / "p.json").read_text()) | {"layers": rows}
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not fit"):
        load_plan(tmp_path / "p.json", "m", layers)


def test_recipe_has_a_sparsity_for_each_target_in_model_order(run):
    run("--prune_method sparsegpt_er_plus --sparsity_ratio 0.4 --export_llmcompressor r.yaml")
    ((name, modifier),) = yaml.safe_load(Path("r.yaml").read_text())["pruning_stage"]["pruning_modifiers"].items()
    # Of layers that stay dense, llm-compressor's SparseGPT would take a weight or two.
    rows = [r for r in table_of("save/layers_sparsegpt_er_plus_sparsity_0.4.tsv") if float(r["planned_ratio"])]
    assert len(rows) == 14 and not [r["name"] for r in rows if "layers.2." in r["name"]]
    assert name == "SparseGPTModifier" and modifier["mask_structure"] == "0:0"
    assert modifier["targets"] == [r["name"] for r in rows]
    assert modifier["sparsity"] == [float(r["planned_ratio"]) for r in rows]
    in_model = [name for name, _ in tiny_llama().named_modules() if name in set(modifier["targets"])]
    assert in_model == modifier["targets"]  # llm-compressor goes by the model's order, whatever the list's


def test_recipe_counts_the_zeros_of_nm():
    layers = prunable_layers(tiny_llama())
    recipe = llm_compressor_recipe(SparsityPlan(0.75, uniform(layers, 0.75), (1, 4)), layers, "wanda")
    (modifier,) = yaml.safe_load(recipe)["pruning_stage"]["pruning_modifiers"].values()
    assert modifier["mask_structure"] == "3:4"
    mixed = dict.fromkeys((x.name for x in layers), (1, 4)) | {layers[0].name: (2, 4)}
    with pytest.raises(UserError, match="one N:M"):
        llm_compressor_recipe(SparsityPlan(0.75, uniform(layers, 0.75), mixed), layers, "wanda")


@pytest.mark.parametrize(("pruner", "suffix"), across(PRUNERS, filter(None, ALLOCATIONS)))
@pytest.mark.usefixtures("few_windows")
def test_mixed_nm_is_obeyed_in_every_layer(pruner, suffix, run):
    record = run(f"--prune_method {pruner}_{suffix} --sparsity_type 4:8 --save_model kept")
    rows = table_of(f"save/layers_{pruner}_{suffix}_sparsity_0.5.tsv")
    weights = saved_tensors(Path("kept") / f"{pruner}_{suffix}_0.5")
    for row in rows:
        keep, group = map(int, row["type"].split(":"))
        kept = (weights[f"{row['name']}.weight"] != 0).view(-1, group).sum(1)
        assert group == 8 and (kept <= keep).all() and float(row["planned_ratio"]) == pytest.approx(1 - keep / 8)
        if pruner != "sparsegpt" or keep == group:  # a repaired weight may be zero by itself
            assert (kept == keep).all()
    assert record["sparsity"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_what_is_kept_dense_stays_dense(pruner, run):
    # A threshold at the smallest score would take that one weight all the same.
    run(f"--prune_method {pruner}_er_plus --sparsity_ratio 0.4")
    rows = table_of(f"save/layers_{pruner}_er_plus_sparsity_0.4.tsv")
    assert {(r["planned_ratio"], r["sparsity"]) for r in rows if "layers.2." in r["name"]} == {("0.000000", "0.000000")}


def test_grid_is_zero_and_twentieths():
    assert epsilon.epsilon_grid(0.21) == [0, 0.05, 0.1, 0.15, 0.2]
    assert epsilon.epsilon_grid(0.2) == [0, 0.05, 0.1, 0.15, 0.2]
    assert epsilon.epsilon_grid(0.04) == [0]


def test_best_is_the_lowest_finite_and_the_smallest_of_equals():
    assert epsilon.best({0.1: math.nan, 0.3: 5.0, 0.2: 5.0, 0.0: math.inf}) == 0.2
    with pytest.raises(UserError, match="not finite"):
        epsilon.best({0.1: math.nan, 0.0: math.inf})


@pytest.mark.parametrize("method", fast([f"{p}_ww" for p in PRUNERS], 1))
def test_epsilon_auto_takes_the_best_and_prunes_with_it(method, run):
    auto = run(f"--prune_method {method} --sparsity_ratio 0.6 --epsilon auto")
    trials = auto["epsilon_search"]
    assert trials[0]["epsilon"] == 0 and len(trials) > 3
    assert auto["epsilon"] == min(trials, key=lambda t: (t["perplexity"], t["epsilon"]))["epsilon"]
    named = run(f"--prune_method {method} --sparsity_ratio 0.6 --epsilon {auto['epsilon']}")
    assert (named["perplexity"], named["sparsity"]) == (auto["perplexity"], auto["sparsity"])


def test_epsilon_auto_never_reads_the_evaluation_text(run, monkeypatch):
    seen = []
    real = epsilon.perplexity_by_blocks
    monkeypatch.setattr(epsilon, "perplexity_by_blocks", lambda w, windows: seen.append(windows) or real(w, windows))
    flags = "--prune_method magnitude_ww --sparsity_ratio 0.6 --epsilon auto --eval_windows"
    held = [run(f"{flags} {n}")["epsilon_search"] for n in (1, 3)]
    assert held[0] == held[1] and len({w.numel() for w in seen}) == 1


def test_epsilons_that_lead_to_one_plan_are_tried_once(tiny_weights, tiny_windows, monkeypatch):
    walks, dense, walk = [], tiny_weights.snapshot(), epsilon.walk
    monkeypatch.setattr(epsilon, "walk", lambda *args: walks.append(1) or walk(*args))
    plan = SparsityPlan(0.5, uniform(tiny_weights.layers, 0.5))
    windows = (tiny_windows, tiny_windows)
    trials = epsilon.try_epsilons(tiny_weights, dict.fromkeys([0, 0.05, 0.1], plan), PRUNERS["magnitude"], windows)
    assert len(walks) == 1 and [*trials] == [0, 0.05, 0.1] and len({*trials.values()}) == 1
    assert all(torch.equal(weight, dense[name]) for name, weight in tiny_weights.snapshot().items())


def test_metrics_only_computes_and_ends(run, monkeypatch, capsys, tiny_folder):
    monkeypatch.setattr("lib.evaluation.perplexity.perplexity", lambda *_: pytest.fail("it evaluates"))
    record = run("--metrics_only --ww_metric stable_rank --esd_driver fast --calib_data c4")
    assert len(record["metric"]) == 21 and Path("data", tiny_folder.name, "stable_rank_fast.npy").is_file()
    assert not Path("save").exists()
