"""The scripts are run: published settings, interrupted and restarted; table and sweep on real run files."""

import csv
import importlib.util
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import main
from lib.allocation import SparsityPlan, heavy_tailed
from lib.models import prunable_layers


def load(name: str):
    """Return a script of the folder scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table, sweep, is_complete = load("table"), load("sweep"), load("is_complete")

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
NAMES = dict(zip(PUBLISHED, json.loads(table.PUBLISHED.read_text())["models"], strict=True))


# One thread, as in the other tests: several of them stall each other where the cores are shared.
ENVIRONMENT = os.environ | {"PYTHON_BIN": sys.executable, "OMP_NUM_THREADS": "1"}


def shell(script: str, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", f"scripts/{script}.sh", *flags]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=300)


def dry(script: str, *flags: str, **variables: str) -> list:
    """Return the parsed flags of each run that the script would make."""
    done = shell(script, *flags, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return [main.make_parser().parse_args(shlex.split(line)[1:]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", PUBLISHED)
def test_script_has_the_published_settings(script):
    hub, cache, *epsilons = PUBLISHED[script]
    runs = dry(script)
    assert [run.prune_method for run in runs] == ["magnitude_ww", "wanda_ww", "sparsegpt_ww"]
    assert [run.epsilon for run in runs] == epsilons
    for run in runs:
        main.check_args(run)
        assert (run.model, run.ww_metric_cache, run.save) == (hub, cache, f"results/{script}")
        assert (run.sparsity_ratio, run.ww_metric, run.mapping_type) == (0.7, "alpha_peak", "block_wise")
        assert (run.calib_data, run.eval_data, run.nsamples, run.seqlen, run.seed) == ("c4", "wikitext2", 128, 2048, 0)


def test_script_settings_can_be_overridden():
    variables = {"MODEL": "a b", "SAVE": "there", "SPARSITY": "0.5 0.6", "METHODS": "dense wanda wanda_ww"}
    runs = dry("llama_13b", "--epsilon", "0.1", "--seed", "3", **variables)
    assert [(run.prune_method, run.sparsity_ratio) for run in runs] == [
        (None, 0.0), ("wanda", 0.5), ("wanda_ww", 0.5), ("wanda", 0.6), ("wanda_ww", 0.6)
    ]  # fmt: skip
    assert {(run.model, run.save, run.epsilon, run.seed) for run in runs} == {("a b", "there", 0.1, 3)}
    assert {run.ww_metric_cache for run in runs} == {None}, "another model's metric is not kept under this one's name"
    assert dry("llama_13b", MODEL="m", CACHE="c", METHODS="wanda_ww")[0].ww_metric_cache == "c"
    for run in dry("llama_13b", METHODS="dense wanda wanda_owl sparsegpt_dlp"):
        main.check_args(run)  # which refuses flags of another allocation


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
    sizes = [layer.module.weight.numel() for layer in layers]
    for epsilon in PUBLISHED[script][2:]:
        ratios = heavy_tailed(layers, 0.7, values=values, epsilon=epsilon, mapping="block_wise")
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
    return {"MODEL": str(tiny_folder), "SAVE": str(save / "runs"), "CACHE": str(save / "cache"),
            "METHODS": "magnitude_ww wanda_ww"}, flags, save / "runs"  # fmt: skip


@pytest.fixture(scope="module")
def finished(small) -> Path:
    """Run llama_7b.sh, stop it after its first method, start it again; return the folder of its results."""
    variables, flags, save = small
    first, second = (save / f"run_{m}_ww_sparsity_0.7.json" for m in ("magnitude", "wanda"))
    process = subprocess.Popen(
        ["bash", "scripts/llama_7b.sh", *flags], cwd=ROOT, env=ENVIRONMENT | variables, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 143 and "stopped" in errors, errors
    with pytest.raises(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, 0)
    assert first.exists() and not second.exists()
    made = first.stat().st_mtime_ns
    again = shell("llama_7b", *flags, **variables)
    assert again.returncode == 0, again.stderr
    assert first.stat().st_mtime_ns == made and "magnitude_ww at 0.7 is complete already" in again.stdout
    assert again.stdout.count("complete already") == 1
    return save


def test_restarted_script_completes_what_is_left(finished):
    for method, epsilon in {"magnitude_ww": 0.3, "wanda_ww": 0.2}.items():
        record = json.loads((finished / f"run_{method}_sparsity_0.7.json").read_text())
        assert record["complete"] is True and record["flags"]["epsilon"] == epsilon
        assert record["sparsity"] == pytest.approx(0.7, abs=1 / 32)


def test_a_run_is_complete_only_with_the_same_flags(finished, small):
    variables, flags, save = small
    flags = ["--model", variables["MODEL"], "--save", str(save), "--ww_metric_cache", variables["CACHE"], *flags]
    flags += ["--prune_method", "wanda_ww", "--sparsity_ratio", "0.7", "--epsilon"]
    assert is_complete.is_complete([*flags, "0.2"])
    assert not is_complete.is_complete([*flags, "0.3"]) and not is_complete.is_complete([*flags, "0.2", "--seed", "1"])
    assert not is_complete.is_complete([*flags, "2"]) and not is_complete.is_complete([*flags, "0.2", "--nonsense"])
    path = save / "run_wanda_ww_sparsity_0.7.json"
    text = path.read_text()
    try:
        for damaged in (text.replace('"complete": true', '"complete": false'), text[: len(text) // 2]):
            path.write_text(damaged)
            assert not is_complete.is_complete([*flags, "0.2"])
    finally:
        path.write_text(text)


def test_a_method_that_fails_does_not_stop_the_others(finished, small):
    variables, flags, save = small
    done_before = (save / "run_magnitude_ww_sparsity_0.7.json").stat().st_mtime_ns
    done = shell("llama_7b", *flags, **(variables | {"METHODS": "nonsense magnitude_ww", "FORCE": "1"}))
    assert done.returncode == 1 and "failed: nonsense at 0.7;" in done.stderr
    assert (save / "run_magnitude_ww_sparsity_0.7.json").stat().st_mtime_ns > done_before, "FORCE runs it again"


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
    assert [line.split() for line in outs["text"].splitlines()[3:]] == expected
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
        ["method", "allocation", "sparsity", "LLaMA-7B", "paper", "llama-7b-hf"],
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
    assert rows[0][3:] == ["LLaMA-7B (c4, 166 windows of 2048)", "LLaMA-7B (wikitext2, 166 windows of 2048)", "paper"]


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"ww_metric": "stable_rank"}, "AlphaPruning, ww_metric stable_rank"),
        ({"mapping_type": "layer_wise"}, "AlphaPruning, mapping_type layer_wise"),
        ({"farms": True}, "AlphaPruning, farms True"),
        ({"nsamples": 4}, "AlphaPruning"),
        ({"eval_windows": 4}, "AlphaPruning"),
        ({"calib_data": "wiki_leads"}, "AlphaPruning"),
    ],
)
def test_the_papers_figure_is_for_its_own_setting(change, label, tmp_path, capsys):
    # One run alone: nothing else tells that it is another method.
    header, row = csv_of(tmp_path, {"a": record("wanda_ww", 366.0, **change)}, capsys)
    assert "paper" not in header and row[1] == label


def test_a_run_without_the_metric_is_left_out(tmp_path, capsys):
    odd, good = record("wanda", 9.0), record("magnitude", 9.0)
    odd["zero_shot"], good["zero_shot"] = {"means": {"f1": 0.5}}, {"means": {"acc": 0.5}}
    rows = csv_of(tmp_path, {"a": odd, "b": good}, capsys, "--value", "zero_shot")
    assert [row[0] for row in rows] == ["method", "magnitude"]


def test_zero_shot_table_and_a_perplexity_that_is_not_finite(tmp_path, capsys):
    accurate = record("wanda", math.inf)
    accurate["zero_shot"] = {"means": {"acc": 0.43219}}
    assert csv_of(tmp_path, {"a": accurate}, capsys)[1][3] == "inf"
    assert csv_of(tmp_path, {}, capsys, "--value", "zero_shot")[1] == ["wanda", "uniform", "0.7", "43.22"]
    assert table.main([str(tmp_path / "nowhere")]) == 2 and "is no folder" in capsys.readouterr().err


def test_published_figures_are_the_checked_ones():
    rows = json.loads(table.PUBLISHED.read_text())["perplexity"]
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


# ------------------------------------------------------------------------------------------------------ the sweep


def test_sweep_is_what_separate_runs_are(small, tmp_path, capsys, monkeypatch):
    variables, flags, _ = small
    flags = ["--model", variables["MODEL"], "--ww_metric_cache", variables["CACHE"], *flags]
    command = [*flags, "--save", str(tmp_path), "--sparsities", "0.6,0.5", "--epsilons", "0.2,0.1"]
    command += ["--methods", "magnitude,wanda_ww,sparsegpt,dense"]
    loads = []
    load_llm = main.models.load_llm
    monkeypatch.setattr(main.models, "load_llm", lambda *args: loads.append(args) or load_llm(*args))
    assert sweep.run(command, 1.0) == 0
    out = capsys.readouterr().out
    assert len(loads) == 1 and "9 settings in" in out
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("run_*.json"))
    assert len(files) == 9 and "epsilon_0.1/run_wanda_ww_sparsity_0.5.json" in files
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "sweep.png"
    ).stat().st_size > 5000
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
    assert sweep.run(command, 1.0) == 0
    out = capsys.readouterr().out
    assert out.count("complete already") == 8 and "1 settings in" in out
    assert table.main([str(tmp_path), "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_sweep_checks_every_setting_before_the_first(small, tmp_path, capsys):
    variables, flags, _ = small
    command = ["--model", variables["MODEL"], *flags, "--save", str(tmp_path / "s"), "--methods", "dense,wandaa"]
    assert sweep.run(command, 1.0) == 2
    assert "Did you mean 'wanda'" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_time_saved_is_a_lower_bound_by_what_was_measured():
    def made(text: float, load_: float) -> dict:
        return {"stages": {"text": {"seconds": text}, "load": {"seconds": load_}, "prune": {"seconds": 9.0}}}

    # the second pays nothing again, the third only its own calibration text
    assert sweep.saved_seconds([made(3, 2), made(0, 0), made(4, 0)], 5.0) == (5 + 5) + (5 + 1)
    assert sweep.saved_seconds([made(3, 2)], 5.0) == 0


def test_table2_of_smollm2_runs(tmp_path):
    done = shell("table2_smollm2", "--nsamples", "2", "--seqlen", "64", "--eval_windows", "2",
                 "--ww_metric_cache", str(tmp_path / "c"),
                 SAVE=str(tmp_path), METHODS="dense magnitude", SPARSITY="0.5", FORMAT="csv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines() if line.startswith(("dense,", "magnitude,"))]
    assert [row[:3] for row in rows] == [["dense", "", "0"], ["magnitude", "uniform", "0.5"]]
    assert 1 < float(rows[0][3]) < float(rows[1][3]) and "measured on 20" in done.stdout
