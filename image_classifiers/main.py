"""Pruning of an image classifier, layer by layer, and its accuracy: python image_classifiers/main.py --help"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

from image_classifiers.settings import ImageExperiment
from image_classifiers.subject import Classifier
from lib.cli.command import command, make_parser
from lib.cli.task import Task
from lib.run import checks, pipeline, report
from lib.run.record import Record, explain_failure

PARSER = make_parser(
    ImageExperiment,
    "image_classifiers/main.py",
    "Prune a ViT, DeiT or ConvNeXt and measure its accuracy. Without --prune_metric: the dense model's.",
    "example: python image_classifiers/main.py --model convnext_base --data_path IMAGENET --resume WEIGHTS "
    "--prune_metric wanda_ww --sparsity 0.8 --save_dir OUT --WW_metric alpha_mid --epsilon 0.2",
)


def run(settings: ImageExperiment) -> dict:
    """Carry out the run step by step and return its record."""
    task, flags = settings.task(), settings.flags()
    subject, record = Classifier(), Record(Path(settings.save), task.run)

    with record.stage("prepare"):  # everything that can be checked without the weights
        targets = settings.folders(task)
        checks.check_output(record.folder, task.run, targets, flags, settings.paths(), mark="config.json")
        subject.prepare(settings, task)
        figures = dict.fromkeys(("sparsity", "dense_zeros", "dense", "accuracy", "saved_model"))
        record.content |= {"method": task.method, "target_sparsity": task.target, "flags": flags} | figures
        record.content |= subject.describe()

    with record.stage("load"):
        subject.load()
        record.content["dense_zeros"] = subject.weights.sparsity()

    with record.stage("evaluate dense"):
        accuracy = subject.accuracy()
        record.content["dense"] = accuracy._asdict()

    if task.pruner:
        with record.stage("measure"):
            measurement, options = settings.measurement(subject.name), settings.price_options()
            values, search = pipeline.measure_values(subject, task, measurement, options)
        report.show_prices(record, search, "images", "image")
        with record.stage("allocate"):
            plan, _ = pipeline.allocate(subject, task, values)
        with record.stage("prune"):
            record.rows = pipeline.prune(subject, task, plan, values, settings.statistics)

    unsaved = None
    with explain_failure(partial(record.how_to_resume, "to measure it, give it as --model")):
        record.content["sparsity"] = sparsity = subject.weights.sparsity()
        if task.pruner:
            unsaved = pipeline.save(record, partial(subject.save, *targets, sparsity) if targets else None)
            with record.stage("evaluate"):
                accuracy = subject.accuracy()
        record.content["accuracy"] = accuracy._asdict()
        sentence = f"Accuracy of the network on {accuracy.images} test images: {accuracy.top1:.5f}%\n"
        record.files[f"{task.target}.txt"] = sentence  # both published
        record.write(complete=unsaved is None)

    show_accuracy(settings, task, record)
    if unsaved:
        raise unsaved
    return record.content


def show_accuracy(settings: ImageExperiment, task: Task, record: Record) -> None:
    """Print the run's figures and where they were written."""
    content, seconds = record.content, sum(stage["seconds"] for stage in record.stages.values())
    rows = [("dense", 0, content["dense_zeros"], content["dense"], "")]
    if task.pruner:
        rows.append((task.method, task.target, content["sparsity"], content["accuracy"], f"{seconds:.1f}"))
    cells = [
        (method, f"{target:g}", f"{sparsity:.4f}", f"{hits['top1']:.2f}", f"{hits['top5']:.2f}", time)
        for method, target, sparsity, hits, time in rows
    ]
    title = f"{content['model']['given']}: {content['accuracy']['images']} test images"
    report.show(title, ("method", "target", "sparsity", "top-1 %", "top-5 %", "seconds"), cells)
    share = content["model"]["prunable"] / content["model"]["parameters"]
    report.line(f"sparsity: of the blocks' matrices, {share:.1%} of the model's parameters")
    report.line(f"written:  {settings.save}/{task.target}.txt, {settings.save}/*_{task.run}.*")
    if content["saved_model"]:
        report.line(f"model:    {content['saved_model']}")


def main(argv: Sequence[str] | None = None) -> int:
    advice = "lower --batch_size, or add --hidden_device cpu"
    return command(ImageExperiment, run, argv, PARSER, out_of_memory=advice)


if __name__ == "__main__":
    sys.exit(main())
