"""Merge a LoRA adapter into the pruned weights without filling their zeros: python lora_ft/merge.py --help"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import main as pruning
from lib import UserError, data, eval, models, prune, results
from lora_ft import common, evaluate_ppl


class Row(NamedTuple):
    """One state of the model, its ``sparsity`` over the layers in the blocks, and its perplexity."""

    state: str
    sparsity: float
    perplexity: float


def make_parser() -> argparse.ArgumentParser:
    parser = pruning.Parser(
        prog="merge.py",
        description=__doc__,
    )
    evaluate_ppl.add_model_flags(parser)
    add = parser.add_argument
    add("--lora_weights", required=True, metavar="DIR", help="the adapter: finetune_lm.py's --output_dir")
    add("--out", required=True, metavar="DIR", help="where the merged model is written; a new folder")
    add("--keep_dense", action="store_true", help="let the adapter fill the zeros of the layers it changes")
    evaluate_ppl.add_text_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Find every contradiction that needs no model."""
    evaluate_ppl.check_text_args(args)
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is not empty; give a new folder")


def run(args: argparse.Namespace, console: Console) -> list[Row]:
    """Merge, write the merged model, and report what each step does to sparsity and perplexity."""
    check_args(args)
    base = common.find_base(args.model, args.config_name, args.cache_dir)
    common.check_length("--ctx_length", args.ctx_length, base.skeleton)
    common.check_adapter(args.lora_weights, base)
    out = Path(args.out)
    results.prepare("--out", out, models.saved_bytes(base.skeleton, args.dtype))
    windows = data.evaluation_windows(args.dataset, base.tokenizer, args.ctx_length, args.eval_windows)

    loaded = common.load_base(base, args.dtype)
    model = common.load_adapter(args.lora_weights, loaded, base)
    adapted = common.adapted_layers(model)
    masks = {name: layer.weight == 0 for name, layer in adapted.items()}
    with model.disable_adapter():
        rows = [Row("pruned", loaded.sparsity, eval.perplexity(model, windows))]
    rows.append(Row("adapter beside it", loaded.sparsity, eval.perplexity(model, windows)))
    merged = model.merge_and_unload()
    rows.append(Row("merged plainly", _sparsity(loaded), eval.perplexity(merged, windows)))
    if not args.keep_dense:
        apply_masks(adapted, masks)
        rows.append(Row("merged, zeros kept", _sparsity(loaded), eval.perplexity(merged, windows)))

    models.save_llm(merged, base.tokenizer, out)
    prune.check_saved(out, loaded.layers, rows[-1].sparsity)
    record = {
        "rows": [row._asdict() for row in rows],
        "written": rows[-1].state,
        "model": common.identity(base.source),
        "lora_weights": args.lora_weights,
        "evaluation": {"text": args.dataset, "windows": len(windows), "seqlen": args.ctx_length},
    }
    results.write_atomically(out / "merge.json", results.run_text(record))
    _print(console, rows, out, args)
    return rows


@torch.no_grad()
def apply_masks(layers: dict[str, torch.nn.Module], masks: dict[str, Tensor]) -> None:
    """Zero each layer's weight where its mask [out, in] is true."""
    for name, layer in layers.items():
        layer.weight.masked_fill_(masks[name], 0)


def _sparsity(loaded: common.Loaded) -> float:
    # The layers are those of the model before it got its adapters; merging has changed their weights in place.
    zeros = prune.count_zeros(models.find_blocks(loaded.model)[1], loaded.layers)
    return loaded._replace(zeros=zeros).sparsity


def _print(console: Console, rows: list[Row], out: Path, args: argparse.Namespace) -> None:
    table = Table(title=f"{args.lora_weights} in {args.model}, perplexity on {args.dataset}", title_justify="left")
    for heading in ("model", "sparsity", "perplexity"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(row.state, f"{row.sparsity:.4f}", f"{row.perplexity:.4f}")
    console.print(table)
    console.print(f"written: {out}, {rows[-1].state}, with a sparsity of {rows[-1].sparsity:.4f}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for something that the user can mend."""
    args = make_parser().parse_args(argv)
    common.quiet()
    try:
        with common.renamed(evaluate_ppl.FLAGS):
            run(args, Console())
    except UserError as error:
        print(f"merge.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
