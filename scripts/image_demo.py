"""Train two small classifiers of digits, prune them in all ways, print accuracies: what scripts/image_demo.sh runs."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from image_classifiers import data, main, models
from image_classifiers.evaluation import accuracy
from lib import UserError, results

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("magnitude", "magnitude_ww", "wanda", "wanda_ww")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
SIZE = 8
# timm's own architectures, made small: what differs from the named one.
SMALL = {
    "vit": ("deit_tiny_patch16_224", {"img_size": SIZE, "patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4}),
    "convnext": (
        "convnext_atto",
        {"patch_size": 1, "dims": (32, 64, 96, 128), "depths": (2, 2, 2, 2), "kernel_sizes": 3},
    ),
}
EPOCHS, BATCH, RATE, DECAY = 40, 32, 2e-3, 0.05
LEAST = 95.0  # per cent of the test images


def train(name: str, folder: Path, seed: int = 0) -> float:
    """Train the small model ``name`` from scratch, seeded, write it to ``folder``, and return its test accuracy."""
    import timm

    torch.set_num_threads(1)  # these matrices are too small to share; the same weights on every machine
    torch.manual_seed(seed)
    architecture, changes = SMALL[name]
    model = timm.create_model(architecture, num_classes=10, **changes)
    transform = data.evaluation_transform(SIZE, None, data.MEAN_STD[True])
    training, test = (
        data.Prepared(images, range(len(images.items)), transform)
        for images in (data.digits(None, None, train=True), data.digits(None, None, train=False))
    )
    ((pixels, labels),) = data.batches(training, len(training), workers=0)  # 1,347 small images: one tensor
    steps = len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * steps, pct_start=0.2)
    model.train()
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"  epoch {epoch + 1}/{EPOCHS}: loss {loss.item():.4f}", flush=True)
    found = accuracy(model.eval(), data.batches(test, 150, 0)).top1
    if found < LEAST:
        raise UserError(
            f"the {name} reached {found:.2f} % and {LEAST} % are wanted; raise EPOCHS in scripts/image_demo.py"
        )
    models.save(model, SIZE, folder)
    return found


def prune_all(folder: Path, epsilon: str, save: Path) -> tuple[dict, dict]:
    """Return the record of the dense model, and those of the pruned ones by (method, sparsity)."""
    setting = f"--model {folder} --data_set digits --nsamples 1024 --num_workers 0 --epsilon {epsilon}".split()
    setting += ["--metric_cache", str(save / "metric_cache")]
    quiet = Console(quiet=True)
    parse = main.make_parser().parse_args
    dense = main.run(parse([*setting, "--save_dir", str(save / "dense")]), quiet)
    records = {}
    for method in METHODS:
        for sparsity in SPARSITIES:
            where = ["--save_dir", str(save / method)]  # the published file names do not hold the method
            args = parse([*setting, *where, "--prune_metric", method, "--sparsity", str(sparsity)])
            records[method, sparsity] = main.run(args, quiet)
    return dense, records


def show(name: str, dense: dict, records: dict) -> None:
    table = Table(title=f"{name}: top-1 % of {dense['accuracy']['images']} test images", title_justify="left")
    table.add_column("method")
    for sparsity in SPARSITIES:
        table.add_column(f"{sparsity:.0%}", justify="right")
    table.add_row("dense", *[f"{dense['accuracy']['top1']:.2f}"] * len(SPARSITIES))
    for method in METHODS:
        table.add_row(method, *(f"{records[method, s]['accuracy']['top1']:.2f}" for s in SPARSITIES))
    Console().print(table)


def plot(found: dict[str, tuple[dict, dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4), sharey=True, squeeze=False)
    for axis, (name, (dense, records)) in zip(axes[0], found.items(), strict=True):
        axis.axhline(dense["accuracy"]["top1"], color="grey", linestyle=":", label="dense")
        for method in METHODS:
            line = "-" if method.endswith("_ww") else "--"
            axis.plot(
                SPARSITIES, [records[method, s]["accuracy"]["top1"] for s in SPARSITIES], line, marker="o", label=method
            )
        axis.set(title=f"{name} on scikit-learn's digits", xlabel="sparsity of the blocks")
    axes[0][0].set_ylabel("top-1 accuracy, %")
    axes[0][0].legend()
    figure.tight_layout()
    results.save_figure(figure, path, dpi=120)


def demo(epsilon: str, save: Path) -> None:
    found = {}
    for name in SMALL:
        folder = ROOT / "image_classifiers" / "weights" / f"digits-{name}"
        if not folder.is_dir():
            print(f"training a small {name}, once", flush=True)
            print(f"  test accuracy {train(name, folder):.2f} %", flush=True)
        print(f"pruning {folder.name}: {len(METHODS)} methods, {len(SPARSITIES)} sparsities", flush=True)
        found[name] = prune_all(folder, epsilon, save / name)
        show(name, *found[name])
    plot(found, save / "accuracy.png")
    print(f"written: {save}/accuracy.png; the figures of every run: {save}/{{{','.join(SMALL)}}}/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="image_demo.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--epsilon", default="0.2", metavar="E", help="half width of the map (default: 0.2)")
    parser.add_argument(
        "--save", default="results/image_demo", metavar="DIR", help="where it goes (default: results/image_demo)"
    )
    args = parser.parse_args()
    main.quiet()
    try:
        demo(args.epsilon, Path(args.save))
    except UserError as error:
        print(f"image_demo.sh: error: {error}", file=sys.stderr)
        sys.exit(2)
