"""Latencies of models in one engine: started by benchmark.py as a separate process, in which the models take turns."""

# DeepSparse's own environment has neither torch nor lib: nothing but numpy is imported up here.
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

# The graphs, a whole window and one token after a window, and their files: NAME.onnx, NAME.npz.
FILES = {"prefill": "model", "decode": "decode"}


class Job(NamedTuple):
    """Input of an engine: the model's folder, its graph's ONNX file, the cores, and the inputs by the graph's names."""

    folder: Path
    onnx: str
    cores: int
    feed: dict[str, np.ndarray]


# Each engine takes a job and returns a function that runs the model once and returns its logits.


def onnxruntime(job: Job) -> Callable:
    """ONNX Runtime on the CPU, with the same file: dense kernels, whatever the weights."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.cores
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(job.onnx, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, job.feed)[0]  # all outputs: the next token needs the keys and values


def onnxruntime_int8(job: Job) -> Callable:
    """ONNX Runtime with its own dynamic quantisation: 8-bit weights and activations, scales per matrix."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/int8.onnx"
        # Unsigned: on processors without VNNI the sums of signed weights overflow (logits off by 0.4 of the largest).
        quantize_dynamic(job.onnx, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QUInt8)
        return onnxruntime(job._replace(onnx=path))


def deepsparse(job: Job) -> Callable:
    """DeepSparse 1.8.0: compiles the graph for these specific weights and skips their zeros."""
    from deepsparse import Engine

    engine = Engine(model=job.onnx, batch_size=1, num_cores=job.cores)
    for name, shape in zip(engine.input_names, engine.input_shapes, strict=True):
        if tuple(shape) != job.feed[name].shape:  # it would run its own shape without a word
            raise RuntimeError(f"runs {name} as {list(shape)}, not {list(job.feed[name].shape)} as asked")
    inputs = [np.ascontiguousarray(job.feed[name]) for name in engine.input_names]
    return lambda: engine.run(inputs)[0]


@cache
def _model(folder: Path, dtype: str, packed: bool):
    """Return the model of a folder for one engine; loaded once for all graphs and batches."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from lib import sparse
    from lib.models.load import load_llm
    from lib.models.locate import locate

    model = load_llm(locate(str(folder), ""), getattr(torch, dtype), torch.device("cpu"))
    if packed:
        sparse.load_kernel()  # without it the model would stay as it is, and be measured under this name
        sparse.sparsify(model)
    return model


def pytorch(job: Job, dtype: str, packed: bool = False) -> Callable:
    """PyTorch: dense kernels, or the layers of the pruned model packed (lib.sparse)."""
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(job.cores)
    model = _model(job.folder, dtype, packed)
    ids = torch.from_numpy(job.feed["input_ids"])
    past = [torch.from_numpy(array).to(model.dtype) for name, array in job.feed.items() if name != "input_ids"]
    cached = DynamicCache()
    for layer in range(len(past) // 2):
        cached.update(past[2 * layer], past[2 * layer + 1], layer)

    # Each run decodes one token further on, as ``generate`` does: a cropped cache would be copied anew.
    @torch.inference_mode()
    def run() -> torch.Tensor:
        if past:
            return model(input_ids=ids, past_key_values=cached, use_cache=True).logits
        return model(input_ids=ids, use_cache=False).logits

    return run


ENGINES: dict[str, Callable[[Job], Callable]] = {
    "packed": partial(pytorch, dtype="bfloat16", packed=True),
    "torch_bfloat16": partial(pytorch, dtype="bfloat16"),
    "torch_float32": partial(pytorch, dtype="float32"),
    "onnxruntime": onnxruntime,
    "onnxruntime_int8": onnxruntime_int8,
    "deepsparse": deepsparse,
}
ONE_SEQUENCE = ("onnxruntime", "onnxruntime_int8", "deepsparse")  # their graphs are exported for a batch of one
SPARSE = ("packed", "deepsparse")  # the others multiply by zeros, too: the dense model's time suffices


def take_turns(runs: Sequence[Callable], warmup: int, rounds: int) -> list[list[float]]:
    """Return the seconds of every run in every round, [runs][rounds]; each round starts with a different run."""
    for _ in range(warmup):
        for run in runs:
            run()
    seconds = [[] for _ in runs]
    for first in range(rounds):
        for turn in range(len(runs)):
            index = (first + turn) % len(runs)
            start = time.perf_counter()
            runs[index]()
            seconds[index].append(time.perf_counter() - start)
    return seconds


def agreement(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return how far ``logits`` [positions, vocabulary] are from ``reference``.

    ``relative`` is the largest difference over the largest reference logit; ``top1`` the fraction of positions with
    the same most likely token.
    """
    relative = float(abs(logits - reference).max() / abs(reference).max())
    return {"relative": relative, "top1": float((logits.argmax(-1) == reference.argmax(-1)).mean())}


def measure(spec: dict) -> list[dict]:
    """Load every model of ``spec`` in its engine, let them take turns in each cell, and return the measurements.

    A cell is a graph and a batch: {"graph", "batch", "rounds"}. One that fails is {"graph", "batch", "error"}.
    """
    results = []
    for cell in spec["cells"]:
        named = {"engine": spec["engine"], "graph": cell["graph"], "batch": cell["batch"]}
        try:
            results.append(named | _measure_cell(spec, cell))
        except Exception as error:  # every engine has its own
            results.append(named | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]})
    return results


def _measure_cell(spec: dict, cell: dict) -> dict:
    runs, agrees = [], []
    for model in spec["models"]:
        path = Path(model["deployment"]) / FILES[cell["graph"]]
        arrays = dict(np.load(path.with_suffix(".npz")))
        # The same sequence as many times as the batch asks for.
        feed = {k[6:]: np.repeat(array, cell["batch"], axis=0) for k, array in arrays.items() if k.startswith("input:")}
        run = ENGINES[spec["engine"]](Job(Path(model["folder"]), f"{path}.onnx", spec["cores"], feed))
        logits = run()
        logits = logits if isinstance(logits, np.ndarray) else logits.float().numpy()
        agrees.append(agreement(logits[0][arrays["positions"]], arrays["logits"]))
        runs.append(run)
    seconds = take_turns(runs, spec["warmup"], cell["rounds"])
    package = spec["engine"].split("_")[0].replace("packed", "torch")
    return {
        "version": importlib.metadata.version(package),
        "models": [{"seconds": s, "agreement": a} for s, a in zip(seconds, agrees, strict=True)],
    }


if __name__ == "__main__":
    measured = measure(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(measured))
