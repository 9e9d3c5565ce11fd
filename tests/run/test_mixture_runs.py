"""Whole runs on a tiny mixture of experts: methods, flags for mixtures, and what is refused before it is loaded."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import transformers as tf
from conftest import fast, saved_tensors
from mixtures import FAMILIES, tiny_mixture

import main
from lib.models.layers import prunable_layers
from lib.models.weights import weights_of
from lib.pruning import drop
from lora_ft import recover


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tiny_tokenizer) -> Path:
    return saved(tmp_path_factory.mktemp("mixture") / "tiny-mixture", "qwen2-moe", tiny_tokenizer)


def saved(folder: Path, family: str, tokenizer) -> Path:
    tiny_mixture(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_text, other_text):
    """Return a function of a model and flags that runs main.py and returns its status."""
    monkeypatch.chdir(tmp_path)

    def status(model: Path, flags: str) -> int:
        words = f"--model {model} --calib_data {tiny_text} --eval_data {other_text} --seqlen 32 --eval_windows 4"
        words += " --nsamples 6" if "magnitude" not in flags and "--metrics_only" not in flags else ""
        return main.main([*words.split(), *flags.split()])

    return status


def record_of(folder: str) -> dict:
    (path,) = Path(folder).glob("run_*.json")
    return json.loads(path.read_text())


def zeros_by_name(folder: Path) -> dict[str, float]:
    """Return the fraction of zeros of each prunable matrix of a saved model, as plain transformers reads it."""
    weights = weights_of(tf.AutoModelForCausalLM.from_pretrained(folder))
    return {layer.name: weights.zeros()[layer.name] / layer.size for layer in weights.layers}


METHODS = ["wanda_ww", "sparsegpt_ww --mapping_type expert_wise", "alps_ww", "magnitude_ww", "sparsegpt_er"]


@pytest.mark.parametrize("method", fast(METHODS, 2))
def test_streamed_and_in_memory_runs_are_the_same(method, mixture, run):
    tensors = []
    for how in ("never", "always"):
        flags = f"--prune_method {method} --sparsity_ratio 0.5 --stream {how} --save {how} --save_model kept-{how}"
        assert run(mixture, f"{flags} --ww_metric_cache {how}" if "_ww" in method else flags) == 0
        record = record_of(how)
        assert abs(record["sparsity"] - 0.5) < 0.03  # a row of 32 columns loses a whole number
        tensors.append(saved_tensors(Path(record["saved_model"])))
        with torch.no_grad():
            model = tf.AutoModelForCausalLM.from_pretrained(record["saved_model"])
            assert torch.isfinite(model(torch.arange(9)[None], use_cache=False).logits).all()
        table = next(Path(how).glob("layers_*.tsv")).read_text().splitlines()
        assert table[0].endswith("\ttokens") == (not method.startswith("magnitude"))
        assert any(".experts.3.down_proj\t" in line for line in table)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda_ww", "sparsegpt_ww --stream always", "alps_price --price_steps 2"])
def test_every_family_runs(method, family, run, tmp_path, tiny_tokenizer, few_windows):
    model = saved(tmp_path / "model", family, tiny_tokenizer)
    assert run(model, f"--prune_method {method} --sparsity_ratio 0.5 --save out --save_model kept --seed 1") == 0
    record = record_of("out")
    assert abs(record["sparsity"] - 0.5) < 0.03  # a row of 32 columns loses a whole number
    again = tf.AutoModelForCausalLM.from_pretrained(record["saved_model"])
    assert weights_of(again).sparsity() == record["sparsity"]


def test_experts_only(mixture, run):
    flags = "--prune_method wanda_ww --sparsity_ratio 0.6 --only experts --mapping_type expert_wise --save out"
    assert run(mixture, f"{flags} --save_model kept --ww_metric_cache cache --save_plan plan.json") == 0
    zeros = zeros_by_name(Path(record_of("out")["saved_model"]))
    layers = prunable_layers(tiny_mixture("qwen2-moe"))
    assert {name for name, share in zeros.items() if share} == {layer.name for layer in layers if layer.expert}
    inside = [layer for layer in layers if layer.expert]
    mean = sum(zeros[layer.name] * layer.size for layer in inside) / sum(layer.size for layer in inside)
    assert mean == pytest.approx(0.6, abs=0.02)
    ratios = {name: row["ratio"] for name, row in json.loads(Path("plan.json").read_text())["layers"].items()}
    for layer in inside:  # the three matrices of an expert share their ratio, and two experts differ
        assert ratios[layer.name] == ratios[f"{layer.expert}.down_proj"]
    assert len({ratios[layer.name] for layer in inside}) == 8
    # The plan says the same as the flags.
    assert run(mixture, "--prune_method wanda --plan plan.json --save again --save_model kept-again") == 0
    assert zeros_by_name(Path(record_of("again")["saved_model"])) == zeros


def test_epsilons_that_are_tried_are_those_of_the_experts_alone(mixture, run):
    # All else, whose alpha is far above theirs, would bound them by 0.14; the experts of two blocks, 0 and 1, by 0.25.
    layers = prunable_layers(tiny_mixture("qwen2-moe"))
    Path("cache").mkdir()
    numpy.save("cache/alpha_peak.npy", [layer.block if layer.expert else 10.0 for layer in layers])
    flags = "--prune_method magnitude_ww --sparsity_ratio 0.8 --mapping_type expert_wise --only experts --epsilon auto"
    assert run(mixture, f"{flags} --ww_metric_cache cache --save out") == 0
    assert [trial["epsilon"] for trial in record_of("out")["epsilon_search"]] == [0, 0.05, 0.1, 0.15, 0.2, 0.25]


def test_experts_only_in_groups(mixture, run):
    assert run(mixture, "--prune_method wanda --sparsity_type 2:4 --only experts --save out --save_model kept") == 0
    zeros = zeros_by_name(Path(record_of("out")["saved_model"]))
    assert {share for name, share in zeros.items() if ".experts." in name} == {0.5}
    assert {share for name, share in zeros.items() if ".experts." not in name} == {0}


def test_router_weighting_changes_what_is_pruned(mixture, run):
    found = {}
    for weighting in ("auto", "router", "none"):
        flags = f"--prune_method wanda --sparsity_ratio 0.5 --expert_weighting {weighting} --save {weighting}"
        assert run(mixture, f"{flags} --save_model kept-{weighting}") == 0
        found[weighting] = saved_tensors(Path(record_of(weighting)["saved_model"]))
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    assert torch.equal(found["auto"][name], found["router"][name])
    assert not torch.equal(found["none"][name], found["router"][name])


@pytest.mark.parametrize(("method", "search"), [("wanda_price", "price_search"), ("wanda_ww", "epsilon_search")])
def test_searches_weight_tokens_as_the_pruning_does(method, search, mixture, run):
    found = []
    for weighting in ("auto", "router", "none"):
        flags = f"--prune_method {method} --sparsity_ratio 0.5 --expert_weighting {weighting} --save {weighting}"
        flags += " --price_steps 1" if search == "price_search" else " --epsilon auto --ww_metric_cache cache"
        assert run(mixture, flags) == 0
        found.append(record_of(weighting)[search])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("by", fast(drop.DROP_BY, 2))
def test_dropped_experts_in_memory_and_streamed(by, mixture, run):
    tensors = []
    for how in ("never", "always"):
        method = "wanda_ww" if by == "alpha" else "wanda"  # whose alphas are those of the experts that stay
        flags = f"--prune_method {method} --sparsity_ratio 0.5 --drop_experts 0.25 --drop_by {by} --stream {how}"
        flags += f" --ww_metric_cache cache-{how}" if by == "alpha" else ""
        assert run(mixture, f"{flags} --save {how} --save_model kept-{how}") == 0
        record = record_of(how)
        folder = Path(record["saved_model"])
        assert folder.name == f"{method}_0.5_drop0.25" and record["model"]["parameters"] == sum(
            tensor.numel() for tensor in saved_tensors(folder).values()
        )
        config = json.loads((folder / "config.json").read_text())
        assert config["num_experts"] == 3
        assert weights_of(tf.AutoModelForCausalLM.from_pretrained(folder)).sparsity() == record["sparsity"]
        tensors.append(saved_tensors(folder))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_a_folder_without_some_experts_is_recovered_by_itself(mixture, run, tiny_text, other_text, capsys):
    method = "--prune_method magnitude --drop_experts 0.5"  # and nothing else
    assert run(mixture, f"{method} --nsamples 6 --recover 256 --save both --save_model kept") == 0
    texts = f"--calib_data {tiny_text} --eval_data {other_text} --seqlen 32 --eval_windows 4"
    flags = f"--model kept/magnitude_0.0_drop0.5 {texts} --tokens 256 --save figures --save_model alone"
    assert recover.main(flags.split()) == 0
    one, two = saved_tensors(Path("kept/magnitude_0.0_drop0.5_recovered")), saved_tensors(Path("alone"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    # Another model of the same shapes is found out by what is no expert.
    other = tiny_mixture("qwen2-moe")
    other.model.layers[1].self_attn.q_proj.weight.data.mul_(1.5)
    other.save_pretrained("other")
    shutil.copy(mixture / "tokenizer.json", "other")
    assert recover.main([*flags.split(), *"--dense other --save_model again".split()]) == 2
    assert "is not the model that was pruned (see model.layers.1.self_attn.q_proj)" in capsys.readouterr().err


def test_metrics_and_plans_are_those_of_the_experts_that_stay(mixture, run, capsys):
    flags = "--sparsity_ratio 0.5 --drop_experts 0.25 --drop_by random"
    for seed in (1, 2):  # with which other experts stay
        ww = f"--prune_method magnitude_ww --seed {seed} --ww_metric_cache cache --save_plan {seed}.json"
        assert run(mixture, f"{ww} {flags} --save {seed}") == 0
    assert record_of("1")["perplexity"] != record_of("2")["perplexity"]
    for seed, status in ((1, 0), (2, 2)):
        assert run(mixture, f"--prune_method magnitude --plan 1.json --seed {seed} {flags} --save again") == status
    assert record_of("again")["perplexity"] == record_of("1")["perplexity"]
    assert "1.json: is a plan for the model tiny-mixture-random-drop0.25-" in capsys.readouterr().err


RECOVERED = ["", "--by block --stream always", "--train low_rank --rank 4", "--sparsity_ratio 0"]


@pytest.mark.parametrize("flags", fast(RECOVERED, 2))
def test_what_is_left_of_experts_is_recovered(flags, mixture, run):
    base = "--prune_method wanda --sparsity_ratio 0.5 --drop_experts 0.25 --recover 960 --save out --save_model kept"
    assert run(mixture, f"{base} {flags}") == 0
    record = record_of("out")
    report = record["recovery"]
    assert report["held_after"] < report["held_before"] and record["sparsity"] == report["sparsity_before"]
    again = weights_of(tf.AutoModelForCausalLM.from_pretrained(record["saved_model"]))
    assert again.sparsity() == pytest.approx(record["sparsity"])
    if not flags:
        pruned = saved_tensors(Path("kept/wanda_0.5_drop0.25"))
        recovered = saved_tensors(Path(record["saved_model"]))
        name = "model.layers.1.mlp.experts.0.down_proj.weight"
        assert torch.equal(pruned[name] == 0, recovered[name] == 0) and not torch.equal(pruned[name], recovered[name])
        assert torch.equal(pruned["model.layers.1.mlp.gate.weight"], recovered["model.layers.1.mlp.gate.weight"])


def test_experts_are_dropped_without_a_sparsity(mixture, run):
    assert run(mixture, "--prune_method magnitude --drop_experts 0.5 --save out --save_model kept --nsamples 6") == 0
    record = record_of("out")
    whole = saved_tensors(mixture)
    for name, tensor in saved_tensors(Path(record["saved_model"])).items():
        if ".experts." not in name:
            rows = [row for row in whole[name]] if tensor.shape != whole[name].shape else []
            assert torch.equal(tensor, whole[name]) if not rows else all(any(map(row.equal, rows)) for row in tensor)
        else:
            assert any(other.shape == tensor.shape and torch.equal(other, tensor) for other in whole.values())


def test_of_a_model_with_images_the_text_model_is_pruned(run, tmp_path, tiny_tokenizer, caplog):
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    text = tiny_mixture("qwen3.5-moe")
    config = tf.Qwen3_5MoeConfig(text_config=text.config.to_dict(), vision_config=vision)
    model = tf.Qwen3_5MoeForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    saved(tmp_path / "text", "qwen3.5-moe", tiny_tokenizer)

    tensors = []
    for folder, how in (("text", "never"), ("model", "never"), ("model", "always")):
        flags = f"--prune_method wanda --sparsity_ratio 0.5 --stream {how} --save {folder}-{how}"
        assert run(tmp_path / folder, f"{flags} --save_model kept-{folder}-{how}") == 0
        assert ("its text model alone" in caplog.text) == (folder == "model")
        tensors.append(saved_tensors(Path(record_of(f"{folder}-{how}")["saved_model"])))
    for other in tensors[1:]:
        assert tensors[0].keys() == other.keys()
        assert all(torch.equal(tensors[0][name], other[name]) for name in other)


REFUSED = {
    "--prune_method wanda --sparsity_ratio 0.5 --drop_experts 0.1": "--drop_experts 0.1: drops none of 4 experts",
    "--prune_method wanda --sparsity_ratio 0.5 --drop_experts 0.75": "--drop_experts 0.75: leaves 1 of 4 experts",
    "--prune_method wanda --sparsity_ratio 0.5 --drop_by alpha": "--drop_by does nothing",
    "--prune_method wanda_price --sparsity_ratio 0.5 --only experts": "--only experts: with wanda_price",
    "--prune_method wanda_lamp --sparsity_ratio 0.5 --only experts": "--only experts: with wanda_lamp",
    "--prune_method magnitude --sparsity_ratio 0.5 --expert_weighting router": "does nothing with magnitude",
    "--prune_method wanda --sparsity_ratio 0.5 --save_model m --packed": "--packed is not supported for mixtures",
}
DENSE = {
    "--prune_method wanda --sparsity_ratio 0.5 --drop_experts 0.25": "needs a mixture with as many experts",
    "--prune_method wanda --sparsity_ratio 0.5 --only experts": "tiny-llama is no mixture of experts",
    "--prune_method wanda --sparsity_ratio 0.5 --expert_weighting router": "tiny-llama is no mixture of experts",
    "--prune_method wanda_ww --sparsity_ratio 0.5 --mapping_type expert_wise": "tiny-llama is no mixture of experts",
}


@pytest.mark.parametrize("flags", [*REFUSED, *DENSE])
def test_refused_before_anything_is_loaded(flags, mixture, tiny_folder, run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(main.LanguageModel, "load", None)
    assert run(mixture if flags in REFUSED else tiny_folder, flags) == 2
    assert (REFUSED | DENSE)[flags] in (err := capsys.readouterr().err) and len(err.splitlines()) == 1, err
    assert not [path for path in tmp_path.iterdir() if path.name != "data"]
