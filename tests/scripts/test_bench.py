"""The benchmark and the table of large models: all is timed and compared, figures by pencil, wrong flags."""

import json

import pytest
import torch
from conftest import fast
from pretend_cuda import pretend_cuda

from lib.calibration.statistics import STATISTICS
from lib.models.layers import prunable_layers
from lib.models.load import load_llm
from lib.models.locate import locate
from lib.pruning.pruners import PRUNERS, VARIANTS
from lib.spectra.spectrum import DRIVERS
from scripts.bench import bench, cases, plain, scale
from scripts.bench.bench import Cost, Row
from scripts.bench.cases import PARTS, Case, Sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Two blocks of SparseGPT's columns in the widest layer, so that errors are carried from one to the other.
TINY = Sizes(hidden=32, intermediate=160, heads=2, kv_heads=1, vocabulary=50, tokens=30, blocks=2, samples=2)


def test_every_method_is_timed_and_gives_what_its_plain_formulation_gives():
    rows = {row.name: row for row in bench.bench([*PARTS], TINY, CPU, rounds=1)}
    for name in [*PRUNERS, *(f"{name}, variant" for name in VARIANTS), *(f"walk, {name}" for name in PRUNERS)]:
        assert any(case.startswith(name) for case in rows), name
    for name in [*(f"spectrum, {driver}" for driver in DRIVERS), *(f"{name} of" for name in STATISTICS), "prices, "]:
        assert any(case.startswith(name) for case in rows), name
    assert all(row.ours.gib is None and not row.differs for row in rows.values())
    exact = ("magnitude, ", "wanda, 0.5", "wanda, 2:4", "walk, magnitude", "ranks", "prices", "alpha")
    assert {row.alike for name, row in rows.items() if name.startswith(exact)} == {1}
    assert [name for name, row in rows.items() if row.flops] == [
        "hessian of 2 x 30 tokens, 160 columns", "walk, wanda, 2 blocks, 2 x 30 tokens"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")
def test_cases_mix_no_devices():
    with pretend_cuda() as cuda:
        rows = bench.bench([*PARTS], TINY, CUDA, rounds=1)
    assert cuda.operations > 10_000
    assert all(row.ours.gib == 0 for row in rows)  # the pretend device counts no memory


def drop_largest(weight, statistic, ratio, nm):
    return weight.masked_fill(weight.abs() > weight.abs().median(), 0)


def test_another_result_is_told_and_ends_with_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(plain.METHODS, "wanda", plain.METHODS["wanda"]._replace(prune=drop_largest))
    monkeypatch.setitem(cases.SIZES, "smollm2-135m", TINY)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert bench.main(f"--parts pruners,walk --rounds 1 --save {tmp_path}".split()) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench.py: ")]
    assert [line.split(",")[0] for line in told] == ["bench.py: wanda"] * 2 + ["bench.py: walk"]
    content = json.loads((tmp_path / "bench.json").read_text())
    assert len(content["rows"]) == (tmp_path / "bench.md").read_text().count("\n| ") - 1


def test_functions_take_turns_and_the_first_is_not_timed():
    calls = []

    def call(name):
        return lambda: calls.append(name) or torch.zeros(len(calls))

    case = Case("it", call("ours"), call("plain"), lambda one, two: len(one) < len(two), call("reset"))
    row = bench.compare(case, CPU, rounds=2)
    assert calls == ["reset", "ours", "reset", "plain"] * 3
    assert row.alike == 1 and row.plain.gib is None
    alone = bench.compare(Case("it", call("alone")), CPU, rounds=2)
    assert alone.plain is alone.alike is None and calls[-3:] == ["alone"] * 3


def test_shares_by_pencil():
    assert cases.same_zeros(torch.tensor([0.0, 0, 1, 2]), torch.tensor([0.0, 3, 1, 0])) == 0.5
    # 1 % of each number, and a millionth of the largest for those near zero.
    near = cases.same_numbers(torch.tensor([1.009, 1.02, 1e-7, 100]), torch.tensor([1.0, 1.0, 0.0, 100]))
    assert near == 0.75 and cases.same_numbers(2.0, 2.01) == 1 and cases.same_numbers(2.0, 2.1) == 0
    assert cases.same_numbers(float("nan"), 1.0) == 0
    assert Row("nan", Cost(1.0, None), Cost(1.0, None), float("nan")).differs


def test_table_is_markdown():
    rows = [Row("a", Cost(0.5, 1.25), Cost(1.0, 2.0), 0.999, 2e12), Row("b", Cost(0.25, None), None, None)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in bench.table(rows, peak=16).splitlines()]
    assert lines[2:] == [
        ["a", "0.5000", "1.25", "4.00", "25.0%", "1.0000", "2.00", "2.0", "0.9990"],
        ["b", "0.2500", *["-"] * 7],
    ]
    assert bench.table(rows).splitlines()[2].split("|")[5].strip() == "-"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--parts metrics,prunners", "--parts prunners: invalid choice. Did you mean 'pruners'"),
        ("--shapes 8b", "--shapes 8b"),
        ("--blocks 0", "--blocks 0: must be at least 1"),
        ("--device cuda", "--device cuda: no CUDA device here"),
    ],
)
def test_wrong_flags(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench.py: error: {says}") and list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_memory_is_what_a_call_takes_beyond_what_was_there():
    there = torch.zeros(2**20, device="cuda")
    _, cost = bench.measure(lambda: there + 1, CUDA)
    assert cost.gib * 2**30 == pytest.approx(4 * 2**20, rel=0.01)


# --------------------------------------------------------------------------------------- large models, by shape and run


@pytest.mark.parametrize(("size", "parameters"), [("7B", 6_738_415_616), ("70B", 68_976_648_192)])  # of Llama 2
def test_weights_are_those_of_the_published_models(size, parameters):
    needs = {need["method"]: need for need in scale.needs(size, 2, 8)}
    assert needs["wanda"]["disk"] == 2 * 2 * parameters  # read and written


def test_operations_by_pencil():
    # One block of q k v o [2, 2], gate up [3, 2], down [2, 3]: 16 + 12 + 6 = 34 weights; 5 tokens, two passes.
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (2, 2))
    shapes |= {"gate_proj": (3, 2), "up_proj": (3, 2), "down_proj": (2, 3)}
    passes = 2 * 5 * 2 * 34
    assert scale.work(shapes, 1, "magnitude", 5) == 0
    assert scale.work(shapes, 1, "wanda", 5) == passes and scale.work(shapes, 3, "wanda", 5) == 3 * passes
    hessians = 2 * 5 * (4 + 4 + 4 + 9)
    factors = 2 / 3 * (8 + 8 + 8 + 27)  # Cholesky and inverse of each
    solves = 6 * 4 + 2 * 4 + 6 * 4 + 2 * 9
    assert scale.work(shapes, 1, "sparsegpt", 5) == pytest.approx(passes + hessians + factors + solves)


