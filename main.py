"""Pruning experiment: a language model is pruned layer by layer and evaluated; python main.py --help"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from lib.cli.command import command, make_parser
from lib.cli.settings import Experiment
from lib.core import processes
from lib.run import checks, pipeline, report
from lib.run.language import LanguageModel
from lib.run.record import Record, perplexity_text

log = logging.getLogger("main")

PARSER = make_parser(
    Experiment,
    "main.py",
    "Prune a causal language model layer by layer and measure its perplexity. "
    "Without --prune_method: the dense model's.",
    "example: python main.py --model smollm2-135m --prune_method wanda_ww --sparsity_ratio 0.5 "
    "--epsilon 0.2 --calib_data wiki_leads --eval_data wiki_leads --seqlen 512 --nsamples 16",
)


def run(settings: Experiment, console: Console, subject: LanguageModel | None = None) -> dict:
    """Carry out the run step by step and return its record.

    Several runs of one process may share a ``subject``: texts and the model are then loaded once, and each run starts
    from the dense weights.
    """
    task, flags = settings.task(), settings.flags()
    subject = subject or LanguageModel()
    record = Record(Path(settings.save), task.run)

    with record.stage("prepare"):  # everything that can be checked without the weights
        target = settings.model_folder(task)
        checks.check_output(record.folder, task.run, target, flags, settings.paths())
        subject.prepare(settings, task)
        measurement = settings.measurement(subject.name)
        record.content |= report.task_entries(task, flags) | subject.describe(flags)
        # The journal's folder comes last, so that what is refused above leaves no trace.
        journal = pipeline.open_journal(target, settings.restart, record.folder, task.run, flags)

    with closing(journal) if journal else nullcontext():
        with record.stage("load"):
            subject.load()
            record.content["dense_zeros"] = subject.weights.sparsity()

        with record.stage("measure"):
            values, search = pipeline.measure(subject, task, measurement, settings.price_options(), journal)
            record.content |= report.price_entries(search)
        report.show_prices(console, search)
        if settings.metrics_only:
            report.show_metric(console, settings.model, subject.layers, values, measurement)
            return record.whole() | {"metric": values}

        if task.pruner:
            with record.stage("allocate"):
                plan, trials = pipeline.allocate(subject, task, values, journal)
                pipeline.write_plan(subject, task, plan, settings.save_plan, settings.export_llmcompressor, flags)
                record.content |= report.epsilon_entries(trials)
            report.show_trials(console, trials)

            with record.stage("prune"):
                record.rows = pipeline.prune(subject, task, plan, values, settings.statistics, journal)

        record.content["sparsity"] = sparsity = subject.weights.sparsity()
        pipeline.warn_if_off_target(task, sparsity)
        with record.explain_failure(partial(how_to_resume, settings, record)):
            # The model is saved before whatever may still fail.
            write = partial(subject.save, journal, settings.packed, sparsity) if journal else None
            unsaved = pipeline.save(record, write)
            report.draw_prices(record, search)
            evaluate(subject, settings, record, console)
            record.write(complete=unsaved is None)

    report.show_run(console, record)
    if unsaved:
        raise unsaved
    return record.whole()


def evaluate(subject: LanguageModel, settings: Experiment, record: Record, console: Console) -> None:
    """Measure perplexity, then zero-shot accuracy, which may take hours; earlier results are on disk by then."""
    method, sparsity = record.content["method"], record.content["sparsity"]
    if subject.evaluation is not None:
        with record.stage("evaluate"):
            perplexity = subject.perplexity()
        record.content["perplexity"] = perplexity
        record.files[f"perplexity_{record.run}.txt"] = perplexity_text(method, sparsity, perplexity)
    if subject.questions is None:
        return
    saved = record.content["saved_model"]
    if subject.streamed and settings.prune_method and saved is None:
        log.warning("no zero-shot accuracy: the pruned model is whole in its folder only, which could not be saved")
        return
    record.write()
    with record.stage("zero_shot"):
        answers = subject.zero_shot(saved, settings.num_fewshot, settings.limit, settings.batch_size())
    record.content["zero_shot"] = {"means": answers.means, "lm_eval": answers.full}
    record.files[f"zero_shot_{record.run}.txt"] = f"{method}:\n{answers.table}"
    report.line(console, answers.table)


def how_to_resume(settings: Experiment, record: Record) -> str:
    """Return what to do after a failure: evaluate the saved model, or start again."""
    saved = record.content["saved_model"]
    if saved is None and settings.save_model:
        return "the same command resumes"
    if saved is None:
        return "the same command starts again" + (" (--save_model DIR would keep the model)" if record.rows else "")
    measure = f"python main.py --model {saved} --eval_data {settings.eval_data} --seqlen {settings.seqlen}"
    return f"the pruned model is saved; the same command resumes, and so does: {measure}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""

    def work(settings: Experiment) -> None:
        processes.join()
        settings.warn_of_idle()
        run(settings, Console(quiet=not processes.is_main()))
        processes.leave()

    resume = "with --save_model the same command resumes after the last finished block, else it starts again"
    return command(Experiment, work, argv, PARSER, resume, processes=True)


if __name__ == "__main__":
    sys.exit(main())
