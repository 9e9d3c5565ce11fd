"""Engines that run models on the CPU: each in a process of its own, which benchmark.py starts and asks for times."""

# llama.cpp's interpreter may have neither torch nor lib: nothing but numpy is imported up here.
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

TOKENS = 8  # timed one after another, after one that is not


class Transformers:
    """A model of transformers, with torch's products or with those of lib.sparse, in memory as ``packed`` says.

    ``packed``: None, or the values of layers that are not packed already (``sparse.sparsify``), dense ones as well.
    """

    def __init__(self, model: dict, spec: dict, dtype: str, packed: str | None = None) -> None:
        import torch

        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from lib import sparse
        from lib.models.load import load_llm
        from lib.models.locate import locate

        torch.set_num_threads(spec["cores"])
        self.torch, self.version, path = torch, torch.__version__, model["path"]
        if packed:
            sparse.load_kernel()  # without it the model would run dense, and be measured under this name
        if packed and sparse.is_packed(path):
            self.model = sparse.load_packed(path)
        else:
            self.model = load_llm(locate(path, ""), getattr(torch, dtype), torch.device("cpu"))
            if packed:
                sparse.sparsify(self.model, values=packed)

    def megabytes(self) -> float:
        """Return the size of the tensors that the model holds; packed ones are plain attributes of their layers."""
        held = [tensor for module in self.model.modules() for tensor in vars(module).values()]
        held += [*self.model.parameters(), *self.model.buffers()]
        return sum({t.data_ptr(): t.nbytes for t in held if isinstance(t, self.torch.Tensor)}.values()) / 1e6

    def read(self, ids: np.ndarray, every: bool = False) -> np.ndarray:
        """Begin anew with a prompt [N] and return the logits [1, vocabulary] of its last token, or of ``every`` one."""
        self.cache = None
        return self._forward(ids, 0 if every else 1)

    def go_on(self, token: int) -> np.ndarray:
        """Return the logits [1, vocabulary] after one more token."""
        return self._forward([token], 1)

    def _forward(self, ids: np.ndarray | list[int], keep: int) -> np.ndarray:
        tokens = self.torch.from_numpy(np.array([ids]))
        given = {"input_ids": tokens, "past_key_values": self.cache, "logits_to_keep": keep}
        with self.torch.inference_mode():
            out = self.model(**given, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[0].float().numpy()


class LlamaCpp:
    """A GGUF file in llama.cpp, as it is or quantised anew to ``Q8_0``, with the same methods as Transformers."""

    def __init__(self, model: dict, spec: dict) -> None:
        import llama_cpp

        self.api, self.version, path = llama_cpp, llama_cpp.__version__, model["path"]
        with tempfile.TemporaryDirectory() as folder:
            if model["name"] == "Q8_0":
                how = self.api.llama_model_quantize_default_params()
                how.ftype, how.allow_requantize = self.api.LLAMA_FTYPE_MOSTLY_Q8_0, True
                path, source = f"{folder}/Q8_0.gguf", path
                if self.api.llama_model_quantize(source.encode(), path.encode(), how):
                    raise RuntimeError(f"llama.cpp could not quantise {source}")
            self.bytes = os.path.getsize(path)
            self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        how = self.api.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = spec["longest"]
        how.n_threads = how.n_threads_batch = spec["cores"]
        self.context = self.model and self.api.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {model['path']}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.batch = self.api.llama_batch_init(spec["longest"], 0, 1)

    def megabytes(self) -> float:
        return self.bytes / 1e6

    def read(self, ids: np.ndarray, every: bool = False) -> np.ndarray:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.length = 0
        return self._decode(ids, every)

    def go_on(self, token: int) -> np.ndarray:
        return self._decode([token], False)

    def _decode(self, ids: np.ndarray | list[int], every: bool) -> np.ndarray:
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), self.length + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, every or i == count - 1
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.length += count
        shape = count if every else 1, self.vocabulary
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape).copy()


ENGINES = {
    "packed": partial(Transformers, dtype="bfloat16", packed="exact"),
    "dense_int8": partial(Transformers, dtype="bfloat16", packed="int8"),
    "torch_bfloat16": partial(Transformers, dtype="bfloat16"),
    "torch_float32": partial(Transformers, dtype="float32"),
    "llama_cpp": LlamaCpp,
}


def perplexity(model: Transformers | LlamaCpp, windows: np.ndarray) -> float:
    """Return exp of the mean next-token loss (nats) of ``windows`` [count, seqlen], as lib.evaluation does."""
    losses = []
    for ids in windows:
        logits = model.read(ids, every=True)[:-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[1:]]))
    return float(np.exp(np.mean(losses)))


def answers(requests: Iterable[str]) -> Iterator[list]:
    """Yield an answer to each request, a line of JSON.

    The first is {"engine", "models": [{"name", "path"}], "windows": token ids [count, seqlen], "context", "longest",
    "cores"}; the answer describes each model. The others are [number of the model, tokens]; the answer is the seconds
    of a prompt of that many tokens, or, for 0, those of each of TOKENS single ones after ``context``. With one core
    these are seconds of the process on the CPU: what other programs take does not count.
    """
    requests = iter(requests)
    spec = json.loads(next(requests))
    clock = time.process_time if spec["cores"] == 1 else time.perf_counter
    windows = np.array(spec["windows"])
    stream = windows.reshape(-1)
    models = [ENGINES[spec["engine"]](model, spec) for model in spec["models"]]
    sizes = [{"version": model.version, "megabytes": model.megabytes()} for model in models]
    yield [size | {"perplexity": perplexity(model, windows)} for size, model in zip(sizes, models, strict=True)]

    for line in requests:
        index, tokens = json.loads(line)
        model = models[index]
        if tokens:
            runs = [partial(model.read, stream[:tokens])]
        else:
            model.read(stream[: spec["context"]])
            model.go_on(stream[spec["context"]])
            runs = [partial(model.go_on, token) for token in stream[spec["context"] + 1 :][:TOKENS]]
        yield [_seconds(run, clock) for run in runs]


def _seconds(run: Callable, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")  # what libraries print is no answer
    os.dup2(2, 1)
    for answer in answers(sys.stdin):
        print(json.dumps(answer), file=out, flush=True)
