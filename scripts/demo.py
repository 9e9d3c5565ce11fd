"""Demonstration: SmolLM2-135M pruned uniformly, by alpha and by ALPS, a table, a plot and a prompt; see demo.sh."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sweep
import table
from rich.console import Console

from lib.cli.command import command, make_parser, parse
from lib.cli.flags import Flags, flag
from lib.cli.settings import Experiment
from lib.core import files
from lib.core.lazy import torch
from lib.models import load, locate
from lib.run import report
from lib.run.record import parsed

TEXTS = "--model smollm2-135m --calib_data wiki_leads --eval_data wiki_leads".split()
# Small enough for four minutes on two cores; the paper's setting is 128 windows of 2048, and all of WikiText-2.
SIZE = "--seqlen 448 --nsamples 4 --eval_windows 3".split()
METHODS = "dense,wanda,sparsegpt,wanda_ww,sparsegpt_ww"
# ALPS takes longest, so it prunes at the lowest sparsity only, with fewer iterations than usual: half of the time. Its
# model is the one that is saved and prompted.
ALPS = "--methods alps --pruner_iterations 5 --refit 5".split()
PROMPT = "The capital of France is"
TOKENS = 24


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
        common = [*TEXTS, *SIZE, "--save", self.save]
        lowest = str(min(sweep.numbers("sparsity_ratio", self.sparsity_ratio)))
        every = ["--methods", METHODS, "--sparsities", self.sparsity_ratio, "--epsilons", str(self.epsilon)]
        alps = [*ALPS, "--sparsities", lowest, "--save_model", f"{self.save}/model"]
        sweeps = [parse(sweep.Sweep, [*common, *flags], sweep.PARSER) for flags in (every, alps)]
        return [settings for grid in sweeps for settings in grid.settings()]


PARSER = make_parser(Demo, "demo.sh", __doc__)


def perplexity(record: Mapping) -> str:
    """Return the perplexity, with ``about`` if it depends on the machine's rounding."""
    about = record["method"].endswith("_ww") or record["method"].startswith(("sparsegpt", "alps"))
    return f"about {record['perplexity']:.1f}" if about else f"{record['perplexity']:.2f}"


def show(records: Sequence[Mapping], console: Console) -> None:
    """Print a row per record, what alpha gains over uniform ratios, and the best method at each sparsity."""
    rows = []
    for record in records:
        seconds = sum(stage["seconds"] for stage in record["stages"].values())
        figures = (f"{record['target_sparsity']:g}", f"{record['sparsity']:.4f}", perplexity(record), f"{seconds:.1f}")
        rows.append((record["method"], *figures))
    headings = ("method", "target", "sparsity", "perplexity", "seconds")
    report.show(console, "SmolLM2-135M on Wikipedia lead sections", headings, rows)
    report.line(console, "about: differs between processors, since alphas and Cholesky factors round differently")

    report.line(console, "What was gained:")
    by_run = {(record["method"], record["target_sparsity"]): record for record in records}
    for (method, target), record in by_run.items():
        uniform = by_run.get((method.removesuffix("_ww"), target))
        if method.endswith("_ww") and uniform:
            gain = _change(uniform, record, "uniform", "by alpha")
            report.line(console, f"{uniform['method']} at {target:g}: {gain}")
    for target in sorted({target for _, target in by_run if target}):
        first = by_run.get(("wanda", target))
        best = min((by_run[run] for run in by_run if run[1] == target), key=lambda record: record["perplexity"])
        if first and best is not first:
            report.line(console, f"best at {target:g}: {_change(first, best, 'wanda', best['method'])}")


def _change(before: Mapping, after: Mapping, *names: str) -> str:
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    return f"perplexity {perplexity(before)} {names[0]}, {perplexity(after)} {names[1]} (about {change:+.0f} %)"


def show_answer(record: Mapping, console: Console) -> None:
    """Let the saved model continue the prompt."""
    source = locate.locate(record["saved_model"], record["flags"]["cache_dir"])
    tokenizer, model = load.load_tokenizer(source), load.load_llm(source, torch.float32, "cpu")
    with torch.inference_mode():
        ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False)
    report.line(console, f"\nThe saved model, {record['saved_model']}, continues:")
    report.line(console, tokenizer.decode(ids[0], skip_special_tokens=True))


def run(demo: Demo) -> int:
    """Run the demonstration; return 0, or 1 if a setting failed."""
    folder, console = Path(demo.save), Console()
    files.prepare("save", folder)
    run_files = sweep.run_all(demo.planned(), demo.force)
    complete = [path for path in run_files if path]
    if complete:
        records = [parsed(path.read_text(encoding="utf-8")) for path in complete]
        show(records, console)
        runs = table.read_runs(complete)
        table.plot(folder / "demo.png", {table.title_of(runs): table.cells_of(runs)})
        report.line(console, f"written: {folder}/demo.png")
        if records[-1]["saved_model"] and Path(records[-1]["saved_model"]).is_dir():
            show_answer(records[-1], console)
    report.line(console, "\nNext, on more text and with the model kept (less than five minutes on two cores):")
    flags = "--seqlen 512 --nsamples 16 --eval_windows 10 --prune_method sparsegpt_ww --sparsity_ratio 0.5"
    flags = f"{' '.join(TEXTS)} {flags} --epsilon {demo.epsilon} --save_model out"
    report.line(console, f"{shlex.quote(sys.executable)} main.py {flags}")
    return 1 if None in run_files else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a setting failed, 2 for a wrong flag."""
    return command(Demo, run, argv, PARSER, resume=sweep.RESUME)


if __name__ == "__main__":
    sys.exit(main())
