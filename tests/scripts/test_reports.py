"""The report of spectra, and the benchmark's plain formulation."""

import sys

import pytest
import torch
from conftest import ROOT, fast
from test_tail import oracle_fit, student

sys.path.insert(0, str(ROOT / "scripts"))

import bench_metrics
import esd_report

import main


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


def test_the_benchmarks_loop_is_the_definition():
    # A benchmark against a wrong baseline says nothing.
    eigs = bench_metrics.plain_spectrum(student())
    index, alpha = oracle_fit(eigs, range(len(eigs) - 1))
    assert bench_metrics.plain_fit(eigs, torch.arange(len(eigs) - 1)) == (index, pytest.approx(alpha, rel=1e-6))


def test_shapes_of_a_7b_at_a_small_size(capsys):
    rows = bench_metrics.bench_llama_7b(((16, 16), (44, 16)), cores=8)
    assert [row["what"].removeprefix("7B spectrum, ") for row in rows] == [
        "exact, 16x16", "fast, 16x16", "exact, 44x16", "fast, 44x16", "exact, QR first, 44x16",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows) and capsys.readouterr().out.count("8 at once") == 2
    assert bench_metrics.seconds_of_7b(2.0, 3.0, 8) == (128 * 2 + 96 * 3) / 8
    weight = torch.randn(44, 16, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(weight.double()).square().flip(0)
    # Float32 singular values, squared: a few roundings of the largest.
    torch.testing.assert_close(bench_metrics.qr_first(weight).double(), exact, rtol=0, atol=1e-5 * exact[-1].item())
