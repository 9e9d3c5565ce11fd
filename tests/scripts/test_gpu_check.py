"""The check of a GPU, exercised at tiny sizes on the CPU and on the pretend device: that all is timed, and compared."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, fast
from pretend_cuda import pretend_cuda

from lib.calibration.statistics import STATISTICS
from lib.pruning.pruners import PRUNERS, VARIANTS
from lib.spectra.spectrum import DRIVERS

sys.path.insert(0, str(ROOT / "scripts"))
import gpu_check
import plain_methods
from gpu_check import Case, Cost, Row, Sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Two blocks of SparseGPT's columns in the widest layer, so that errors are carried from one to the other.
TINY = Sizes(hidden=32, intermediate=160, heads=2, vocabulary=50, blocks=2, samples=2, tokens=30)


def test_every_method_is_timed_and_gives_what_its_plain_formulation_gives():
    rows = {row.what: row for row in gpu_check.check(TINY, CPU, rounds=1)}
    for name in [*PRUNERS, *(f"{name}, variant" for name in VARIANTS), *(f"walk, {name}" for name in PRUNERS)]:
        assert any(what.startswith(name) for what in rows), name
    for name in [*(f"spectrum, {driver}" for driver in DRIVERS), *(f"{statistic} of" for statistic in STATISTICS)]:
        assert any(what.startswith(name) for what in rows), name
    assert all(row.ours.seconds > 0 and row.ours.gib is None for row in rows.values())
    assert all(row.plain.seconds > 0 and row.agree >= 0.98 for row in rows.values() if row.plain)
    exact = [row.agree for what, row in rows.items() if what.startswith(("magnitude, 0.5", "wanda, 0.5", "walk, mag"))]
    assert exact == [1, 1, 1]  # the same comparisons of the same numbers
    told = gpu_check.whole_runs(list(rows.values()), TINY)
    assert [line.split(",")[0] for line in told] == [name for name in PRUNERS if name != "magnitude"]
    assert sum(row.flops is not None for row in rows.values()) == 3  # the Hessian, and Wanda's two walks


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")
def test_the_check_mixes_no_devices():
    with pretend_cuda() as cuda:
        rows = gpu_check.check(TINY, CUDA, rounds=1)
    assert cuda.operations > 10_000
    assert any("in flight" in row.what and row.plain.seconds > 0 for row in rows)
    assert all(row.ours.gib == 0 for row in rows)  # the pretend device counts no memory


def drop_largest(weight, statistic, ratio, nm):
    return weight.masked_fill(weight.abs() > weight.abs().median(), 0)


@pytest.mark.parametrize("part", ["pruners", "walks"])
def test_another_result_is_no_comparison(part, monkeypatch):
    method = plain_methods.METHODS["wanda"]._replace(prune=drop_largest)
    monkeypatch.setitem(plain_methods.METHODS, "wanda", method)
    monkeypatch.setattr(gpu_check, "PARTS", (getattr(gpu_check, part),))
    with pytest.raises(gpu_check.Disagreement, match="wanda"):
        gpu_check.check(TINY, CPU, rounds=1)


def test_functions_take_turns_and_the_first_is_not_timed():
    calls = []

    def call(name):
        return lambda: calls.append(name) or torch.zeros(len(calls))

    case = Case("it", call("ours"), call("plain"), lambda one, other: len(one) < len(other), call("reset"))
    row = gpu_check.compare(case, CPU, rounds=2)
    assert calls == ["reset", "ours", "reset", "plain"] * 3
    assert row.agree == 1 and row.plain.gib is None
    alone = gpu_check.compare(Case("it", call("alone")), CPU, rounds=2)
    assert alone.plain is alone.agree is None and calls[-3:] == ["alone"] * 3


def test_shares():
    one, other = torch.tensor([0.0, 0, 1, 2]), torch.tensor([0.0, 3, 1, 0])
    assert gpu_check.same_zeros(one, other) == 0.5
    # 1 % of each number, and a millionth of the largest for those near zero.
    near = gpu_check.same_numbers(torch.tensor([1.009, 1.02, 1e-7, 100]), torch.tensor([1.0, 1.0, 0.0, 100]))
    assert near == 0.75 and gpu_check.same_numbers(2.0, 2.01) == 1 and gpu_check.same_numbers(2.0, 2.1) == 0
    assert gpu_check.same_numbers(float("nan"), 1.0) == 0


def test_table_is_markdown():
    rows = [Row("a", Cost(0.5, 1.25), Cost(1.0, 2.0), 0.999, 2e12), Row("b", Cost(0.25, None), None, None)]
    lines = gpu_check.table(rows, peak=16).splitlines()
    assert lines[2:] == [
        "| a | 0.5000 | 1.25 | 4.0 | 25.0% | 1.0000 | 2.00 | 2.0 | 0.9990 |",
        "| b | 0.2500 | - | - | - | - | - | - | - |",
    ]
    assert {line.count("|") for line in lines} == {10}
    assert "| 4.0 | - |" in gpu_check.table(rows)


def test_whole_run_by_pencil():
    # 5 s a block whatever the windows, 0.5 s a pass of a window; 2 blocks, 3 windows or 6; all passes, or all but one.
    assert gpu_check.whole_run(10 + 6, 10 + 12, 3, 2, 4) == pytest.approx(32 * 5 + 128 * 64 * 0.5)
    assert gpu_check.whole_run(10 + 4.5, 10 + 9, 3, 2, 3) == pytest.approx(32 * 5 + 128 * 63 * 0.5)


def test_whole_runs_are_told_of_what_was_walked():
    def row(name, samples, seconds, plain):
        what = f"walk, {name}, 2 blocks, {samples} x 30 tokens"
        return Row(what, Cost(seconds, None), plain and Cost(plain, None), None)

    rows = [row("wanda", 2, 1.0, 2.0), row("wanda", 4, 2.0, 4.0), row("alps", 2, 1.0, None), row("alps", 4, 2.0, None)]
    assert gpu_check.whole_runs([*rows, row("sparsegpt", 2, 1.0, None)], TINY) == [
        f"wanda, 32 blocks, 128 x 30 tokens, extrapolated: {128 * 63 / 6:.0f} s, plain {128 * 64 / 4:.0f} s",
        f"alps, 32 blocks, 128 x 30 tokens, extrapolated: {128 * 63 / 6:.0f} s",
    ]


COMMANDS = [["bash", "scripts/gpu_check.sh"], [sys.executable, "scripts/gpu_check.py"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")
@pytest.mark.parametrize("command", fast(COMMANDS, 1))
def test_without_a_gpu_it_says_so_in_one_line(command):
    environment = os.environ | {"PYTHON_BIN": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "no CUDA device here" in done.stderr


@pytest.mark.gpu
def test_memory_is_what_a_call_takes_beyond_what_was_there():
    there = torch.zeros(2**20, device="cuda")
    _, cost = gpu_check.measure(lambda: there + 1, CUDA)
    assert cost.gib * 2**30 == pytest.approx(4 * 2**20, rel=0.01)
