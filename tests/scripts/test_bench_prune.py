"""The benchmark of the pruners: that its figures are about the same work, and about all of it."""

import sys

import pytest
import torch
from conftest import ROOT, tiny_llama

sys.path.insert(0, str(ROOT / "scripts"))
import bench_prune
import plain_methods

from lib.models.weights import weights_of
from lib.pruning.pruners import PRUNERS


def zeros_of(model) -> torch.Tensor:
    return torch.cat([*weights_of(model).map(lambda _, weight: (weight == 0).flatten()).values()])


@torch.no_grad()
@pytest.mark.parametrize("name", PRUNERS)
def test_both_ways_do_the_same_and_all_parts_are_timed(name, tiny_windows):
    found = {}
    for way in ("ours", "plain") if name in plain_methods.METHODS else ("ours",):
        model, clock = tiny_llama(), bench_prune.Clock()
        with clock.part("rest"):
            bench_prune.WAYS[way](weights_of(model), tiny_windows, name, 0.5, clock)
        found[way] = zeros_of(model)
        assert 0.45 < found[way].double().mean() < 0.55
        wanted = {"rest", "solve or select"}
        if name != "magnitude":
            wanted |= {"entry", "dense pass", "statistics", "pruned pass"}
        if name in ("sparsegpt", "alps"):
            wanted |= {"factorisation"}
        timed = {part for part, seconds in clock.seconds.items() if seconds > 0}
        assert wanted <= timed <= set(bench_prune.PARTS)
    if len(found) == 2:
        assert (found["ours"] == found["plain"]).double().mean() >= (1 if name == "magnitude" else 0.98)


def test_a_part_inside_another_is_counted_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_prune.time, "process_time", lambda: now[0])
    clock = bench_prune.Clock()

    def inner():
        now[0] += 2

    def outer():
        now[0] += 1
        clock.timed("inner", inner)()
        now[0] += 4

    with clock.part("all"):
        now[0] += 8
        clock.timed("outer", outer)()
        now[0] += 16
    assert clock.seconds == {"rest": 0, "all": 24, "outer": 5, "inner": 2}
    assert clock.timed("nothing", None) is None


def test_rows_of_the_table_and_the_chart():
    cost = {"seconds": 2.0, "parts": {"entry": 0.5, "rest": 1.5}, "peak_mb": 700}
    rows = [
        {"model": "a", "pruner": "wanda", "ours": cost, "plain": cost | {"seconds": 5.0}, "ratio": 2.5},
        {"model": "b", "pruner": "alps", "ours": cost},
    ]
    lines = [line for row in rows for line in bench_prune.cells(row)]
    assert [line[:4] for line in lines] == [
        ("wanda, ours", "2.0", "2.50", "700"),
        ("wanda, plain", "5.0", "", "700"),
        ("alps, ours", "2.0", "", "700"),
    ]
    assert lines[0][4:] == ("0.5", "0.0", "0.0", "0.0", "0.0", "0.0", "1.5")
    figure = bench_prune.draw(rows, "title")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert [len(axes.patches) for axes in figure.axes] == [2 * len(bench_prune.PARTS), len(bench_prune.PARTS)]


@pytest.mark.parametrize("flags", ["--pruners wnda", "--models llama", "--sparsity_ratio 1"])
def test_wrong_flags(flags, capsys):
    assert bench_prune.main(flags.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_whole_benchmark(tmp_path, monkeypatch, capsys):
    # In this process, which knows what is patched; the benchmark itself starts one for each pruning.
    windows = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(bench_prune, "load", lambda *_: (weights_of(tiny_llama()), windows))
    monkeypatch.setattr(bench_prune, "SELECT", 64)
    monkeypatch.setattr(bench_prune, "separately", lambda function, *args: function(*args))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as it leaves them in a process of its own
    monkeypatch.setitem(sys.modules, "triton", None)
    threads = torch.get_num_threads()
    assert bench_prune.main(["--pruners", "magnitude,wanda", "--rounds", "1", "--save", str(tmp_path / "out")]) == 0
    torch.set_num_threads(threads)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench_prune.json", "bench_prune.png"}
    assert "100.000 % of the first block's weights" in capsys.readouterr().out
