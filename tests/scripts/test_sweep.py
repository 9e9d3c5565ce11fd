"""The scripts are run: published settings, interrupted and restarted; table, sweep and demo on real run files."""

import csv
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import main
from lib.allocation.formulas import heavy_tailed
from lib.cli.command import parse
from lib.cli.settings import Experiment
from lib.core.errors import UserError
from lib.models import load as loading
from lib.models.layers import prunable_layers
from lib.pruning.plan import SparsityPlan
from lib.run.record import inputs_of

sys.path.insert(0, str(ROOT / "scripts"))

import demo
import sweep
import table

# The paper's settings, script -> hub id, metric cache, epsilon of magnitude / wanda / sparsegpt.
PUBLISHED = {
    "llama_7b": ("pinkmanlove/llama-7b-hf", "data/llama-7b-hf", 0.3, 0.2, 0.2),
    "llama_13b": ("pinkmanlove/llama-13b-hf", "data/llama-13b-hf", 0.5, 0.3, 0.3),
    "llama_30b": ("pinkmanlove/llama-30b-hf", "data/llama-30b-hf", 0.4, 0.3, 0.3),
    "llama_65b": ("pinkmanlove/llama-65b-hf", "data/llama-65b-hf", 0.4, 0.3, 0.3),
    "llama2_7b": ("meta-llama/Llama-2-7b-hf", "data/llama2-7b-hf", 0.5, 0.3, 0.2),
    "llama2_13b": ("meta-llama/Llama-2-13b-hf", "data/llama2-13b-hf", 0.4, 0.3, 0.3),
    "llama2_70b": ("meta-llama/Llama-2-70b-hf", "data/llama2-70b-hf", 0.4, 0.3, 0.3),
}
# width, inner width, blocks, heads, key/value heads
SHAPES = {
    "llama_7b": (4096, 11008, 32, 32, 32),
    "llama_13b": (5120, 13824, 40, 40, 40),
    "llama_30b": (6656, 17920, 60, 52, 52),
    "llama_65b": (8192, 22016, 80, 64, 64),
    "llama2_7b": (4096, 11008, 32, 32, 32),
    "llama2_13b": (5120, 13824, 40, 40, 40),
    "llama2_70b": (8192, 28672, 80, 64, 8),
}
NAMES = dict(zip(PUBLISHED, json.loads(table.PUBLISHED.read_text())["models"], strict=False))


# One thread, as in the other tests: several of them stall each other where the cores are shared.
ENVIRONMENT = os.environ | {"PYTHON_BIN": sys.executable, "OMP_NUM_THREADS": "1"}


