"""Latencies of exported models: one engine in a separate process, on models that take turns."""

# Runs in the DeepSparse environment too, which is old and has no torch: nothing but numpy is imported up here.
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

# The graphs, a whole window and one token after a window, and their files: NAME.onnx, NAME.npz.
FILES = {"prefill": "model", "decode": "decode"}


class Job(NamedTuple):
    """Input of a loader: the model's folder, the graph, the cores, and the inputs by the graph's names."""

    folder: Path
    deployment: Path
    graph: str
    cores: int
    feed: dict
    sparse: bool

    @property
    def onnx(self) -> str:
        return str(self.deployment / f"{FILES[self.graph]}.onnx")


class Loaded(NamedTuple):
    """A function that runs the model once and returns its logits [1, tokens, vocabulary], and the operators' share."""

    run: Callable
    supported: "float | None" = None  # of the graph's operators that the engine runs itself


def deepsparse(job: Job) -> Loaded:
    """DeepSparse 1.8.0: compiles the graph for these specific weights and skips their zeros."""
    from deepsparse import Engine

    engine = Engine(model=job.onnx, batch_size=1, num_cores=job.cores)
    for name, shape in zip(engine.input_names, engine.input_shapes):  # noqa: B905  (Python 3.8)
        if tuple(shape) != job.feed[name].shape:
            raise RuntimeError(f"runs {name} as {list(shape)}, not {list(job.feed[name].shape)} as asked")
    inputs = [np.ascontiguousarray(job.feed[name]) for name in engine.input_names]
    return Loaded(lambda: engine.run(inputs)[0], engine.fraction_of_supported_ops)


def onnxruntime(job: Job) -> Loaded:
    """ONNX Runtime on the CPU, with the same file: dense kernels, whatever the weights."""
    return _session(job, job.onnx)


def onnxruntime_int8(job: Job) -> Loaded:
    """ONNX Runtime with its own dynamic quantisation: 8-bit weights and activations, scales per matrix."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = Path(job.onnx).with_suffix(".int8.onnx")
    if not path.is_file() or path.stat().st_mtime < Path(job.onnx).stat().st_mtime:
        part = path.with_name("." + path.name)
        # Unsigned: on processors without VNNI the sums of signed weights overflow (logits off by 0.4 of the largest).
        quantize_dynamic(job.onnx, part, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QUInt8)
        os.replace(part, path)
    return _session(job, str(path))


def packed(job: Job) -> Loaded:
    """lib.sparse in bfloat16: pruned layers packed, and the dense model with a dense product in the same style."""
    return _torch(job, "bfloat16", packed=True)


def torch_float32(job: Job) -> Loaded:
    """PyTorch, dense kernels in float32."""
    return _torch(job, "float32")


def torch_bfloat16(job: Job) -> Loaded:
    """PyTorch, dense kernels in bfloat16: the same machine's speed without any sparsity."""
    return _torch(job, "bfloat16")


def torch_int8(job: Job) -> Loaded:
    """PyTorch with its own dynamic quantisation of every linear layer: 8-bit weights and activations."""
    return _torch(job, "int8")


def torch_csr(job: Job) -> Loaded:
    """PyTorch with the pruned matrices as CSR, a generic sparse kernel; the dense model stays dense float32."""
    return _torch(job, "float32", csr=job.sparse)


ENGINES = {
    f.__name__: f
    for f in (packed, torch_bfloat16, torch_float32, torch_int8, onnxruntime, onnxruntime_int8, torch_csr, deepsparse)
}
ONE_SEQUENCE = ("onnxruntime", "onnxruntime_int8", "deepsparse")  # their graphs are exported for a batch of one
SPARSE = ("packed", "torch_csr", "deepsparse")  # the others multiply by zeros too: the dense model's time suffices


def _session(job: Job, path: str) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.cores
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # All outputs, as in the other engines: keys and values are wanted for the next token. A graph with an operator that
    # the provider lacks makes no session, so the share is 1.
    return Loaded(lambda: session.run(None, job.feed)[0], 1.0)


