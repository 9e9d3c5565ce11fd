"""Checkpoints that are packed or exported: a model's folder on disk and its zeros."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib import sparse
from lib.core.errors import UserError, first_line
from lib.core.files import in_repository
from lib.models.layers import prunable_layers, refuse_experts
from lib.models.load import Source, load_skeleton
from lib.models.locate import locate
from lib.models.weights import weights_of
from lib.pruning.walk import checkpoint_sparsity


def open_checkpoint(model: str) -> tuple[Source, float]:
    """Return where ``model`` lies, a folder on disk, and the share of zeros among the weights of its blocks.

    Raises:
        UserError: an unknown model, not a supported causal language model, packed, or missing weights.
    """
    source = locate(model, in_repository("llm_weights"))
    folder = Path(source.path)
    if not folder.is_dir():  # the weight files themselves are read, so a hub id is not enough
        raise UserError(None, model, "folder not found", f"fetch it first: hf download {model} --local-dir DIR")
    sparse.refuse_packed(source)
    skeleton = load_skeleton(source)
    refuse_experts("model", model, prunable_layers(skeleton))
    try:
        return source, checkpoint_sparsity(folder, weights_of(skeleton).pruned_tensors())
    except Exception as error:  # safetensors has its own error class for a truncated file
        raise UserError(None, model, f"its weights cannot be read ({first_line(error)})") from error


def check_free(field: str | None, out: Path, marker: str | None = None) -> None:
    """Refuse a non-empty folder ``out``, unless a file ``marker`` shows that it was written here and is replaceable."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (marker and (out / marker).is_file()))):
        raise UserError(field, out, "already exists and holds something else", "give another folder, or remove it")
