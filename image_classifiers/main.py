"""Prune an image classifier layer by layer and measure its accuracy: python image_classifiers/main.py --help"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import torch
from rich.console import Console
from rich.table import Table

from image_classifiers import data, models, pruning
from image_classifiers.evaluation import Accuracy, accuracy
from lib import UserError, allocation, metrics, prune, pruners, registry, results, scores
from lib.calibration import BlockInputs
from main import BLOCK_SCORES, METRICS, OWN_FLAGS, WEIGHT_SCORES, Parser, quiet, true_or_false

log = logging.getLogger("main")

METHODS = [f"{p}_{a}" if a else p for a in allocation.ALLOCATIONS for p in pruning.IMAGE_PRUNERS]

# Of the published parser, which was a training script's: understood, and without any effect.
TRAINING_FLAGS = (
    "aa auto_resume clip_grad color_jitter cutmix cutmix_minmax disable_eval dist_eval dist_on_itp dist_url drop_path "
    "enable_wandb epochs eval finetune head_init_scale layer_decay layer_scale_init_value local_rank log_dir lr min_lr "
    "mixup mixup_mode mixup_prob mixup_switch_prob model_ema model_ema_decay model_ema_eval model_ema_force_cpu "
    "model_key model_prefix momentum opt opt_betas opt_eps output_dir pin_mem project recount remode reprob resplit "
    "save_ckpt save_ckpt_freq save_ckpt_num smoothing start_epoch train_interpolation update_freq wandb_ckpt "
    "warmup_epochs warmup_steps weight_decay weight_decay_end world_size"
).split()


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="image_classifiers/main.py",
        description="Prune a ViT, DeiT or ConvNeXt and measure its accuracy. Without --prune_metric: the dense one's.",
        epilog="example: python image_classifiers/main.py --model convnext_base --data_path IMAGENET --resume WEIGHTS "
        "--prune_metric wanda_ww --sparsity 0.8 --save_dir OUT --WW_metric alpha_mid --epsilon 0.2",
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help=f"name that timm knows, or a folder written by --save_model; {models.SUPPORTED}")
    add("--resume", metavar="FILE", help="weights in timm's or their original layout (default: timm's own weights)")
    add("--input_size", type=int, metavar="N", help="side of the images, pixels (default: the model's own)")
    add("--nb_classes", type=int, metavar="N", help="classes of the model, a count (default: the model's own)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    add("--seed", type=int, default=0, help="of the calibration draws, an integer")

    add = parser.add_argument_group("data").add_argument
    add("--data_set", default="IMNET", metavar="SET", help=f"{{{','.join(data.DATASETS)}}}")
    add(
        "--data_path",
        metavar="DIR",
        help="IMNET: holds train/ and val/; image_folder: a folder per class, to calibrate",
    )
    add("--eval_data_path", metavar="DIR", help="image_folder only: images to test on, a folder per class")
    add("--nsamples", type=int, default=4096, metavar="N", help="calibration images, a count")
    add("--published_calibration", action="store_true", help="calibrate on augmented images, drawn with replacement")
    add("--batch_size", type=int, default=256, metavar="N", help="images at a time, a count")
    add("--num_workers", type=int, metavar="N", help="processes that read images (default: one a core, at most 10)")
    add("--crop_pct", type=float, metavar="P", help="share of an image that is kept (default: 224/256, as published)")
    switch = {"type": true_or_false, "nargs": "?", "const": True, "metavar": "{true,false}"}
    add("--imagenet_default_mean_and_std", default=True, **switch, help="of ImageNet, to normalise by; false: 0.5")

    add = parser.add_argument_group("pruning").add_argument
    add("--prune_metric", metavar="METHOD", help=f"{{{','.join(METHODS)}}}; _ww: layer-wise sparsity by --WW_metric")
    add("--sparsity", type=float, default=0.0, metavar="S", help="fraction of the blocks' weights to remove, in [0, 1)")
    add(
        "--propagate",
        default="dense",
        metavar="HOW",
        help=f"{{{','.join(prune.PROPAGATE)}}}: what calibration passes on",
    )
    add("--hidden_device", metavar="DEVICE", help="of hidden states; cpu saves GPU memory (default: the model's)")

    add = parser.add_argument_group(
        "allocation (methods with a suffix; of _ww what is not said otherwise)"
    ).add_argument
    add("--WW_metric", default="alpha_mid", metavar="METRIC", help=f"{{{','.join(METRICS)}}} of each matrix")
    cache = ("--metric_cache", "--ww_metric_cache")  # the second is what errors of the cache speak of
    add(*cache, default="./metric_cache", metavar="DIR", help="the metric is kept in DIR/<model>")
    add(
        "--epsilon",
        type=float,
        default=0.2,
        metavar="E",
        help="half width of the map from metric to sparsity, in [0, 1]",
    )

    add(
        "--owl_m", type=float, default=5.0, metavar="M", help="for _owl: outliers exceed M times the block's mean score"
    )
    add("--owl_lambda", type=float, default=0.08, metavar="L", help="for _owl: half width of the map, in [0, 1]")
    add("--dlp_alpha", type=float, default=0.15, metavar="A", help="for _dlp: half width of the map, in [0, 1]")
    add("--atp_beta", type=float, default=0.005, metavar="B", help="for _atp: from block to block, in [0, 1]")

    add = parser.add_argument_group("evaluation and output").add_argument
    add("--use_amp", default=False, **switch, help="evaluate in half precision (autocast)")
    add("--save_dir", default="results", metavar="DIR", help="where the run's figures are written")
    add("--save_model", metavar="DIR", help="write the pruned model to DIR/{method}_{sparsity}, for timm or --model")
    for flag in TRAINING_FLAGS:
        parser.add_argument(f"--{flag}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


class Task(NamedTuple):
    """What the flags ask for: names in registries, and the sparsity."""

    method: str  # "dense" without pruning
    pruner: pruners.Pruner | None
    allocation: str
    target: float

    @property
    def wants(self) -> str | None:
        """Return what the allocation wants to know of each layer."""
        return allocation.ALLOCATIONS[self.allocation].wants

    @property
    def run(self) -> str:
        return f"{self.method}_sparsity_{self.target}"


def check_args(args: argparse.Namespace) -> Task:
    """Find every contradiction that needs neither model nor images, and return what is asked for."""
    registry.check_name("--data_set", args.data_set, data.DATASETS)
    registry.check_name("--propagate", args.propagate, prune.PROPAGATE)
    registry.check_name("--WW_metric", args.WW_metric, METRICS)
    if not 0 <= args.sparsity < 1:
        raise UserError(f"--sparsity {args.sparsity}: must be at least 0 and below 1")
    for flag in ("epsilon", "owl_lambda", "dlp_alpha", "atp_beta"):
        if not 0 <= getattr(args, flag) <= 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be between 0 and 1")
    if not 0 < args.owl_m < math.inf:
        raise UserError(f"--owl_m {args.owl_m}: must be above 0")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UserError(f"--crop_pct {args.crop_pct}: must be above 0 and at most 1")
    for flag, least in (("nsamples", 1), ("batch_size", 1), ("input_size", 1), ("nb_classes", 2), ("num_workers", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    if args.eval_data_path and args.data_set != "image_folder":
        raise UserError(f"--eval_data_path with --data_set {args.data_set} does nothing; add --data_set image_folder")
    for flag in ("device", "hidden_device"):
        _check_device(flag, getattr(args, flag))
    if args.prune_metric is None:
        if args.sparsity:
            raise UserError(
                f"--sparsity {args.sparsity} without a method; add --prune_metric, one of: {', '.join(METHODS)}"
            )
        if args.save_model:
            raise UserError("--save_model without --prune_metric does nothing")
        return Task("dense", None, "", 0.0)
    method = registry.check_name("--prune_metric", args.prune_metric, METHODS)
    if not args.sparsity:
        raise UserError(f"--prune_metric {method} without a sparsity; add --sparsity")
    name, _, suffix = method.partition("_")
    for other, flags in OWN_FLAGS.items():
        idle = [flag for flag in flags if flag in getattr(args, "given", []) and suffix != other]
        if idle:
            raise UserError(f"--{idle[0]} does nothing with {method}; it is for the methods with _{other}")
    return Task(method, pruning.IMAGE_PRUNERS[name], suffix, args.sparsity)


def _check_device(flag: str, given: str | None) -> None:
    if given in (None, "auto" if flag == "device" else None):
        return
    try:
        torch.zeros(1, device=given)
    except (RuntimeError, AssertionError) as error:  # no such kind, none there, or torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--{flag} {given}: cannot be used ({reason}); say cpu") from error


class Sets(NamedTuple):
    """The images that a run reads; ``calibration`` is None for a pruner that wants none."""

    test: data.Prepared
    calibration: data.Prepared | None


def open_images(args: argparse.Namespace, task: Task, size: int, classes: int) -> Sets:
    """Return the images that the run reads, none of them read yet.

    Raises:
        UserError: they are not there, too few, or of other classes than the model's.
    """
    find = data.DATASETS[args.data_set]
    mean_std = data.MEAN_STD[args.imagenet_default_mean_and_std]
    plain = data.evaluation_transform(size, args.crop_pct, mean_std)
    found = find(args.data_path, args.eval_data_path, False)
    if len(found.classes) != classes:
        raise UserError(
            f"--data_set {args.data_set}: {len(found.classes)} classes of images, and the model has {classes}; "
            f"for a model that has {len(found.classes)}, add --nb_classes {len(found.classes)}"
        )
    calibration = None
    if task.pruner and (task.pruner.statistic or task.wants in BLOCK_SCORES):
        training = find(args.data_path, args.eval_data_path, True)
        if training.classes != found.classes:
            other = sorted(set(training.classes) ^ set(found.classes))
            raise UserError(
                f"--data_path {args.data_path}: calibration and test differ in their classes ({', '.join(other[:5])})"
            )
        indices = data.draw(training, args.nsamples, args.seed, replacement=args.published_calibration)
        random = args.published_calibration
        transform = data.augmenting_transform(size, mean_std) if random else plain
        calibration = data.Prepared(training, indices, transform, args.seed if random else None)
    return Sets(data.Prepared(found, range(len(found.items)), plain), calibration)


class Prepared(NamedTuple):
    """What is known before the weights are loaded."""

    source: models.Source
    size: int
    cache: Path
    saved: Path | None
    sets: Sets


def prepare(args: argparse.Namespace, task: Task) -> Prepared:
    """Find out whatever can be known without the weights, so that nothing is computed in vain."""
    results.prepare("--save_dir", Path(args.save_dir))
    source = models.locate(args.model)
    skeleton, size = models.skeleton(source, args.input_size, args.nb_classes)
    cache = Path(args.metric_cache) / source.label
    if task.wants == "metric":
        measured = models.find_parts(skeleton).measured
        if args.WW_metric in metrics.WEIGHTWATCHER and any(layer.module.weight.ndim > 2 for layer in measured):
            raise UserError(f"--WW_metric {args.WW_metric}: is about matrices, and {args.model} holds convolutions")
        metrics.read_cache(cache, args.WW_metric, source.label, measured)
        results.prepare("--metric_cache", cache)
    saved = Path(args.save_model) / f"{task.method}_{task.target}" if args.save_model else None
    if saved:
        results.prepare("--save_model", saved.parent, 4 * sum(p.numel() for p in skeleton.parameters()))
    return Prepared(source, size, cache, saved, open_images(args, task, size, skeleton.num_classes))


def run(args: argparse.Namespace, console: Console) -> dict:
    """Do what ``args`` ask for, in the order in which it happens, and return the run's record."""
    task = check_args(args)
    ignored = [flag for flag in TRAINING_FLAGS if hasattr(args, flag)]
    if ignored:
        log.warning("flags of the published training script, which do nothing here: --%s", ", --".join(ignored))
    stages = results.Stages()
    with stages.stage("images"):
        known = prepare(args, task)
    with stages.stage("load"):
        model = models.load(known.source, args.resume, known.size, args.nb_classes)
        _warn_of_normalisation(model, args)
        device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        parts = models.find_parts(model.to(device))
    workers = min(10, os.cpu_count() or 1) if args.num_workers is None else args.num_workers
    read = partial(data.batches, batch_size=args.batch_size, workers=workers)

    dense_zeros = sum(prune.count_zeros(parts.blocks, parts.pruned))
    with stages.stage("evaluate dense"):
        dense = after = accuracy(model, read(known.sets.test), args.use_amp)
    rows = []
    if task.pruner:
        calibrate = None
        if known.sets.calibration:

            def calibrate() -> BlockInputs:
                return pruning.block_inputs(model, parts.blocks, read(known.sets.calibration), args.hidden_device)

        rows = _prune(args, task, known, parts, calibrate, stages)
        with stages.stage("evaluate"):
            after = accuracy(model, read(known.sets.test), args.use_amp)

    total = sum(layer.module.weight.numel() for layer in parts.pruned)
    measured = sum(prune.count_zeros(parts.blocks, parts.pruned)) / total
    if known.saved:
        with stages.stage("save"):
            models.save(model, known.size, known.saved)
            prune.check_saved(known.saved, parts.pruned, measured)
    about = {"parameters": sum(p.numel() for p in model.parameters()), "prunable": total}
    record = {
        "complete": True,
        "method": task.method,
        "target_sparsity": task.target,
        "sparsity": measured,
        "dense_zeros": dense_zeros / total,
        "dense": dense._asdict(),
        "accuracy": after._asdict(),
        "model": known.source._asdict() | about | {"input_size": known.size, "device": str(device)},
        "calibration": len(known.sets.calibration) if known.sets.calibration else None,
        "saved_model": str(known.saved) if known.saved else None,
        "stages": stages.table,
        "flags": vars(args),
    }
    _write(Path(args.save_dir), task, record, after, rows)
    _print_table(console, record, Path(args.save_dir), task)
    return record


