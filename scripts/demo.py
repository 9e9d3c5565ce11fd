"""Demonstration: SmolLM2-135M pruned uniformly, by alpha and by ALPS, a table, a plot and a prompt; see demo.sh."""

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

from lib.cli.command import command, make_parser, parse
from lib.cli.flags import Flags, flag
from lib.cli.settings import Experiment
from lib.core import files
from lib.core.lazy import torch
from lib.models import load, locate
from lib.run import report

TEXTS = "--model smollm2-135m --calib_data wiki_leads --eval_data wiki_leads".split()
# Small enough for four minutes on two cores; the paper's setting is 128 windows of 2048, and all of WikiText-2.
SIZE = "--seqlen 448 --nsamples 4 --eval_windows 3".split()
METHODS = "dense,wanda,sparsegpt,wanda_ww,sparsegpt_ww"
KEPT = "alps"  # at the lowest sparsity only, since it takes longest: the model that is saved and prompted
FEWER = "--pruner_iterations 5 --refit 5".split()  # of its iterations: half of the time
NEXT = "less than five minutes"  # what the next command takes
PROMPT, TOKENS = "The capital of France is", 24


@dataclass(kw_only=True)
class Demo(Flags):
    _title: ClassVar[str] = "demonstration"

    sparsity_ratio: str = flag("0.6,0.7", "fractions to remove", metavar="S,S")
    epsilon: float = flag(0.2, "half width of the map from alpha to sparsity, in [0, 1]", least=0, most=1, metavar="E")
    save: str = flag("results/demo", "where figures and plot are written", metavar="DIR")
    force: bool = flag(False, "run what is complete, too")

    def check(self) -> None:
        self.planned()

    def planned(self) -> list[Experiment]:
        """Return the settings of each run; the last one saves its model."""
        lowest = str(min(sweep.numbers("sparsity_ratio", self.sparsity_ratio)))
        kept = ["--methods", KEPT, *FEWER, "--sparsities", lowest, "--save_model", f"{self.save}/model"]
        every = ["--methods", METHODS, "--sparsities", self.sparsity_ratio, "--epsilons", str(self.epsilon)]
        own = [*TEXTS, *SIZE, "--save", self.save]
        return [one for part in (every, kept) for one in parse(sweep.Sweep, [*own, *part], sweep.PARSER).settings()]


PARSER = make_parser(Demo, "demo.sh", __doc__)


def show(records: Sequence[dict], console: Console) -> None:
    """Print a row per record."""
    rows = []
    for record in records:
        seconds = sum(stage["seconds"] for stage in record["stages"].values())
        figures = (f"{record['target_sparsity']:g}", f"{record['sparsity']:.4f}", perplexity(record), f"{seconds:.1f}")
        rows.append((record["method"], *figures))
    headings = ("method", "target", "sparsity", "perplexity", "seconds")
    report.show(console, "SmolLM2-135M on Wikipedia lead sections", headings, rows)
    report.line(console, "about: differs between processors, since alphas and Cholesky factors round differently")


def perplexity(record: dict) -> str:
    """Return the perplexity, with ``about`` if it depends on the machine's rounding."""
    about = record["method"].endswith("_ww") or record["method"].startswith(("sparsegpt", "alps"))
    return f"about {record['perplexity']:.1f}" if about else f"{record['perplexity']:.2f}"


def show_gain(records: Sequence[dict], console: Console) -> None:
    """Print the gain from distributing the sparsity by alpha, and the best method at each sparsity."""
    found = {(record["method"], record["target_sparsity"]): record for record in records}
    report.line(console, "What was gained:")
    for (method, target), record in found.items():
        uniform = found.get((method.removesuffix("_ww"), target))
        if method.endswith("_ww") and uniform:
            gain = _change(uniform, record, "uniform", "by alpha")
            report.line(console, f"{uniform['method']} at {target:g}: {gain}")
    for target in sorted({target for _, target in found if target}):
        rows = [record for (_, other), record in found.items() if other == target]
        first, best = found.get(("wanda", target)), min(rows, key=lambda record: record["perplexity"])
        if first and best is not first:
            report.line(console, f"best at {target:g}: {_change(first, best, 'wanda', best['method'])}")


def _change(before: dict, after: dict, *names: str) -> str:
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    return f"perplexity {perplexity(before)} {names[0]}, {perplexity(after)} {names[1]} (about {change:+.0f} %)"


def show_answer(records: Sequence[dict], console: Console) -> None:
    """Let the saved model continue one prompt."""
    saved = [record for record in records if record.get("saved_model") and Path(record["saved_model"]).is_dir()]
    for record in saved[:1]:
        source = locate.locate(record["saved_model"], record["flags"]["cache_dir"])
        tokenizer, model = load.load_tokenizer(source), load.load_llm(source, torch.float32, "cpu")
        ids = tokenizer(PROMPT, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        report.line(console, f"\nThe saved model, {record['saved_model']}, continues:")
        report.line(console, tokenizer.decode(out[0], skip_special_tokens=True))


def run(demo: Demo) -> int:
    """Run the demonstration; return 0, or 1 if a setting failed."""
    folder, console = Path(demo.save), Console()
    files.check_writable("save", folder)
    every, _ = sweep.run_all(demo.planned(), demo.force)
    records = sweep.measured(every)
    if records:
        show(records, console)
        show_gain(records, console)
        sweep.plot(records, folder / "demo.png")
        report.line(console, f"written: {folder}/demo.png")
        show_answer(records, console)
    again = f"--prune_method sparsegpt_ww --sparsity_ratio 0.5 --epsilon {demo.epsilon} --save_model out"
    report.line(console, f"\nNext, on more text and with the model kept ({NEXT} on two cores):")
    python = shlex.quote(sys.executable)
    report.line(console, f"{python} main.py {' '.join(TEXTS)} --seqlen 512 --nsamples 16 --eval_windows 10 {again}")
    return 1 if None in every else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a setting failed, 2 for a wrong flag."""
    return command(Demo, run, argv, PARSER, resume=sweep.RESUME)


if __name__ == "__main__":
    sys.exit(main())