@lru_cache(maxsize=None)  # noqa: UP033  (Python 3.8)
def _model(folder: Path, dtype: str, csr: bool, packed: bool):
    """Return the model of a folder for one engine; loaded once for all graphs and batches."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from lib import sparse
    from lib.models import load, locate
    from lib.models.layers import prunable_modules

    kind = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    model = load.load_llm(locate.locate(str(folder), ""), kind, torch.device("cpu"))
    if packed:
        sparse.load_kernel()  # without it the model would stay as it is, and be measured under this name
        sparse.sparsify(model)
    if csr:
        _to_csr(model, prunable_modules(model))
    if dtype == "int8":
        import warnings

        warnings.filterwarnings("ignore", message=".*torch.ao.quantization is deprecated")
        warnings.filterwarnings("ignore", message=".*quantize_per_tensor.*")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    return model


def _torch(job: Job, dtype: str, csr: bool = False, packed: bool = False) -> Loaded:
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(job.cores)
    model = _model(job.folder, dtype, csr, packed)
    ids = torch.from_numpy(job.feed["input_ids"])
    past = [torch.from_numpy(array).to(model.dtype) for name, array in job.feed.items() if name != "input_ids"]
    cache = DynamicCache()
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)

    @torch.inference_mode()
    def prefill():
        return model(input_ids=ids, use_cache=False).logits

    @torch.inference_mode()
    def decode():  # each run one token further on, as ``generate`` goes on: a cropped cache would be copied anew
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    return Loaded(decode if past else prefill)


def _to_csr(model, linears: dict) -> None:
    """Replace every linear layer of the blocks by a CSR matrix."""
    import warnings

    import torch

    class CsrLinear(torch.nn.Module):
        def __init__(self, linear) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight.detach().to_sparse_csr(), linear.bias

        def forward(self, x):
            out = (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
            return out if self.bias is None else out + self.bias

    warnings.filterwarnings("ignore", message="Sparse CSR")
    for full_name, linear in linears.items():
        parent, _, name = full_name.rpartition(".")
        setattr(model.get_submodule(parent), name, CsrLinear(linear))


def take_turns(runs: list, warmup: int, rounds: int, meter: "Callable | None" = None) -> list:
    """Return the seconds of every run in every round, [runs][rounds]; each round starts with a different run.

    With a ``meter``: pairs of seconds and its reading, in joules.
    """
    for _ in range(warmup):
        for run in runs:
            run()
    seconds = [[] for _ in runs]
    for index in range(rounds):
        for turn in range(len(runs)):
            which = (index + turn) % len(runs)
            before, start = meter() if meter else 0.0, time.perf_counter()
            runs[which]()
            took = time.perf_counter() - start
            seconds[which].append((took, meter() - before) if meter else took)
    return seconds


def energy_meter(root: Path = Path("/sys/class/powercap")) -> "Callable | None":
    """Return a function that returns the joules used by all processor packages, None if they cannot be read."""
    files = [path / "energy_uj" for path in root.glob("*:*") if path.name.count(":") == 1]
    try:
        if not files or not all(int(path.read_text()) for path in files):
            return None
    except (OSError, ValueError):  # for root alone, on most machines
        return None
    return lambda: sum(int(path.read_text()) for path in files) / 1e6


def agreement(logits, reference) -> dict:
    """Return how far ``logits`` [positions, vocabulary] are from ``reference``, both numpy arrays.

    ``relative`` is the largest difference over the largest reference logit; ``top1`` the fraction of positions with
    the same most likely token.
    """
    relative = float(abs(logits - reference).max() / abs(reference).max())
    return {"relative": relative, "top1": float((logits.argmax(-1) == reference.argmax(-1)).mean())}


def measure(spec: dict) -> list:
    """Load every model of ``spec`` in its engine, let them take turns in each cell, and return the measurements.

    A cell is a graph and a batch: {"graph", "batch", "rounds"}. One that fails is {"graph", "batch", "error"}.
    """
    results = []
    for cell in spec["cells"]:
        about = {"engine": spec["engine"], "graph": cell["graph"], "batch": cell["batch"]}
        try:
            results.append({**about, **_measure_cell(spec, cell)})
        except Exception as error:  # of any engine
            results.append({**about, "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
    return results


def _measure_cell(spec: dict, cell: dict) -> dict:
    loaded, agrees = [], []
    for model in spec["models"]:
        deployment = Path(model["deployment"])
        arrays = dict(np.load(deployment / f"{FILES[cell['graph']]}.npz"))
        # The same sequence as many times as the batch asks for.
        feed = {k[6:]: np.repeat(array, cell["batch"], axis=0) for k, array in arrays.items() if k.startswith("input:")}
        job = Job(Path(model["folder"]), deployment, cell["graph"], spec["cores"], feed, model["sparse"])
        loaded.append(ENGINES[spec["engine"]](job))
        out = loaded[-1].run()
        out = out if isinstance(out, np.ndarray) else out.float().numpy()
        agrees.append(agreement(out[0][arrays["positions"]], arrays["logits"]))
    runs, meter = [one.run for one in loaded], energy_meter()
    turns = take_turns(runs, spec["warmup"], cell["rounds"], meter)
    seconds = [[took for took, _ in one] for one in turns] if meter else turns
    joules = [[used for _, used in one] for one in turns] if meter else [None] * len(runs)
    names = {"packed": ["torch", "transformers"], "onnxruntime_int8": ["onnxruntime"]}
    packages = names.get(spec["engine"], names["packed"] if spec["engine"].startswith("torch") else [spec["engine"]])
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "loadavg": os.getloadavg(),
        "models": [
            {"seconds": times, "joules": used, "supported": one.supported, "agreement": agree}
            for times, used, one, agree in zip(seconds, joules, loaded, agrees)  # noqa: B905  (Python 3.8)
        ],
    }


if __name__ == "__main__":
    result = measure(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
