"""The speed-up commands: graphs against PyTorch, packed tensors bit for bit, turns and ratios by pencil, bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fast, tiny_llama
from safetensors.torch import load_file
from test_load_models import build
from transformers import AutoModelForCausalLM, DynamicCache

from lib.core.errors import UserError
from lib.models.layers import prunable_modules
from lib.pruning.pruners import magnitude

sys.path.append(str(ROOT / "scripts" / "speedup"))

import benchmark
import checkpoints
import engines
import environment
import export_onnx
import pack
import pipeline
import two_of_four

onnx = pytest.importorskip("onnx", reason="tests/requirements.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="tests/requirements.txt is not installed")

LENGTH = 24
# Float32 sums of at most 48 terms in another order, three blocks deep: a few units in the last place (1e-7).
CLOSE = 1e-5


def prune(folder: Path, ratio: float, nm=None) -> None:
    """Save the tiny LLaMA to ``folder`` with ``ratio`` of each matrix zero."""
    model = tiny_llama()
    for linear in prunable_modules(model).values():
        linear.weight.data = magnitude(linear.weight.data, None, ratio, nm)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder, tiny_text) -> SimpleNamespace:
    """Return folders of a dense and two pruned tiny models, exported at LENGTH tokens; to be read only."""
    root = tmp_path_factory.mktemp("speedup")
    made = {"dense": root / "dense", "half": root / "half", "most": root / "most"}
    for name, ratio in (("dense", 0.0), ("half", 0.5), ("most", 0.8)):
        shutil.copytree(tiny_folder, made[name])
        if ratio:
            prune(made[name], ratio)
        argv = [str(made[name]), "--sequence_length", str(LENGTH), "--text", str(tiny_text)]
        assert export_onnx.main(argv) == 0
    return SimpleNamespace(**made)


@pytest.fixture
def copied(folders, tmp_path) -> SimpleNamespace:
    """Return copies of the folders that a test may spoil; an export made before stays valid."""
    names = {name: tmp_path / name for name in vars(folders)}
    for name, path in names.items():
        shutil.copytree(getattr(folders, name), path)  # keeps times, by which a stale export is told
    return SimpleNamespace(**names)


def one_line(capsys, status: int) -> str:
    """Return the error that a command printed: one line, with exit status 2."""
    assert status == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def test_prefill_graph_is_the_model_on_tokens_it_was_not_checked_on(folders, tiny_windows):
    ids = tiny_windows[:1, :LENGTH]
    found = session(folders.half / "deployment" / "model.onnx").run(["logits"], {"input_ids": ids.numpy()})[0]
    expected = load(folders.half)(ids).logits.numpy()
    assert abs(found - expected).max() <= CLOSE * abs(expected).max()


def test_prefill_graph_looks_only_back(folders, tiny_windows):
    graph = session(folders.half / "deployment" / "model.onnx")
    ids = tiny_windows[:1, :LENGTH].numpy()
    other = ids.copy()
    other[0, 10] = (ids[0, 10] + 7) % 300
    one, two = (graph.run(["logits"], {"input_ids": x})[0][0] for x in (ids, other))
    assert (one[:10] == two[:10]).all() and (one[10:] != two[10:]).any(axis=1).all()


@torch.no_grad()
def test_decode_graph_says_what_the_whole_window_says_and_hands_the_cache_on(folders, tiny_windows):
    ids = tiny_windows[1:2, :LENGTH]
    model, cache = load(folders.half), DynamicCache()
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    feed = {"input_ids": ids[:, -1:].numpy()}
    for index, layer in enumerate(cache.layers):
        feed[f"past_key_values.{index}.key"] = layer.keys.numpy()
        feed[f"past_key_values.{index}.value"] = layer.values.numpy()
    graph = session(folders.half / "deployment" / "decode.onnx")
    names = [output.name for output in graph.get_outputs()]
    found = dict(zip(names, graph.run(None, feed), strict=True))
    whole = DynamicCache()
    expected = model(ids, past_key_values=whole, use_cache=True).logits[:, -1:].numpy()
    assert abs(found["logits"] - expected).max() <= CLOSE * abs(expected).max()
    for index, layer in enumerate(whole.layers):
        assert abs(found[f"present.{index}.key"] - layer.keys.numpy()).max() <= 1e-5
        assert abs(found[f"present.{index}.value"] - layer.values.numpy()).max() <= 1e-5
    assert len(names) == 1 + 2 * 3


def test_export_record_says_what_the_files_hold(folders):
    record = json.loads((folders.most / "deployment" / "export.json").read_text())
    weights = load_file(folders.most / "model.safetensors")
    blocks = [w for name, w in weights.items() if "layers" in name and w.ndim == 2]
    zeros, total = sum(int((w == 0).sum()) for w in blocks), sum(w.numel() for w in blocks)
    assert record["sparsity"] == zeros / total and abs(zeros / total - 0.8) < 0.01
    for graph, name in (("prefill", "model"), ("decode", "decode")):
        found, proto = record["graphs"][graph], onnx.load(folders.most / "deployment" / f"{name}.onnx")
        assert (found["zeros"], found["weights"]) == (zeros, total + weights["lm_head.weight"].numel())
        assert (found["ir"], found["opset"]) == (proto.ir_version, 14) and proto.ir_version <= 9
        assert {entry.version for entry in proto.opset_import} == {14}
        assert 0 < found["onnxruntime"]["relative"] <= CLOSE and found["onnxruntime"]["top1"] == 1


@pytest.mark.parametrize("kind", fast(["opt projected", "gemma3", "gpt-neox", "phi3"], 1))
def test_other_kinds_of_models(kind, tmp_path, tiny_tokenizer, tiny_text, capsys):
    build(kind).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--text", str(tiny_text), "--sequence_length"]
    assert export_onnx.main([*argv, "8"]) == 0  # compared with PyTorch there
    if kind == "gemma3":  # its local blocks look back 8 tokens
        assert "look back 8 tokens only" in one_line(capsys, export_onnx.main([*argv, "9"]))


def test_weights_over_the_limit_of_a_file_go_beside_it(folders, tmp_path, tiny_text, monkeypatch):
    monkeypatch.setattr(export_onnx, "ONE_FILE", 10_000)
    argv = [str(folders.half), "--save", str(tmp_path / "out"), "--text", str(tiny_text), "--sequence_length", "8"]
    assert export_onnx.main(argv) == 0  # compared with PyTorch there
    names = {path.name for path in (tmp_path / "out").iterdir()}
    both = {f"{name}.{end}" for name in ("model", "decode") for end in ("onnx", "onnx.data", "npz")}
    assert names == both | {"export.json"}
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 4 * 30_000


def leaky(self, model, length):
    """Make the prefill wrapper without a causal mask."""
    torch.nn.Module.__init__(self)
    self.model = model
    self.register_buffer("mask", torch.zeros(1, 1, length, length))
    self.register_buffer("positions", torch.arange(length)[None])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: m.setattr(export_onnx.Prefill, "__init__", leaky), "logits disagree with PyTorch's"),
        (lambda m: m.setattr(export_onnx, "OPSET", 17), "opset 17; IR 9 at most and opset 14 are needed"),
        (lambda m: m.setattr(checkpoints, "MOST_IR", 6), "has ONNX IR 7 and opset 14; IR 6 at most"),
        (lambda m: m.setattr(export_onnx, "matrix_zeros", lambda *_: (1, 2)), "1 of 2 weights are zero in the file"),
        (
            lambda m: m.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000)),
            "the disk is too full",
        ),
    ],
)
def test_export_that_goes_wrong_leaves_nothing(folders, tmp_path, tiny_text, monkeypatch, capsys, spoil, says):
    spoil(monkeypatch)
    argv = [str(folders.half), "--save", str(tmp_path / "out"), "--text", str(tiny_text), "--sequence_length", "8"]
    assert says in one_line(capsys, export_onnx.main([*argv, "--graphs", "prefill"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("nowhere", "nowhere: folder not found"),
        ("owner/name", "owner/name: folder not found; fetch it first: hf download"),
        ("{half} --sequence_length 1", "--sequence_length 1: must be at least 2"),
        ("{half} --sequence_length 129", "at most the model's context, 128"),
        ("{half} --text nothing.txt", "--text nothing.txt: file not found"),
        ("{half} --save {most}", "already exists and holds something else"),
    ],
)
def test_export_bad_input(folders, tiny_text, capsys, flags, says):
    argv = flags.format(**vars(folders)).split()
    argv += [] if "--text" in argv else ["--text", str(tiny_text)]
    assert says in one_line(capsys, export_onnx.main(argv))


# --------------------------------------------------------------------------------------------------------- packing


def test_packed_folder_comes_back_file_by_file(folders, tmp_path, capsys):
    assert pack.main([str(folders.most), "--save", str(tmp_path / "packed")]) == 0
    assert "every tensor comes back bit for bit" in capsys.readouterr().out
    with pytest.raises(OSError):  # not a model with random weights
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert pack.main([str(tmp_path / "packed"), "--unpack", "--save", str(tmp_path / "back")]) == 0
    before = {p.name: p.read_bytes() for p in folders.most.iterdir() if p.is_file()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == before
    assert (tmp_path / "packed" / "model.packed.safetensors").stat().st_size < len(before["model.safetensors"])


def test_damaged_packed_file_is_refused(folders, tmp_path, capsys):
    assert pack.main([str(folders.most), "--save", str(tmp_path / "packed")]) == 0
    path = tmp_path / "packed" / "model.packed.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    says = one_line(capsys, pack.main([str(tmp_path / "packed"), "--unpack", "--save", str(tmp_path / "back")]))
    assert "its SHA-256 differs" in says and not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("{dense} --save new", "is not sparse, 0.0000% of its block weights are zero"),
        ("nowhere --save new", "nowhere: folder not found"),
        ("{most} --save {half}", "already exists and holds something else"),
        ("{most} --unpack --save new", "holds no *.packed.safetensors"),
        ("{most} --unpack --format 2of4 --save new", "--unpack with --format 2of4"),
        ("{most} --format 2of4 --save new", "needs a CUDA device and this machine has none"),
    ],
)
def test_pack_bad_input(folders, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in one_line(capsys, pack.main(flags.format(**vars(folders)).split()))
    assert list(tmp_path.iterdir()) == []


def test_two_of_four_by_pencil():
    good = torch.tensor([[1, 0, 2, 0, 0, 0, 0, 3], [0, 0, 4, 5, 6, 7, 0, 0]])
    assert two_of_four.breaks_two_of_four(good) == 0
    bad = good.clone()
    bad[0, 1] = bad[1, 3] = bad[1, 6] = 9  # row 0: 1 9 2 0; row 1: 0 0 4 9 is fine, 6 7 9 0 is not
    assert two_of_four.breaks_two_of_four(bad) == 2
    assert two_of_four.breaks_two_of_four(good[:, :6]) == -1


def test_two_of_four_refuses_a_matrix_that_is_not():
    with pytest.raises(UserError, match=r"q_proj: is not 2:4, 256 groups of 4 hold more than 2 numbers"):
        two_of_four.check_two_of_four(prunable_modules(tiny_llama()))


@pytest.mark.gpu
def test_two_of_four_on_the_device(tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=300, max_position_embeddings=128)  # fmt: skip
    model = LlamaForCausalLM(config)
    for linear in prunable_modules(model).values():
        linear.weight.data = magnitude(linear.weight.data, None, 0.5, (2, 4))
    model.half().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert pack.main([str(tmp_path / "model"), "--format", "2of4", "--save", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "2of4.json").read_text())
    assert record["bytes_2of4"] / record["bytes_dense"] == 0.5625  # two of four, and 2 bits for the place of each
    assert [row["tokens"] for row in record["rows"]] == [1, 128]


# ------------------------------------------------------------------------------------------------------ measuring


def test_models_take_turns_and_warm_up():
    calls = []
    seconds = engines.take_turns([lambda i=i: calls.append(i) for i in range(3)], warmup=2, rounds=4)
    assert calls[:6] == [0, 1, 2] * 2  # warm-up
    assert calls[6:] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]  # nobody is always first
    assert [len(times) for times in seconds] == [4, 4, 4]


def test_summary_by_pencil():
    result = {
        "engine": "onnxruntime",
        "graph": "prefill",
        "batch": 1,
        "models": [
            {"seconds": [2.0, 4.0, 3.0], "joules": None, "supported": 1.0, "agreement": {}},
            {"seconds": [1.0, 4.0, 2.0], "joules": [3.0, 9.0, 4.0], "supported": 1.0, "agreement": {}},
        ],
    }
    dense, sparse = benchmark.summarise(result, [0.0, 0.5], tokens=100)
    assert dense["speedup"] == 1 and dense["median_seconds"] == 3
    # ratios by round 2, 1, 1.5: not the ratio of the medians, which is 3/2 by another way
    assert sparse["speedup"] == 1.5 and sparse["speedup_range"] == [1, 2]
    assert (sparse["median_seconds"], sparse["least_seconds"], sparse["tokens_per_second"]) == (2, 1, 50)
    assert (dense["joules"], sparse["joules"]) == (None, 4)
    # An engine to which zeros are nothing has run the dense model alone.
    assert len(benchmark.summarise(result | {"models": result["models"][:1]}, [0.0, 0.5], tokens=100)) == 1


def test_ideal_speedup_by_pencil():
    checkpoint = checkpoints.Checkpoint(None, block_weights=80, head_weights=20, zeros=0)
    assert [checkpoint.ideal_speedup(s) for s in (0, 0.5, 1)] == [1, 100 / 60, 5]


def test_bandwidth_bound_by_pencil():
    assert [benchmark.bandwidth_bound(s) for s in (0, 0.5, 1)] == [16 / 17, 16 / 9, 16]


def test_agreement_by_pencil():
    found = engines.agreement(np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[1.0, 2.5], [3.0, 5.0]]))
    assert found == {"relative": 2 / 5, "top1": 0.5}


@pytest.mark.parametrize("engine", [name for name in engines.ENGINES if name != "deepsparse"])
def test_engine_computes_what_the_model_computes(copied, engine):
    folders = copied
    models = [
        {"folder": str(f), "deployment": str(f / "deployment"), "sparse": f != folders.dense}
        for f in (folders.dense, folders.most)
    ]
    batches = [1] if engine in engines.ONE_SEQUENCE else [1, 3]
    cells = [("prefill", 1, 2), *[("decode", batch, 3) for batch in batches]]
    cells = [{"graph": graph, "batch": batch, "rounds": rounds} for graph, batch, rounds in cells]
    found = engines.measure({"engine": engine, "models": models, "cells": cells, "cores": 1, "warmup": 1})
    # 8 bits of every activation, three blocks deep; of int8, one scale for a whole matrix or window.
    limit = 0.05 if engine in ("torch_bfloat16", "packed") else 0.1 if "int8" in engine else CLOSE
    for cell, result in zip(cells, found, strict=True):
        assert result["graph"] == cell["graph"] and result["batch"] == cell["batch"] and "error" not in result
        assert all(len(model["seconds"]) == cell["rounds"] for model in result["models"])
        assert all(min(model["seconds"]) > 0 for model in result["models"])
        # After warm-up and rounds the answer is still the first one's: the cache of a decoding step is put back.
        assert all(model["agreement"]["relative"] <= limit for model in result["models"]), result


def test_cell_that_fails_is_named_and_the_others_are_measured(folders):
    models = [{"folder": str(folders.most), "deployment": str(folders.most / "deployment"), "sparse": True}]
    cells = [{"graph": "decode", "batch": batch, "rounds": 1} for batch in (2, 1)]  # the graph is for one sequence
    found = engines.measure({"engine": "onnxruntime", "models": models, "cells": cells, "cores": 1, "warmup": 0})
    assert "index: 0 Got: 2 Expected: 1" in found[0]["error"]
    assert len(found[1]["models"][0]["seconds"]) == 1


def test_energy_is_read_where_it_can_be(tmp_path):
    assert engines.energy_meter(tmp_path) is None
    for name, used in (("intel-rapl:0", 5_000_000), ("intel-rapl:0:0", 3_000_000), ("intel-rapl:1", 1_500_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{used}\n")
    meter = engines.energy_meter(tmp_path)
    assert meter() == 6.5  # packages, without the parts of one that are in it
    turns = engines.take_turns([lambda: (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2500000")], 0, 2, meter)
    assert [used for _, used in turns[0]] == [1, 0] and all(took > 0 for took, _ in turns[0])


def test_where_sparsity_pays_by_pencil():
    def row(engine, sparsity, seconds):
        return {"graph": "decode", "batch": 1, "engine": engine, "sparsity": sparsity, "median_seconds": seconds}

    rows = [row("packed", 0.0, 6.0), row("packed", 0.5, 5.0), row("packed", 0.7, 2.0), row("torch_int8", 0.0, 4.0)]
    record = {"rows": rows, "sparsities": [0.0, 0.5, 0.7]}
    says = "pays from 70% on: 0.80 at 50%, 2.00 at 70% times the speed of the fastest dense engine, torch_int8"
    assert says in benchmark.where_it_pays(record, "decode", 1)
    rows[3]["median_seconds"] = 1.0
    assert "does not pay: 0.20 at 50%" in benchmark.where_it_pays(record, "decode", 1)
    assert benchmark.where_it_pays(record, "prefill", 1) is None


def test_decoding_goes_on_by_one_token_each_time(folders):
    deployment = folders.most / "deployment"
    arrays = np.load(deployment / "decode.npz")
    feed = {name[6:]: arrays[name] for name in arrays.files if name.startswith("input:")}
    step = engines.torch_float32(engines.Job(folders.most, deployment, "decode", 1, feed, True)).run
    steps = torch.cat([step() for _ in range(3)], 1)
    model, cache = AutoModelForCausalLM.from_pretrained(folders.most, dtype=torch.float32), DynamicCache()
    past = [torch.from_numpy(array) for name, array in feed.items() if name != "input_ids"]
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    with torch.no_grad():  # the same token three times, in one pass
        at_once = model(torch.from_numpy(feed["input_ids"]).repeat(1, 3), past_key_values=cache).logits
    assert steps.shape == (1, 3, 300) and not torch.equal(steps[:, 0], steps[:, 1])
    torch.testing.assert_close(steps, at_once, rtol=1e-4, atol=1e-5)  # sums of 32 numbers in another order


def test_csr_layers_hold_the_weights_as_csr_and_keep_the_bias():
    model = tiny_llama()
    name, linear = next(iter(prunable_modules(model).items()))
    linear.bias = torch.nn.Parameter(torch.arange(32.0))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    expected = linear(x)
    engines._to_csr(model, {name: linear})
    made = model.get_submodule(name)
    assert made.weight.layout == torch.sparse_csr
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-5)  # 32 terms of size one in another order


@pytest.mark.slow
def test_benchmark_from_folders_to_table_and_files(folders, tmp_path, capsys):
    names = ["onnxruntime", "torch_csr"]
    argv = [folders.dense, folders.half, folders.most, "--sequence_length", LENGTH, "--graphs", "prefill"]
    argv += ["--engines", *names, "--rounds", 3, "--cores", 1, "--save", tmp_path / "save"]
    assert benchmark.main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names) and "ideal speed-up" in out
    record = json.loads((tmp_path / "save" / f"speedup_{LENGTH}.json").read_text())
    assert [(row["engine"], round(row["sparsity"], 1)) for row in record["rows"]] == [
        ("onnxruntime", 0), *(("torch_csr", s) for s in (0, 0.5, 0.8))  # zeros are nothing to the first
    ]  # fmt: skip
    for row in record["rows"]:
        low, high = row["speedup_range"]
        assert low <= row["speedup"] <= high and row["least_seconds"] <= row["median_seconds"]
        assert row["logits"]["relative"] <= CLOSE
        assert row["tokens_per_second"] == pytest.approx(LENGTH / row["median_seconds"])
    assert record["ideal"][0] == 1 and record["processor"]["model"] and len(record["loadavg_after"]) == 3
    assert (tmp_path / "save" / f"speedup_{LENGTH}.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "save").iterdir()} == {f"speedup_{LENGTH}.json", f"speedup_{LENGTH}.png"}


def test_engine_that_fails_is_named_and_the_others_are_kept(folders, tmp_path, monkeypatch, capsys):
    def run_engine(engine, models, cells, args):
        about = [{"engine": engine, "graph": cell["graph"], "batch": cell["batch"]} for cell in cells]
        if engine == "torch_csr":
            return [one | {"error": "no kernel"} for one in about]
        row = {"seconds": [1.0], "joules": None, "supported": None, "agreement": {"relative": 0.0, "top1": 1.0}}
        return [one | {"versions": {}, "models": [row] * len(models)} for one in about]

    monkeypatch.setattr(benchmark, "run_engine", run_engine)
    argv = [folders.dense, folders.most, "--sequence_length", LENGTH, "--save", tmp_path]
    assert benchmark.main([str(a) for a in [*argv, "--engines", "torch_csr", "torch_float32"]]) == 0
    assert "torch_csr could not run the decode graph: no kernel" in capsys.readouterr().out
    assert benchmark.main([str(a) for a in [*argv, "--engines", "torch_csr"]]) == 2
    assert "no engine could run: no kernel" in capsys.readouterr().err


def test_engine_that_dies_says_why(folders, monkeypatch):
    args = SimpleNamespace(cores=1, warmup=0, rounds=1, graphs=["prefill"], batch=[1])
    missing = [{"folder": "nowhere", "deployment": "nowhere", "sparse": True}]
    (result,) = benchmark.run_engine("onnxruntime", missing, benchmark.cells_of("onnxruntime", args), args)
    assert "FileNotFoundError" in result["error"] and "nowhere/model.npz" in result["error"]
    monkeypatch.setattr(environment, "deepsparse_python", lambda: "false")  # dies before it has anything to say
    (result,) = benchmark.run_engine("deepsparse", missing, benchmark.cells_of("deepsparse", args), args)
    assert result == {"engine": "deepsparse", "graph": "prefill", "batch": 1, "error": "no message"}


def test_busy_machine_is_warned_about(monkeypatch, caplog):
    monkeypatch.setattr("os.getloadavg", lambda: (3.5, 0, 0))
    benchmark.check_load(4, "now")
    assert not caplog.records
    benchmark.check_load(2, "now")
    assert "busy now: load average 3.5 on 2 cores" in caplog.text


def rewrite(path: Path, change) -> None:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path)


def newer_opset(proto) -> None:
    proto.opset_import[0].version = 17


def newer_ir(proto) -> None:
    proto.ir_version = 11


def graph(folder: Path, name: str = "model") -> Path:
    return folder / "deployment" / f"{name}.onnx"


def swap(folders) -> None:
    folders.dense.rename(folders.dense.with_name("aside"))
    folders.most.rename(folders.dense)
    folders.half.rename(folders.most)


# What is done to the folders, the flags, and what is said.
SPOILED = {
    "another length": (lambda f: None, "--sequence_length 12", "was exported for 24 and would run that whatever"),
    "not exported": (lambda f: shutil.rmtree(f.dense / "deployment"), "", "file not found; type: python scripts"),
    "no input": (lambda f: shutil.rmtree(f.most / "deployment"), "", "was not written by export_onnx.py; type: python"),
    "opset": (lambda f: rewrite(graph(f.dense, "decode"), newer_opset), "", "decode.onnx: has ONNX IR 7 and opset 17"),
    "IR": (lambda f: rewrite(graph(f.dense), newer_ir), "", "model.onnx: has ONNX IR 11 and opset 14; IR 9 at most"),
    "no ONNX": (lambda f: graph(f.dense).write_bytes(b"\x0anothing"), "", "cannot be read as ONNX"),
    "pruned again": (lambda f: prune(f.most, 0.9), "", "is of other weights than the model's"),
    "not pruned": (lambda f: prune(f.most, 0.03), "", "is not sparse, 3."),
    "no model": (lambda f: shutil.rmtree(f.most), "", "most: folder not found"),
    "cut off": (lambda f: (f.most / "model.safetensors").write_bytes(b"123"), "", "its weights cannot be read"),
    "swapped": (swap, "", "the dense model comes first"),
    "cores": (lambda f: None, "--cores 4096", "physical cores"),
    "rounds": (lambda f: None, "--rounds 0", "--rounds 0: must be at least 1"),
    "batch": (lambda f: None, "--batch 0 1", "--batch 0 1: must be positive, 1 among them"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_benchmark_bad_input(copied, tmp_path, monkeypatch, capsys, case):
    spoil, flags, says = SPOILED[case]
    spoil(copied)
    monkeypatch.setattr(benchmark, "run_engine", lambda *_: pytest.fail("measured all the same"))
    argv = [str(copied.dense), str(copied.most), "--engines", "onnxruntime", "--save", str(tmp_path / "save")]
    argv += ["--sequence_length", str(LENGTH)] if "--sequence_length" not in flags else []
    assert says in one_line(capsys, benchmark.main([*argv, *flags.split()]))
    assert not (tmp_path / "save").exists()


@pytest.mark.slow
def test_engine_with_other_logits_is_refused(copied, tmp_path, capsys):
    path = copied.most / "deployment" / "model.npz"
    arrays = dict(np.load(path))
    arrays["logits"][0, 0] += 0.01 * abs(arrays["logits"]).max()
    np.savez(path, **arrays)
    argv = [copied.dense, copied.most, "--engines", "torch_csr", "--sequence_length", LENGTH, "--graphs", "prefill"]
    status = benchmark.main([str(a) for a in [*argv, "--rounds", 1, "--save", tmp_path / "save"]])
    says = one_line(capsys, status)
    assert "torch_csr: its logits (prefill, sparsity 0.80) disagree with PyTorch's by 1.0e-02 of the largest" in says
    assert not (tmp_path / "save").exists()


# --------------------------------------------------------------------------------------------- from model to table


@pytest.mark.slow
def test_pipeline_prunes_exports_and_measures(tmp_path, tiny_folder, tiny_text, capsys, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "model")
    argv = [tmp_path / "model", "--sparsity", 0.75, 0.5, "--method", "magnitude", "--work", tmp_path / "work"]
    argv += ["--sequence_length", 16, "--text", tiny_text, "--engines", "onnxruntime", "torch_csr"]
    argv = [str(a) for a in [*argv, "--graphs", "decode", "--rounds", 2, "--save", tmp_path / "save"]]
    assert pipeline.main(argv) == 0
    record = json.loads((tmp_path / "save" / "speedup_16.json").read_text())
    assert [round(row["sparsity"], 2) for row in record["rows"] if row["batch"] == 1] == [0, 0, 0.5, 0.75]
    # Of the pruned models no graph is run, and none is written.
    assert sorted(path.parts[-3] for path in tmp_path.rglob("deployment_16/*.onnx")) == ["model"]
    assert len(list(tmp_path.rglob("deployment_16/decode.npz"))) == 3
    capsys.readouterr()
    for name in ("benchmark", "leave"):
        monkeypatch.setattr(benchmark, name, lambda *_: None)  # measured above
    assert pipeline.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("pruned before") == 2 and out.count("exported before") == 3


def test_pipeline_without_arguments_measures_smollm2(smollm2_source, monkeypatch, capsys):
    def found(args):
        raise UserError(None, f"{args.models} {args.sparsity} {args.sequence_length} {args.batch} {args.cores}")

    monkeypatch.setattr(pipeline, "find_models", found)
    assert "['smollm2-135m'] [0.5, 0.7] [128, 512] [1, 2, 4, 8] 1" in one_line(capsys, pipeline.main([]))


def test_pipeline_without_dense_fills_the_zeros(copied, tmp_path, tiny_text, capsys):
    argv = [copied.most, "--work", tmp_path / "work", "--save", tmp_path / "save", "--sequence_length", LENGTH]
    argv += ["--text", tiny_text, "--engines", "onnxruntime", "--rounds", 1, "--graphs", "prefill"]
    assert pipeline.main([str(a) for a in argv]) == 0
    assert "with its zeros filled stands in for the dense model" in capsys.readouterr().out
    (made,) = (tmp_path / "work").glob("*/dense-*/model.safetensors")
    filled, sparse = load_file(made), load_file(copied.most / "model.safetensors")
    for name, weight in sparse.items():
        kept = weight != 0
        assert torch.equal(filled[name][kept], weight[kept])
        assert (filled[name] != 0).all() or "layers" not in name  # the embedding has a row of zeros, for padding


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("{dense}", "is not sparse, 0.0000% of its block weights are zero; add --sparsity"),
        ("nowhere", "nowhere: folder not found"),
        ("{half} --dense nowhere", "nowhere: folder not found"),
        ("{half} --sparsity 1.5", "--sparsity 1.5: must be at least 0.05 and below 1"),
        ("{half} {most} --sparsity 0.5", "--sparsity prunes one dense MODEL"),
        ("{most} --dense {half}/../most", "the dense model comes first"),
    ],
)
def test_pipeline_bad_input(folders, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    argv = [*flags.format(**vars(folders)).split(), "--engines", "onnxruntime"]
    assert says in one_line(capsys, pipeline.main(argv))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- environments


@pytest.mark.parametrize(
    ("machine", "flags", "says"),
    [("aarch64", {"avx2"}, "runs on x86-64 only and this machine is aarch64"), ("x86_64", {"avx"}, "AVX2")],
)
def test_machine_without_the_instructions(machine, flags, says):
    environment.check_machine("x86_64", {"avx2"})
    with pytest.raises(UserError, match=says):
        environment.check_machine(machine, flags)


def fake_python(path: Path, version: str, name: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


def test_python_for_the_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "main", "3 13"))
    fake_python(tmp_path / "python3", "3 12")
    says = r"needs Python 3.8 to 3.11, and .*main is 3.13, python3.11 not found.* 3.12; install"
    with pytest.raises(UserError, match=says):
        environment.find_python()
    ten = fake_python(tmp_path / "python3.10", "3 10")
    assert environment.find_python() == ten
    monkeypatch.setenv("DEEPSPARSE_PYTHON", fake_python(tmp_path / "asked", "3 8"))
    assert environment.find_python() == str(tmp_path / "asked")
    monkeypatch.setenv("DEEPSPARSE_PYTHON", fake_python(tmp_path / "asked", "3 7"))
    with pytest.raises(UserError, match="asked is 3.7"):  # what was asked for is not passed over
        environment.find_python()


def test_stub_of_the_engine_is_refused(tmp_path):
    fake_python(tmp_path / "venv" / "bin" / "python", "1.9.0")
    with pytest.raises(UserError, match="has 1.9.0, an end-of-life stub without an engine; 1.8.0 is the last"):
        environment.check_version(tmp_path / "venv")
    (tmp_path / "requirements.txt").write_text("deepsparse>=1.8  # newest\n")
    with pytest.raises(UserError, match="asks for deepsparse>=1.8; 1.9.0 is an end-of-life stub"):
        environment._check_pin(tmp_path / "requirements.txt")
    environment._check_pin(environment.ENGINE_REQUIREMENTS)


def skip_without_index(error: UserError, tmp_path: Path) -> None:
    """Skip where this machine cannot have the environment: no such processor, no package index. Else it failed."""
    if "could not install" not in str(error):
        pytest.skip(str(error))
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path / "probe"), "six"]
    if subprocess.run(pip, capture_output=True, timeout=60).returncode:
        pytest.skip(f"the package index is not reached: {error}")
    raise error


@pytest.mark.slow  # without the environment, the test makes it
def test_deepsparse_runs_both_graphs_and_agrees(folders, tmp_path, capsys):
    try:
        python = environment.deepsparse_python()
    except UserError as error:
        skip_without_index(error, tmp_path)
    argv = [folders.dense, folders.most, "--sequence_length", LENGTH, "--engines", "onnxruntime", "--deepsparse"]
    argv += ["--rounds", 2, "--cores", 1, "--save", tmp_path / "save"]
    assert benchmark.main([str(a) for a in argv]) == 0
    record = json.loads((tmp_path / "save" / f"speedup_{LENGTH}.json").read_text())
    assert record["failed"] == [] and record["versions_of_engines"]["deepsparse"] == "1.8.0"
    rows = [row for row in record["rows"] if row["engine"] == "deepsparse"]
    assert [(row["graph"], round(row["sparsity"], 1)) for row in rows] == [
        ("prefill", 0), ("prefill", 0.8), ("decode", 0), ("decode", 0.8)
    ]  # fmt: skip
    for row in rows:
        assert row["supported_operators"] == 1 and row["logits"]["top1"] == 1
        assert row["logits"]["relative"] <= 1e-4  # approximated exponentials, three blocks deep
    # An input of another length, which the engine would run at its own without a word.
    cells = [{"graph": "prefill", "batch": 1, "rounds": 1}]
    spec = {"engine": "deepsparse", "cells": cells, "cores": 1, "warmup": 0}
    shutil.copytree(folders.most / "deployment", tmp_path / "other")
    arrays = dict(np.load(tmp_path / "other" / "model.npz"))
    np.savez(tmp_path / "other" / "model.npz", **arrays | {"input:input_ids": arrays["input:input_ids"][:, :12]})
    spec["models"] = [{"folder": str(folders.most), "deployment": str(tmp_path / "other"), "sparse": True}]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [python, ROOT / "scripts" / "speedup" / "engines.py", tmp_path / "spec.json", tmp_path / "result.json"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert "runs input_ids as [1, 24], not [1, 12] as asked" in result["error"]


@pytest.mark.slow
def test_smollm2_export_agrees(smollm2_source, tmp_path):
    checkpoint = checkpoints.open_checkpoint(smollm2_source.path)
    record = export_onnx.export(checkpoint, 32, tmp_path / "out", ["decode"], "wiki_leads")
    # 30 blocks of sums of 576 and 1,536 terms in another order; 1e-6 was seen
    assert record["graphs"]["decode"]["onnxruntime"]["relative"] <= 1e-5
    assert record["graphs"]["decode"]["onnxruntime"]["top1"] == 1
