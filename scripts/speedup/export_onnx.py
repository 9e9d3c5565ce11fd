"""ONNX export of a checkpoint: graphs of a whole window and of one token of decoding, checked against PyTorch."""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from checkpoints import (  # it puts the repository's root on the path
    GRAPHS,
    OPSET,
    TEXT_HELP,
    Checkpoint,
    Parser,
    check_free,
    check_graph,
    command,
    fingerprint,
    graph_file,
    open_checkpoint,
)
from engines import agreement
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lib.calibration import texts
from lib.core import files
from lib.core.errors import UserError
from lib.models import load, locate
from lib.run.record import provenance

# One file holds 2 GiB at most (protobuf); above that the weights go to a file beside it.
ONE_FILE = 2**31 - 2**24
POSITIONS = 16  # of a window, whose logits are kept for the check: all of them would take 400 MB at 2,048
# Largest difference over largest logit: float32 sums of a few thousand terms in another order, some thirty blocks deep.
TOLERANCE = 5e-5


class Prefill(nn.Module):
    """Token ids [1, N] to logits [1, N, vocabulary]; mask and positions are constants, so no shape logic is left."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        self.model = model
        lowest = torch.finfo(torch.float32).min
        self.register_buffer("mask", torch.full((1, 1, length, length), lowest).triu(1))
        self.register_buffer("positions", torch.arange(length)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=self.mask, position_ids=self.positions, use_cache=False
        ).logits


class Decode(nn.Module):
    """A token's id [1, 1] and keys, values of N - 1 before it [1, heads, N - 1, size] to logits and N keys, values."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", torch.zeros(1, 1, 1, length))
        self.register_buffer("positions", torch.tensor([[length - 1]]))

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return (logits, *flat_cache(cache))


def flat_cache(cache: DynamicCache) -> list[Tensor]:
    """Return key, value of layer 0, key, value of layer 1 ..."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


class Example(NamedTuple):
    """A real input of a graph by the inputs' names, and the model's own logits at the kept positions."""

    inputs: dict[str, Tensor]
    outputs: list[str]
    positions: np.ndarray
    logits: np.ndarray  # [positions, vocabulary]


@torch.no_grad()
def examples(model: PreTrainedModel, window: Tensor) -> dict[str, Example]:
    """Return an example of each graph from a ``window`` of a real text, [1, N], with the unchanged model's output."""
    length = window.shape[1]
    logits = model(input_ids=window, use_cache=False).logits[0].numpy()
    kept = np.unique(np.linspace(0, length - 1, POSITIONS).round().astype(np.int64))
    cache = DynamicCache()
    model(input_ids=window[:, :-1], past_key_values=cache, use_cache=True)
    kinds = [f"{layer}.{kind}" for layer in range(len(cache.layers)) for kind in ("key", "value")]
    past = dict(zip([f"past_key_values.{kind}" for kind in kinds], flat_cache(cache), strict=True))
    present = [f"present.{kind}" for kind in kinds]
    last = {"input_ids": window[:, -1:]}
    return {
        "prefill": Example({"input_ids": window}, ["logits"], kept, logits[kept]),
        "decode": Example(last | past, ["logits", *present], np.zeros(1, np.int64), logits[-1:]),
    }


