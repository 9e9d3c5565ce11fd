"""ONNX export of a checkpoint: graphs of a whole window and of one token of decoding, checked against PyTorch."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from lib.calibration.texts import check_text, evaluation_windows
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.errors import UserError
from lib.models.load import context_length, load_llm, load_skeleton, load_tokenizer
from lib.models.locate import SMOLLM2
from lib.run.record import provenance
from scripts.speedup.pack import check_free, open_checkpoint

# The graphs, a whole window and one token after a window, and the names of their files.
FILES = {"prefill": "model.onnx", "decode": "decode.onnx"}
OPSET = 14  # and so ONNX IR 7: DeepSparse, which skips zeros, reads no opset above 14 and no IR above 9
# One file holds 2 GiB at most (protobuf); above that the weights go to a file beside it.
ONE_FILE = 2**31 - 2**24
# Largest difference over largest logit: float32 sums of a few thousand terms in another order, some thirty blocks deep.
TOLERANCE = 5e-5


@dataclass(kw_only=True)
class Export(Flags):
    _title: ClassVar[str] = "export"

    model: str = flag(MISSING, f"local folder, .gguf file or {SMOLLM2}", positional=True, metavar="MODEL")
    save: str | None = flag(None, "where the graphs go (default: MODEL/deployment)", metavar="DIR")
    sequence_length: int = flag(2048, "window length, tokens; fixed in the graph", least=2, metavar="N")
    graphs: Sequence[str] = flag(tuple(FILES), "a whole window, and one token after it", nargs="+", choices=FILES)
    text: str = flag(
        "wiki_leads", "of the check of the logits: a name of main.py's --eval_data, a .txt, .json or .jsonl file",
        metavar="TEXT",
    )  # fmt: skip

    def check(self) -> None:
        check_text("text", self.text)


PARSER = make_parser(Export, "export_onnx.py", __doc__)


class Prefill(torch.nn.Module):
    """Token ids [1, N] to logits [1, N, vocabulary]; mask and positions are constants, so no shape logic is left."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        self.model = model
        lowest = torch.finfo(torch.float32).min
        self.register_buffer("mask", torch.full((1, 1, length, length), lowest).triu(1))
        self.register_buffer("positions", torch.arange(length)[None])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = {"attention_mask": self.mask, "position_ids": self.positions}
        return self.model(input_ids=input_ids, use_cache=False, **places).logits


class Decode(torch.nn.Module):
    """A token's id [1, 1] and keys, values of N - 1 before it [1, heads, N - 1, size] to logits and N keys, values."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", torch.zeros(1, 1, 1, length))
        self.register_buffer("positions", torch.tensor([[length - 1]]))

    def forward(self, input_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        places = {"attention_mask": self.mask, "position_ids": self.positions}
        logits = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **places).logits
        return (logits, *flat_cache(cache))


def flat_cache(cache: DynamicCache) -> list[torch.Tensor]:
    """Return key, value of layer 0, key, value of layer 1 ..."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


class Example(NamedTuple):
    """A real input of a graph by the inputs' names, and the model's own logits, [tokens, vocabulary]."""

    inputs: dict[str, torch.Tensor]
    outputs: list[str]
    logits: np.ndarray


@torch.no_grad()
def examples(model: PreTrainedModel, window: torch.Tensor) -> dict[str, Example]:
    """Return an example of each graph from a ``window`` of a real text, [1, N], with the unchanged model's output."""
    logits = model(input_ids=window, use_cache=False).logits[0].numpy()
    cache = DynamicCache()
    model(input_ids=window[:, :-1], past_key_values=cache, use_cache=True)
    kinds = [f"{layer}.{kind}" for layer in range(len(cache.layers)) for kind in ("key", "value")]
    past = dict(zip([f"past_key_values.{kind}" for kind in kinds], flat_cache(cache), strict=True))
    present = [f"present.{kind}" for kind in kinds]
    last = {"input_ids": window[:, -1:]}
    return {
        "prefill": Example({"input_ids": window}, ["logits"], logits),
        "decode": Example(last | past, ["logits", *present], logits[-1:]),
    }


