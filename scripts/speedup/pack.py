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
from lib.models.safetensors_io import weight_files
from lib.sparse import PACKED_VALUES
from scripts.speedup.checkpoints import check_free, open_checkpoint


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
    checkpoint = open_checkpoint(settings.model)
    checkpoint.check_sparse()
    folder = checkpoint.folder
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
