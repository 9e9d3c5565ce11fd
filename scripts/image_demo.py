"""Image demonstration: two small digit classifiers trained, pruned with six methods, and compared in accuracy."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import product
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import table

from image_classifiers import data, main, models
from image_classifiers.settings import ImageExperiment
from image_classifiers.subject import accuracy
from lib.cli.command import command, make_parser, parse
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.lazy import pandas, torch
from lib.run import report

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("magnitude", "magnitude_ww", "magnitude_price", "wanda", "wanda_ww", "wanda_price")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
SIZE = 8
# timm's own architectures, made small: what differs from the named one.
SMALL = {
    "vit": ("deit_tiny_patch16_224", {"img_size": SIZE, "patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4}),
    "convnext": ("convnext_atto", {"patch_size": 1, "dims": (32, 64, 96, 128), "depths": (2,) * 4, "kernel_sizes": 3}),
}
EPOCHS = 40
BATCH = 32
RATE = 2e-3
DECAY = 0.05


@dataclass(kw_only=True)
class Demo(Flags):
    _title: ClassVar[str] = "demo"

    epsilon: float = flag(0.2, "half width of the map from alpha to sparsity, in [0, 1]", least=0, most=1, metavar="E")
    save: str = flag("results/image_demo", "where the figures are written", metavar="DIR")


PARSER = make_parser(Demo, "image_demo.sh", __doc__)


def train(name: str, folder: Path, seed: int = 0) -> float:
    """Train the small model ``name`` from scratch, seeded, write it to ``folder``, and return its test accuracy."""
    import timm

    torch.set_num_threads(1)  # these matrices are too small to share; the same weights on every machine
    torch.manual_seed(seed)
    architecture, changes = SMALL[name]
    model = timm.create_model(architecture, num_classes=10, **changes)
    transform = data.evaluation_transform(SIZE, None, data.MEAN_STD[True])
    training, test = (
        data.PreparedImages(images, range(len(images.items)), transform)
        for images in (data.digits(None, None, train=True), data.digits(None, None, train=False))
    )
    ((pixels, labels),) = data.batches(training, len(training), workers=0)  # 1,347 small images: one tensor
    steps = len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * steps, pct_start=0.2)
    model.train()
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"  epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.4f}", flush=True)
    top1 = accuracy(model.eval(), data.batches(test, 150, 0)).top1
    models.save_classifier(model, SIZE, folder)
    return top1


def prune_all(folder: Path, epsilon: float, save: Path) -> pandas.DataFrame:
    """Return a row per run, dense and pruned: pruner, allocation's suffix, target and test accuracy (``mean``, %)."""
    common = ["--model", str(folder), "--data_set", "digits", "--num_workers", "0"]
    alpha = ["--epsilon", str(epsilon), "--metric_cache", str(save / "metric_cache")]
    rows = []
    for method, sparsity in [("dense", 0.0), *product(METHODS, SPARSITIES)]:
        flags = [*common, "--save_dir", str(save / method)]  # the published file names do not hold the method
        flags += ["--nsamples", "1024", "--prune_metric", method, "--sparsity", str(sparsity)] if sparsity else []
        flags += alpha if method.endswith("_ww") else []
        with redirect_stdout(StringIO()):
            record = main.run(parse(ImageExperiment, flags, main.PARSER))
        pruner, _, suffix = method.partition("_")
        rows.append((pruner, suffix, sparsity, record["accuracy"]["top1"]))
    cells = pandas.DataFrame(rows, columns=["pruner", "suffix", "target", "mean"])
    cells["text"] = cells["mean"].map("{:.2f}".format)
    return cells.assign(model=f"{folder.name}, on scikit-learn's digits", extra="", deviation=math.nan)


def demo(settings: Demo) -> None:
    """Train the models if needed, prune them with all methods, and print and plot the accuracies."""
    save, panels = Path(settings.save), []
    files.check_writable("save", save)
    for name in SMALL:
        folder = ROOT / "image_classifiers" / "weights" / f"digits-{name}"
        if not folder.is_dir():
            print(f"training a small {name}, once", flush=True)
            print(f"  test accuracy {train(name, folder):.2f} %", flush=True)
        print(f"pruning {folder.name}: {len(METHODS)} methods, {len(SPARSITIES)} sparsities", flush=True)
        panels.append(prune_all(folder, settings.epsilon, save / name))
        (_, (dense,)), *pruned = panels[-1].groupby(["pruner", "suffix"], sort=False)["text"]
        rows = [("_".join(filter(None, method)), *accuracies) for method, accuracies in pruned]
        headings = ("method", *(f"{sparsity:.0%}" for sparsity in SPARSITIES))
        report.show(f"{name}: top-1 % of the test images, dense {dense}", headings, rows)
    table.plot(save / "accuracy.png", *panels, xlabel="top-1 accuracy, %", xscale="linear")
    print(f"written: {save}/accuracy.png; the figures of every run: {save}/{{{','.join(SMALL)}}}/")


def run(argv: Sequence[str] | None = None) -> int:
    return command(Demo, demo, argv, PARSER)


if __name__ == "__main__":
    sys.exit(run())