@torch.no_grad()
def write_graph(wrapper: torch.nn.Module, example: Example, path: Path) -> None:
    """Write ``wrapper`` as ONNX to ``path``, in a folder of its own; above 2 GiB the weights go to ``<path>.data``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: every shape here is meant to be a constant
        # With a Path, the exporter does not know that it may write files beside it.
        torch.onnx.export(
            wrapper, tuple(example.inputs.values()), str(path), input_names=list(example.inputs),
            output_names=example.outputs, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    size = sum(p.numel() * 4 for p in wrapper.parameters())
    if size > ONE_FILE or len(list(path.parent.iterdir())) > 1:
        import onnx

        proto = onnx.load(path)
        for tensor in list(path.parent.iterdir()):  # the exporter writes a file per tensor
            tensor.unlink()
        beside = f"{path.name}.data"
        onnx.save_model(proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=beside)
        path.with_name(beside).chmod(path.stat().st_mode)


def agreement(logits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return how far ``logits`` [tokens, vocabulary] are from ``reference``.

    ``relative`` is the largest difference over the largest reference logit; ``top1`` the fraction of tokens with the
    same most likely next one.
    """
    relative = float(abs(logits - reference).max() / abs(reference).max())
    return {"relative": relative, "top1": float((logits.argmax(-1) == reference.argmax(-1)).mean())}


def check_export(path: Path, example: Example) -> dict:
    """Run the graph in ``path`` and return its IR, its opset and the agreement of its logits with the model's.

    Raises:
        UserError: the logits disagree.
    """
    import onnx
    import onnxruntime

    proto = onnx.load(path, load_external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {name: tensor.numpy() for name, tensor in example.inputs.items()})[0]
    agrees = agreement(logits[0], example.logits)
    if not agrees["relative"] <= TOLERANCE:
        problem = f"ONNX Runtime's logits disagree with PyTorch's, by {agrees['relative']:.1e} of the largest"
        raise UserError(None, path.name, problem, "this model cannot be exported at this length")
    return {"ir": proto.ir_version, "opset": proto.opset_import[0].version, "onnxruntime": agrees}


def run(settings: Export) -> None:
    """Write the graphs of the model and ``export.json``, which holds the checks.

    Raises:
        UserError: too long a window, too full a disk, or a graph that is not the model.
    """
    (source, sparsity), length = open_checkpoint(settings.model), settings.sequence_length
    out = Path(settings.save) if settings.save else Path(source.path) / "deployment"
    check_free("save", out, "export.json")
    context = context_length(load_skeleton(source))
    if context is not None and length > context:
        raise UserError("sequence_length", length, "is more than the model's context", f"give at most {context}")
    window = evaluation_windows(settings.text, load_tokenizer(source), length, 1)
    model = load_llm(source, torch.float32, torch.device("cpu"))
    head = model.get_output_embeddings().weight.numel()  # tied, but the graph has a copy
    size = 4 * (sum(p.numel() for p in model.parameters()) + head)
    # One more where weights are gathered into one file from a file per tensor.
    files.check_writable("save", out.parent, (len(settings.graphs) + (size > ONE_FILE)) * size)

    by_graph = examples(model, window)
    model.set_attn_implementation("eager")  # scaled dot product attention has no operator in this opset
    record = {"complete": True, "model": source.given, "text": settings.text, "sparsity": sparsity}
    record |= {"sequence_length": length, "graphs": {}}
    with files.new_folder(out) as tmp:
        for graph in settings.graphs:
            inside = tmp / graph  # a separate folder, which the exporter litters
            inside.mkdir()
            wrapper = (Prefill if graph == "prefill" else Decode)(model, length)
            write_graph(wrapper, by_graph[graph], inside / FILES[graph])
            for written in inside.iterdir():
                written.rename(tmp / written.name)
            inside.rmdir()
            record["graphs"][graph] = check_export(tmp / FILES[graph], by_graph[graph])
        (tmp / "export.json").write_text(json.dumps(record | provenance(), indent=1) + "\n")
    print(f"exported: {out}, {length} tokens, {sparsity:.4f} of the block weights are zero")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Export, run, argv, PARSER, out_of_memory="use a smaller model")


if __name__ == "__main__":
    sys.exit(main())
