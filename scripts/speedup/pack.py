"""Packing of a pruned checkpoint: a bit per weight and the nonzero values, undone exactly by --unpack."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lib import sparse
from lib.calibration.hidden import entry_device
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import cpu, files
from lib.core.errors import UserError, first_line
from lib.models.layers import prunable_modules
from lib.models.load import Source, context_length, load_llm
from lib.models.safetensors_io import weight_files
from scripts.bench import bench
from scripts.bench.cases import Case
from scripts.speedup.checkpoints import check_free, open_checkpoint

TOKENS = (1, 128, 2048)  # of the timed windows; a window of 1 is one step of decoding without its cache
# Both models multiply in float16 and sum in float32, in another order: 11 bits of every activation, through all blocks.
TOLERANCE = 0.05


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


@torch.inference_mode()
def time_two_of_four(source: Source) -> str:
    """Return a table of the latencies of a 2:4 model in float16 on a CUDA device, with 2:4 kernels and with dense ones.

    Raises:
        UserError: a matrix that is not 2:4 or has no kernel, or logits that disagree.
    """
    dense, halved = (load_llm(source, torch.float16) for _ in range(2))
    for name, linear in prunable_modules(halved).items():
        check_two_of_four(name, linear.weight)
        try:
            matrix = torch.sparse.to_sparse_semi_structured(linear.weight.data)
        except (RuntimeError, ValueError) as error:  # an older device, or shapes that are no multiple of a tile
            raise UserError(
                None, name, f"has no 2:4 kernel here ({first_line(error)})", "leave --format out"
            ) from error
        linear.weight = torch.nn.Parameter(matrix, requires_grad=False)

    def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.float()

    def close(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).abs().max() <= TOLERANCE * two.abs().max())

    rows = []
    for tokens in TOKENS:
        if tokens <= (context_length(dense) or tokens):
            ids = torch.randint(dense.get_input_embeddings().num_embeddings, (1, tokens), device=entry_device(dense))
            case = Case(f"2:4, {tokens} tokens", partial(logits, halved, ids), partial(logits, dense, ids), close)
            rows.append(bench.compare(case, torch.device("cuda"), rounds=20))
    if not all(row.alike for row in rows):
        raise UserError(None, source.given, "the logits of 2:4 kernels disagree with the dense model's")
    return f"2:4 in float16 on {torch.cuda.get_device_name()}; plain: dense\n\n{bench.table(rows)}\n"


def check_two_of_four(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight [out, in] in which four consecutive entries of a row hold more than two that are not zero."""
    if weight.shape[1] % 4 or ((weight.unflatten(1, (-1, 4)) != 0).sum(dim=2) > 2).any():
        raise UserError(None, name, "is not 2:4", "prune it with --sparsity_type 2:4")


def run(settings: Pack) -> None:
    """Pack or unpack the folder and print the sizes."""
    out = Path(settings.save)
    if settings.unpack:
        with files.new_folder(out) as tmp:
            count = sparse.unpack_files(Path(settings.model), tmp)
        print(f"{out}: {count} tensors, each with the SHA-256 of what was packed")
        return
    checkpoint = open_checkpoint(settings.model)
    checkpoint.check_sparse()
    report = time_two_of_four(checkpoint.source) if settings.format == "2of4" else ""

    # Two of four and the mask's bit for each are as small as two numbers with their places: one container for both.
    folder = checkpoint.folder
    files.check_writable("save", out.parent, sum(path.stat().st_size for path in weight_files(folder)))
    with files.new_folder(out) as tmp:
        size = sparse.pack_files(folder, tmp)
        if report:
            (tmp / "2of4.md").write_text(report)
    print(
        f"{out}: {size['all_after'] / 1e6:.1f} MB, {size['all_after'] / size['all']:.4f} of {folder}'s "
        f"{size['all'] / 1e6:.1f} MB; every tensor comes back bit for bit (compared)\n"
        f"  the tensors with zeros alone: {size['masked_after'] / size['masked']:.4f} of "
        f"{size['masked'] / 1e6:.1f} MB, at a sparsity of {checkpoint.sparsity:.4f} in the blocks\n{report}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command(Pack, run, argv, PARSER, out_of_memory="use a smaller model")


if __name__ == "__main__":
    sys.exit(main())