def _prune(
    args: argparse.Namespace,
    task: Task,
    known: Prepared,
    parts: models.Parts,
    calibrate: Callable[[], BlockInputs] | None,
    stages: results.Stages,
) -> list[results.LayerReport]:
    values, folder = None, known.cache
    with stages.stage("metric"):
        if task.wants == "metric":
            metric = metrics.load_or_measure(folder, args.WW_metric, known.source.label, parts.measured, parts.blocks)
            values = metric.values
        elif task.wants in BLOCK_SCORES:
            outliers = partial(scores.outlier_ratio, multiple=args.owl_m)
            number = {"outlier_ratio": outliers, "median_score": scores.median_score}[task.wants]
            values = prune.block_scores(parts.blocks, parts.pruned, calibrate(), number)
        elif task.wants:
            values = scores.shares_below(parts.blocks, parts.pruned, task.target, WEIGHT_SCORES[task.wants])
    how = allocation.ALLOCATIONS[task.allocation]
    flags = vars(args) | {"mapping": "layer_wise"}  # a ratio for each matrix, as published
    ratios = how.share(parts.pruned, task.target, values, **{name: flags[name] for name in how.flags})
    plan = allocation.SparsityPlan(task.target, ratios)
    with stages.stage("prune"):
        inputs = calibrate() if task.pruner.statistic else None
        return prune.prune_blocks(parts.blocks, parts.pruned, plan, task.pruner, inputs, values, args.propagate)


