"""Packing of a pruned checkpoint: a bit per weight and the nonzero values, undone exactly by --unpack."""

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
from lib.core import cpu, files
from lib.core.errors import UserError
from scripts.speedup import two_of_four
from scripts.speedup.checkpoints import check_free, open_checkpoint


@dataclass(kw_only=True)
class Pack(Flags):
    _title: ClassVar[str] = "packing"

    model: str = flag(
        MISSING, "folder of a pruned model; with {unpack} a folder that pack.py wrote", positional=True, metavar="MODEL"
    )
    save: str = flag(MISSING, "output folder; must not exist yet", metavar="DIR")
    unpack: bool = flag(False, "the other way: write the model again, every tensor bit for bit")
    format: str = flag(
        "bitmask", "{choices}: bitmask for any zeros, 2of4 for a 2:4 model, timed against dense on a CUDA device",
        choices=("bitmask", "2of4"),
    )  # fmt: skip

    def check(self) -> None:
        check_free("save", Path(self.save))
        if self.unpack and self.format != "bitmask":
            raise UserError("unpack", None, "the packed folder says how it was packed; leave --format out")
        if self.format == "2of4" and not cpu.gpus():
            raise UserError("format", "2of4", "needs a CUDA device and there is none", "--format bitmask needs none")


PARSER = make_parser(Pack, "pack.py", __doc__)


def run(settings: Pack) -> None:
    """Pack or unpack the folder and print the sizes."""
    folder, out = Path(settings.model), Path(settings.save)
    if settings.unpack:
        with files.new_folder(out) as tmp:
            count = sparse.unpack_files(folder, tmp)
        print(f"{out}: {count} tensors, each with the SHA-256 of what was packed")
        return
    checkpoint = open_checkpoint(settings.model)
    checkpoint.check_sparse()
    report = two_of_four.measure(checkpoint) if settings.format == "2of4" else None

    # Two of four and the mask's bit for each are as small as two numbers with their places: one container for both.
    folder = checkpoint.folder
    files.check_writable("save", out.parent, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    with files.new_folder(out) as tmp:
        size = sparse.pack_files(folder, tmp)
        if report:
            (tmp / "2of4.md").write_text(report)
    print(
        f"{out}: {size['all_after'] / 1e6:.1f} MB, {size['all_after'] / size['all']:.4f} of {folder}'s "
        f"{size['all'] / 1e6:.1f} MB; every tensor comes back bit for bit (compared)\n"
        f"  the tensors with zeros alone: {size['masked_after'] / size['masked']:.4f} of "
        f"{size['masked'] / 1e6:.1f} MB, at a sparsity of {checkpoint.sparsity:.4f} in the blocks"
    )
    if report:
        print(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status."""
    return command(Pack, run, argv, PARSER, out_of_memory="use a smaller model")


if __name__ == "__main__":
    sys.exit(main())
