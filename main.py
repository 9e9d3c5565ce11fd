"""Pruning experiment: a language model is pruned layer by layer and evaluated; python main.py --help"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

from lib.cli.command import command, make_parser
from lib.cli.settings import Experiment
from lib.core import processes
from lib.run import checks, pipeline, report
from lib.run.journal import Journal
from lib.run.language import LanguageModel
from lib.run.record import Record, explain_failure

PARSER = make_parser(
    Experiment,
    "main.py",
    "Prune a language model layer by layer and measure its perplexity; without --prune_method, the dense model's.",
    "example: python main.py --model smollm2-135m --prune_method wanda_ww --sparsity_ratio 0.5 "
    "--epsilon 0.2 --calib_data wiki_leads --eval_data wiki_leads --seqlen 512 --nsamples 16",
)


def run(settings: Experiment, subject: LanguageModel | None = None) -> dict:
    """Carry out the run step by step and return its record.

    Several runs may share a ``subject``: texts and the model are then loaded once, and each starts from dense weights.
    """
    task, flags = settings.task(), settings.flags()
    subject, record = subject or LanguageModel(), Record(Path(settings.save), task.run)

    with record.stage("prepare"):  # everything that can be checked without the weights
        targets = settings.folders(task)
        checks.check_output(record.folder, task.run, targets, flags, settings.paths())
        subject.prepare(settings, task)
        measurement = settings.measurement(subject.name)
        record.content |= subject.describe(task)
        # The journal's folder comes last, so that what is refused above leaves no trace.
        journal = Journal(targets[0], settings.restart) if targets else None

    with closing(journal) if journal else nullcontext():
        with record.stage("load"):
            subject.load()
            record.content["dense_zeros"] = subject.weights.sparsity()

        with record.stage("measure"):
            values, search = pipeline.measure_values(subject, task, measurement, settings.price_options(), journal)
        report.show_prices(record, search)
        if settings.metrics_only:
            report.show_metric(settings.model, subject.layers, values, measurement)
            return record.content | {"metric": values}

        if task.pruner:
            with record.stage("allocate"):
                plan, trials = pipeline.allocate(subject, task, values, journal)
                pipeline.write_plan(subject, task, plan, settings.save_plan, settings.export_llmcompressor, flags)
            report.show_trials(record, trials)

            with record.stage("prune"):
                record.rows = pipeline.prune(subject, task, plan, values, settings.statistics, journal)

        record.content["sparsity"] = sparsity = subject.weights.sparsity()
        if task.pruner:
            pipeline.warn_if_off_target(plan.target, sparsity)
        with explain_failure(partial(record.how_to_resume, "the same command resumes")):
            # The model is saved before whatever may still fail.
            packed = "exact" if settings.packed and settings.recover else settings.packed  # a resumed run reads it
            write = partial(subject.save, journal, packed, sparsity) if journal else None
            unsaved = pipeline.save(record, write)
            if settings.recover:
                subject.recover(record, task)
            evaluate(subject, record)
            record.write(complete=unsaved is None)

    report.show_run(record)
    if unsaved:
        raise unsaved
    return record.content


def evaluate(subject: LanguageModel, record: Record) -> None:
    """Measure perplexity, then zero-shot accuracy, which may take hours; earlier results are on disk by then."""
    content = record.content
    if subject.evaluation is not None:
        with record.stage("evaluate"):
            content["perplexity"] = subject.perplexity()
        line = f"{content['method']}\t{content['sparsity']:.4f}\t{content['perplexity']:.4f}\n"  # as published
        record.files[f"perplexity_{record.run}.txt"] = f"method\tactual_sparsity\tppl_test\n{line}"
    if subject.questions is None:
        return
    record.write()
    with record.stage("zero_shot"):
        content["zero_shot"], table = subject.zero_shot(content["saved_model"])
    record.files[f"zero_shot_{record.run}.txt"] = f"{content['method']}:\n{table}"
    report.line(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""

    def work(settings: Experiment) -> None:
        processes.join()
        settings.warn_of_idle()
        run(settings)
        processes.leave()

    resume = "the same command starts again; with --save_model it resumes after the last finished block"
    return command(Experiment, work, argv, PARSER, resume, processes=True)


if __name__ == "__main__":
    sys.exit(main())
