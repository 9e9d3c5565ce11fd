"""Demonstration: SmolLM2-135M pruned uniformly and by alpha, a table and a plot; what scripts/demo.sh runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sweep
from rich.console import Console

from lib import files, tables
from lib.command import Flags, command, flag, make_parser, parse

TEXTS = "--model smollm2-135m --calib_data wiki_leads --eval_data wiki_leads --seqlen 512".split()
# Small enough for a few minutes on two cores; the paper's setting is 128 windows of 2048, and all of WikiText-2.
SIZE = ("--nsamples", "6", "--eval_windows", "5")
METHODS = "dense,wanda,sparsegpt,wanda_ww,sparsegpt_ww"


@dataclass(kw_only=True)
class Demo(Flags):
    _title: ClassVar[str] = "demonstration"

    sparsity_ratio: str = flag("0.6,0.7", "fractions to remove", metavar="S,S")
    epsilon: float = flag(0.2, "half width of the map from alpha to sparsity, in [0, 1]", least=0, most=1, metavar="E")
    save: str = flag("results/demo", "where figures and plot are written", metavar="DIR")
    force: bool = flag(False, "run what is complete, too")

    def check(self) -> None:
        self.planned()

    def planned(self) -> sweep.Sweep:
        """Return the sweep that the demonstration is."""
        own = [*SIZE, "--methods", METHODS, "--sparsities", self.sparsity_ratio, "--save", self.save]
        force = ["--force"] if self.force else []
        return parse(sweep.Sweep, [*TEXTS, *own, "--epsilons", str(self.epsilon), *force], sweep.PARSER)


PARSER = make_parser(Demo, "demo.sh", __doc__)


def show(records: Sequence[dict], console: Console) -> None:
    """Print a row per record; ``~`` marks what depends on the machine's rounding."""
    rows = []
    for record in records:
        seconds = sum(stage["seconds"] for stage in record["stages"].values())
        figures = (f"{record['target_sparsity']:g}", f"{record['sparsity']:.4f}", perplexity(record), f"{seconds:.1f}")
        rows.append((record["method"], *figures))
    headings = ("method", "target", "sparsity", "perplexity", "seconds")
    tables.show(console, "SmolLM2-135M on Wikipedia lead sections", headings, rows)
    tables.line(console, "~ moves a little from processor to processor: alphas and Cholesky factors round differently")


def perplexity(record: dict) -> str:
    about = record["method"].endswith("_ww") or record["method"].startswith("sparsegpt")
    return f"{'~' if about else ''}{record['perplexity']:.2f}"


def show_gain(records: Sequence[dict], console: Console) -> None:
    """Print, for each pair, what sharing the sparsity out by alpha changed."""
    found = {(record["method"], record["target_sparsity"]): record for record in records}
    for (method, target), record in found.items():
        uniform = found.get((method.removesuffix("_ww"), target))
        if method.endswith("_ww") and uniform:
            change = 100 * (record["perplexity"] / uniform["perplexity"] - 1)
            figures = f"perplexity {perplexity(uniform)} uniform, {perplexity(record)} by alpha ({change:+.1f} %)"
            tables.line(console, f"{uniform['method']} at {target:g}: {figures}")


def run(demo: Demo) -> int:
    """Run the demonstration; return 0, or 1 if a setting failed."""
    folder, console = Path(demo.save), Console()
    files.prepare("save", folder)
    every, _ = sweep.run_all(demo.planned().settings(), demo.force)
    records = sweep.measured(every)
    if records:
        show(records, console)
        show_gain(records, console)
        sweep.plot(records, folder / "demo.png")
        tables.line(console, f"written: {folder}/demo.png")
    again = f"--prune_method sparsegpt_ww --sparsity_ratio 0.6 --epsilon {demo.epsilon} --save_model out"
    tables.line(console, "\nNext, on more text and with the model kept (less than five minutes on two cores):")
    python = shlex.quote(sys.executable)
    tables.line(console, f"{python} main.py {' '.join(TEXTS)} --nsamples 16 --eval_windows 10 {again}")
    return 1 if None in every else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a setting failed, 2 for a wrong flag."""
    return command(Demo, run, argv, PARSER, resume=sweep.RESUME)


if __name__ == "__main__":
    sys.exit(main())
