"""Demonstration: SmolLM2-135M pruned uniformly, by alpha and by ALPS, a table, a plot and a prompt; see demo.sh."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sweep
import table

from lib.cli.command import command, make_parser, parse
from lib.cli.flags import Flags, flag
from lib.cli.settings import Experiment
from lib.core import files
from lib.core.lazy import torch
from lib.models import load, locate

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
        grid = ["--methods", METHODS, "--sparsities", self.sparsity_ratio, "--epsilons", str(self.epsilon)]
        settings = parse(sweep.Sweep, [*common, *grid], sweep.PARSER).settings()
        lowest = min(run.sparsity_ratio for run in settings if run.prune_method)
        alps = [*ALPS, "--sparsities", str(lowest), "--save_model", f"{self.save}/model"]
        return settings + parse(sweep.Sweep, [*common, *alps], sweep.PARSER).settings()


PARSER = make_parser(Demo, "demo.sh", __doc__)


def show_answer(settings: Experiment) -> None:
    """Let the saved model continue the prompt."""
    folder = Path(settings.save_model, settings.task().folder)
    source = locate.locate(str(folder), settings.cache_dir)
    tokenizer, model = load.load_tokenizer(source), load.load_llm(source, torch.float32, "cpu")
    with torch.inference_mode():
        ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=TOKENS, do_sample=False)
    print(f"\nThe saved model, {folder}, continues:\n{tokenizer.decode(ids[0], skip_special_tokens=True)}")


def run(demo: Demo) -> int:
    """Run the demonstration; return 0, or 1 if a setting failed."""
    folder, todo = Path(demo.save), demo.planned()
    files.check_writable("save", folder)
    run_files = sweep.run_all(todo, demo.force)
    if None not in run_files:
        runs = table.read_runs(run_files)
        print(f"\nSmolLM2-135M: {table.caption(runs)}\n{table.formatted(table.by_sparsity(runs), 'text')}")
        table.plot(folder / "demo.png", table.cells_of(runs))
        print(f"written: {folder}/demo.png")
        show_answer(todo[-1])
    return 1 if None in run_files else 0


def main(argv: Sequence[str] | None = None) -> int:
    return command(Demo, run, argv, PARSER, resume=sweep.RESUME)


if __name__ == "__main__":
    sys.exit(main())
