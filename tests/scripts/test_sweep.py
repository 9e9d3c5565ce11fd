"""The sweep and the scripts that start one: published settings, what is run again, what is refused; the demo."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sweep
import table
from conftest import ROOT

import main
from lib.cli.command import parse
from lib.cli.settings import Experiment
from lib.core.errors import UserError
from lib.models import load as loading

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


# -------------------------------------------------------------------------------------- completed settings, records


@pytest.fixture
def small(tiny_folder, tiny_text) -> list[str]:
    """Return the flags of a small run, without those that say where its figures lie."""
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {tiny_text} --seqlen 32 --nsamples 4"
    return [*flags.split(), "--eval_windows", "8"]


@pytest.fixture
def undrawn(monkeypatch):
    """Draw no plot, which takes longer than a run of the tiny model."""
    monkeypatch.setattr(table, "plot", lambda *_: None)


@pytest.mark.usefixtures("undrawn")
def test_only_the_same_run_of_the_same_files_is_complete(tiny_folder, tiny_text, tmp_path, capsys, caplog):
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    (tmp_path / "cal.txt").write_bytes(tiny_text.read_bytes())
    flags = f"--model {tmp_path}/tiny --calib_data {tmp_path}/cal.txt --eval_data {tmp_path}/cal.txt".split()
    flags += f"--seqlen 32 --eval_windows 2 --save {tmp_path}/s --methods magnitude --sparsities 0.5".split()

    def again(*more: str) -> bool:
        """Return whether the setting was run."""
        caplog.clear()
        assert sweep.main([*flags, *more]) == 0
        return "complete already" not in capsys.readouterr().out

    assert again() and not again() and again("--force")
    assert again("--seed", "1") and again()
    path = tmp_path / "s" / "run_magnitude_sparsity_0.5.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    assert again() and not again()
    (tmp_path / "cal.txt").write_text(tiny_text.read_text()[::-1])
    assert again() and "_data: changed since the complete run on disk" in caplog.text and not again()
    weights = tmp_path / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert again() and "--model: changed since the complete run on disk" in caplog.text and not again()
    (tmp_path / "tiny" / "README.md").write_text("not the model")
    assert not again()


def test_what_changes_while_a_sweep_runs_is_not_mixed(small, tmp_path, monkeypatch, caplog):
    (tmp_path / "cal.txt").write_text("a")

    monkeypatch.setattr(main, "run", lambda *_: (tmp_path / "cal.txt").write_text("b"))
    flags = [*small, "--save", str(tmp_path), "--methods", "wanda,magnitude"]
    flags += ["--calib_data", str(tmp_path / "cal.txt"), "--sparsities", "0.5"]
    assert sweep.run_all(planned(*flags), False) == [tmp_path / "run_wanda_sparsity_0.5.json", None]
    assert "cal.txt: was changed since this command started" in caplog.text


def test_record_names_its_candidates(tmp_path):
    done = shell("record", "a b/model", "--nsamples", "7", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    runs, recovered, shown = (shlex.split(line) for line in done.stdout.splitlines())
    assert [(s.prune_method, s.recover, s.seed) for s in planned(*recovered[2:])] == [
        ("alps_price", 2_000_000, seed) for seed in range(3)
    ]
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
    flags = [*small[2:], "--eval_data", "wiki_leads", "--eval_windows", "2", "--price_steps", "1"]
    done = shell("record", small[1], *flags, SAVE=str(tmp_path / "r"), SEEDS="2", FORMAT="csv", TOKENS="128")
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines() if " ± " in line]
    expected = [["wanda", "price"], ["sparsegpt", "uniform"], ["alps", "uniform"], ["alps", "price"]]
    expected.append(["alps", "price + recovery"])
    assert [row[:2] for row in rows] == expected and {row[2] for row in rows} == {"0.7"}
    assert all(float(row[3].split(" ± ")[1]) > 0 for row in rows), "another seed draws another text"


# ------------------------------------------------------------------------------------------------------ the sweep


def test_sweep_is_what_separate_runs_are(small, tmp_path, capsys, monkeypatch):
    flags = ["--ww_metric_cache", str(tmp_path / "cache"), *small]
    command = [*flags, "--save", str(tmp_path), "--sparsities", "0.5", "--epsilons", "0.2,0.1"]
    command += ["--methods", "wanda_ww,sparsegpt,dense"]
    loads = []
    load_llm = loading.load_llm
    monkeypatch.setattr(loading, "load_llm", lambda *args, **more: loads.append(args) or load_llm(*args, **more))
    assert sweep.main(command) == 0
    out = capsys.readouterr().out
    assert len(loads) == 1 and out.count("/4]") == 4
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("run_*.json"))
    assert len(names) == 4 and "epsilon_0.1/run_wanda_ww_sparsity_0.5.json" in names
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
    assert capsys.readouterr().out.count("complete already") == 3


def test_a_sweeps_lists_become_settings():
    flags = ["--model", "m", "--save", "s", "--sparsities", "0.6, 0.5", "--nsamples", "7", "--owl_m", "3"]
    flags += ["--methods", "dense magnitude_owl wanda_ww sparsegpt_ww", "--save_model", "out", "--seed", "2"]
    runs = planned(*flags, "--epsilons", "0.1,0.2,sparsegpt_ww=0.3")
    assert [(r.prune_method, r.sparsity_ratio, r.save, r.save_model) for r in runs] == [
        (None, 0.0, "s", None),
        ("magnitude_owl", 0.6, "s", "out"), ("magnitude_owl", 0.5, "s", "out"),
        ("wanda_ww", 0.6, "s/epsilon_0.1", "out/epsilon_0.1"), ("wanda_ww", 0.5, "s/epsilon_0.1", "out/epsilon_0.1"),
        ("wanda_ww", 0.6, "s/epsilon_0.2", "out/epsilon_0.2"), ("wanda_ww", 0.5, "s/epsilon_0.2", "out/epsilon_0.2"),
        ("sparsegpt_ww", 0.6, "s", "out"), ("sparsegpt_ww", 0.5, "s", "out"),
    ]  # fmt: skip
    assert [r.epsilon for r in runs[3:]] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert [r.owl_m for r in runs[:4]] == [5.0, 3.0, 3.0, 5.0], "a flag goes to the methods that understand it"
    assert {(r.nsamples, r.seed) for r in runs} == {(7, 2)}
    # What is recorded is what main.py would record: a run of one is complete for the other.
    alone = "--model m --save s --nsamples 7 --seed 2 --prune_method magnitude_owl --sparsity_ratio 0.6 --owl_m 3"
    assert parse(Experiment, [*alone.split(), "--save_model", "out"], main.PARSER).flags() == runs[1].flags()


def test_a_flag_for_a_flag_goes_where_that_one_goes():
    flags = "--model m --methods dense,wanda --sparsities 0.5 --drop_experts 0.25 --drop_by alpha --recover 64"
    flags += " --batch 1"
    dense, pruned = planned(*flags.split())
    assert (dense.drop_experts, dense.drop_by, dense.recover, dense.batch) == (0.0, "reap", None, 2)
    assert (pruned.drop_experts, pruned.drop_by, pruned.recover, pruned.batch) == (0.25, "alpha", 64, 1)
    with pytest.raises(UserError, match="--drop_by does nothing"):
        planned(*flags.replace("--drop_experts 0.25", "").split())


def test_several_values_of_a_hyper_parameter_have_folders():
    flags = "--model m --save s --methods wanda_atp,wanda,wanda_ww --epsilons 0.10,0.2,.1 --atp_betas 0.01".split()
    assert [(r.prune_method, r.save, r.atp_beta, r.epsilon) for r in planned(*flags, "--sparsities", "0.5,0.50")] == [
        ("wanda_atp", "s", 0.01, 0.3), ("wanda", "s", 0.005, 0.3),
        ("wanda_ww", "s/epsilon_0.1", 0.005, 0.1), ("wanda_ww", "s/epsilon_0.2", 0.005, 0.2),
    ]  # fmt: skip


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
    ("command", "flags", "says"),
    [
        (sweep, "--methods wanda --pruner_iterations 30", "--pruner_iterations does nothing with wanda"),
        (sweep, "--methods wanda_ww --epsilons magnitude_ww=0.1", "holds none for wanda_ww"),
        (sweep, "--methods magnitude --epsilons wandaa_ww=0.3", "Did you mean 'wanda_ww'"),
        (sweep, "--epsilons wanda_ww=x", "--epsilons 'x': is not a number"),
        (sweep, "--sparsities ,", "holds no number"),
        (sweep, "--methods dense,wandaa", "Did you mean 'wanda'"),
        (sweep, "--save_plan p.json", "18 settings would write the same file"),
        (sweep, "--calib_data self --save_calib p.jsonl", "18 settings would write the same file"),
        (sweep, "--metrics_only", "nothing to sweep"),
        (sweep, "--methods magnitude --model /nope", "--model /nope: folder not found"),
        (sweep, "--methods wanda_atp --atp_betas auto", "--atp_betas 'auto': is not a number"),
    ],
)
def test_sweeps_refuse_in_one_line_before_the_first_run(command, flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--model", "m", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and line.startswith(f"{command.PARSER.prog}: error: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("methods", "warned"), [("magnitude", True), ("magnitude_ww", False)])
def test_epsilons_for_no_method_are_warned_about(methods, warned, caplog):
    flags = ["--model", "m", "--methods", methods]
    planned(*flags)
    assert not caplog.records, "the default is not the user's"
    planned(*flags, "--epsilons", "0.4")
    assert ("--epsilons does nothing without a method with _ww" in caplog.text) is warned


@pytest.mark.usefixtures("undrawn")
def test_a_setting_that_fails_does_not_stop_the_others(small, tmp_path, capsys, caplog):
    np.save(tmp_path / "alpha_peak.npy", np.ones(3))  # of another model
    flags = [*small, "--ww_metric_cache", str(tmp_path), "--save", str(tmp_path / "s")]
    flags += ["--methods", "magnitude_ww,magnitude", "--sparsities", "0.5"]
    assert sweep.main(flags) == 1
    assert "magnitude_ww at 0.5, epsilon 0.2 failed" in caplog.text and "shape [3]" in caplog.text
    assert [path.name for path in (tmp_path / "s").glob("run_*")] == ["run_magnitude_sparsity_0.5.json"]
    capsys.readouterr()
    assert sweep.main(flags) == 1, "and is tried again"
    assert capsys.readouterr().out.count("complete already") == 1


@pytest.mark.usefixtures("undrawn")
def test_the_model_is_loaded_with_room_for_the_neediest_setting(small, tmp_path, monkeypatch):
    # On a GPU the first run's needs would otherwise decide how much of the model goes there.
    rooms = []
    load_llm = loading.load_llm
    monkeypatch.setattr(loading, "load_llm", lambda *a, reserve, **k: rooms.append(reserve) or load_llm(*a, **k))
    common = [*small, "--save", str(tmp_path)]
    pruned = ["--prune_method", "sparsegpt", "--sparsity_ratio", "0.5"]
    assert main.main(common) == main.main([*common, *pruned]) == 0
    assert sweep.main([*common, "--force", "--methods", "dense,sparsegpt", "--sparsities", "0.5"]) == 0
    dense, alone, swept = rooms
    assert dense < alone == swept


@pytest.mark.slow
def test_table2_of_smollm2_runs(tmp_path):
    done = shell("table2_smollm2", "--nsamples", "2", "--seqlen", "64", "--eval_windows", "2",
                 "--ww_metric_cache", str(tmp_path / "c"),
                 SAVE=str(tmp_path), METHODS="dense magnitude", SPARSITY="0.5", FORMAT="csv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines() if line.startswith(("dense,", "magnitude,"))]
    assert [row[:3] for row in rows] == [["dense", "", "0"], ["magnitude", "uniform", "0.5"]]
    assert 1 < float(rows[0][3]) < float(rows[1][3]) and "measured on 20" in done.stdout


@pytest.mark.slow
def test_demonstration_shows_its_runs_and_what_the_saved_model_says(tmp_path):
    small = "--seqlen 32 --nsamples 1 --eval_windows 1 --sparsities 0.6".split()
    done = shell("demo", *small, "--methods", "dense,magnitude", SAVE=str(tmp_path), TOKENS="64")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("magnitude", "+ recovery", "The capital of France is", "tokens/s"))
    assert (tmp_path / "sweep.png").is_file() and (tmp_path / "model/alps_0.6_recovered/config.json").is_file()
