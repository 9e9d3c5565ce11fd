"""The speed-up commands: graphs and engines against PyTorch, packed tensors bit for bit, sizes by pencil, bad input."""

import ctypes
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import error_line, fast, tiny_llama
from safetensors.torch import load_file
from test_load_models import build
from transformers import AutoModelForCausalLM, DynamicCache

from lib.core.errors import UserError
from lib.evaluation.perplexity import perplexity
from lib.models.layers import find_blocks, linear_modules
from lib.pruning.pruners import magnitude
from lib.sparse.kernel import PADDING
from scripts.speedup import benchmark, engines, export_onnx, pack

onnx = pytest.importorskip("onnx", reason="tests/requirements.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="tests/requirements.txt is not installed")

LENGTH = 24
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
    """Return folders of a dense and a pruned tiny model, and graphs of the latter; to be read only."""
    root = tmp_path_factory.mktemp("speedup")
    made = {name: root / name for name in ("dense", "most", "graphs", "packed")}
    for name in ("dense", "most"):
        shutil.copytree(tiny_folder, made[name])
    prune(made["most"], 0.8)
    argv = [str(made["most"]), "--sequence_length", str(LENGTH), "--text", str(tiny_text)]
    assert export_onnx.main([*argv, "--save", str(made["graphs"])]) == 0
    assert pack.main([str(made["most"]), "--save", str(made["packed"])]) == 0
    return SimpleNamespace(**made)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# ---------------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def test_prefill_graph_is_the_model_on_tokens_it_was_not_checked_on(folders, tiny_windows):
    ids = tiny_windows[:1, :LENGTH]
    graph_logits = session(folders.graphs / "model.onnx").run(["logits"], {"input_ids": ids.numpy()})[0]
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
    graph = session(folders.graphs / "decode.onnx")
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
    record = json.loads((folders.graphs / "export.json").read_text())
    weights = load_file(folders.most / "model.safetensors")
    blocks = [w for name, w in weights.items() if "layers" in name and w.ndim == 2]
    zeros, total = sum(int((w == 0).sum()) for w in blocks), sum(w.numel() for w in blocks)
    assert record["sparsity"] == zeros / total and abs(zeros / total - 0.8) < 0.01
    for graph, name in (("prefill", "model"), ("decode", "decode")):
        checks, proto = record["graphs"][graph], onnx.load(folders.graphs / f"{name}.onnx")
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
    both = {f"{name}.{end}" for name in ("model", "decode") for end in ("onnx", "onnx.data")}
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
    with pytest.raises(OSError):  # not a model with random weights
        AutoModelForCausalLM.from_pretrained(folders.packed)
    assert pack.main([str(folders.packed), "--unpack", "--save", str(tmp_path / "back")]) == 0
    assert "each with the SHA-256 of what was packed" in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in folders.most.iterdir() if p.is_file()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == before
    assert (folders.packed / "model.packed.safetensors").stat().st_size < len(before["model.safetensors"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("{dense} --save new", "is not sparse, 0.0000% of its block weights are zero"),
        ("{packed} --save new", "is packed, which is for running it; unpack it first"),
        ("{most} --unpack --save new", "holds no *.packed.safetensors"),
    ],
)
def test_pack_bad_input(folders, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    assert says in error_line(capsys, pack.main(flags.format(**vars(folders)).split()))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ measuring


def test_agreement_by_pencil():
    agrees = export_onnx.agreement(np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[1.0, 2.5], [3.0, 5.0]]))
    assert agrees == {"relative": 2 / 5, "top1": 0.5}


def spec(engine: str, windows: torch.Tensor, *paths: Path) -> dict:
    """Return the first request to an engine: ``windows`` [count, LENGTH] and models in the folders ``paths``."""
    models = [{"name": path.name, "path": str(path)} for path in paths]
    sizes = {"windows": windows.tolist(), "context": 5, "longest": LENGTH, "cores": 1}
    return {"engine": engine, "models": models} | sizes


@pytest.mark.parametrize("engine", [name for name in engines.ENGINES if name != "llama_cpp"])
def test_engine_computes_what_the_model_computes(folders, tiny_windows, engine):
    paths = [folders.dense, folders.most, folders.packed][: None if engine == "packed" else 2]
    windows = tiny_windows[:3, :LENGTH]
    requests = [spec(engine, windows, *paths), [1, 0], [0, 16]]
    described, tokens, prompt = engines.answers(map(json.dumps, requests))
    assert (len(tokens), len(prompt)) == (engines.TOKENS, 1) and min(tokens + prompt) > 0
    dense, most = (perplexity(load(path), windows) for path in (folders.dense, folders.most))
    limit = 1e-5 if engine == "torch_float32" else 0.02  # 8 bits of every activation, three blocks deep
    assert [each["perplexity"] for each in described] == pytest.approx([dense, most, most][: len(paths)], rel=limit)