@pytest.mark.parametrize("count", fast([1, None], 1))  # of sizes, and of mixtures
def test_table_shows_hours_at_the_given_rate(count, monkeypatch, capsys):
    for name in ("SIZES", "MIXTURES"):
        monkeypatch.setattr(scale, name, dict([*getattr(scale, name).items()][:count]))
    assert scale.main(["--tflops", "1000"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    work, hours = next((float(row[-2]), float(row[-1])) for row in rows if row[:2] == ["7B", "wanda"])
    assert hours == pytest.approx(work / 3600, rel=0.05)  # PFLOP at 1 PFLOP/s; two digits


def test_made_model_is_one_that_loads(smollm2_source, tmp_path, monkeypatch, capsys):
    flags = ["--make", str(tmp_path / "out" / "llama"), "--blocks", "2", "--hidden", "64", "--intermediate", "96"]
    assert scale.main(flags) == 0
    assert len(list(tmp_path.glob("out/llama/*.safetensors"))) == 3  # a shard per block, and the rest
    model = load_llm(locate(str(tmp_path / "out" / "llama"), "unused"), torch.float32, CPU)
    assert all(layer.shape in ((64, 64), (96, 64), (64, 96)) for layer in prunable_layers(model))
    logits = model(torch.arange(20)[None]).logits
    assert 0.1 < logits.std() < 10  # the scale of the inputs is kept
    capsys.readouterr()
    monkeypatch.setattr(scale, "make_checkpoint", lambda *_: pytest.fail("it was replaced"))
    assert scale.main(flags) == 2 and "already exists" in capsys.readouterr().err
