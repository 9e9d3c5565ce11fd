"""Recovery of a pruned model: the dense one is distilled into its weights: python lora_ft/recover.py --help"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli.command import command, make_parser
from lib.cli.flags import flag
from lib.cli.settings import AllocationFlags, Experiment, MixtureFlags, PruningFlags, ZeroShotFlags, parse_nm
from lib.cli.task import Task
from lib.core import processes
from lib.core.errors import UserError
from lib.run import checks, report
from lib.run.journal import read_manifest
from lib.run.language import LanguageModel
from lib.run.record import Record


@dataclass(kw_only=True)
class Recover(Experiment):
    """The flags of recover.py: those of main.py about texts, recovery, evaluation and output, and two models."""

    _title: ClassVar[str] = "models"
    _without: ClassVar[Sequence[str]] = (
        "nsamples", "prompts", "prompt_data", "save_calib",
        *PruningFlags.__annotations__, *AllocationFlags.__annotations__, *MixtureFlags.__annotations__,
        *ZeroShotFlags.__annotations__,
    )  # fmt: skip
    _spelled: ClassVar[dict[str, str]] = {"recover": "tokens"}

    model: str = flag(MISSING, "the pruned model: folder or hub id")
    dense: str | None = flag(
        None, "the model it was pruned from, or none: text alone (default: the one pruning.json names)", metavar="NAME"
    )
    recover: int = flag(MISSING, "tokens of {calib_data} to train on, a count", least=1)
    save_model: str = flag(MISSING, "where the recovered model is written", metavar="DIR")

    def task(self) -> Task:
        flags = read_manifest(Path(self.model)).get("flags", {})
        nm = parse_nm(flags.get("sparsity_type", "unstructured"))
        target = 1 - nm[0] / nm[1] if nm else flags.get("sparsity_ratio", 0.0)
        return self.settled(Task("recovered", None, "", target))

    def check(self) -> None:
        if self.calib_data == "self":
            fix = "give the file that main.py wrote with --save_calib"
            raise UserError("calib_data", "self", "a pruned model has no text of its own to learn from", fix)
        super().check()

    def pruned_from(self) -> dict:
        pruned = read_manifest(Path(self.model))
        source = self.dense or pruned.get("source")
        if source is None:
            problem = f"is needed: {self.model} does not say what it was pruned from"
            raise UserError("dense", None, problem, "give that model, or none to train on the text alone")
        return pruned | {"source": None if source == "none" else source}

    def folders(self, task: Task) -> list[Path]:
        return [Path(self.save_model)]


PARSER = make_parser(
    Recover,
    "recover.py",
    "Distil the dense model into the weights that pruning left; zeros stay zeros.",
    "example: python lora_ft/recover.py --model out/wanda_price_0.7 --tokens 50000 --calib_data wiki_leads "
    "--eval_data wiki_leads --seqlen 512 --eval_windows 10 --save_model out/recovered",
)


def run(settings: Recover) -> None:
    """Recover a model, save it, and measure its perplexity before and after."""
    processes.join()
    settings.warn_of_idle()
    task, flags = settings.task(), settings.flags()
    subject, record = LanguageModel(), Record(Path(settings.save), task.run)
    with record.stage("prepare"):
        checks.check_output(record.folder, task.run, settings.folders(task), flags, settings.paths())
        subject.prepare(settings, task)
        record.content |= subject.describe(task)
    with record.stage("load"):
        subject.load()
        record.content["dense_zeros"] = record.content["sparsity"] = subject.weights.sparsity()

    subject.recover(record, task)
    record.write()
    with record.stage("evaluate"):
        record.content["perplexity"] = subject.perplexity()
    record.write(complete=True)
    report.show_run(record)
    processes.leave()


def main(argv: Sequence[str] | None = None) -> int:
    resume = "the same command resumes after the last state that was stored"
    out_of_memory = "lower --batch or --seqlen, use --states 8bit or --by block, or more GPUs"
    return command(Recover, run, argv, PARSER, resume, processes=True, out_of_memory=out_of_memory)


if __name__ == "__main__":
    sys.exit(main())
