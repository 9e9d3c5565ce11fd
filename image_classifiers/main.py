"""Prune an image classifier layer by layer and measure its accuracy: python image_classifiers/main.py --help"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import torch
from rich.console import Console
from rich.table import Table

from image_classifiers import data, models, pruning
from image_classifiers.evaluation import Accuracy, accuracy
from lib import UserError, allocation, metrics, prune, pruners, registry, results
from main import Parser, quiet, true_or_false

log = logging.getLogger("main")

# Those that need no more than the matrices' shapes or --WW_metric.
ALLOCATIONS = {a: how for a, how in allocation.ALLOCATIONS.items() if how.wants in (None, "metric") and a != "atp"}
METHODS = [f"{p}_{a}" if a else p for a in ALLOCATIONS for p in pruning.IMAGE_PRUNERS]

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
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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

    add = parser.add_argument_group("allocation (methods with _ww)").add_argument
    add("--WW_metric", default="alpha_mid", metavar="METRIC", help=f"{{{','.join(metrics.METRICS)}}} of each matrix")
    cache = ("--metric_cache", "--ww_metric_cache")  # the second is what errors of the cache speak of
    add(*cache, default="./metric_cache", metavar="DIR", help="the metric is kept in DIR/<model>")
    add(
        "--epsilon",
        type=float,
        default=0.2,
        metavar="E",
        help="half width of the map from metric to sparsity, in [0, 1]",
    )

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
    def run(self) -> str:
        return f"{self.method}_sparsity_{self.target}"


def check_args(args: argparse.Namespace) -> Task:
    """Find every contradiction that needs neither model nor images, and return what is asked for."""
    registry.check_name("--data_set", args.data_set, data.DATASETS)
    registry.check_name("--propagate", args.propagate, prune.PROPAGATE)
    registry.check_name("--WW_metric", args.WW_metric, metrics.METRICS)
    if not 0 <= args.sparsity < 1:
        raise UserError(f"--sparsity {args.sparsity}: must be at least 0 and below 1")
    if not 0 <= args.epsilon <= 1:
        raise UserError(f"--epsilon {args.epsilon}: must be between 0 and 1")
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
    if task.pruner and task.pruner.statistic:
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


def run(args: argparse.Namespace, console: Console) -> dict:
    """Do what ``args`` ask for, in the order in which it happens, and return the run's record."""
    task = check_args(args)
    ignored = [flag for flag in TRAINING_FLAGS if hasattr(args, flag)]
    if ignored:
        log.warning("flags of the published training script, which do nothing here: --%s", ", --".join(ignored))
    save = Path(args.save_dir)
    results.prepare("--save_dir", save)
    stages = results.Stages()

    # Whatever can be known without the weights is found out first.
    with stages.stage("images"):
        source = models.locate(args.model)
        skeleton, size = models.skeleton(source, args.input_size, args.nb_classes)
        cache = Path(args.metric_cache) / source.label
        if task.allocation == "ww":
            metrics.read_cache(cache, args.WW_metric, source.label, models.find_parts(skeleton).measured)
            results.prepare("--metric_cache", cache)
        target_folder = Path(args.save_model or "") / f"{task.method}_{task.target}"
        if args.save_model:
            need = 4 * sum(p.numel() for p in skeleton.parameters())
            results.prepare("--save_model", target_folder.parent, need)
        sets = open_images(args, task, size, skeleton.num_classes)

    with stages.stage("load"):
        model = models.load(source, args.resume, size, args.nb_classes)
        _warn_of_normalisation(model, args)
        device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        parts = models.find_parts(model.to(device))
    workers = min(10, os.cpu_count() or 1) if args.num_workers is None else args.num_workers

    def read(prepared: data.Prepared) -> Iterator:
        return data.batches(prepared, args.batch_size, workers)

    dense_zeros = sum(prune.count_zeros(parts.blocks, parts.pruned))
    with stages.stage("evaluate dense"):
        dense = accuracy(model, read(sets.test), args.use_amp)

    rows, values, after = [], None, dense
    if task.pruner:
        if task.allocation == "ww":
            with stages.stage("metric"):
                values = metrics.load_or_measure(
                    cache, args.WW_metric, source.label, parts.measured, parts.blocks
                ).values
        how = ALLOCATIONS[task.allocation]
        flags = {"epsilon": args.epsilon, "mapping": "layer_wise"}
        ratios = how.share(parts.pruned, task.target, values, **{name: flags[name] for name in how.flags})
        plan = allocation.SparsityPlan(task.target, ratios)
        with stages.stage("prune"):
            inputs = None
            if sets.calibration:
                inputs = pruning.block_inputs(model, parts.blocks, read(sets.calibration), args.hidden_device)
            rows = prune.prune_blocks(parts.blocks, parts.pruned, plan, task.pruner, inputs, values, args.propagate)
            del inputs
        with stages.stage("evaluate"):
            after = accuracy(model, read(sets.test), args.use_amp)

    total = sum(layer.module.weight.numel() for layer in parts.pruned)
    measured = sum(prune.count_zeros(parts.blocks, parts.pruned)) / total
    if args.save_model:
        with stages.stage("save"):
            models.save(model, size, target_folder)
            written = prune.checkpoint_sparsity(target_folder, [layer.name for layer in parts.pruned])
            if written != measured:
                raise RuntimeError(f"{target_folder}: holds a sparsity of {written}, the model has {measured}")
    parameters = sum(p.numel() for p in model.parameters())
    record = {
        "complete": True,
        "method": task.method,
        "target_sparsity": task.target,
        "sparsity": measured,
        "dense_zeros": dense_zeros / total,
        "dense": dense._asdict(),
        "accuracy": after._asdict(),
        "model": source._asdict()
        | {"parameters": parameters, "prunable": total, "input_size": size, "device": str(device)},
        "calibration": len(sets.calibration) if sets.calibration else None,
        "saved_model": str(target_folder) if args.save_model else None,
        "stages": stages.table,
        "flags": vars(args),
    }
    files = {f"run_{task.run}.json": results.run_text(record), f"{task.target}.txt": sentence(after)}
    if rows:
        files[f"layers_{task.run}.tsv"] = results.layers_text(rows)
    if (save / f"{task.target}.txt").exists() and results.read_run(
        save, task.run
    ) is None:  # as published: no method in it
        log.warning("%s/%s.txt of another method is replaced; its JSON stays", save, task.target)
    results.write_files(save, files)
    _print_table(console, record, save, task)
    return record


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
