"""The speed-up commands: graphs against PyTorch, packed tensors bit for bit, turns and ratios by pencil, bad input."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import error_line, fast, tiny_llama
from safetensors.torch import load_file
from test_load_models import build
from transformers import AutoModelForCausalLM, DynamicCache

from lib.models.layers import find_blocks, linear_modules
from lib.pruning.pruners import magnitude
from scripts.speedup import benchmark, engines, export_onnx, pack

onnx = pytest.importorskip("onnx", reason="tests/requirements.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="tests/requirements.txt is not installed")

LENGTH = 24
GRAPHS = f"deployment_{LENGTH}"  # where run.sh keeps the graphs of a model
# Float32 sums of at most 48 terms in another order, three blocks deep: a few units in the last place (1e-7).
CLOSE = 1e-5


def prune(folder: Path, ratio: float, nm=None) -> None:
    """Save the tiny LLaMA to ``folder`` with ``ratio`` of each matrix zero."""
    model = tiny_llama()
    for linear in linear_modules(find_blocks(model)[1]).values():
        linear.weight.data = magnitude(linear.weight.data, None, ratio, nm)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder, tiny_text) -> SimpleNamespace:
    """Return folders of a dense and a pruned tiny model, exported at LENGTH tokens; to be read only."""
    root = tmp_path_factory.mktemp("speedup")
    made = {"dense": root / "dense", "most": root / "most"}
    for name, folder in made.items():
        shutil.copytree(tiny_folder, folder)
        if name == "most":
            prune(folder, 0.8)
        argv = [str(folder), "--sequence_length", str(LENGTH), "--text", str(tiny_text)]
        assert export_onnx.main([*argv, "--save", str(folder / GRAPHS)]) == 0
    return SimpleNamespace(**made)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def test_prefill_graph_is_the_model_on_tokens_it_was_not_checked_on(folders, tiny_windows):
    ids = tiny_windows[:1, :LENGTH]
    graph_logits = session(folders.most / GRAPHS / "model.onnx").run(["logits"], {"input_ids": ids.numpy()})[0]
    expected = load(folders.most)(ids).logits.numpy()
    assert abs(graph_logits - expected).max() <= CLOSE * abs(expected).max()


@torch.no_grad()
def test_decode_graph_says_what_the_whole_window_says_and_hands_the_cache_on(folders, tiny_windows):
    ids = tiny_windows[1:2, :LENGTH]
    model, cache = load(folders.most), DynamicCache()
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    feed = {"input_ids": ids[:, -1:].numpy()}
    for index, layer in enumerate(cache.layers):
        feed[f"past_key_values.{index}.key"] = layer.keys.numpy()
        feed[f"past_key_values.{index}.value"] = layer.values.numpy()
    graph = session(folders.most / GRAPHS / "decode.onnx")
    names = [output.name for output in graph.get_outputs()]
    outputs = dict(zip(names, graph.run(None, feed), strict=True))
    whole = DynamicCache()
    expected = model(ids, past_key_values=whole, use_cache=True).logits[:, -1:].numpy()
    assert abs(outputs["logits"] - expected).max() <= CLOSE * abs(expected).max()
    for index, layer in enumerate(whole.layers):
        assert abs(outputs[f"present.{index}.key"] - layer.keys.numpy()).max() <= 1e-5
        assert abs(outputs[f"present.{index}.value"] - layer.values.numpy()).max() <= 1e-5
    assert len(names) == 1 + 2 * 3


def test_export_record_says_what_the_files_hold(folders):
    record = json.loads((folders.most / GRAPHS / "export.json").read_text())
    weights = load_file(folders.most / "model.safetensors")
    blocks = [w for name, w in weights.items() if "layers" in name and w.ndim == 2]
    zeros, total = sum(int((w == 0).sum()) for w in blocks), sum(w.numel() for w in blocks)
    assert record["sparsity"] == zeros / total and abs(zeros / total - 0.8) < 0.01
    for graph, name in (("prefill", "model"), ("decode", "decode")):
        checks, proto = record["graphs"][graph], onnx.load(folders.most / GRAPHS / f"{name}.onnx")
        assert (checks["ir"], checks["opset"]) == (proto.ir_version, 14) and proto.ir_version <= 9
        assert {entry.version for entry in proto.opset_import} == {14}
        arrays = [onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer]
        in_blocks = [array for array in arrays if array.ndim == 2 and 300 not in array.shape]  # 300 tokens
        assert sum((array == 0).sum() for array in in_blocks) == zeros, "what an engine skips is still there"
        assert 0 < checks["onnxruntime"]["relative"] <= CLOSE and checks["onnxruntime"]["top1"] == 1


@pytest.mark.parametrize("kind", fast(["opt projected", "gemma3", "gpt-neox", "phi3"], 1))
def test_other_kinds_of_models(kind, tmp_path, tiny_tokenizer, tiny_text, capsys):
    build(kind).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--text", str(tiny_text), "--sequence_length"]
    assert export_onnx.main([*argv, "8"]) == 0  # compared with PyTorch there
    if kind == "gemma3":  # its local blocks look back 8 tokens
        assert "cannot be exported at this length" in error_line(capsys, export_onnx.main([*argv, "9"]))


def test_weights_over_the_limit_of_a_file_go_beside_it(folders, tmp_path, tiny_text, monkeypatch):
    monkeypatch.setattr(export_onnx, "ONE_FILE", 10_000)
    argv = [str(folders.most), "--save", str(tmp_path / "out"), "--text", str(tiny_text), "--sequence_length", "8"]
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
        (lambda m: m.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000)), "the disk is too full"),
    ],
)
def test_export_that_goes_wrong_leaves_nothing(folders, tmp_path, tiny_text, monkeypatch, capsys, spoil, says):
    spoil(monkeypatch)
    argv = [str(folders.most), "--save", str(tmp_path / "out"), "--text", str(tiny_text), "--sequence_length", "8"]
    assert says in error_line(capsys, export_onnx.main([*argv, "--graphs", "prefill"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("nowhere", "nowhere: folder not found"),
        ("owner/name", "owner/name: folder not found; fetch it first: hf download"),
        ("{most} --sequence_length 129", "is more than the model's context; give at most 128"),
        ("{most} --save {dense}", "already exists and holds something else"),
    ],
)
def test_export_bad_input(folders, tiny_text, capsys, flags, says):
    argv = flags.format(**vars(folders)).split()
    argv += [] if "--text" in argv else ["--text", str(tiny_text)]
    assert says in error_line(capsys, export_onnx.main(argv))


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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("{dense} --save new", "is not sparse, 0.0000% of its block weights are zero"),
        ("{most} --unpack --save new", "holds no *.packed.safetensors"),
    ],
)
def test_pack_bad_input(folders, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    assert says in error_line(capsys, pack.main(flags.format(**vars(folders)).split()))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ measuring


def test_models_take_turns_and_warm_up():
    calls = []
    seconds = engines.take_turns([lambda i=i: calls.append(i) for i in range(3)], warmup=2, rounds=4)
    assert calls[:6] == [0, 1, 2] * 2  # warm-up
    assert calls[6:] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]  # nobody is always first
    assert [len(times) for times in seconds] == [4, 4, 4]


def test_summary_by_pencil():
    result = {"engine": "onnxruntime", "graph": "prefill", "batch": 1, "version": "1"}
    result["models"] = [{"seconds": seconds, "agreement": {}} for seconds in ([2.0, 4.0, 3.0], [1.0, 4.0, 2.0])]
    dense, sparse = benchmark.summarise(result, [0.0, 0.5], tokens=100)
    assert dense["speedup"] == 1 and dense["median_seconds"] == 3
    # ratios by round 2, 1, 1.5: not the ratio of the medians, which is 3/2 by another way
    assert sparse["speedup"] == 1.5 and sparse["speedup_range"] == [1, 2]
    assert (sparse["median_seconds"], sparse["least_seconds"], sparse["tokens_per_second"]) == (2, 1, 50)
    # An engine to which zeros are nothing has run the dense model alone.
    assert len(benchmark.summarise(result | {"models": result["models"][:1]}, [0.0, 0.5], tokens=100)) == 1


def test_agreement_by_pencil():
    agrees = engines.agreement(np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[1.0, 2.5], [3.0, 5.0]]))
    assert agrees == {"relative": 2 / 5, "top1": 0.5}


@pytest.mark.parametrize("engine", [name for name in engines.ENGINES if name != "deepsparse"])
def test_engine_computes_what_the_model_computes(folders, engine):
    batches = [1] if engine in engines.ONE_SEQUENCE else [1, 3]
    cells = [("prefill", 1, 2), *[("decode", batch, 3) for batch in batches]]
    spec = {"engine": engine, "cores": 1, "warmup": 1}
    spec["models"] = [{"folder": str(path), "deployment": str(path / GRAPHS)} for path in (folders.dense, folders.most)]
    spec["cells"] = [{"graph": graph, "batch": batch, "rounds": rounds} for graph, batch, rounds in cells]
    results = engines.measure(spec)
    # 8 bits of every activation, three blocks deep; of int8, one scale for a whole matrix or window.
    limit = 0.05 if engine in ("torch_bfloat16", "packed") else 0.1 if "int8" in engine else CLOSE
    for (graph, batch, rounds), result in zip(cells, results, strict=True):
        assert result["graph"] == graph and result["batch"] == batch and "error" not in result
        assert all(len(model["seconds"]) == rounds and min(model["seconds"]) > 0 for model in result["models"])
        assert all(model["agreement"]["relative"] <= limit for model in result["models"]), result


def test_decoding_goes_on_by_one_token_each_time(folders):
    arrays = np.load(folders.most / GRAPHS / "decode.npz")
    feed = {name[6:]: arrays[name] for name in arrays.files if name.startswith("input:")}
    step = engines.ENGINES["torch_float32"](engines.Job(folders.most, "", 1, feed))
    steps = torch.cat([step() for _ in range(3)], 1)
    model, cache = AutoModelForCausalLM.from_pretrained(folders.most, dtype=torch.float32), DynamicCache()
    past = [torch.from_numpy(array) for name, array in feed.items() if name != "input_ids"]
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    with torch.no_grad():  # the same token three times, in one pass
        at_once = model(torch.from_numpy(feed["input_ids"]).repeat(1, 3), past_key_values=cache).logits
    assert steps.shape == (1, 3, 300) and not torch.equal(steps[:, 0], steps[:, 1])
    torch.testing.assert_close(steps, at_once, rtol=1e-4, atol=1e-5)  # sums of 32 numbers in another order


# --------------------------------------------------------------------------------------------- from model to table


@pytest.fixture
def speedup(tmp_path, tiny_text):
    """Return a function that runs the benchmark with some flags and returns its exit status."""
    where = ["--work", tmp_path / "work", "--save", tmp_path / "save", "--text", tiny_text]

    def run(*flags: object) -> int:
        return benchmark.main([str(word) for word in (*flags, *where)])

    return run


@pytest.mark.slow
def test_benchmark_prunes_exports_and_measures(speedup, tmp_path, tiny_folder, capsys, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "model")
    flags = ["--sparsity", 0.75, 0.5, "--sequence_length", 16, "--graphs", "decode", "--rounds", 2]
    flags += ["--engines", "onnxruntime", "packed", "--batch", 1, 2]
    assert speedup(tmp_path / "model", *flags) == 0
    record = json.loads((tmp_path / "save/speedup_16.json").read_text())
    rows = [(row["engine"], round(row["sparsity"], 2), row["batch"]) for row in record["rows"]]
    packed = [("packed", sparsity, batch) for batch in (1, 2) for sparsity in (0, 0.5, 0.75)]
    assert rows == [("onnxruntime", 0, 1), *packed], "zeros are nothing to the first"
    assert capsys.readouterr().out.count("\n| packed ") == 6
    # Of the pruned models no graph is run, and none is written.
    assert sorted(path.parts[-3] for path in tmp_path.rglob("deployment_16/*.onnx")) == ["model"]
    assert len(list(tmp_path.rglob("deployment_16/decode.npz"))) == 3
    monkeypatch.setattr(benchmark, "run_engine", measured)
    assert speedup(tmp_path / "model", *flags) == 0
    out = capsys.readouterr().out
    assert out.count("pruned before") == 2 and out.count("exported before") == 3


def measured(engine, models, settings, off: float = 0.0) -> list[dict]:
    """Return what ``run_engine`` would, without running anything; "onnxruntime" fails."""
    cells = [{"engine": engine} | cell for cell in benchmark.cells_of(engine, settings)]
    if engine == "onnxruntime":
        return [cell | {"error": "no kernel"} for cell in cells]
    row = {"seconds": [1.0], "agreement": {"relative": off, "top1": 1.0}}
    return [cell | {"version": "1", "models": [row] * len(models)} for cell in cells]


def test_engine_that_fails_is_named_and_the_others_are_kept(folders, speedup, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run_engine", measured)
    flags = [folders.most, "--dense", folders.dense, "--sequence_length", LENGTH, "--engines", "onnxruntime"]
    assert speedup(*flags, "torch_float32") == 0
    assert "onnxruntime could not run the decode graph: no kernel" in capsys.readouterr().out
    assert "no engine could run: no kernel" in error_line(capsys, speedup(*flags))


def test_engine_with_other_logits_is_refused(folders, speedup, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run_engine", lambda *args: measured(*args, off=0.01))
    flags = [folders.most, "--dense", folders.dense, "--sequence_length", LENGTH, "--engines", "torch_float32"]
    says = error_line(capsys, speedup(*flags))
    assert "torch_float32: its logits (prefill, sparsity 0.00) disagree with PyTorch's by 1.0e-02 of the" in says
    assert not (tmp_path / "save").exists()


def test_engine_that_dies_says_why(monkeypatch):
    settings = benchmark.SpeedUp(rounds=1, graphs=("prefill",))
    missing = [{"folder": "nowhere", "deployment": "nowhere"}]
    (result,) = benchmark.run_engine("onnxruntime", missing, settings)
    assert "FileNotFoundError" in result["error"] and "nowhere/model.npz" in result["error"]
    monkeypatch.setenv("DEEPSPARSE_PYTHON", "false")  # dies before it has anything to say
    (result,) = benchmark.run_engine("deepsparse", missing, settings)
    assert result == {"engine": "deepsparse", "graph": "prefill", "batch": 1, "error": "no message"}


def test_export_is_made_anew_for_other_weights_and_a_missing_graph(folders, tmp_path, speedup, monkeypatch, capsys):
    # Copies keep the times by which a stale export is told.
    dense, most = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (folders.dense, folders.most))
    monkeypatch.setattr(benchmark, "run_engine", measured)

    def export(checkpoint, length, folder, *_):
        print(f"exported: {folder.parent.name}")
        (folder / "export.json").write_text(json.dumps({"fingerprint": "", "graphs": {}}))

    monkeypatch.setattr(benchmark, "export", export)
    flags = [most, "--dense", dense, "--sequence_length", LENGTH, "--engines", "packed"]
    prune(most, 0.6)
    assert speedup(*flags) == 0
    out = capsys.readouterr().out
    assert "exported: most" in out and f"exported before: {dense}" in out
    (dense / GRAPHS / "export.json").write_text(json.dumps({"graphs": {}}))
    assert speedup(*flags) == 0 and "exported: dense" in capsys.readouterr().out


BAD = {
    "{most} --dense nowhere": "nowhere: folder not found",
    "{most}": "--dense is missing; give the model that MODEL was pruned from, or --sparsity 0.5 0.7",
    "{dense} --dense {dense}": "is not sparse, 0.0000% of its block weights are zero",
    "{most} --dense {most}": "is no denser (0.8",
    "{dense} {most} --sparsity 0.5": "--sparsity prunes one dense MODEL",
    "{most} --dense {dense} --engines torch_csr": "--engines torch_csr: invalid choice",
    "{most} --dense {dense} --cores 5": "--cores 5: this machine has 4 physical cores",
    "{most} --dense {dense} --deepsparse": "--deepsparse has no interpreter; set DEEPSPARSE_PYTHON=",
    "{cut_off} --dense {dense}": "its weights cannot be read",
}


@pytest.mark.parametrize("flags", BAD)
def test_benchmark_bad_input(folders, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPSPARSE_PYTHON", raising=False)
    monkeypatch.setattr(benchmark.cpu, "physical_cores", lambda: 4)
    if "cut_off" in flags:
        shutil.copytree(folders.most, "cut_off")
        Path("cut_off/model.safetensors").write_bytes(b"123")
    before = set(tmp_path.rglob("*"))
    assert BAD[flags] in error_line(capsys, benchmark.main(flags.format(**vars(folders), cut_off="cut_off").split()))
    assert set(tmp_path.rglob("*")) == before
