"""Checkpoints for the speed-up commands: a model's folder on disk, its zeros, and whether it changed."""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib import sparse
from lib.core.digests import digest
from lib.core.errors import UserError, first_line
from lib.models.layers import prunable_layers, refuse_experts
from lib.models.load import Source, load_skeleton
from lib.models.locate import locate
from lib.models.safetensors_io import weight_files
from lib.models.weights import weights_of
from lib.pruning.walk import checkpoint_sparsity

ROOT = Path(__file__).resolve().parents[2]
LEAST_SPARSE = 0.05  # share of zeros below which a checkpoint was not pruned


class Checkpoint(NamedTuple):
    """A model's folder on disk, the number of weights in its block matrices, and the share of zeros among them."""

    source: Source
    block_weights: int
    sparsity: float

    @property
    def folder(self) -> Path:
        return Path(self.source.path)

    def fingerprint(self) -> str:
        """Return a hash of names, sizes and times of the weight files: it reveals an export older than its weights."""
        paths = weight_files(self.folder)
        return digest([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])

    def check_sparse(self) -> None:
        """Refuse a checkpoint that was not pruned."""
        if self.sparsity < LEAST_SPARSE:
            problem = f"is not sparse, {self.sparsity:.4%} of its block weights are zero"
            fix = "prune it first: python main.py --prune_method ... --save_model DIR"
            raise UserError(None, self.source.given, problem, fix)


def locate_folder(model: str) -> Source:
    """Return the folder of ``model``: these commands read the weight files themselves, so a hub id is not enough."""
    source = locate(model, str(ROOT / "llm_weights"))
    folder = Path(source.path)
    if not folder.is_dir():
        raise UserError(None, model, "folder not found", f"fetch it first: hf download {model} --local-dir DIR")
    if sparse.is_packed(folder):
        fix = f"first: python scripts/speedup/pack.py {model} --unpack --save DIR"
        raise UserError(None, model, "is packed", fix)
    return source


def open_checkpoint(model: str) -> Checkpoint:
    """Return the folder of ``model`` with its zeros counted.

    Raises:
        UserError: an unknown model, not a supported causal language model, or missing weights.
    """
    source = locate_folder(model)
    skeleton = load_skeleton(source)
    layers = prunable_layers(skeleton)
    refuse_experts("model", model, layers)
    try:
        sparsity = checkpoint_sparsity(Path(source.path), weights_of(skeleton).pruned_tensors())
    except Exception as error:  # safetensors has its own error class for a truncated file
        raise UserError(None, model, f"its weights cannot be read ({first_line(error)})") from error
    return Checkpoint(source, sum(layer.size for layer in layers), sparsity)


def check_free(field: str | None, out: Path, marker: str | None = None) -> None:
    """Refuse a non-empty folder ``out``, unless a file ``marker`` shows that it was written here and is replaceable."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (marker and (out / marker).is_file()))):
        raise UserError(field, out, "already exists and holds something else", "give another folder, or remove it")
