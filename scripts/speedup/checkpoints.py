"""Checkpoints for the speed-up commands: a model's folder, its zeros and exported graphs; command errors."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engines import FILES

from lib import sparse
from lib.cli.command import answer
from lib.cli.flags import Flags
from lib.core.errors import UserError
from lib.models import load, locate
from lib.models.layers import prunable_layers
from lib.pruning import walk

ROOT = Path(__file__).resolve().parents[2]
OPSET = 14
MOST_IR = 9  # DeepSparse 1.8.0 reads no newer file
GRAPHS = list(FILES)
LEAST_SPARSE = 0.05  # fewer zeros than this and a checkpoint was not pruned
TEXT_HELP = "text for the check of the logits: a name of main.py's --eval_data or a .txt, .json or .jsonl file"


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UserErrors."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(None, f"{message} (--help lists the flags)")


def command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Run one of this folder's commands and return its exit status; see ``lib.command``."""

    def work() -> None:
        try:
            run(parser.parse_args(argv))
        except UserError as error:
            if error.field != "model":
                raise
            raise UserError(None, error.text) from error  # here the model has no flag

    return answer(parser.prog, Flags, work, "the same command starts again", False, "use a smaller model")


class Checkpoint(NamedTuple):
    """A model's folder on disk, the number of weights in its block matrices and its head, and the zeros."""

    source: load.Source
    block_weights: int
    head_weights: int
    zeros: int  # of the block matrices
    graphs: str = "deployment"  # folder of its graphs, where the published command looks for them

    @property
    def folder(self) -> Path:
        return Path(self.source.path)

    @property
    def deployment(self) -> Path:
        return self.folder / self.graphs

    @property
    def sparsity(self) -> float:
        return self.zeros / self.block_weights

    def ideal_speedup(self, sparsity: float) -> float:
        """Return the ratio of multiplications, dense over sparse; the head stays dense, attention is not counted."""
        return (self.block_weights + self.head_weights) / (self.block_weights * (1 - sparsity) + self.head_weights)


def locate_folder(model: str) -> load.Source:
    """Return the folder of ``model``: these commands read the weight files themselves, so a hub id is not enough."""
    source = locate.locate(model, str(ROOT / "llm_weights"))
    folder = Path(source.path)
    if not folder.is_dir():
        raise UserError(None, f"{model}: folder not found; fetch it first: hf download {model} --local-dir DIR")
    if sparse.is_packed(folder):
        raise UserError(None, f"{model}: is packed; first: python scripts/speedup/pack.py {model} --unpack --save DIR")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            None, f"{model}: the folder holds no *.safetensors; load it and save it again with transformers"
        )
    return source


def open_checkpoint(model: str) -> Checkpoint:
    """Return the folder of ``model`` with its zeros counted.

    Raises:
        UserError: an unknown model, not a supported causal language model, or missing weights.
    """
    source = locate_folder(model)
    skeleton = load.load_skeleton(source)
    layers = prunable_layers(skeleton)
    total = sum(layer.size for layer in layers)
    try:
        zeros = round(walk.checkpoint_sparsity(Path(source.path), [layer.name for layer in layers]) * total)
    except Exception as error:  # safetensors has its own error class for a truncated file
        raise UserError(None, f"{model}: its weights cannot be read ({str(error).splitlines()[0]})") from error
    return Checkpoint(source, total, skeleton.get_output_embeddings().weight.numel(), zeros)


def check_sparse(checkpoint: Checkpoint, hint: str) -> None:
    """Refuse a checkpoint that was not pruned."""
    if checkpoint.sparsity < LEAST_SPARSE:
        text = f"is not sparse, {checkpoint.sparsity:.4%} of its block weights are zero; {hint}"
        raise UserError(None, f"{checkpoint.source.given}: {text}")


def check_free(flag: str, out: Path, marker: str | None = None) -> None:
    """Refuse a non-empty folder ``out``, unless a file ``marker`` shows that it was written here and is replaceable."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (marker and (out / marker).is_file()))):
        raise UserError(
            None, f"{flag} {out}: already exists and holds something else; give another folder, or remove it"
        )


def graph_file(folder: Path, graph: str) -> Path:
    return folder / f"{FILES[graph]}.onnx"


def read_graph(path: Path):
    """Return an ONNX file's protobuf; weights in a file beside it are not loaded."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # the protobuf reader's own classes
        raise UserError(None, f"{path}: cannot be read as ONNX ({str(error).splitlines()[0]})") from error


def check_graph(path: Path, graph: str, sequence_length: int):
    """Return the protobuf of an exported graph.

    Raises:
        UserError: a missing file, an unexpected IR or opset, or another length: the engine would run its own.
    """
    if not path.is_file():
        raise UserError(None, f"{path}: file not found; {export_hint(path, sequence_length)}")
    proto = read_graph(path)
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
    if proto.ir_version > MOST_IR or opset != OPSET:
        raise UserError(
            None,
            f"{path}: has ONNX IR {proto.ir_version} and opset {opset}; IR {MOST_IR} at most and opset {OPSET} are "
            f"needed, {export_hint(path, sequence_length)}",
        )
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    has = shapes.get("input_ids", [0, 0])[1]
    if graph == "decode":
        has += next((shape[2] for name, shape in shapes.items() if name.startswith("past_key_values.")), 0)
    check_length(has, path, sequence_length)
    return proto


def check_length(has: int, path: Path, sequence_length: int) -> None:
    """Refuse an export for a length other than the requested one."""
    if has != sequence_length:
        raise UserError(
            "sequence_length",
            f"{sequence_length}: {path} was exported for {has} and would run that whatever is asked; "
            f"{export_hint(path, sequence_length)}",
        )


def export_hint(path: Path, sequence_length: int) -> str:
    return f"type: python scripts/speedup/export_onnx.py {path.parent.parent} --sequence_length {sequence_length}"


def fingerprint(folder: Path) -> str:
    """Return a hash of names, sizes and times of a model's files: it reveals an export older than its weights."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
