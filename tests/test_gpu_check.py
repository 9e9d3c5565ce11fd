"""The check of a GPU, exercised at tiny sizes on the CPU and on the pretend device: that all is timed, and compared."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from pretend_cuda import pretend_cuda

from lib.calibration import STATISTICS
from lib.esd import DRIVERS
from lib.pruners import PRUNERS, VARIANTS

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")
def test_the_check_mixes_no_devices():
    with pretend_cuda() as cuda:
        rows = gpu_check.check(TINY, CUDA, rounds=1)
    assert cuda.operations > 10_000
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
    rows = [Row("a", Cost(0.5, 1.25), Cost(1.0, 2.0), 0.999), Row("b", Cost(0.25, None), None, None)]
    lines = gpu_check.table(rows).splitlines()
    assert lines[2:] == ["| a | 0.5000 | 1.25 | 1.0000 | 2.00 | 2.0 | 0.9990 |", "| b | 0.2500 | - | - | - | - | - |"]
    assert {line.count("|") for line in lines} == {8}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")
@pytest.mark.parametrize("command", [["bash", "scripts/gpu_check.sh"], [sys.executable, "scripts/gpu_check.py"]])
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