@torch.no_grad()
def write_graph(wrapper: nn.Module, example: Example, path: Path) -> None:
    """Write ``wrapper`` as ONNX; weights of more than 2 GiB in total go to ``<path>.data``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: every shape here is meant to be a constant
        torch.onnx.export(
            wrapper,
            tuple(example.inputs.values()),
            str(path),  # with a Path, the exporter does not know that it may write files beside it
            input_names=list(example.inputs),
            output_names=example.outputs,
            opset_version=OPSET,
            dynamo=False,
        )
    size = sum(p.numel() * 4 for p in wrapper.parameters())
    if size > ONE_FILE or len(list(path.parent.iterdir())) > 1:
        _gather(path)


def _gather(path: Path) -> None:
    """Put the weights of the graph in ``path`` into one file beside it, ``<path>.data``."""
    import onnx

    others = [p for p in path.parent.iterdir() if p != path]  # the exporter writes a file per tensor
    proto = onnx.load(path)
    data_name = f"{path.name}.data"
    for other in (path, *others):
        other.unlink()
    onnx.save_model(proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data_name)
    path.with_name(data_name).chmod(path.stat().st_mode)


def matrix_zeros(proto, folder: Path) -> tuple[int, int]:
    """Return the zeros and the total of the weights that a graph multiplies by; external weights are in ``folder``."""
    from onnx import numpy_helper

    graph = proto.graph
    matrices = {i.name: i for i in graph.initializer if len(i.dims) == 2}
    turned = {node.output[0]: node.input[0] for node in graph.node if node.op_type in ("Transpose", "Identity")}
    counts, zeros, total = {}, 0, 0
    for node in graph.node:
        for name in node.input if node.op_type in ("MatMul", "Gemm") else ():
            name = turned.get(name, name)
            if name in matrices:
                if name not in counts:
                    array = numpy_helper.to_array(matrices[name], base_dir=str(folder))
                    counts[name] = (array.size - np.count_nonzero(array), array.size)
                zeros, total = zeros + counts[name][0], total + counts[name][1]
    return int(zeros), int(total)


def run_onnx_runtime(path: Path, example: Example) -> np.ndarray:
    """Return ONNX Runtime's logits at the example's positions, [positions, vocabulary]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in example.inputs.items()}
    return session.run(["logits"], feed)[0][0][example.positions]


def check_export(path: Path, graph: str, example: Example, length: int, weights: tuple[int, int]) -> dict:
    """Compare the written graph with the model and return the findings.

    Raises:
        UserError: IR, opset, zeros or logits that are not as expected.
    """
    proto = check_graph(path, graph, length)
    found = matrix_zeros(proto, path.parent)
    if found != weights:
        has = "{} of {} weights are zero".format
        raise UserError(
            None, f"{path.name}: {has(*found)} in the file, {has(*weights)} in the model; it cannot be exported"
        )
    agrees = agreement(run_onnx_runtime(path, example), example.logits)
    if not agrees["relative"] <= TOLERANCE:
        raise UserError(
            None,
            f"{path.name}: ONNX Runtime's logits disagree with PyTorch's, by {agrees['relative']:.1e} of the largest "
            f"(at most {TOLERANCE:g}); this kind of model cannot be exported at {length} tokens",
        )
    opset = proto.opset_import[0].version
    return {"ir": proto.ir_version, "opset": opset, "zeros": found[0], "weights": found[1], "onnxruntime": agrees}


def export(checkpoint: Checkpoint, length: int, out: Path, graphs: list[str], text: str, onnx: bool = True) -> dict:
    """Write the ``graphs`` of a checkpoint for windows of ``length`` tokens to ``out`` and return the record.

    Each is NAME.onnx and NAME.npz (input and logits of a real text), without ``onnx`` only the latter; ``export.json``
    lists the checks. Everything is written and checked under a temporary name.
    """
    model, window = _load(checkpoint, length, text)
    _check_disk(checkpoint, model, length, out, graphs if onnx else [])
    given = examples(model, window)
    model.set_attn_implementation("eager")  # scaled dot product attention has no operator in this opset
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]  # the head among them
    weights = (sum(int((w == 0).sum()) for w in matrices), sum(w.numel() for w in matrices))
    record = {
        "complete": True,
        "model": checkpoint.source.given,
        "fingerprint": fingerprint(checkpoint.folder),
        "sequence_length": length,
        "sparsity": checkpoint.sparsity,
        "text": text,
        "graphs": {},
    }
    with files.new_folder(out) as tmp:
        for graph in graphs:
            start = time.perf_counter()
            path = graph_file(tmp, graph)
            arrays = {f"input:{name}": tensor.numpy() for name, tensor in given[graph].inputs.items()}
            np.savez(path.with_suffix(".npz"), **arrays, positions=given[graph].positions, logits=given[graph].logits)
            if not onnx:
                record["graphs"][graph] = None
                continue
            inside = tmp / graph  # a separate folder, which the exporter litters
            inside.mkdir()
            wrapper = (Prefill if graph == "prefill" else Decode)(model, length)
            write_graph(wrapper, given[graph], inside / path.name)
            for written in inside.iterdir():
                written.rename(tmp / written.name)
            inside.rmdir()
            record["graphs"][graph] = check_export(path, graph, given[graph], length, weights)
            record["graphs"][graph]["seconds"] = round(time.perf_counter() - start, 1)
        (tmp / "export.json").write_text(json.dumps(record | provenance(), indent=1) + "\n")
    return record


