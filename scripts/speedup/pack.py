"""Packing of a pruned checkpoint: a bit per weight and the nonzero values, exact or rounded to int8."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib import sparse
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.errors import UserError, first_line
from lib.models.layers import prunable_layers, refuse_experts
from lib.models.load import Source, load_skeleton
from lib.models.locate import locate
from lib.models.safetensors_io import weight_files
from lib.models.weights import weights_of
from lib.pruning.walk import checkpoint_sparsity
from lib.sparse import PACKED_VALUES

LEAST_SPARSE = 0.05  # share of zeros below which a checkpoint was not pruned


@dataclass(kw_only=True)
class Pack(Flags):
    _title: ClassVar[str] = "packing"

    model: str = flag(MISSING, "folder of a pruned model; with {unpack} a packed one", positional=True, metavar="MODEL")
    save: str = flag(MISSING, "output folder; must not exist yet", metavar="DIR")
    values: str = flag("exact", "values of the matrices, {choices}", choices=PACKED_VALUES, only="packing")
    unpack: bool = flag(False, "the other way: write the model again, every tensor bit for bit unless it is of int8")

    def traits(self) -> set[str]:
        return super().traits() | (set() if self.unpack else {"packing"})

    def check(self) -> None:
        super().check()
        check_free("save", Path(self.save))


PARSER = make_parser(Pack, "pack.py", __doc__)


def open_checkpoint(model: str) -> tuple[Source, float]:
    """Return where ``model`` lies, a folder on disk, and the share of zeros among the weights of its blocks.

    Raises:
        UserError: an unknown model, not a supported causal language model, packed, or missing weights.
    """
    source = locate(model, files.in_repository("llm_weights"))
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


def run(settings: Pack) -> None:
    """Pack or unpack the folder and print the sizes."""
    out = Path(settings.save)
    if settings.unpack:
        with files.new_folder(out) as tmp:
            count = sparse.unpack_files(Path(settings.model), tmp)
        what = (
            "the matrices from int8, as products take them"
            if sparse.holds_int8(Path(settings.model))
            else "bit for bit"
        )
        print(f"{out}: {count} tensors, each with the SHA-256 of what was packed, {what}")
        return
    source, sparsity = open_checkpoint(settings.model)
    if sparsity < LEAST_SPARSE:
        problem = f"is not sparse, {sparsity:.4%} of its block weights are zero"
        fix = "prune it first: python main.py --prune_method ... --save_model DIR"
        raise UserError(None, settings.model, problem, fix)
    folder = Path(source.path)
    files.check_writable("save", out.parent, sum(path.stat().st_size for path in weight_files(folder)))
    with files.new_folder(out) as tmp:
        before, after = sparse.pack_files(folder, tmp, settings.values)
    exact = "every tensor comes back bit for bit (compared)"
    held = "every matrix is rounded to int8" if settings.values == "int8" else exact
    print(f"{out}: {after / 1e6:.1f} MB, {after / before:.4f} of {folder}'s {before / 1e6:.1f} MB; {held}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Pack, run, argv, PARSER, out_of_memory="use a smaller model")


if __name__ == "__main__":
    sys.exit(main())
