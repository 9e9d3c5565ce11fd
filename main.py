"""Pruning experiment: a language model is pruned layer by layer and evaluated; python main.py --help"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from lib.calibration import hidden
from lib.cli.command import command, make_parser
from lib.cli.settings import Experiment, Task
from lib.core import processes
from lib.core.errors import UserError
from lib.evaluation import perplexity as evaluation
from lib.models import load
from lib.models.weights import Weights
from lib.pruning import walk
from lib.run import pipeline, report
from lib.run.pipeline import Prepared, Session
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


def run(settings: Experiment, console: Console, session: Session | None = None) -> dict:
    """Carry out the run step by step and return its record.

    Several runs of one process may share a ``session``: texts and the model are then loaded once, and the dense weights
    are restored at the start of each run.
    """
    session = session or Session()
    task = settings.task()
    record = Record(Path(settings.save), task.run)

    with record.stage("prepare"):  # everything that can be checked without the weights
        known = pipeline.prepare(settings, task, session)
        record.content |= pipeline.described(settings, task, known)
    try:
        return work(settings, task, known, session, record, console)
    finally:
        if known.journal is not None:
            known.journal.close()


def work(
    settings: Experiment, task: Task, known: Prepared, session: Session, record: Record, console: Console
) -> dict:
    """Load, measure, allocate, prune, save, evaluate, report."""
    with record.stage("load"):
        weights = session.weights(known)
        record.content["dense_zeros"] = weights.sparsity()

    with record.stage("measure"):
        prices = pipeline.find_prices(settings, task, weights, known, session)
        values = prices.ratios if prices else pipeline.measure_values(settings, task, weights, known, session)
        record.content |= pipeline.priced(prices)
    report.show_prices(console, prices)
    if settings.metrics_only:
        report.show_metric(console, settings, weights.layers, values, pipeline.metric_file(settings, known))
        return record.whole() | {"metric": values}

    if task.pruner:
        with record.stage("allocate"):
            plan, trials = pipeline.choose_plan(settings, task, weights, known, values, session.dense)
            record.content |= pipeline.searched(trials)
            report.show_trials(console, trials)

        with record.stage("prune"):
            pipeline.begin_journal(settings, weights, known, plan)
            inputs = None
            if task.pruner.statistic:
                given = (known.windows.calibration, settings.hidden_states, known.calib_dtype)
                inputs = hidden.enter_blocks(weights, *given)
            record.rows = walk.walk(weights, plan, task.pruner, inputs, values, settings.statistics, known.journal)

    record.content["sparsity"] = weights.sparsity()
    unsaved = save(settings, task, weights, known, record)  # before whatever may still fail
    with record.explain_failure(_resume(settings, record)):
        record.write()
        pipeline.draw_prices(settings, task, prices)
        evaluate(task, weights, known, record, console, settings)
        record.write(complete=unsaved is None)

    show(settings, record, console)
    if unsaved:
        raise unsaved
    return record.whole()


def save(settings: Experiment, task: Task, weights: Weights, known: Prepared, record: Record) -> UserError | None:
    """Complete the pruned model's folder; return an error instead of raising it: the figures can still be measured."""
    if task.pruner:
        pipeline.warn_of_miss(task.target, record.content["sparsity"])
    if known.journal is None:
        return None
    journal = known.journal
    if journal.failure:
        return journal.failure
    try:
        with record.stage("save"):
            processes.on_main(partial(_finish, settings, weights, known, record.content["sparsity"]))
            weights.rebase_files(journal.folder, journal.target)
    except UserError as error:
        log.warning("%s; the figures are measured all the same", error)
        return error
    record.content["saved_model"] = str(journal.target)
    return None


def _finish(settings: Experiment, weights: Weights, known: Prepared, sparsity: float) -> None:
    folder = known.journal.folder
    load.complete_folder(folder, weights.model, known.tokenizer, weights.outer_tensors(), known.dtypes.stored)
    walk.check_saved(folder, weights, sparsity)
    known.journal.finish(settings.packed)


def evaluate(
    task: Task, weights: Weights, known: Prepared, record: Record, console: Console, settings: Experiment
) -> None:
    """Measure perplexity, then zero-shot accuracy, which may take hours; earlier results are on disk by then."""
    if known.windows.evaluation is not None:
        with record.stage("evaluate"):
            perplexity = evaluation.perplexity_by_blocks(weights, known.windows.evaluation)
        record.content["perplexity"] = perplexity
        text = perplexity_text(task.method, record.content["sparsity"], perplexity)
        record.files[f"perplexity_{task.run}.txt"] = text
    if known.questions is None:
        return
    if weights.streamed and task.pruner and record.content["saved_model"] is None:
        log.warning("no zero-shot accuracy: the pruned model is whole in its folder only, which could not be saved")
        return
    record.write()
    with record.stage("zero_shot"):
        model = pipeline.whole_model(weights, known, record.content["saved_model"])
        answers = pipeline.zero_shot(settings, model, known.tokenizer, known.questions)
    record.content["zero_shot"] = {"means": answers.means, "lm_eval": answers.full}
    record.files[f"zero_shot_{task.run}.txt"] = f"{task.method}:\n{answers.table}"
    report.line(console, answers.table)


def show(settings: Experiment, record: Record, console: Console) -> None:
    """Print the run's figures and where they were written."""
    report.show_run(console, record.content, record.stages, record.rows)
    report.line(console, f"written: {settings.save}/*_{record.run}.*")
    if record.content["saved_model"]:
        report.line(console, f"saved:   {record.content['saved_model']}")


def _resume(settings: Experiment, record: Record) -> str:
    saved = record.content["saved_model"]
    if saved is None:
        return "the same command starts again" + (" (--save_model DIR would keep the model)" if record.rows else "")
    measure = f"python main.py --model {saved} --eval_data {settings.eval_data} --seqlen {settings.seqlen}"
    return f"the pruned model is saved; the same command resumes, and so does: {measure}"


def _after_interrupt(settings: Experiment) -> str:
    if settings.save_model and settings.prune_method:
        return "the same command resumes after the last finished block"
    return "the same command starts again; with --save_model it would resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    console = Console(quiet=not processes.is_main())
    return command(Experiment, partial(_run, console=console), argv, PARSER, processes=True)


def _run(settings: Experiment, console: Console) -> None:
    try:
        processes.join()
        pipeline.check_used(settings)
        run(settings, console)
        processes.leave()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_after_interrupt(settings)) from None


if __name__ == "__main__":
    sys.exit(main())