def _load(checkpoint: Checkpoint, length: int, text: str) -> tuple[PreTrainedModel, Tensor]:
    skeleton = load.load_skeleton(checkpoint.source)
    context = load.context_length(skeleton)
    if length < 2 or (context is not None and length > context):
        raise UserError("sequence_length", f"{length}: must be at least 2 and at most the model's context, {context}")
    sliding = getattr(skeleton.config.get_text_config(), "sliding_window", None)
    if sliding and length > sliding:  # the graph has one mask for all blocks
        raise UserError("sequence_length", f"{length}: its blocks look back {sliding} tokens only; give at most that")
    window = texts.evaluation_windows(text, load.load_tokenizer(checkpoint.source), length, 1)
    return load.load_llm(checkpoint.source, torch.float32, torch.device("cpu")), window


def _check_disk(checkpoint: Checkpoint, model: PreTrainedModel, length: int, out: Path, graphs: list[str]) -> None:
    config = model.config.get_text_config()
    size = 4 * (sum(p.numel() for p in model.parameters()) + checkpoint.head_weights)  # tied: the graph has a copy
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    past = 8 * length * heads * (config.hidden_size // config.num_attention_heads) * config.num_hidden_layers
    again = size if size > ONE_FILE else 0  # gathered into one file from a file per tensor
    files.check_writable("save", out.parent, len(graphs) * size + again + past + 4 * length**2)


def describe(record: dict, out: Path) -> str:
    """Return the lines for the terminal."""
    lines = [f"{out}: {record['sequence_length']} tokens, {record['sparsity']:.4f} of the block weights are zero"]
    for graph, found in record["graphs"].items():
        if found is None:
            lines.append(f"  {graph}: an input and its logits")
            continue
        agrees = found["onnxruntime"]
        share = found["zeros"] / found["weights"]
        lines += [
            f"  {graph}: ONNX IR {found['ir']}, opset {found['opset']}, {share:.4f} of all weights (head too) zero,",
            f"    ONNX Runtime's logits differ from PyTorch's by {agrees['relative']:.1e} of the largest, "
            f"the top token is the same at {agrees['top1']:.0%} of the positions",
        ]
    return "\n".join(lines)


def add_export_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    add = parser.add_argument
    lengths = {"nargs": "+", "default": [128, 512]} if several else {"default": 2048}
    add("--sequence_length", type=int, metavar="N", help="window length, tokens; fixed in the graph", **lengths)
    add("--graphs", nargs="+", default=GRAPHS, choices=GRAPHS, help="whole window, one token")
    add("--text", default="wiki_leads", help=TEXT_HELP)


def run(args: argparse.Namespace) -> None:
    texts.check_text("--text", args.text)
    checkpoint = open_checkpoint(args.model)
    out = Path(args.out) if args.out else checkpoint.deployment
    check_free("--save", out, "export.json")
    print(describe(export(checkpoint, args.sequence_length, out, args.graphs, args.text), out))


def make_parser() -> Parser:
    parser = Parser(prog="export_onnx.py", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=f"local folder, .gguf file or {locate.SMOLLM2}")
    parser.add_argument("--save", dest="out", metavar="DIR", help="where the graphs go (default: MODEL/deployment)")
    add_export_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    return command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
