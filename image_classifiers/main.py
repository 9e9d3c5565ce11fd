"""Pruning of an image classifier, layer by layer, and its accuracy: python image_classifiers/main.py --help"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

from rich.console import Console

from image_classifiers import experiment, models
from image_classifiers.evaluation import Accuracy, accuracy
from image_classifiers.experiment import Prepared
from image_classifiers.settings import Evaluation, ImageExperiment, Images
from lib.cli.command import command, make_parser
from lib.cli.settings import Task
from lib.core.errors import UserError
from lib.pruning import walk
from lib.run import report
from lib.run.pipeline import draw_prices, make_plan, model_folder, priced
from lib.run.record import Record

log = logging.getLogger("main")

PARSER = make_parser(
    ImageExperiment,
    "image_classifiers/main.py",
    "Prune a ViT, DeiT or ConvNeXt and measure its accuracy. Without --prune_metric: the dense model's.",
    "example: python image_classifiers/main.py --model convnext_base --data_path IMAGENET --resume WEIGHTS "
    "--prune_metric wanda_ww --sparsity 0.8 --save_dir OUT --WW_metric alpha_mid --epsilon 0.2",
)


def run(settings: ImageExperiment, console: Console) -> dict:
    """Carry out the run step by step and return its record."""
    task = settings.task()
    record = Record(Path(settings.save), task.run)

    with record.stage("prepare"):  # everything that can be checked without the weights
        known = experiment.prepare(settings, task)
        record.content |= experiment.described(settings, task, known)

    with record.stage("load"):
        model = models.load(known.source, settings.resume, known.size, settings.nb_classes).to(known.device)
        experiment.warn_of_normalisation(settings, model)
        parts = models.find_parts(model)
        record.content["dense_zeros"] = parts.pruned.sparsity()

    read = experiment.reader(settings)
    with record.stage("evaluate dense"):
        found = accuracy(model, read(known.sets.test), settings.use_amp)
        record.content["dense"] = found._asdict()

    if task.pruner:
        enter = partial(experiment.enter_blocks, settings, parts, known.sets.calibration)
        with record.stage("measure"):
            prices = experiment.find_prices(settings, task, known, parts, enter)
            values = prices.ratios if prices else experiment.measure_values(settings, task, known, parts, enter)
            record.content |= priced(prices)
        report.show_prices(console, prices, "images", "image")
        draw_prices(settings, task, prices)
        with record.stage("allocate"):
            plan = make_plan(settings, task, parts.pruned.layers, values)
        with record.stage("prune"):
            inputs = enter() if task.pruner.statistic else None
            record.rows = walk.walk(parts.pruned, plan, task.pruner, inputs, values, settings.statistics)

    with record.explain_failure(partial(resume, settings, record)):
        record.content["sparsity"] = parts.pruned.sparsity()
        unsaved = save(settings, task, known, parts, record)  # and the results so far, before anything else can fail
        if task.pruner:
            with record.stage("evaluate"):
                found = accuracy(model, read(known.sets.test), settings.use_amp)
        record.content["accuracy"] = found._asdict()
        record.files[f"{task.target}.txt"] = sentence(found)
        record.write(complete=unsaved is None)

    show(settings, task, record, console)
    if unsaved:
        raise unsaved
    return record.whole()


def save(
    settings: ImageExperiment, task: Task, known: Prepared, parts: models.Parts, record: Record
) -> UserError | None:
    """Write the pruned model, then the results so far, even if the model could not be written.

    An error that the user can fix is returned instead of raised, since the accuracy can still be measured.
    """
    if not task.pruner:
        return None
    try:
        if settings.save_model:
            folder = model_folder(settings, task)
            with record.stage("save"):
                models.save(parts.pruned.model, known.size, folder)
                walk.check_saved(folder, parts.pruned, record.content["sparsity"])
            record.content["saved_model"] = str(folder)
    except UserError as error:
        log.error("%s; the accuracy is measured all the same", error)
        return error
    finally:
        record.write()
    return None


def resume(settings: ImageExperiment, record: Record) -> str:
    """Return what to do after a failure: evaluate the saved model, or start again."""
    saved = record.content["saved_model"]
    if saved is None:
        advice = " (--save_model DIR would keep the model)" if record.rows and not settings.save_model else ""
        return f"the same command starts again{advice}"
    words = ["--model", saved]
    for name in (*Images.__annotations__, *Evaluation.__annotations__, "device"):
        if name in settings.given and name not in ("nsamples", "published_calibration"):
            words += [f"--{settings.spelling(name)}", str(getattr(settings, name))]
    return f"the pruned model is saved; measure it with: python image_classifiers/main.py {shlex.join(words)}"


def sentence(found: Accuracy) -> str:
    """Return the published line."""
    return f"Accuracy of the network on {found.images} test images: {found.top1:.5f}%\n"


def show(settings: ImageExperiment, task: Task, record: Record, console: Console) -> None:
    """Print the run's figures and where they were written."""
    content, stages = record.content, record.stages.values()

    def row(method: str, target: float, sparsity: float, found: dict, seconds: str) -> tuple[str, ...]:
        return method, f"{target:g}", f"{sparsity:.4f}", f"{found['top1']:.2f}", f"{found['top5']:.2f}", seconds

    rows = [row("dense", 0, content["dense_zeros"], content["dense"], "")]
    if task.pruner:
        seconds = f"{sum(stage['seconds'] for stage in stages):.1f}"
        rows.append(row(task.method, task.target, content["sparsity"], content["accuracy"], seconds))
    title = f"{content['model']['given']}: {content['accuracy']['images']} test images"
    report.show(console, title, ("method", "target", "sparsity", "top-1 %", "top-5 %", "seconds"), rows)
    share = content["model"]["prunable"] / content["model"]["parameters"]
    report.line(console, f"sparsity: of the blocks' matrices, {share:.1%} of the model's parameters")
    report.line(console, f"written:  {settings.save}/{task.target}.txt, {settings.save}/*_{task.run}.*")
    if content["saved_model"]:
        report.line(console, f"model:    {content['saved_model']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    advice = "lower --batch_size, or add --hidden_device cpu"
    return command(ImageExperiment, partial(_run, console=Console()), argv, PARSER, out_of_memory=advice)


def _run(settings: ImageExperiment, console: Console) -> None:
    run(settings, console)


if __name__ == "__main__":
    sys.exit(main())
