"""Packing of a pruned checkpoint: a bit per weight and the nonzero values, undone exactly by --unpack."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from checkpoints import Parser, check_free, check_sparse, command, open_checkpoint

from lib import sparse
from lib.core import files
from lib.core.errors import UserError


def pack_folder(folder: Path, out: Path) -> Counter:
    """Write the packed form of a model's ``folder`` to ``out``; return bytes before and after, as ``pack_files``."""
    files.check_writable("save", out.parent, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    with files.new_folder(out) as tmp:
        return sparse.pack_files(folder, tmp)


def unpack_folder(folder: Path, out: Path) -> int:
    """Write the model packed in ``folder`` to ``out``, bit for bit; return the number of tensors."""
    with files.new_folder(out) as tmp:
        return sparse.unpack_files(folder, tmp)


def report(folder: Path, out: Path, sparsity: float) -> str:
    """Pack ``folder`` and return a report of the sizes."""
    size = pack_folder(folder, out)
    return (
        f"{out}: {size['all_after'] / 1e6:.1f} MB, {size['all_after'] / size['all']:.4f} of {folder}'s "
        f"{size['all'] / 1e6:.1f} MB; every tensor comes back bit for bit (compared)\n"
        f"  the tensors with zeros alone: {size['masked_after'] / size['masked']:.4f} of "
        f"{size['masked'] / 1e6:.1f} MB, at a sparsity of {sparsity:.4f} in the blocks"
    )


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    check_free("--save", out)
    if args.unpack:
        if args.format != "bitmask":
            raise UserError("unpack", f"with --format {args.format}: the packed folder says how; leave --format out")
        print(f"{out}: {unpack_folder(Path(args.model), out)} tensors, each with the SHA-256 of what was packed")
        return
    if args.format == "2of4":
        import two_of_four

        two_of_four.check_device()
    checkpoint = open_checkpoint(args.model)
    check_sparse(checkpoint, "prune it first: python main.py --prune_method ... --save_model DIR")
    if args.format == "2of4":
        found = two_of_four.measure(checkpoint)
    # Two of four and the mask's bit for each are as small as two numbers with their places: one container for both.
    print(report(checkpoint.folder, out, checkpoint.sparsity))
    if args.format == "2of4":
        two_of_four.leave(found, checkpoint, out)


def make_parser() -> Parser:
    parser = Parser(prog="pack.py", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a pruned model; with --unpack: a folder that pack.py wrote")
    add("--save", dest="out", required=True, metavar="DIR", help="output folder; must not exist yet")
    add("--unpack", action="store_true", help="the other way: write the model again, every tensor bit for bit")
    add("--format", default="bitmask", choices=["bitmask", "2of4"],
        help="bitmask: any zeros; 2of4: a 2:4 model on a CUDA device, packed and timed against dense")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    return command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