def _write(save: Path, task: Task, record: dict, found: Accuracy, rows: list[results.LayerReport]) -> None:
    files = {f"run_{task.run}.json": results.run_text(record), f"{task.target}.txt": sentence(found)}
    if rows:
        files[f"layers_{task.run}.tsv"] = results.layers_text(rows)
    if (save / f"{task.target}.txt").exists() and results.read_run(save, task.run) is None:
        log.warning("%s/%s.txt of another method is replaced; its JSON stays", save, task.target)
    results.write_files(save, files)


def sentence(found: Accuracy) -> str:
    """Return the published line."""
    return f"Accuracy of the network on {found.images} test images: {found.top1:.5f}%\n"


def _warn_of_normalisation(model: torch.nn.Module, args: argparse.Namespace) -> None:
    own, ours = tuple(model.pretrained_cfg["mean"]), data.MEAN_STD[args.imagenet_default_mean_and_std][0]
    if not args.resume and own != ours:
        other = not args.imagenet_default_mean_and_std
        mend = f"; add --imagenet_default_mean_and_std {str(other).lower()}" if own == data.MEAN_STD[other][0] else ""
        log.warning("images are normalised by a mean of %s, and these weights were trained with %s%s", ours, own, mend)


def _print_table(console: Console, record: dict, save: Path, task: Task) -> None:
    table = Table(title=f"{record['model']['given']}: {record['accuracy']['images']} test images", title_justify="left")
    for heading in ("method", "target", "sparsity", "top-1 %", "top-5 %", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    seconds = sum(stage["seconds"] for stage in record["stages"].values())
    dense = record["dense"]
    table.add_row("dense", "0", f"{record['dense_zeros']:.4f}", f"{dense['top1']:.2f}", f"{dense['top5']:.2f}", "")
    if task.pruner:
        after = record["accuracy"]
        figures = (f"{task.target:g}", f"{record['sparsity']:.4f}", f"{after['top1']:.2f}", f"{after['top5']:.2f}")
        table.add_row(task.method, *figures, f"{seconds:.1f}")
    console.print(table)
    share = record["model"]["prunable"] / record["model"]["parameters"]
    console.print(f"sparsity: of the blocks' matrices, {share:.1%} of the model's parameters", highlight=False)
    console.print(f"written:  {save}/{task.target}.txt, {save}/*_{task.run}.*", highlight=False)
    if record["saved_model"]:
        console.print(f"model:    {record['saved_model']}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for something that the user can mend."""
    args = make_parser().parse_args(argv)
    quiet()
    logging.getLogger("image_classifiers").setLevel(logging.INFO)
    try:
        run(args, Console())
    except UserError as error:
        print(f"image_classifiers/main.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
