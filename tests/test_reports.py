"""The report of spectra, the benchmark's plain formulation, and the comparison of allocations."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from test_esd import oracle_fit, student

sys.path.insert(0, str(ROOT / "scripts"))

import bench_metrics
import compare_allocations
import esd_report

import main


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000


@pytest.mark.parametrize(
    "metric", ["alpha_peak", "alpha", "alpha_mid", "stable_rank", "alpha_peak --farms --farms_rows 16 --farms_steps 3"]
)
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


def test_the_benchmarks_loop_is_the_definition():
    # A benchmark against a wrong baseline says nothing.
    eigs = bench_metrics.plain_spectrum(student())
    index, alpha = oracle_fit(eigs, range(len(eigs) - 1))
    assert bench_metrics.plain_fit(eigs, torch.arange(len(eigs) - 1)) == (index, pytest.approx(alpha, rel=1e-6))


def test_comparison_runs_every_setting_once(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {tiny_text} --seqlen 32 --nsamples 3".split()
    flags += "--allocations ,ww,owl,atp --sparsities 0.5,0.6 --epsilons 0.1,0.3 --atp_betas 0.01 --save cmp".split()
    assert compare_allocations.main(flags) == 0
    text = (tmp_path / "cmp/allocations.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert rows == ["uniform", "ww epsilon 0.1", "ww epsilon 0.3", "owl", "atp atp_beta 0.01"]
    assert is_png(tmp_path / "cmp/allocations.png")
    record = json.loads((tmp_path / "cmp/ww_epsilon_0.3/run_wanda_ww_sparsity_0.6.json").read_text())
    assert f"{record['perplexity']:.2f}" in text.splitlines()[4]
    capsys.readouterr()
    assert compare_allocations.main(flags) == 0
    assert capsys.readouterr().out.count("skipped") == 10
    assert (tmp_path / "cmp/allocations.md").read_text() == text


def test_comparisons_table_by_pencil():
    rows = {"uniform": {0.5: 20.0, 0.7: 90.0}, "owl": {0.5: 21.5}}
    assert compare_allocations.table(rows, [0.5, 0.7]).splitlines() == [
        "| allocation | 0.5 | 0.7 |",
        "|---|---:|---:|",
        "| uniform | **20.00** | **90.00** |",
        "| owl | 21.50 | - |",
    ]


def test_comparison_refuses_in_one_line(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare_allocations.main(["--model", str(tiny_folder), "--allocations", "owll"]) == 2
    assert "Did you mean 'owl'" in capsys.readouterr().err
