"""The report of spectra."""

import esd_report
import pandas
import pytest
from conftest import fast

import main

SHOWN = ["stable_rank", "alpha_peak", "alpha_peak --farms --farms_rows 16 --farms_steps 3"]


@pytest.mark.parametrize("metric", fast(SHOWN, 1))
def test_report_shows_what_a_run_plans(metric, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --ww_metric {metric} --sparsity_ratio 0.6 --epsilon 0.2".split()
    assert esd_report.main([*flags, "--save", "report"]) == 0
    pictures = [tmp_path / "report" / f"{name}.png" for name in ("blocks", "heat_map", "spectra")]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000 for path in pictures)
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


def test_heat_map_shows_the_mean_of_a_blocks_experts():
    names = [f"layers.{i}.{m}" for i in (0, 1) for m in ("attn.o_proj", "experts.0.up_proj", "experts.1.up_proj")]
    layers = {"name": names, "block": [0] * 3 + [1] * 3, "shape": ["4x4"] * 6, "alpha": [1, 2, 4, 5, 6, 8]}
    figure = esd_report.draw_heat_map(pandas.DataFrame(layers), "mixture")
    assert figure.axes[0].images[0].get_array().tolist() == [[1, 5], [3, 7]]


@pytest.mark.parametrize(
    ("flags", "say"),
    [
        ("--ww_metric alpha_peek", "Did you mean 'alpha_peak'"),
        ("--sparsity_ratio 0", "--sparsity_ratio 0.0: must be above 0 and below 1"),
        ("--epsilon auto", "--epsilon auto"),
        ("--ww_metric mp_softrank --esd_driver fast", "--ww_metric mp_softrank: has weightwatcher's own spectrum"),
    ],
)
def test_report_refuses_in_one_line(flags, say, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert esd_report.main(["--model", str(tiny_folder), *flags.split()]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(("INFO", "WARNING"))]
    assert say in line and not (tmp_path / "results").exists()