def shell(script: str, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", f"scripts/{script}.sh", *flags]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=300)


def planned(*flags: str) -> list[Experiment]:
    """Return the settings that a sweep of these flags would run."""
    return parse(sweep.Sweep, flags, sweep.PARSER).settings()


def dry(script: str, *flags: str, **variables: str) -> list[Experiment]:
    """Return the settings that the command which the script prints would run."""
    done = shell(script, *flags, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    change, place, then, interpreter, program, *rest = shlex.split(done.stdout)
    assert (change, place, then) == ("cd", str(ROOT), "&&")  # it can be pasted wherever one is
    assert (interpreter, program) == (sys.executable, "scripts/sweep.py")
    return planned(*rest)


@pytest.mark.parametrize("script", PUBLISHED)
def test_script_has_the_published_settings(script):
    hub, cache, *epsilons = PUBLISHED[script]
    runs = dry(script)
    assert [run.prune_method for run in runs] == ["magnitude_ww", "wanda_ww", "sparsegpt_ww"]
    assert [run.epsilon for run in runs] == epsilons
    for run in runs:
        assert (run.model, run.ww_metric_cache, run.save) == (hub, cache, f"results/{script}")
        assert (run.sparsity_ratio, run.ww_metric, run.mapping_type) == (0.7, "alpha_peak", "block_wise")
        assert (run.calib_data, run.eval_data, run.nsamples, run.seqlen, run.seed) == ("c4", "wikitext2", 128, 2048, 0)


def test_script_settings_can_be_overridden():
    variables = {"MODEL": "a b", "SAVE": "there", "SPARSITY": "0.5 0.6", "METHODS": "dense wanda wanda_ww"}
    runs = dry("llama_13b", "--epsilon", "0.1", "--seed", "3", **variables)
    assert [(run.prune_method, run.sparsity_ratio) for run in runs] == [
        (None, 0.0), ("wanda", 0.5), ("wanda", 0.6), ("wanda_ww", 0.5), ("wanda_ww", 0.6)
    ]  # fmt: skip
    assert {(run.model, run.save, run.seed) for run in runs} == {("a b", "there", 3)}
    assert [run.epsilon for run in runs if run.prune_method == "wanda_ww"] == [0.1, 0.1]
    assert {run.ww_metric_cache for run in runs} == {None}, "another model's metric is not kept under this one's name"
    caches = [run.ww_metric_cache for run in dry("llama_13b", MODEL="m", CACHE="c", METHODS="dense wanda wanda_ww")]
    assert caches == [None, None, "c"]
    # A flag of another allocation would be refused.
    assert len(dry("llama_13b", METHODS="dense wanda wanda_owl sparsegpt_dlp")) == 4


@pytest.mark.parametrize(("script", "limit"), [("llama_30b", None), ("llama_65b", 2000), ("llama2_70b", 2000)])
def test_zero_shot_of_the_largest_models_is_cut_openly(script, limit):
    assert {run.limit for run in dry(script)} == {None}
    assert {run.limit for run in dry(script, "--eval_zero_shot")} == {limit}
    assert {run.limit for run in dry(script, "--eval_zero_shot", "--limit", "7")} == {7}


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_settings_give_legal_plans_on_the_true_shapes(script):
    width, inner, blocks, heads, kv = SHAPES[script]
    config = LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, kv, width // heads
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    about = json.loads(table.PUBLISHED.read_text())["models"][NAMES[script]]
    assert model.num_parameters() == about["parameters"]
    layers = prunable_layers(model)
    assert len(layers) == 7 * blocks
    draw = torch.Generator().manual_seed(0)
    values = dict(
        zip([layer.name for layer in layers], (2 + 6 * torch.rand(len(layers), generator=draw)).tolist(), strict=True)
    )
    sizes = [layer.size for layer in layers]
    for epsilon in PUBLISHED[script][2:]:
        ratios = heavy_tailed(layers, 0.7, values=values, epsilon=epsilon, mapping_type="block_wise")
        plan = SparsityPlan(0.7, ratios)  # refuses a ratio outside [0, 1]
        budget = math.fsum(plan.ratios[layer.name] * n for layer, n in zip(layers, sizes, strict=True)) / sum(sizes)
        assert budget == pytest.approx(0.7, abs=1e-12)
        spread = max(plan.ratios.values()) - min(plan.ratios.values())
        assert spread > 0.7 * epsilon, "the wish for unequal blocks is not lost in the cap"


# ------------------------------------------------------------------------------- a script is run, stopped and restarted


@pytest.fixture(scope="module")
def small(tiny_folder, tiny_text, tmp_path_factory) -> tuple[dict, list[str], Path]:
    """Return the variables and flags that make a script small, and the folder of its results."""
    save = tmp_path_factory.mktemp("scripts")
    flags = ["--calib_data", str(tiny_text), "--eval_data", str(tiny_text), "--seqlen", "32", "--nsamples", "4"]
    flags += ["--eval_windows", "8"]
    return {"MODEL": str(tiny_folder), "SAVE": str(save / "runs"), "CACHE": str(save / "cache"),
            "METHODS": "magnitude_ww wanda_ww"}, flags, save / "runs"  # fmt: skip


@pytest.fixture(scope="module")
def finished(small) -> Path:
    """Return the folder of what llama_7b.sh would leave for two methods, with that script's epsilons."""
    variables, flags, save = small
    command = ["--model", variables["MODEL"], "--save", str(save), "--ww_metric_cache", variables["CACHE"], *flags]
    command += ["--methods", "magnitude_ww,wanda_ww", "--sparsities", "0.7", "--epsilons", "magnitude_ww=0.3,0.2"]
    assert sweep.main(command) == 0
    return save


@pytest.mark.slow
def test_a_script_that_is_interrupted_completes_what_is_left(small, tmp_path):
    variables, flags, _ = small
    save = tmp_path / "runs"
    variables = variables | {"SAVE": str(save)}
    first, second = (save / f"run_{m}_ww_sparsity_0.7.json" for m in ("magnitude", "wanda"))
    process = subprocess.Popen(
        ["bash", "scripts/llama_7b.sh", *flags], cwd=ROOT, env=ENVIRONMENT | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert [line.split()[:2] for line in lines] == [["[1/2]", "magnitude_ww"], ["[2/2]", "wanda_ww"]]
    process.send_signal(signal.SIGINT)  # reaches Python itself: the script has become it
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 130 and errors.splitlines()[-1] == f"sweep.py: interrupted; {sweep.RESUME}", errors
    assert "Traceback" not in errors and first.exists() and not second.exists()
    made = first.stat().st_mtime_ns
    again = shell("llama_7b", *flags, **variables)
    assert again.returncode == 0, again.stderr
    assert first.stat().st_mtime_ns == made and "magnitude_ww at 0.7, epsilon 0.3: complete already" in again.stdout
    assert again.stdout.count("complete already") == 1
    for method, epsilon in {"magnitude_ww": 0.3, "wanda_ww": 0.2}.items():
        record = json.loads((save / f"run_{method}_sparsity_0.7.json").read_text())
        assert record["complete"] is True and record["flags"]["epsilon"] == epsilon
        assert record["sparsity"] == pytest.approx(0.7, abs=1 / 32)


def test_a_run_is_complete_only_with_the_same_flags(finished, small, monkeypatch):
    variables, flags, save = small
    flags = ["--model", variables["MODEL"], "--save", str(save), "--ww_metric_cache", variables["CACHE"], *flags]
    flags += ["--methods", "wanda_ww", "--sparsities", "0.7"]
    monkeypatch.setattr(main, "run", lambda *_: {"perplexity": None})

    def skipped(*more: str, force: bool = False) -> bool:
        records, made = sweep.run_all(planned(*flags, *more), force)
        assert len(records) == 1
        return not made

    assert skipped("--epsilons", "0.2") and not skipped("--epsilons", "0.2", force=True)
    assert not skipped("--epsilons", "0.3") and not skipped("--epsilons", "0.2", "--seed", "1")
    path = save / "run_wanda_ww_sparsity_0.7.json"
    text = path.read_text()
    try:
        for damaged in (text.replace('"complete": true', '"complete": false'), text[: len(text) // 2]):
            path.write_text(damaged)
            assert not skipped("--epsilons", "0.2")
    finally:
        path.write_text(text)


def test_a_complete_run_of_a_file_that_was_replaced_is_run_again(tiny_folder, tiny_text, tmp_path, capsys, caplog):
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    (tmp_path / "cal.txt").write_bytes(tiny_text.read_bytes())
    flags = f"--model {tmp_path}/tiny --calib_data {tmp_path}/cal.txt --eval_data {tiny_text} --seqlen 32".split()
    flags += f"--nsamples 2 --eval_windows 2 --save {tmp_path}/s --methods wanda --sparsities 0.5".split()
    path = tmp_path / "s" / "run_wanda_sparsity_0.5.json"

    def again() -> bool:
        """Return whether the setting was run."""
        assert sweep.main(flags) == 0
        return "complete already" not in capsys.readouterr().out

    assert again() and not again()
    (tmp_path / "cal.txt").write_text(tiny_text.read_text()[::-1])
    caplog.clear()
    assert again() and f"--calib_data {tmp_path}/cal.txt has changed" in caplog.text and not again()
    weights = tmp_path / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    caplog.clear()
    assert again() and f"--model {tmp_path}/tiny has changed" in caplog.text and not again()
    (tmp_path / "tiny" / "README.md").write_text("not the model")
    assert not again()
    record = json.loads(path.read_text())
    del record["inputs"]
    path.write_text(json.dumps(record))  # as an older version wrote it
    caplog.clear()
    assert not again() and caplog.text.count("older version") == 1


def test_what_changes_while_a_sweep_runs_is_not_mixed(small, tmp_path, monkeypatch, caplog):
    variables, flags, _ = small
    (tmp_path / "cal.txt").write_text("a")

    def run(settings, *_):
        (tmp_path / "cal.txt").write_text("b")
        return {"perplexity": 1.0}

    monkeypatch.setattr(main, "run", run)
    flags = ["--model", variables["MODEL"], *flags, "--save", str(tmp_path), "--methods", "wanda,magnitude"]
    records, _ = sweep.run_all(planned(*flags, "--calib_data", str(tmp_path / "cal.txt"), "--sparsities", "0.5"), False)
    assert records == [{"perplexity": 1.0}, None] and "cal.txt: was changed since this command started" in caplog.text


def test_large_weights_are_known_without_reading_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.core.digests._LARGE", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 20)
    os.utime(path, ns=(0, 5))
    first = inputs_of({"model": str(tmp_path), "seed": 0, "plan": None, "calib_data": "c4"})
    assert first.keys() == {"model"}
    path.write_bytes(b"y" * 20)
    os.utime(path, ns=(0, 6))
    assert inputs_of({"model": str(tmp_path)}) != first
    os.utime(path, ns=(0, 5))
    assert inputs_of({"model": str(tmp_path)}) == first, "it is not read"


# ------------------------------------------------------------------------------------------------------ the table


def test_table_of_real_runs_in_every_format(finished, capsys):
    ppl = {}
    for method in ("magnitude_ww", "wanda_ww"):
        ppl[method] = json.loads((finished / f"run_{method}_sparsity_0.7.json").read_text())["perplexity"]
    expected = [[m.removesuffix("_ww"), "AlphaPruning", "0.7", f"{value:.2f}"] for m, value in ppl.items()]
    outs = {}
    for form in table.FORMATS:
        assert table.main([str(finished.parent), "--format", form]) == 0
        outs[form] = capsys.readouterr().out
    rows = list(csv.reader(io.StringIO(outs["csv"])))
    assert rows[1:] == expected and rows[0] == ["method", "allocation", "sparsity", "tiny-llama"]
    shown = [line.split("│")[1:-1] for line in outs["text"].splitlines() if "AlphaPruning" in line]
    assert [[cell.strip() for cell in row] for row in shown] == expected
    assert [line.strip("| ").split(" | ") for line in outs["markdown"].splitlines()[4:]] == expected
    latex = [line.removesuffix(r" \\").split(" & ") for line in outs["latex"].splitlines() if "AlphaPruning" in line]
    assert latex == expected
    assert "windows of 32" in outs["text"] and outs["latex"].startswith("%")


def record(method: str, perplexity: float | None, target: float = 0.7, **changes) -> dict:
    """Return what a run of LLaMA-7B as published would leave, with ``changes`` of flags."""
    flags = {
        "epsilon": 0.2,
        "eval_data": "wikitext2",
        "tasks": "a,b",
        "num_fewshot": 0,
        "limit": None,
        "seed": 0,
    } | changes
    return {
        "complete": True, "method": method, "target_sparsity": target, "perplexity": perplexity, "flags": flags,
        "model": {"name": "llama-7b-hf", "parameters": 6738415616}, "finished": "2025-01-01T00:00:00",
        "evaluation": {"text": flags["eval_data"], "seqlen": 2048, "windows": 166}, "zero_shot": None,
    }  # fmt: skip


def csv_of(folder: Path, records: dict[str, dict], capsys, *flags: str) -> list[list[str]]:
    for name, content in records.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "run_x.json").write_text(json.dumps(content))
    assert table.main([str(folder), "--format", "csv", *flags]) == 0
    return list(csv.reader(io.StringIO(capsys.readouterr().out)))


def test_paper_figures_stand_beside_their_own_cells_only(tmp_path, capsys):
    other = record("wanda", 90.0)
    other["model"] = {"name": "llama-7b-hf", "parameters": 1000}  # of that name, but another model
    rows = csv_of(tmp_path, {"a": record("wanda", 86.1), "b": record("wanda_ww", 24.0), "c": record("dense", 5.7, 0.0),
                             "d": record("sparsegpt", 9.9, 0.5), "e": record("wanda_xyz", 30.0),
                              "f": other}, capsys)  # fmt: skip
    assert rows == [
        ["method", "allocation", "sparsity", "LLaMA-7B", "published", "llama-7b-hf"],
        ["dense", "", "0", "5.70", "5.68", ""],
        ["sparsegpt", "uniform", "0.5", "9.90", "", ""],
        ["wanda", "uniform", "0.7", "86.10", "85.77", "90.00"],
        ["wanda", "AlphaPruning", "0.7", "24.00", "23.86", ""],
        ["wanda", "xyz", "0.7", "30.00", "", ""],
    ]
    elsewhere = csv_of(tmp_path / "elsewhere", {"a": record("wanda", 86.1, eval_data="wiki_leads")}, capsys)
    assert elsewhere[0][-1] == "LLaMA-7B", "on another text there is nothing to compare"


def test_settings_are_not_mixed_in_a_cell(tmp_path, capsys):
    runs = {
        "a": record("wanda_ww", 24.0),
        "b": record("wanda_ww", 25.0, epsilon=0.1),
        "c": record("wanda_ww", 31.0, eval_data="c4"),
    }
    newer = record("wanda_ww", 24.5)
    newer["finished"] = "2025-02-01T00:00:00"
    rows = csv_of(tmp_path, runs | {"d": newer, "e": record("wanda_ww", 9.0) | {"complete": False}}, capsys)
    assert rows[1:] == [
        ["wanda", "AlphaPruning, epsilon 0.1", "0.7", "", "25.00", "23.86"],
        ["wanda", "AlphaPruning, epsilon 0.2", "0.7", "31.00", "24.50", "23.86"],
    ]
    texts = ["LLaMA-7B (c4, 166 windows of 2048)", "LLaMA-7B (wikitext2, 166 windows of 2048)"]
    assert rows[0][3:] == [*texts, "published"]


def test_a_cell_is_about_all_seeds_and_the_newer_run_of_one(tmp_path, capsys):
    runs = {f"a{seed}": record("alps_price", ppl, seed=seed) for seed, ppl in enumerate((18.0, 19.0, 21.0))}
    runs |= {f"b{seed}": record("wanda", ppl, seed=seed) for seed, ppl in enumerate((85.0, 87.0))}
    runs |= {"f": record("dense", 5.7, 0.0), "g": record("wanda_owl", 24.0, seed=1)}
    newer = record("alps_price", 20.0, seed=1) | {"finished": "2025-02-01T00:00:00"}
    for content in runs.values():
        content["git_commit"] = "a" * 40
    rows = csv_of(tmp_path, runs | {"h": newer | {"git_commit": "b" * 40 + "-dirty"}}, capsys)
    assert rows == [
        ["method", "allocation", "sparsity", "LLaMA-7B", "published"],
        ["dense", "", "0", "5.70", "5.68"],
        ["wanda", "uniform", "0.7", "86.00 ± 1.41 (2)", "85.77"],
        ["wanda", "OWL", "0.7", "24.00 (1)", "24.55"],
        ["alps", "price", "0.7", "19.67 ± 1.53", ""],  # 18, 20 and 21
    ]
    assert table.main([str(tmp_path), "--format", "latex"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    for words in ("seeds 0, 1, 2", "Commits: aaaaaaaaaaaa, bbbbbbbbbbbb-dirty", "published: Lu et al., AlphaPruning"):
        assert words in title
    assert any(r"19.67 $\pm$ 1.53" in line for line in lines)


def test_published_figures_without_a_run_can_be_listed(tmp_path, capsys):
    run = record("wanda_price", 20.0)
    run["model"] = {"name": "Llama-2-7b-hf", "parameters": 6738415616}
    assert len(csv_of(tmp_path, {"a": run}, capsys)) == 2
    rows = csv_of(tmp_path, {}, capsys, "--published")
    assert rows == [
        ["method", "allocation", "sparsity", "Llama-2-7B", "published"],
        ["dense", "", "0", "", "5.47"],
        ["wanda", "price", "0.7", "20.00", ""],
        ["wanda", "AlphaPruning", "0.7", "", "28.87"],
        ["sparsegpt", "dlp", "0.7", "", "18.58"],
        ["alps", "uniform", "0.7", "", "19.31 ± 0.68"],
    ]
    assert table.main([str(tmp_path), "--published"]) == 0
    title = capsys.readouterr().out.splitlines()[0]
    assert "DLP: Dynamic Layerwise Pruning" in title and "published: Meng et al., ALPS" in title
    # A run in another setting does not hide the figure, and none stands beside it.
    rows = csv_of(tmp_path, {"b": record("alps", 9.0, nsamples=4) | {"model": run["model"]}}, capsys, "--published")
    assert rows[-1] == ["alps", "uniform", "0.7", "9.00", ""]

@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"ww_metric": "stable_rank"}, "AlphaPruning, ww_metric stable_rank"),
        ({"mapping_type": "layer_wise"}, "AlphaPruning, mapping_type layer_wise"),
        ({"farms": True}, "AlphaPruning, farms True"),
        ({"refit": 10}, "AlphaPruning, refit 10"),
        ({"statistics": "dense"}, "AlphaPruning, statistics dense"),
        ({"nsamples": 4}, "AlphaPruning"),
        ({"eval_windows": 4}, "AlphaPruning"),
        ({"calib_data": "wiki_leads"}, "AlphaPruning"),
    ],
)
def test_the_papers_figure_is_for_its_own_setting(change, label, tmp_path, capsys):
    # One run alone: nothing else tells that it is another method.
    header, row = csv_of(tmp_path, {"a": record("wanda_ww", 366.0, **change)}, capsys)
    assert "published" not in header and row[1] == label


def test_a_run_without_the_metric_is_left_out(tmp_path, capsys):
    odd, good = record("wanda", 9.0), record("magnitude", 9.0)
    odd["zero_shot"], good["zero_shot"] = {"means": {"f1": 0.5}}, {"means": {"acc": 0.5}}
    rows = csv_of(tmp_path, {"a": odd, "b": good}, capsys, "--value", "zero_shot")
    assert [row[0] for row in rows] == ["method", "magnitude"]


def test_zero_shot_table_and_a_perplexity_that_is_not_finite(tmp_path, capsys):
    accurate = record("wanda", "inf")
    accurate["zero_shot"] = {"means": {"acc": 0.43219}}
    assert csv_of(tmp_path, {"a": accurate}, capsys)[1][3] == "inf"
    assert csv_of(tmp_path, {}, capsys, "--value", "zero_shot")[1] == ["wanda", "uniform", "0.7", "43.22"]
    seeds = {f"s{seed}": record("alps", ppl, seed=seed) for seed, ppl in enumerate((18.0, "inf", 21.0))}
    older = record("magnitude", None)  # null: an older version's, of a complete run with an evaluation
    rows = csv_of(tmp_path, seeds | {"b": older}, capsys)
    assert [row[3] for row in rows[1:]] == ["nan (1)", "inf (1)", "inf"]
    assert table.main([str(tmp_path / "nowhere")]) == 2 and "folder not found" in capsys.readouterr().err


def test_damaged_run_files_are_left_out_by_name(tmp_path, capsys):
    good = record("wanda", 9.0)
    spoiled = {"a": [1], "e": good | {"flags": 3}, "f": good | {"perplexity": {}}, "g": good | {"target_sparsity": "x"}}
    for name, missing in {"b": "finished", "c": "method", "d": "model"}.items():
        spoiled[name] = {key: value for key, value in good.items() if key != missing}
    for name, content in ({"good": good} | spoiled).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_x.json").write_text(json.dumps(content))
    assert table.main([str(tmp_path), "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and err.count("is left out") == len(spoiled) == len(err.splitlines())


def test_a_sweep_counts_a_perplexity_that_is_not_finite(small, tmp_path, monkeypatch, capsys, recwarn):
    variables, flags, _ = small
    monkeypatch.setattr("lib.evaluation.perplexity.perplexity", lambda *_: math.inf)
    flags = ["--model", variables["MODEL"], *flags, "--save", str(tmp_path), "--methods", "dense,magnitude"]
    labels = []
    legend = "matplotlib.axes.Axes.legend"
    monkeypatch.setattr(legend, lambda axes, **_: labels.append(axes.get_legend_handles_labels()))
    for words in ("2 settings in", "complete already"):
        assert sweep.main([*flags, "--sparsities", "0.5"]) == 0
        assert words in capsys.readouterr().out and (tmp_path / "sweep.png").is_file()
        assert labels.pop()[1] == ["dense (inf)", "magnitude, inf at 0.5"]
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning | UserWarning)]


def test_published_figures_are_the_checked_ones():
    content = json.loads(table.PUBLISHED.read_text())
    assert content["perplexity"].keys() == content["sources"].keys()
    models = {m for rows in content["perplexity"].values() for row in rows.values() for m in row}
    assert models <= content["models"].keys()
    rows = content["perplexity"]["AlphaPruning"]
    one = ("LLaMA-7B", "LLaMA-13B", "LLaMA-30B", "LLaMA-65B")
    assert [rows["dense"][m] for m in (*one, "Llama-2-7B", "Llama-2-13B", "Llama-2-70B")] == [
        5.68,
        5.09,
        4.1,
        3.53,
        5.47,
        4.88,
        3.31,
    ]
    four = {"wanda": [85.77, 55.90, 17.37, 15.23], "wanda_owl": [24.55, 17.17, 10.75, 8.61],
            "sparsegpt": [26.30, 19.24, 12.56, 10.45], "sparsegpt_owl": [19.49, 14.55, 10.28, 8.28],
            "magnitude": [48419.12, 84539.45, 977.73, 46.89]}  # fmt: skip
    assert {method: [rows[method][m] for m in one] for method in four} == four
    assert all(len(rows[method]) == 4 for method in four)
    assert rows["wanda_ww"] == {
        "LLaMA-7B": 23.86,
        "LLaMA-13B": 14.21,
        "LLaMA-30B": 9.68,
        "Llama-2-7B": 28.87,
        "Llama-2-13B": 14.16,
    }
    assert (rows["sparsegpt_ww"], rows["magnitude_ww"]) == ({"LLaMA-7B": 18.54}, {"LLaMA-13B": 2029.2})
    assert len(rows) == 9
    assert content["perplexity"]["DLP"] == {"sparsegpt_dlp": {"Llama-2-7B": 18.58}}
    assert content["perplexity"]["ALPS"] == {"alps": {"Llama-2-7B": [19.31, 0.68, 5], "Llama-3-8B": [30.53, 1.58]}}


def test_record_names_its_candidates(tmp_path):
    done = shell("record", "a b/model", "--nsamples", "7", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    runs, shown = (shlex.split(line) for line in done.stdout.splitlines())
    assert runs[:2] == [sys.executable, "scripts/sweep.py"] and shown[:2] == [sys.executable, "scripts/table.py"]
    settings = planned(*runs[2:])
    methods = ["sparsegpt", "alps", "wanda_price", "alps_price"]
    assert [(s.prune_method, s.seed) for s in settings] == [(method, seed) for seed in range(3) for method in methods]
    for run in settings:
        assert (run.model, run.sparsity_ratio, run.nsamples) == ("a b/model", 0.7, 7)
        assert (run.calib_data, run.eval_data, run.seqlen) == ("c4", "wikitext2", 2048)
    places = ["", "/seed_1", "/seed_2"]
    assert [run.save for run in settings[::4]] == [f"results/record/model{place}" for place in places]
    made = parse(table.Settings, shown[2:], table.PARSER)
    assert (made.folder, made.published, made.format) == ("results/record/model", True, "text")
    for flags in ((), ("--nsamples", "7")):
        missing = shell("record", *flags)
        assert missing.returncode == 2 and missing.stderr.startswith("record.sh: error: MODEL is missing")


@pytest.mark.slow
def test_record_runs_them_and_prints_one_table(small, tmp_path):
    variables, flags, _ = small
    flags = [*flags, "--eval_data", "wiki_leads", "--eval_windows", "2", "--price_steps", "1"]
    done = shell("record", variables["MODEL"], *flags, SAVE=str(tmp_path / "r"), SEEDS="2", FORMAT="csv")
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines() if " ± " in line]
    expected = [["wanda", "price"], ["sparsegpt", "uniform"], ["alps", "uniform"], ["alps", "price"]]
    assert [row[:2] for row in rows] == expected and {row[2] for row in rows} == {"0.7"}
    assert all(float(row[3].split(" ± ")[1]) > 0 for row in rows), "another seed draws another text"


# ------------------------------------------------------------------------------------------------------ the sweep


def test_sweep_is_what_separate_runs_are(small, tmp_path, capsys, monkeypatch):
    variables, flags, _ = small
    flags = ["--model", variables["MODEL"], "--ww_metric_cache", variables["CACHE"], *flags]
    command = [*flags, "--save", str(tmp_path), "--sparsities", "0.6,0.5", "--epsilons", "0.2,0.1"]
    command += ["--methods", "magnitude,wanda_ww,sparsegpt,dense"]
    loads = []
    load_llm = loading.load_llm
    monkeypatch.setattr(loading, "load_llm", lambda *args, **more: loads.append(args) or load_llm(*args, **more))
    assert sweep.main(command) == 0
    out = capsys.readouterr().out
    assert len(loads) == 1 and "9 settings in" in out
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("run_*.json"))
    assert len(found) == 9 and "epsilon_0.1/run_wanda_ww_sparsity_0.5.json" in found
    png = (tmp_path / "sweep.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    # The last of each method, after everything else had pruned the same model, against a process of its own in spirit.
    for where, method in {"": [], "epsilon_0.1": "--prune_method wanda_ww --sparsity_ratio 0.5 --epsilon 0.1".split(),
                          ".": ["--prune_method", "sparsegpt", "--sparsity_ratio", "0.5"]}.items():  # fmt: skip
        assert main.main([*flags, *method, "--save", str(tmp_path / "alone")]) == 0
        (path,) = (tmp_path / "alone").glob("run_*.json")
        alone, swept = (json.loads(p.read_text()) for p in (path, tmp_path / where / path.name))
        assert alone["perplexity"] == swept["perplexity"] and alone["sparsity"] == swept["sparsity"]
        path.unlink()
    capsys.readouterr()
    (tmp_path / "run_sparsegpt_sparsity_0.5.json").unlink()
    assert sweep.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("complete already") == 8 and "1 settings in" in out
    assert table.main([str(tmp_path), "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_sweep_checks_every_setting_before_the_first(small, tmp_path, capsys):
    variables, flags, _ = small
    command = ["--model", variables["MODEL"], *flags, "--save", str(tmp_path / "s"), "--methods", "dense,wandaa"]
    assert sweep.main(command) == 2
    assert "Did you mean 'wanda'" in capsys.readouterr().err and not (tmp_path / "s").exists()


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        planned("--model", "m", *flags)
    return str(caught.value)


def test_a_sweeps_lists_become_settings():
    flags = ["--model", "m", "--save", "s", "--sparsities", "0.6, 0.5", "--nsamples", "7", "--owl_m", "3"]
    flags += ["--methods", "dense magnitude_owl wanda_ww sparsegpt_ww", "--save_model", "out", "--seed", "2"]
    runs = planned(*flags, "--epsilons", "0.1,0.2,sparsegpt_ww=0.3")
    assert [(r.prune_method, r.sparsity_ratio, r.save, r.save_model) for r in runs] == [
        (None, 0.0, "s", None),
        ("magnitude_owl", 0.6, "s", "out"), ("magnitude_owl", 0.5, "s", "out"),
        ("wanda_ww", 0.6, "s/epsilon_0.1", "out/epsilon_0.1"), ("wanda_ww", 0.6, "s/epsilon_0.2", "out/epsilon_0.2"),
        ("wanda_ww", 0.5, "s/epsilon_0.1", "out/epsilon_0.1"), ("wanda_ww", 0.5, "s/epsilon_0.2", "out/epsilon_0.2"),
        ("sparsegpt_ww", 0.6, "s", "out"), ("sparsegpt_ww", 0.5, "s", "out"),
    ]  # fmt: skip
    assert [r.epsilon for r in runs if r.prune_method and r.prune_method.endswith("_ww")] == [
        0.1,
        0.2,
        0.1,
        0.2,
        0.3,
        0.3,
    ]
    assert [r.owl_m for r in runs[:4]] == [5.0, 3.0, 3.0, 5.0], "a flag goes to the methods that understand it"
    assert {(r.nsamples, r.seed) for r in runs} == {(7, 2)}
    # What is recorded is what main.py would record: a run of one is complete for the other.
    alone = "--model m --save s --nsamples 7 --seed 2 --prune_method magnitude_owl --sparsity_ratio 0.6 --owl_m 3"
    assert parse(Experiment, [*alone.split(), "--save_model", "out"], main.PARSER).flags() == runs[1].flags()


def test_a_pruners_flag_goes_to_that_pruner():
    flags = ["--model", "m", "--methods", "wanda,sparsegpt,alps_owl", "--sparsities", "0.5"]
    runs = planned(*flags, "--pruner_iterations", "30", "--damping", "0.2", "--use_variant")
    assert [run.pruner_iterations for run in runs] == [None, None, 30]
    assert [run.damping for run in runs] == [None, 0.2, 0.2]
    assert [run.use_variant for run in runs] == [True, False, False]
    assert [run.damping for run in planned(*flags, "--damping", "0.2", "--refit", "5")] == [0.2] * 3


def test_seeds_of_a_sweep_have_folders():
    runs = planned("--model", "m", "--save", "s", "--methods", "dense,wanda", "--sparsities", "0.5", "--seeds", "2")
    assert [(run.prune_method, run.seed, run.save) for run in runs] == [
        (None, 0, "s"), ("wanda", 0, "s"), ("wanda", 1, "s/seed_1")
    ]  # fmt: skip
    alone = planned("--model", "m", "--save", "s", "--methods", "wanda", "--sparsities", "0.5", "--seed", "1")
    assert [(run.seed, run.save) for run in alone] == [(1, "s")], "of one seed the folder is the one that is asked for"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--methods wanda --sparsities 0.5 --pruner_iterations 30", "--pruner_iterations does nothing with wanda"),
        ("--methods wanda_ww --epsilons magnitude_ww=0.1", "holds none for wanda_ww"),
        ("--epsilons wanda=0.1", "Did you mean 'wanda_ww'"),
        ("--epsilons wanda_ww=x", "'x' is not a number"),
        ("--epsilons 2", "must be between 0 and 1"),
        ("--sparsities 0.5;0.6", "'0.5;0.6' is not a number"),
        ("--sparsities ,", "holds no number"),
        ("--methods ,", "names no method"),
        ("--owl_m 3", "it is for the methods with _owl"),
        ("--save_plan p.json", "18 settings would write the same file"),
        ("--metrics_only", "nothing to sweep"),
        ("--methods dense --seeds 3", "--seeds 3 with --methods dense: nothing is drawn for it"),
        ("--methods magnitude --epsilons wandaa_ww=0.3", "Did you mean 'wanda_ww'"),
        ("--sparsitys 0.5", "Did you mean '--sparsities'"),
    ],
)
def test_sweep_refuses_what_it_could_not_mean(flags, says):
    assert says in refusal(*flags.split())


def test_each_value_of_a_list_is_run_once():
    flags = ["--methods", "wanda,wanda_ww", "--sparsities", "0.5,0.5 0.50", "--epsilons", ".2,0.2"]
    runs = planned("--model", "m", *flags)
    assert [(run.prune_method, run.sparsity_ratio) for run in runs] == [("wanda", 0.5), ("wanda_ww", 0.5)]
    assert runs[1].save == "results/sweep", "one epsilon needs no folder"


@pytest.mark.parametrize(
    ("methods", "epsilons", "idle"),
    [
        ("magnitude", "0.4", ["0.4"]),
        ("sparsegpt_ww", "0.2,wanda_ww=0.3", ["wanda_ww=0.3"]),
        ("sparsegpt_ww", "0.2,sparsegpt_ww=0.3", ["0.2"]),
        ("sparsegpt_ww,wanda_ww", "0.2,sparsegpt_ww=0.3", []),
    ],
)
def test_epsilons_for_no_method_are_named(methods, epsilons, idle, tmp_path, small, monkeypatch, caplog):
    monkeypatch.setattr(sweep, "run_all", lambda *_: ([], []))
    flags = ["--model", small[0]["MODEL"], *small[1], "--save", str(tmp_path), "--methods", methods]
    assert sweep.main([*flags, "--epsilons", epsilons]) == 0
    found = [r.getMessage() for r in caplog.records if "does nothing" in r.getMessage()]
    assert found == ([f"--epsilons {','.join(idle)}: does nothing with --methods {methods}"] if idle else [])
    caplog.clear()
    assert sweep.main(flags) == 0 and "does nothing" not in caplog.text, "the default is not the user's"


def test_a_model_that_is_not_there_is_one_line(small, tmp_path, capsys):
    flags = ["--model", "/nope", *small[1], "--save", str(tmp_path / "s"), "--methods", "dense,magnitude"]
    assert sweep.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sweep.py: error: --model /nope: folder not found") and not (tmp_path / "s").exists()


def test_a_setting_that_fails_does_not_stop_the_others(small, tmp_path, capsys, caplog):
    variables, flags, _ = small
    np.save(tmp_path / "alpha_peak.npy", np.ones(3))  # of another model
    flags = ["--model", variables["MODEL"], *flags, "--ww_metric_cache", str(tmp_path), "--save", str(tmp_path / "s")]
    flags += ["--methods", "magnitude_ww,magnitude", "--sparsities", "0.5"]
    assert sweep.main(flags) == 1
    assert "magnitude_ww at 0.5, epsilon 0.2 failed" in caplog.text and "holds 3 values" in caplog.text
    assert [path.name for path in (tmp_path / "s").glob("run_*")] == ["run_magnitude_sparsity_0.5.json"]
    capsys.readouterr()
    assert sweep.main(flags) == 1, "and is tried again"
    assert capsys.readouterr().out.count("complete already") == 1


def test_records_come_in_the_order_of_the_settings(monkeypatch, tmp_path):
    def run(settings, *_):
        if settings.prune_method == "wanda":
            raise RuntimeError("not foreseen")
        return {"method": settings.prune_method}

    monkeypatch.setattr(main, "run", run)
    flags = ["--model", "m", "--save", str(tmp_path), "--sparsities", "0.5", "--methods", "sparsegpt,wanda,magnitude"]
    records, made = sweep.run_all(planned(*flags), force=False)
    assert records == [{"method": "sparsegpt"}, None, {"method": "magnitude"}] and made == [records[0], records[2]]


def test_the_model_is_loaded_with_room_for_the_neediest_setting(small, tmp_path, monkeypatch):
    # On a GPU the first run's needs would otherwise decide how much of the model goes there.
    variables, flags, _ = small
    rooms = []
    load_llm = loading.load_llm
    monkeypatch.setattr(loading, "load_llm", lambda *a, reserve, **k: rooms.append(reserve) or load_llm(*a, **k))
    common = ["--model", variables["MODEL"], *flags, "--save", str(tmp_path)]
    pruned = ["--prune_method", "sparsegpt", "--sparsity_ratio", "0.5"]
    assert main.main(common) == main.main([*common, *pruned]) == 0
    assert sweep.main([*common, "--force", "--methods", "dense,sparsegpt", "--sparsities", "0.5"]) == 0
    dense, alone, swept = rooms
    assert dense < alone == swept


def test_time_saved_is_a_lower_bound_by_what_was_measured():
    def made(prepare: float, load: float) -> dict:
        return {"stages": {"prepare": {"seconds": prepare}, "load": {"seconds": load}, "prune": {"seconds": 9.0}}}

    # the second pays nothing again, the third only its own calibration text
    assert sweep.saved_seconds([made(3, 2), made(0, 0), made(4, 0)], 5.0) == (5 + 5) + (5 + 1)
    assert sweep.saved_seconds([made(3, 2)], 5.0) == 0


@pytest.mark.slow
def test_table2_of_smollm2_runs(tmp_path):
    done = shell("table2_smollm2", "--nsamples", "2", "--seqlen", "64", "--eval_windows", "2",
                 "--ww_metric_cache", str(tmp_path / "c"),
                 SAVE=str(tmp_path), METHODS="dense magnitude", SPARSITY="0.5", FORMAT="csv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines() if line.startswith(("dense,", "magnitude,"))]
    assert [row[:3] for row in rows] == [["dense", "", "0"], ["magnitude", "uniform", "0.5"]]
    assert 1 < float(rows[0][3]) < float(rows[1][3]) and "measured on 20" in done.stdout


# ------------------------------------------------------------------------------------------------------ the demo


def test_demo_shows_what_was_gained_and_what_moves(monkeypatch, tmp_path, tiny_folder, capsys):
    figures = {("dense", 0.0): 14.0, ("wanda", 0.7): 600.0, ("wanda_ww", 0.7): 450.0, ("sparsegpt", 0.7): 180.0}
    figures |= {("alps", 0.7): 90.0}
    records = [record(method, ppl, target, epsilon=0.2) for (method, target), ppl in figures.items()]
    records = [r | {"sparsity": r["target_sparsity"], "stages": {"load": {"seconds": 1.0}}} for r in records]
    records[-1] |= {"saved_model": str(tiny_folder)}
    records[-1]["flags"] |= {"cache_dir": "none"}
    asked = []
    monkeypatch.setattr(sweep, "run_all", lambda todo, force: asked.append(todo) or (records, records))
    assert demo.main(["--save", str(tmp_path), "--sparsity_ratio", "0.7"]) == 0
    assert [run.prune_method for run in asked[0]] == [None, "wanda", "sparsegpt", "wanda_ww", "sparsegpt_ww", "alps"]
    saving = [run.save_model for run in asked[0]]
    assert saving == [None] * 5 + [str(tmp_path / "model")]
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    shown = {row[1]: row[4] for row in rows if len(row) == 7}
    expected = {"dense": "14.00", "wanda": "600.00", "wanda_ww": "about 450.0", "sparsegpt": "about 180.0"}
    assert {method: shown[method] for method in expected} == expected
    assert "wanda at 0.7: perplexity 600.00 uniform, about 450.0 by alpha (about -25 %)" in out
    assert "best at 0.7: perplexity 600.00 wanda, about 90.0 alps (about -85 %)" in out
    assert f"{tiny_folder}, continues:\n" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    program, *rest = shlex.split(out.splitlines()[-1])[1:]
    assert program == "main.py" and parse(Experiment, rest, main.PARSER).eval_windows == 10


@pytest.mark.parametrize(("flags", "says"), [(["--epsilon", "2"], "--epsilon 2.0"), (["--save", "f/x"], "--save f/x"),
                                             (["--sparsity_ratio", "1"], "--sparsity_ratio 1.0")])  # fmt: skip
def test_demo_refuses_in_one_line(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("")
    assert demo.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"demo.sh: error: {says}")
