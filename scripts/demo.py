"""Prune SmolLM2-135M with all six methods and print one table: what scripts/demo.sh runs."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

import main
from lib import UserError

METHODS = ("magnitude", "wanda", "sparsegpt", "magnitude_ww", "wanda_ww", "sparsegpt_ww")
# Small enough for six methods in a few minutes on two cores; the paper's setting is 128 windows of 2048.
SETTING = "--model smollm2-135m --calib_data wiki_leads --eval_data wiki_leads --seqlen 512".split()


def demo(sparsity: str, epsilon: str, save: str) -> None:
    records = []
    size = ["--nsamples", "8", "--eval_windows", "10", "--save", save]
    for method in (None, *METHODS):
        pruning = (
            [] if method is None else ["--prune_method", method, "--sparsity_ratio", sparsity, "--epsilon", epsilon]
        )
        print(f"\n[{len(records) + 1}/{len(METHODS) + 1}] {method or 'dense'}", flush=True)
        args = main.make_parser().parse_args(SETTING + size + pruning)
        records.append(main.run(args, Console(quiet=True)))
    table = Table(title="SmolLM2-135M on Wikipedia lead sections", title_justify="left")
    for heading in ("method", "target", "sparsity", "perplexity", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for record in records:
        seconds = sum(stage["seconds"] for stage in record["stages"].values())
        figures = (
            f"{record['target_sparsity']:g}",
            f"{record['sparsity']:.4f}",
            f"{record['perplexity']:.2f}",
            f"{seconds:.1f}",
        )
        table.add_row(record["method"], *figures)
    console = Console()
    console.print(table)
    again = " ".join(SETTING) + f" --prune_method wanda_ww --sparsity_ratio 0.6 --epsilon {epsilon} --save_model out"
    console.print("\nNext, at a higher sparsity and with the model kept:", highlight=False)
    console.print(f".venv/bin/python main.py {again}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--sparsity_ratio", default="0.5", metavar="S", help="fraction to remove (default: 0.5)")
    parser.add_argument("--epsilon", default="0.2", metavar="E", help="half width of the map (default: 0.2)")
    parser.add_argument(
        "--save", default="results/demo", metavar="DIR", help="where the figures go (default: results/demo)"
    )
    args = parser.parse_args()
    main.quiet()
    try:
        demo(args.sparsity_ratio, args.epsilon, args.save)
    except UserError as error:
        print(f"demo.sh: error: {error}", file=sys.stderr)
        sys.exit(2)