def test_each_token_goes_on_from_the_one_before_and_a_prompt_begins_anew(folders, tiny_windows):
    ids = tiny_windows[0, :LENGTH].numpy()
    model = engines.ENGINES["torch_float32"]({"path": str(folders.most)}, {"cores": 1})
    whole = model.read(ids, every=True)
    first = model.read(ids[:20])
    steps = [first, *(model.go_on(token) for token in ids[20:])]
    assert whole.shape == (LENGTH, 300) and first.shape == (1, 300)
    # Sums of 32 numbers in another order.
    np.testing.assert_allclose(np.concatenate(steps), whole[19:], rtol=1e-4, atol=1e-5)


def test_megabytes_are_what_the_packed_model_holds(folders):
    model = engines.ENGINES["packed"]({"path": str(folders.packed)}, {"cores": 1})
    size = 0
    for name, weight in load_file(folders.most / "model.safetensors").items():
        if "layers" in name and weight.ndim == 2:
            words = -(-weight.shape[1] // 32)
            nonzero = int((weight != 0).sum())
            # A bit for each column, whole words; two bytes for each value and for those that may be read after the
            # last; where each row begins, and the last ends.
            size += weight.shape[0] * words * 4 + 2 * (nonzero + PADDING) + 8 * (weight.shape[0] + 1)
        else:
            size += 2 * weight.numel()
    angles = sum(buffer.nbytes for buffer in model.model.buffers())
    assert round(1e6 * model.megabytes()) == size + angles


class StubbedLlama:
    """The functions of llama_cpp that the engine calls; a token's logits tell its place, and whether it is asked."""

    LLAMA_FTYPE_MOSTLY_Q8_0, __version__ = 7, "0"

    def __init__(self):
        self.decoded, self.quantised, self.at = [], [], 0

    def __getattr__(self, name):  # whatever else is called gives an object for parameters or a place
        return lambda *_: SimpleNamespace()

    def llama_model_quantize(self, source, target, how):
        assert how.allow_requantize and how.ftype == 7
        self.quantised.append(source)
        Path(target.decode()).write_bytes(bytes(50_000))
        return 0

    def llama_vocab_n_tokens(self, _):
        return 4

    def llama_memory_clear(self, *_):
        self.at = 0

    def llama_batch_init(self, longest, *_):
        numbers = {name: [None] * longest for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(seq_id=[[None] for _ in range(longest)], **numbers)

    def llama_decode(self, _, batch):
        count = batch.n_tokens
        assert batch.pos[:count] == list(range(self.at, self.at + count)), "one token after the other"
        assert batch.n_seq_id[:count] == [1] * count and batch.seq_id[:count] == [[0]] * count
        self.at += count
        self.decoded.append((batch.token[:count], [bool(asked) for asked in batch.logits[:count]]))
        places = [place for place, asked in zip(batch.pos, batch.logits[:count], strict=False) if asked]
        self.logits = np.repeat(np.array(places, np.float32), 4)
        return 0

    def llama_get_logits(self, _):
        return self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_is_given_each_token_at_its_place_and_asked_for_the_logits_that_are_read(tmp_path, monkeypatch):
    stub = StubbedLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", stub)
    (tmp_path / "m.gguf").write_bytes(bytes(20_000))
    size = {"cores": 1, "longest": 8}
    given, smaller = (engines.LlamaCpp({"path": str(tmp_path / "m.gguf"), "name": n}, size) for n in ("m", "Q8_0"))
    assert (given.megabytes(), smaller.megabytes()) == (0.02, 0.05) and len(stub.quantised) == 1

    assert given.read(np.array([7, 8, 9]), every=True).tolist() == [[0] * 4, [1] * 4, [2] * 4]
    assert given.read(np.array([5, 6])).tolist() == [[1] * 4], "from the beginning again"
    assert given.go_on(np.int64(3)).tolist() == [[2] * 4]
    assert stub.decoded == [([7, 8, 9], [True] * 3), ([5, 6], [False, True]), ([3], [True])]


# -------------------------------------------------------------------------------------------- from models to table


class Here:
    """An engine in this process, in place of benchmark.Worker; "torch_float32" dies, and times are counted up."""

    asked = []

    def __init__(self, engine: str, cores: int, stack) -> None:
        self.engine = engine

    def ask(self, request) -> list:
        if self.engine == "torch_float32":
            raise UserError(None, self.engine, "no memory")
        if isinstance(request, dict):
            return [{"version": "1", "megabytes": 2.4, "perplexity": 14.126} for _ in request["models"]]
        self.asked.append((self.engine, *request))
        return [len(self.asked) * 1e-3, 9.0]


@pytest.fixture
def speedup(tmp_path, tiny_text, monkeypatch):
    """Return a function that runs the benchmark with some flags, by default with engines in this process."""
    monkeypatch.setattr(Here, "asked", [])
    monkeypatch.setattr(benchmark, "Worker", Here)
    flags = ["--save", tmp_path / "save", "--text", tiny_text, "--seqlen", 16, "--eval_windows", 2, "--context", 8]
    return lambda *words: benchmark.main([str(word) for word in (*words, *flags)])


def test_models_of_all_engines_take_turns(folders, speedup, tmp_path, capsys):
    models = [folders.dense, folders.most, folders.packed]
    assert (
        speedup(*models, "--rounds", 2, "--prompts", 4, "--engines", "torch_float32", "packed", "torch_bfloat16") == 0
    )
    turns = [("packed", 0), ("packed", 1), ("packed", 2), ("torch_bfloat16", 0)]
    assert Here.asked == [(*turn, tokens) for turn in turns + turns[1:] + turns[:1] for tokens in (0, 4)]
    out = capsys.readouterr().out
    assert "could not run: torch_float32: no memory" in out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    # Requests 1 and 2 were the first model's, and 15 and 16: the least is shown, in milliseconds.
    assert lines[0] == ["engine", "model", "MB", "token after 8", "prompt of 4", "perplexity"]
    assert lines[1] == ["packed", "dense", "2", "1.0", "2.0", "14.13"] and len(lines) == 5
    record = json.loads((tmp_path / "save/speedup.json").read_text())
    assert record["rows"][0]["seconds"] == {"token after 8": [0.001, 9, 0.015, 9], "prompt of 4": [0.002, 9, 0.016, 9]}
    assert (tmp_path / "save/speedup.png").stat().st_size > 1000


def test_no_engine_that_runs_is_an_error(folders, speedup, tmp_path, capsys):
    says = error_line(capsys, speedup(folders.dense, "--prompts", 4, "--engines", "torch_float32"))
    assert "no engine could run: torch_float32: no memory" in says and not (tmp_path / "save").exists()


def test_process_that_dies_says_why(monkeypatch):
    with ExitStack() as stack:
        worker = benchmark.Worker("torch_float32", 1, stack)
        with pytest.raises(UserError, match="torch_float32: KeyError: 'cores'"):
            worker.ask({"engine": "torch_float32"})
        monkeypatch.setenv("LLAMA_CPP_PYTHON", "false")  # dies before it has anything to say
        with pytest.raises(UserError, match="llama_cpp: no message"):
            benchmark.Worker("llama_cpp", 1, stack).ask({})


@pytest.mark.slow
def test_engine_in_its_own_process(folders, speedup, tmp_path, monkeypatch):
    monkeypatch.undo()
    assert speedup(folders.dense, folders.packed, "--prompts", 4, "--engines", "packed") == 0
    rows = json.loads((tmp_path / "save/speedup.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "packed"] and rows[0]["megabytes"] > rows[1]["megabytes"]
    assert all(min(seconds) > 0 for row in rows for seconds in row["seconds"].values())


BAD = {
    "nowhere": "nowhere: folder not found",
    "{dense} {most} --engines torch_float32": "--engines torch_float32: run the first MODEL alone; add packed",
    "{dense} --engines torch_csr": "--engines torch_csr: invalid choice",
    "{dense} --engines llama_cpp": "dense; give a .gguf file as the dense MODEL",
    "m.gguf --engines llama_cpp": "llama_cpp: has no interpreter with llama-cpp-python; set LLAMA_CPP_PYTHON=",
    "{dense} --cores 5": "--cores 5: this machine has 4 physical cores",
    "{dense} --prompts 33": "--eval_windows 2: make a text of 32 tokens, and 33 are read",
}


@pytest.mark.parametrize("flags", BAD)
def test_benchmark_bad_input(folders, tmp_path, speedup, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_CPP_PYTHON", "false")
    monkeypatch.setattr(benchmark.cpu, "physical_cores", lambda: 4)
    before = set(tmp_path.rglob("*"))
    words = flags if "--prompts" in flags else f"{flags} --prompts 4"
    assert BAD[flags] in error_line(capsys, speedup(*words.format(**vars(folders)).split()))
    assert set(tmp_path.rglob("*")) == before
