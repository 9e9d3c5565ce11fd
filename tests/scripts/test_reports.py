"""The report of spectra and the comparison of allocations."""

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, fast

sys.path.insert(0, str(ROOT / "scripts"))

import compare_allocations
import esd_report

import main
from lib.cli.command import parse
from lib.cli.settings import Experiment
from lib.run.record import parsed, run_text
from lib.run.report import spread_of


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000


SHOWN = ["alpha_peak", "alpha_peak --farms --farms_rows 16 --farms_steps 3", "alpha", "alpha_mid", "stable_rank"]


@pytest.mark.parametrize("metric", fast(SHOWN, 2))
def test_report_shows_what_a_run_plans(metric, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --ww_metric {metric} --sparsity_ratio 0.6 --epsilon 0.2".split()
    chosen = ["--layers", "layers.1.mlp.up_proj,layers.0.self_attn.q_proj"]
    assert esd_report.main([*flags, *chosen, "--save", "report"]) == 0
    assert all(is_png(tmp_path / "report" / f"{name}.png") for name in ("blocks", "heat_map", "spectra"))
    page = (tmp_path / "report/report.md").read_text()
    assert all(f"({name})" in page for name in ("blocks.png", "heat_map.png", "spectra.png", "layers.tsv"))
    assert main.main([*flags, "--prune_method", "magnitude_ww", "--eval_wikitext", "false", "--save", "run"]) == 0
    report, run = (
        [line.split("\t") for line in (tmp_path / path).read_text().splitlines()]
        for path in ("report/layers.tsv", "run/layers_magnitude_ww_sparsity_0.6.tsv")
    )
    assert report[0] == ["name", "block", "shape", metric.split()[0], "planned_ratio"] and len(report) == 22
    # name, shape, metric, planned ratio
    assert [(row[0], *row[2:]) for row in report[1:]] == [tuple(row[:4]) for row in run[1:]]


@pytest.mark.parametrize(
    ("flags", "say"),
    [
        ("--layers layers.9.mlp.up_proj", "layer not found"),
        ("--layers mlp.up_proj", "3 layers end in that"),
        ("--ww_metric alpha_peek", "Did you mean 'alpha_peak'"),
        ("--sparsity_ratio 1.5", "--sparsity_ratio 1.5"),
        ("--sparsity_ratio 0", "--sparsity_ratio 0.0: must be above 0 and below 1"),
        ("--save file/below", "--save"),
        ("--epsilon auto", "--epsilon auto"),
        ("--ww_metric mp_softrank --esd_driver fast", "--esd_driver fast"),
    ],
)
def test_report_refuses_in_one_line(flags, say, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert esd_report.main(["--model", str(tiny_folder), *flags.split()]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(("INFO", "WARNING"))]
    assert say in line and not (tmp_path / "results").exists()


@pytest.fixture
def compared(tiny_folder, tiny_text, other_text, tmp_path, monkeypatch):
    """Return a function that runs a comparison on the tiny model and returns its table's rows and whole text."""
    monkeypatch.chdir(tmp_path)
    text = [*f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {other_text} --seqlen 32".split()]
    text += "--nsamples 3 --eval_windows 2 --save cmp".split()

    def run(*flags: str) -> tuple[dict[tuple[str, str], list[str]], str]:
        assert compare_allocations.main([*text, *flags]) == 0
        found = Path("cmp/allocations.md").read_text()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line[:1] == "|"]
        return {(row[0], row[1]): row[2:] for row in rows[2:]}, found

    return run


def test_comparison_runs_every_setting_once(compared, capsys):
    flags = "--allocations ,ww,owl,atp --sparsities 0.5,0.6 --epsilons 0.1,0.3 --atp_betas 0.01 --pruner wanda".split()
    rows, text = compared(*flags)
    labels = ["uniform", "ww epsilon 0.1", "ww epsilon 0.3", "owl", "atp atp_beta 0.01"]
    assert list(rows) == [("wanda", label) for label in labels]
    assert is_png(Path("cmp/allocations.png"))
    record = json.loads(Path("cmp/ww_epsilon_0.3/run_wanda_ww_sparsity_0.6.json").read_text())
    assert rows["wanda", "ww epsilon 0.3"][1] == f"{record['perplexity']:.2f}"
    assert "**" not in text and "one seed, so the noise is unknown" in text
    assert "tiny-llama" in text and record["git_commit"][:12] in text
    capsys.readouterr()
    assert compared(*flags)[1] == text
    assert capsys.readouterr().out.count("skipped") == 10


@pytest.mark.slow
def test_comparison_of_pruners_over_seeds(compared, capsys):
    flags = "--allocations ,owl,price --sparsities 0.5 --price_steps 5".split()
    compared(*flags, "--pruners", "wanda")
    capsys.readouterr()
    rows, text = compared(*flags, "--pruners", "wanda,magnitude", "--seeds", "3")
    assert capsys.readouterr().out.count("skipped") == 3, "the first seed of Wanda is there already"
    assert list(rows) == [(p, a) for p in ("wanda", "magnitude") for a in ("uniform", "owl", "price")]
    folders = ["cmp/owl", "cmp/owl/seed_1", "cmp/owl/seed_2"]
    records = [json.loads(Path(folder, "run_wanda_owl_sparsity_0.5.json").read_text()) for folder in folders]
    assert [record["flags"]["seed"] for record in records] == [0, 1, 2]
    figures = [record["perplexity"] for record in records]
    mean = sum(figures) / 3
    deviation = math.sqrt(sum((figure - mean) ** 2 for figure in figures) / 2)
    assert deviation > 0 and rows["wanda", "owl"][0].strip("*") == f"{mean:.2f} ± {deviation:.2f}"
    # Nothing is drawn for magnitude with uniform ratios.
    assert rows["magnitude", "uniform"][0].strip("*").endswith(" ± 0.00")
    passes = {allocation: row[2] for (pruner, allocation), row in rows.items() if pruner == "wanda"}
    assert passes == {"uniform": "0", "owl": "3", "price": str(16 + 8 + 8 + 5 * 2 * 3 + 2 * 8)}
    assert "seeds 0, 1, 2" in text and "sample standard deviation" in text


def test_seconds_are_those_of_the_processor_where_it_worked():
    stages = {"measure": {"seconds": 9.0, "cpu_seconds": 4.0}, "allocate": {"seconds": 1.0, "cpu_seconds": 0.5}}
    on_cpu, on_gpu = {"device": ["cpu (1 threads)"], "stages": stages}, {"device": ["NVIDIA H100"], "stages": stages}
    assert compare_allocations.seconds_of(on_cpu, "measure", "allocate") == 4.5
    assert compare_allocations.seconds_of(on_gpu, "measure", "allocate") == 10.0
    older = {"device": ["cpu (1 threads)"], "stages": {"prune": {"seconds": 9.0}}}
    assert compare_allocations.seconds_of(older, "prune") is None


def row(seconds: float = 0.0, passes: int = 0, pruning: float = 0.0, **cells) -> compare_allocations.Row:
    """Return a row of a comparison; its cells are given as s5=[figures at 0.5]."""
    found = {int(name[1:]) / 10: spread_of(figures) for name, figures in cells.items()}
    return compare_allocations.Row(found, seconds, passes, pruning)


def test_comparisons_table_by_pencil():
    rows = {
        ("wanda", "uniform"): row(s5=[20.0, 22.0, 24.0], s7=[90.0, 90.0, 93.0]),  # 22 +- 2, 91 +- 1.73
        ("wanda", "owl"): row(12.4, 8, 40.0, s5=[23.5, 24.5, 25.5], s7=[50.0, 51.0]),  # 24.5 +- 1, 50.5 +- 0.71
        ("alps", "uniform"): row(None, 0, None, s5=[15.0, 16.0, 17.0]),
        ("alps", "owl"): row(12.4, 8, 160.0, s5=[16.9, 16.9, 17.1]),  # 0.97 above 16, whose deviation is 1
    }
    rows = {compare_allocations.Key(*key): value for key, value in rows.items()}
    assert compare_allocations.table(rows, [0.5, 0.7]).splitlines() == [
        "| pruner | allocation | 0.5 | 0.7 | seconds | passes | pruning s |",
        "|---|---|---:|---:|---:|---:|---:|",
        "| wanda | uniform | **22.00 ± 2.00** | 91.00 ± 1.73 | 0 | 0 | 0 |",
        "| wanda | owl | 24.50 ± 1.00 | **50.50 ± 0.71 (2)** | 12 | 8 | 40 |",
        "| alps | uniform | 16.00 ± 1.00 | - | - | 0 | - |",
        "| alps | owl | 16.97 ± 0.12 | - | 12 | 8 | 160 |",
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--allocations atp --atp_betas ''", "--atp_betas '': holds no number"),
        ("--allocations ww --epsilons ,", "--epsilons ',': holds no number"),
        ("--allocations atp --atp_betas x", "--atp_betas 'x' is not a number"),
        ("--allocations owl --model /nope", "--model /nope: folder not found"),
    ],
)
def test_comparison_refuses_values_and_models(flags, says, tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["--model", str(tiny_folder), "--calib_data", str(tiny_text), "--eval_data", str(tiny_text)]
    assert compare_allocations.main([*common, *shlex.split(flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compare_allocations.py: error: {says}")
    assert not list(tmp_path.iterdir())


def test_each_value_of_a_comparison_is_tried_once():
    flags = "--model m --allocations ww,,ww --epsilons 0.10,0.2,.1 --sparsities 0.5,0.50".split()
    keyed = parse(compare_allocations.Comparison, flags, compare_allocations.PARSER).keyed()
    labels = ["ww epsilon 0.10", "ww epsilon 0.2", "uniform"]
    assert [key.allocation for key, _ in keyed] == labels and [s.epsilon for _, s in keyed[:2]] == [0.1, 0.2]


def test_a_seed_that_diverged_counts(tmp_path):
    def record(figure: float) -> dict:
        stages = dict.fromkeys(("measure", "allocate", "prune"), {"seconds": 1.0})
        return parsed(run_text({"perplexity": figure, "target_sparsity": 0.5, "stages": stages}))

    setting = parse(Experiment, "--model m --prune_method wanda --sparsity_ratio 0.5".split(), main.PARSER)
    keys = [compare_allocations.Key("wanda", name) for name in ("uniform", "uniform", "owl")]
    rows = compare_allocations.rows_of(keys, [setting] * 3, [record(9.0), record(math.inf), record(8.0)])
    assert rows[keys[0]].cells[0.5].text(2) == "inf" and rows[keys[2]].cells[0.5].text(2) == "8.00 (1)"
    compare_allocations.plot(rows, [0.5], "m", tmp_path / "x.png")
    assert is_png(tmp_path / "x.png")


def test_the_documented_results_are_the_measured_ones():
    content = json.loads((ROOT / "data/smollm2_results.json").read_text())
    keys, settings, records = [], [], []
    for run in content["runs"]:
        setting = parse(Experiment, run["command"].split()[2:], main.PARSER)
        pruner, _, suffix = run["method"].partition("_")
        epsilon = f" epsilon {setting.epsilon}" if suffix == "ww" else ""
        keys.append(compare_allocations.Key(pruner, (suffix or "uniform") + epsilon))
        settings.append(setting)
        records.append(run | {"device": content["device"]})
        assert (setting.prune_method, setting.sparsity_ratio) == (run["method"], run["target_sparsity"])
    rows = compare_allocations.rows_of(keys, settings, records)
    sparsities = sorted({run["target_sparsity"] for run in content["runs"]})
    page = (ROOT / "docs/results.md").read_text()
    assert compare_allocations.table(rows, sparsities) in page
    assert content["command"].replace(" ", "") in page.replace("\\\n", "").replace(" ", "")
    commits = {run["git_commit"][:12] for run in content["runs"]}
    assert all(commit in page for commit in commits) and f"dense {content['dense']:.2f}" in page


def test_a_cell_without_a_rival_or_without_noise_stands_out_from_nothing():
    alone = {compare_allocations.Key("wanda", "uniform"): row(s5=[1.0, 2.0])}
    assert not compare_allocations.stands_out(alone, next(iter(alone)), 0.5)
    single = {compare_allocations.Key("wanda", name): row(s5=[x]) for name, x in (("uniform", 1.0), ("owl", 99.0))}
    assert not any(compare_allocations.stands_out(single, key, 0.5) for key in single)
    infinite = spread_of([1.0, math.inf])
    assert infinite.text() == "inf" and not infinite.below(spread_of([1.0, 2.0]))


def test_comparison_refuses_in_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare_allocations.main(["--model", str(tiny_folder), "--allocations", "owll"]) == 2
    assert "Did you mean 'owl'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "say"),
    [
        ("--pruners wanda,alp", "Did you mean 'alps'"),
        ("--pruners ,", "names no pruner"),
        ("--seeds 0", "--seeds 0: must be at least 1"),
        ("--pruners wanda --damping 0.1", "--damping"),
    ],
)
def test_comparison_of_pruners_refuses_in_one_line(flags, say, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare_allocations.main(["--model", "m", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert say in line
