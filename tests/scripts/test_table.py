"""The table of run files: over seeds, beside the published figures, in every format; and a sweep's table."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import sweep
import table
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import main
from lib.cli.command import parse
from lib.cli.settings import Experiment

SEVEN_B = {"parameters": 6738415616}


def record(method: str, perplexity: float | str | None, target: float = 0.7, **changes) -> dict:
    """Return what a run of LLaMA-7B as published would leave, with ``changes`` of flags."""
    command = ["--model", "m"] + (["--prune_method", method, "--sparsity_ratio", str(target)] if target else [])
    flags = parse(Experiment, command, main.PARSER).flags() | {"epsilon": 0.2, "tasks": "a,b"} | changes
    return {
        "complete": True, "method": method, "target_sparsity": target, "perplexity": perplexity, "flags": flags,
        "model": {"name": "llama-7b-hf"} | SEVEN_B, "finished": "2025-01-01T00:00:00", "git_commit": None,
        "evaluation": {"text": flags["eval_data"], "seqlen": 2048, "windows": 166}, "zero_shot": None,
        "device": ["cpu (1 threads)"], "stages": {"load": {"seconds": 1.0, "cpu_seconds": 0.5}},
    }  # fmt: skip


def csv_of(folder: Path, records: dict[str, dict], capsys, *flags: str) -> list[list[str]]:
    for name, content in records.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "run_x.json").write_text(json.dumps(content))
    assert table.main([str(folder), "--format", "csv", *flags]) == 0
    return list(csv.reader(io.StringIO(capsys.readouterr().out)))


def test_every_format_shows_the_same_cells(tmp_path, capsys):
    headings = ["method", "allocation", "sparsity", "LLaMA-7B", "published"]
    row = ["wanda", "AlphaPruning", "0.7", "24.00", "23.86"]
    assert csv_of(tmp_path, {"a": record("wanda_ww", 24.0)}, capsys) == [headings, row]
    for form, rule in {"text": "│", "markdown": "|", "latex": "&"}.items():
        assert table.main([str(tmp_path), "--format", form]) == 0
        title, *lines = capsys.readouterr().out.splitlines()
        assert "perplexity on wikitext2, 166 windows of 2048; seed 0; commit unknown; published: Lu et al." in title
        assert title.startswith("% ") == (form == "latex")
        cells = [[cell.strip() for cell in line.removesuffix(r"\\").split(rule)] for line in lines]
        rows = [line if form == "latex" else line[1:-1] for line in cells if "0.7" in line]
        assert rows == [row]


def test_published_figures_stand_beside_their_own_cells_only(tmp_path, capsys):
    namesake = record("wanda", 90.0)
    namesake["model"] = {"name": "llama-7b-hf", "parameters": 1000}
    rows = csv_of(tmp_path, {"a": record("wanda", 86.1), "b": record("wanda_ww", 24.0), "c": record("dense", 5.7, 0.0),
                             "d": record("sparsegpt", 9.9, 0.5), "e": record("wanda_price", 30.0),
                             "f": namesake}, capsys)  # fmt: skip
    assert rows == [
        ["method", "allocation", "sparsity", "LLaMA-7B", "published", "llama-7b-hf"],
        ["dense", "", "0", "5.70", "5.68", ""],
        ["sparsegpt", "uniform", "0.5", "9.90", "", ""],
        ["wanda", "uniform", "0.7", "86.10", "85.77", "90.00"],
        ["wanda", "AlphaPruning", "0.7", "24.00", "23.86", ""],
        ["wanda", "price", "0.7", "30.00", "", ""],
    ]
    elsewhere = csv_of(tmp_path / "elsewhere", {"a": record("wanda", 86.1, eval_data="wiki_leads")}, capsys)
    assert elsewhere[0][-1] == "LLaMA-7B", "on another text there is nothing to compare"


def test_experts_alone_are_another_setting(tmp_path, capsys):
    rows = csv_of(tmp_path, {"a": record("wanda", 5.0, 0.5, only="experts")}, capsys)
    assert rows[1] == ["wanda", "uniform, only experts", "0.5", "5.00"]
    runs = {name: record("wanda", 5.0, 0.5, drop_experts=share) for name, share in (("a", 0.0), ("b", 0.25))}
    for name, count in (("a", 4000), ("b", 3000)):
        runs[name]["model"] = {"name": "moe", "parameters": count}
    headings, *rows = csv_of(tmp_path / "dropped", runs, capsys)
    assert [heading.partition("), ")[2] for heading in headings[3:]] == ["3,000 parameters", "4,000 parameters"]
    assert [row[1] for row in rows] == ["uniform", "uniform, drop_experts 0.25"]


def test_settings_are_not_mixed_in_a_cell(tmp_path, capsys):
    runs = {
        "a": record("wanda_ww", 24.0),
        "b": record("wanda_ww", 25.0, epsilon=0.1),
        "c": record("wanda_ww", 31.0, eval_data="c4"),
        "d": record("wanda_ww", 24.5) | {"finished": "2025-02-01T00:00:00"},
        "e": record("wanda_ww", 9.0) | {"complete": False},
    }
    assert csv_of(tmp_path, runs, capsys) == [
        ["method", "allocation", "sparsity", "LLaMA-7B (c4, 166 windows of 2048)",
         "LLaMA-7B (wikitext2, 166 windows of 2048)", "published"],
        ["wanda", "AlphaPruning, epsilon 0.1", "0.7", "", "25.00", "23.86"],
        ["wanda", "AlphaPruning, epsilon 0.2", "0.7", "31.00", "24.50", "23.86"],
    ]  # fmt: skip


def test_a_cell_is_about_all_seeds_and_the_newer_run_of_one(tmp_path, capsys):
    runs = {f"a{seed}": record("alps_price", ppl, seed=seed) for seed, ppl in enumerate((18.0, 19.0, 21.0))}
    runs |= {f"b{seed}": record("wanda", ppl, seed=seed) for seed, ppl in enumerate((85.0, 87.0))}
    runs |= {"f": record("dense", 5.7, 0.0), "g": record("wanda_owl", 24.0, seed=1)}
    for content in runs.values():
        content["git_commit"] = "a" * 40
    newer = record("alps_price", 20.0, seed=1) | {"finished": "2025-02-01T00:00:00"}
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
    assert "seeds 0, 1, 2" in title and "commits aaaaaaaaaaaa, bbbbbbbbbbbb-dirty" in title
    assert any(r"19.67 $\pm$ 1.53" in line for line in lines)


def test_published_figures_without_a_run_can_be_listed(tmp_path, capsys):
    llama2 = {"model": {"name": "Llama-2-7b-hf"} | SEVEN_B}
    assert len(csv_of(tmp_path, {"a": record("wanda_price", 20.0) | llama2}, capsys)) == 2
    assert csv_of(tmp_path, {}, capsys, "--published") == [
        ["method", "allocation", "sparsity", "Llama-2-7B", "published"],
        ["dense", "", "0", "", "5.47"],
        ["wanda", "AlphaPruning", "0.7", "", "28.87"],
        ["wanda", "price", "0.7", "20.00", ""],
        ["sparsegpt", "dlp", "0.7", "", "18.58"],
        ["alps", "uniform", "0.7", "", "19.31 ± 0.68"],
    ]
    assert table.main([str(tmp_path), "--published"]) == 0
    title = capsys.readouterr().out.splitlines()[0]
    assert "DLP: Dynamic Layerwise Pruning" in title and "published: Meng et al., ALPS" in title
    # A run in another setting takes the row, and no published figure stands beside it.
    rows = csv_of(tmp_path, {"b": record("alps", 9.0, nsamples=4) | llama2}, capsys, "--published")
    assert rows[-1] == ["alps", "uniform", "0.7", "9.00", ""]


@pytest.mark.parametrize(
    ("change", "label"),
    [({"ww_metric": "entropy"}, "AlphaPruning, ww_metric entropy"), ({"nsamples": 4}, "AlphaPruning")],
)
def test_the_papers_figure_is_for_its_own_setting(change, label, tmp_path, capsys):
    # One run alone: nothing else tells that it is another method.
    header, row = csv_of(tmp_path, {"a": record("wanda_ww", 366.0, **change)}, capsys)
    assert "published" not in header and row[1] == label


def test_zero_shot_accuracies_have_a_table(tmp_path, capsys):
    runs = {"a": record("wanda", "inf"), "b": record("magnitude", 9.0), "c": record("alps", 9.0)}
    runs["a"]["zero_shot"] = {"means": {"acc": 0.43219}}
    runs["b"]["zero_shot"] = {"means": {"f1": 0.5}}  # without the metric: left out
    assert csv_of(tmp_path, runs, capsys, "--value", "zero_shot")[1:] == [["wanda", "uniform", "0.7", "43.22"]]


def test_a_perplexity_that_is_not_finite_counts(tmp_path, capsys):
    runs = {f"s{seed}": record("alps", ppl, seed=seed) for seed, ppl in enumerate((18.0, "inf", 21.0))}
    runs |= {f"t{seed}": record("wanda", ppl, seed=seed) for seed, ppl in enumerate((18.0, "nan", 21.0))}
    rows = csv_of(tmp_path, runs | {"b": record("magnitude", "inf")}, capsys)
    assert [row[3] for row in rows[1:]] == ["inf (1)", "nan", "inf"]


def test_damaged_run_files_are_left_out_by_name(tmp_path, capsys):
    good = record("wanda", 9.0)
    spoiled = {"a": [1], "b": good | {"flags": 3}, "c": {key: good[key] for key in good if key != "finished"}}
    for name, content in ({"good": good} | spoiled).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run_x.json").write_text(json.dumps(content))
    assert table.main([str(tmp_path), "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and err.count("is left out") == len(spoiled) == len(err.splitlines())
    assert table.main([str(tmp_path / "nowhere")]) == 2 and "folder not found" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ a column per sparsity


def test_table_by_sparsity_by_pencil(tmp_path):
    figures = {
        ("wanda", 0.5): [20.0, 22.0, 24.0], ("wanda", 0.7): [90.0, 90.0, 93.0],  # 22 +- 2, 91 +- 1.73
        ("wanda_owl", 0.5): [23.5, 24.5, 25.5], ("wanda_owl", 0.7): [50.0, 51.0],  # 24.5 +- 1, 50.5 +- 0.71
        ("alps", 0.5): [15.0, 16.0, 17.0],
        ("alps_owl", 0.5): [16.9, 16.9, 17.1],  # 0.97 above 16, whose deviation is 1
        ("sparsegpt", 0.5): [1.0], ("sparsegpt_owl", 0.5): [99.0],  # of one seed the noise is unknown
        ("magnitude", 0.5): [1.0, math.inf], ("magnitude_owl", 0.5): [1.0, 2.0],
    }  # fmt: skip
    rows = []
    for (method, target), perplexities in figures.items():
        for seed, perplexity in enumerate(perplexities):
            stages = {"measure": {"seconds": 9.0, "cpu_seconds": 12.0 * ("owl" in method) + 0.1 * seed}}
            stages["prune"] = {"seconds": 99.0, "cpu_seconds": 40.0 + seed}
            rows.append(table.row_of(record(method, perplexity, target, seed=seed, nsamples=8) | {"stages": stages}))
    runs = table.runs_of(rows)
    assert table.by_sparsity(runs) == [
        ["pruner", "allocation", "0.5", "0.7", "seconds", "passes", "pruning s"],
        ["magnitude", "uniform", "inf (2)", "-", "0", "0", "40"],
        ["magnitude", "OWL", "1.50 ± 0.71 (2)", "-", "12", "8", "40"],
        ["wanda", "uniform", "**22.00 ± 2.00**", "91.00 ± 1.73", "0", "0", "41"],
        ["wanda", "OWL", "24.50 ± 1.00", "**50.50 ± 0.71 (2)**", "12", "8", "41"],
        ["sparsegpt", "uniform", "1.00 (1)", "-", "0", "0", "40"],
        ["sparsegpt", "OWL", "99.00 (1)", "-", "12", "8", "40"],
        ["alps", "uniform", "16.00 ± 1.00", "-", "0", "0", "41"],
        ["alps", "OWL", "16.97 ± 0.12", "-", "12", "8", "41"],
    ]


def test_seconds_are_those_of_the_processor_where_it_worked():
    stages = {"measure": {"seconds": 9.0, "cpu_seconds": 4.0}, "allocate": {"seconds": 1.0, "cpu_seconds": 0.5}}
    run = record("wanda", 9.0) | {"stages": stages}
    assert table.row_of(run)["allocating"] == 4.5 and table.row_of(run | {"device": ["H100"]})["allocating"] == 10.0


@pytest.mark.parametrize(
    ("method", "more", "passes"),
    [
        ("wanda", "", 0),
        ("wanda_owl", "", 3),
        # ranks, held-out windows of both ends, steps forward and backward, evaluations
        ("wanda_price", "--price_steps 5", 16 + 8 + 8 + 5 * 2 * 3 + 2 * 8),
    ],
)
def test_passes_of_an_allocation(method, more, passes):
    flags = f"--model m --prune_method {method} --sparsity_ratio 0.5 --nsamples 3 {more}"
    assert table.passes_of(parse(Experiment, flags.split(), main.PARSER)) == passes


def test_plot_has_a_mark_for_each_mean(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(table.files, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    figures = [("dense", 0.0, 14.0), ("wanda", 0.5, 30.0), ("wanda", 0.7, math.inf), ("alps", 0.5, 20.0)]
    runs = table.runs_of([table.row_of(record(method, value, target)) for method, target, value in figures])
    table.plot(tmp_path / "x.png", table.cells_of(runs))
    axes = drawn[0].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["wanda, uniform, inf at 0.7", "alps, uniform"]
    marks = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
    assert marks[0] == [[20.0, 1.0], [30.0, 0.0]] and math.isnan(marks[1][0][0])
    assert axes.get_legend_handles_labels()[1] == ["dense, 14.00", "sparsity 0.5", "sparsity 0.7"]


def test_a_sweeps_table_runs_every_setting_once(tiny_folder, tiny_text, other_text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {other_text} --seqlen 32 --nsamples 3 "
    flags += "--eval_windows 2 --save cmp --methods magnitude,magnitude_ww --sparsities 0.5,0.6 --epsilons 0.1,0.3"
    assert sweep.main(flags.split()) == 0
    page = Path("cmp/sweep.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"][2:]
    labels = ["uniform", "AlphaPruning, epsilon 0.1", "AlphaPruning, epsilon 0.3"]
    assert [row[:2] for row in rows] == [["magnitude", label] for label in labels]
    assert Path("cmp/sweep.png").read_bytes().startswith(b"\x89PNG")
    run = json.loads(Path("cmp/epsilon_0.3/run_magnitude_ww_sparsity_0.6.json").read_text())
    assert rows[2][3] == f"{run['perplexity']:.2f}"
    assert "**" not in page and "tiny-llama: perplexity on" in page and run["git_commit"][:12] in page
    assert "calibration on 3 windows of 32" in page
    capsys.readouterr()
    assert sweep.main(flags.split()) == 0 and Path("cmp/sweep.md").read_text() == page
    assert capsys.readouterr().out.count("skipped") == 6


def test_published_figures_are_the_checked_ones():
    content = json.loads(table.PUBLISHED.read_text())
    assert content["perplexity"].keys() == content["sources"].keys()
    one = ("LLaMA-7B", "LLaMA-13B", "LLaMA-30B", "LLaMA-65B")
    two = ("Llama-2-7B", "Llama-2-13B", "Llama-2-70B")
    dense = [5.68, 5.09, 4.1, 3.53, 5.47, 4.88, 3.31]
    assert content["perplexity"]["AlphaPruning"] == {
        "dense": dict(zip((*one, *two), dense, strict=True)),
        "magnitude": dict(zip(one, [48419.12, 84539.45, 977.73, 46.89], strict=True)),
        "wanda": dict(zip(one, [85.77, 55.90, 17.37, 15.23], strict=True)),
        "sparsegpt": dict(zip(one, [26.30, 19.24, 12.56, 10.45], strict=True)),
        "wanda_owl": dict(zip(one, [24.55, 17.17, 10.75, 8.61], strict=True)),
        "sparsegpt_owl": dict(zip(one, [19.49, 14.55, 10.28, 8.28], strict=True)),
        "magnitude_ww": {"LLaMA-13B": 2029.2},
        "wanda_ww": dict(zip((*one[:3], *two[:2]), [23.86, 14.21, 9.68, 28.87, 14.16], strict=True)),
        "sparsegpt_ww": {"LLaMA-7B": 18.54},
    }
    assert content["perplexity"]["DLP"] == {"sparsegpt_dlp": {"Llama-2-7B": 18.58}}
    assert content["perplexity"]["ALPS"] == {"alps": {"Llama-2-7B": [19.31, 0.68, 5], "Llama-3-8B": [30.53, 1.58]}}


@pytest.mark.parametrize(
    ("name", "width", "inner", "blocks", "kv_heads"),
    [
        ("LLaMA-7B", 4096, 11008, 32, 32),
        ("LLaMA-13B", 5120, 13824, 40, 40),
        ("LLaMA-30B", 6656, 17920, 60, 52),
        ("LLaMA-65B", 8192, 22016, 80, 64),
        ("Llama-2-7B", 4096, 11008, 32, 32),
        ("Llama-2-13B", 5120, 13824, 40, 40),
        ("Llama-2-70B", 8192, 28672, 80, 8),
    ],
)
def test_published_models_are_told_by_their_true_number_of_parameters(name, width, inner, blocks, kv_heads):
    config = LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = width // 128, kv_heads, 128
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert model.num_parameters() == table.published()["models"][name]["parameters"]
