"""Show a model's metric in pictures: python scripts/esd_report.py --model smollm2-135m"""

import argparse
import logging
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import main as program
from lib import UserError, allocation, metrics, models, results
from lib.esd import NoFit, PowerLaw, fit_tail, peak_candidates, spectrum
from lib.models import PrunableLayer, resident

log = logging.getLogger("main")
MOST_TICKS = 40  # on an axis of blocks


class Report(NamedTuple):
    """What the pictures are about: ``values`` of the ``metric`` and planned ``ratios``, by layer name."""

    model: str
    metric: str
    layers: list[PrunableLayer]
    values: dict[str, float]
    ratios: dict[str, float]
    title: str  # of the plan


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="esd_report.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="as for main.py")
    add("--cache_dir", default="llm_weights", metavar="DIR", help="as for main.py")
    add("--dtype", default="auto", help="as for main.py")
    add("--ww_metric", default="alpha_peak", metavar="METRIC", help="as for main.py")
    add("--ww_metric_cache", metavar="DIR", help="as for main.py")
    add("--esd_driver", default="exact", help="as for main.py")
    add("--sparsity_ratio", type=float, default=0.7, metavar="S", help="of the plan that is shown, a fraction")
    add("--epsilon", type=float, default=0.3, metavar="E", help="of the plan that is shown")
    add("--mapping_type", default="block_wise", metavar="TYPE", help="of the plan that is shown")
    add(
        "--layers",
        metavar="A,B",
        help="names of layers whose spectra are drawn (default: of the smallest, the middle and the largest metric)",
    )
    add("--out", default="results/esd_report", metavar="DIR", help="where the report goes")
    return parser


def report(args: argparse.Namespace) -> Path:
    """Write the report and return its page."""
    flags = ["--model", args.model, "--cache_dir", args.cache_dir, "--dtype", args.dtype, "--ww_metric", args.ww_metric]
    flags += [
        "--esd_driver",
        args.esd_driver,
        "--sparsity_ratio",
        str(args.sparsity_ratio),
        "--epsilon",
        str(args.epsilon),
    ]
    flags += ["--mapping_type", args.mapping_type, "--prune_method", "magnitude_ww"]
    program.check_args(program.make_parser().parse_args(flags))
    out = Path(args.out)
    results.prepare("--out", out)
    source = models.locate(args.model, args.cache_dir)
    known = [layer.name for layer in models.prunable_layers(models.load_skeleton(source))]
    chosen = [] if args.layers is None else [_full_name(name, known) for name in args.layers.split(",")]
    model = models.load_llm(source, args.dtype)
    blocks, layers = models.find_blocks(model)[1], models.prunable_layers(model)
    folder = program.metric_folder(args, source.name)
    settings = metrics.Settings(args.esd_driver)
    values = metrics.load_or_measure(folder, args.ww_metric, source.name, layers, blocks, settings).values
    ratios = allocation.heavy_tailed(layers, args.sparsity_ratio, values, args.epsilon, args.mapping_type)
    plan = f"sparsity {args.sparsity_ratio:g}, epsilon {args.epsilon:g}, {args.mapping_type}"
    about = Report(source.name, args.ww_metric, layers, values, ratios, plan)
    chosen = chosen or _typical(values)

    out.mkdir(parents=True, exist_ok=True)
    _write_table(out / "layers.tsv", about)
    results.save_figure(draw_blocks(about), out / "blocks.png", dpi=130)
    results.save_figure(draw_heat_map(about), out / "heat_map.png", dpi=130)
    by_name = {layer.name: layer for layer in layers}
    results.save_figure(draw_spectra([by_name[name] for name in chosen], blocks, args), out / "spectra.png", dpi=130)
    _write_page(out / "report.md", about)
    return out / "report.md"


def _full_name(name: str, known: Sequence[str]) -> str:
    found = [full for full in known if full == name or full.endswith("." + name)]
    if len(found) != 1:
        what = f"{len(found)} layers end in that" if found else "there is no such layer"
        raise UserError(f"--layers {name}: {what}; give names such as {known[0]}")
    return found[0]


def _typical(values: dict[str, float]) -> list[str]:
    ordered = sorted(values, key=values.get)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _by_block(about: Report, numbers: dict[str, float]) -> list[float]:
    """Return the mean over each block's matrices, weighted by size for ratios."""
    means = []
    for _, group in groupby(about.layers, key=lambda layer: layer.block):
        group = list(group)
        sizes = [layer.module.weight.numel() if numbers is about.ratios else 1 for layer in group]
        means.append(float(np.average([numbers[layer.name] for layer in group], weights=sizes)))
    return means


def draw_blocks(about: Report):
    """Draw each block's mean metric and its planned ratio as bars, one above the other."""
    from matplotlib.figure import Figure

    metric, ratio = _by_block(about, about.values), _by_block(about, about.ratios)
    figure = Figure(figsize=(max(6.0, 2.0 + 0.16 * len(metric)), 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(range(len(metric)), metric, color="tab:blue")
    upper.set_ylabel(f"mean {about.metric}")
    upper.set_title(f"{about.model}: {about.title}")
    lower.bar(range(len(ratio)), ratio, color="tab:orange")
    lower.axhline(np.average(ratio), color="black", linewidth=0.8, linestyle="--")
    lower.set_ylabel("planned sparsity")
    lower.set_ylim(0, 1)
    lower.set_xlabel("block")
    _tick_blocks(lower, len(metric))
    return figure


def _tick_blocks(axes, count: int) -> None:
    step = -(-count // MOST_TICKS)
    axes.set_xticks(range(0, count, step))
    axes.tick_params(axis="x", labelsize=8)


def draw_heat_map(about: Report):
    """Draw the metric, a row for each type of matrix and a column for each block."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in about.layers))
    count = 1 + max(layer.block for layer in about.layers)
    grid = np.full((len(kinds), count), np.nan)
    for layer in about.layers:
        grid[kinds.index(layer.name.rpartition(".")[2]), layer.block] = about.values[layer.name]
    figure = Figure(figsize=(max(6.0, 2.5 + 0.16 * count), 1.2 + 0.35 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    low, high = np.nanpercentile(grid, [1, 99])  # one outlier would leave the rest in one colour
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title(f"{about.model}: {about.metric}")
    _tick_blocks(axes, count)
    figure.colorbar(image, ax=axes, label=about.metric, extend="both")
    return figure


def draw_spectra(layers: Sequence[PrunableLayer], blocks, args: argparse.Namespace):
    """Draw the density of each layer's eigenvalues over log axes, and its fitted tail."""
    from matplotlib.figure import Figure

    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(layers) :] if len(layers) < rows * columns else ():
        axes.set_axis_off()
    for layer, axes in zip(layers, grid, strict=False):
        with resident(blocks[layer.block]):
            eigs = spectrum(layer.module.weight, args.esd_driver).eigs.cpu()
        eigs = eigs[eigs > 0]
        bins = np.logspace(np.log10(eigs[0].item()), np.log10(eigs[-1].item()), 60)
        bins[[0, -1]] *= 1 - 1e-6, 1 + 1e-6  # rounding would leave the largest outside
        axes.hist(eigs.numpy(), bins=bins, density=True, color="tab:blue", alpha=0.6)
        fit = _fit(eigs, args.ww_metric)
        if fit is not None:
            tail = eigs[fit.index :]
            start, share = tail[0].item(), len(tail) / len(eigs)
            x = np.logspace(np.log10(start), np.log10(eigs[-1].item()), 50)
            law = share * (fit.alpha - 1) / start * (x / start) ** -fit.alpha
            axes.plot(x, law, color="tab:red", label=f"alpha {fit.alpha:.2f}")
            axes.axvline(start, color="black", linewidth=0.8, linestyle="--", label="start of the tail")
            axes.legend(fontsize=8, loc="lower left")
        axes.set(xscale="log", yscale="log", xlabel="eigenvalue of W'W", ylabel="density")
        axes.set_title(layer.name, fontsize=8)
        _tick_log(axes, (eigs[-1] / eigs[0]).item())
    return figure


def _tick_log(axes, span: float) -> None:
    """Label powers of ten, or 1 2 5 where the axis spans few of them; no labels between, which would overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_minor_formatter(NullFormatter())
    if span < 50:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _fit(eigs: torch.Tensor, metric: str) -> PowerLaw | None:
    """Return the fit that the metric is about; that of alpha_peak for a metric that fits nothing."""
    try:
        if metric == "alpha_mid":
            return fit_tail(eigs, torch.tensor([len(eigs) // 2]))
        if metric in ("alpha", "alpha_weighted", "log_alpha_norm"):
            return fit_tail(eigs, torch.arange(len(eigs) - 1))
        return fit_tail(eigs, peak_candidates(eigs))
    except NoFit as error:
        log.warning("no tail is drawn: %s", error)
        return None


def _write_table(path: Path, about: Report) -> None:
    lines = [f"name\tblock\tshape\t{about.metric}\tplanned_ratio"]
    for layer in about.layers:
        shape = "x".join(map(str, layer.module.weight.shape))
        lines.append(
            f"{layer.name}\t{layer.block}\t{shape}\t{about.values[layer.name]:.6f}\t{about.ratios[layer.name]:.6f}"
        )
    results.write_atomically(path, "\n".join(lines) + "\n")


def _write_page(path: Path, about: Report) -> None:
    lowest, _, highest = _typical(about.values)
    found = np.array(list(about.values.values()))
    results.write_atomically(path, f"""# {about.model}: {about.metric}

{len(about.layers)} matrices; {about.metric} from {found.min():.3f} ({lowest}) to {found.max():.3f} ({highest}), mean
{found.mean():.3f}.
Plan: {about.title}. Every matrix is in [layers.tsv](layers.tsv).

## Blocks

![mean metric and planned sparsity of each block](blocks.png)

## Types of matrix

![metric of each type of matrix in each block](heat_map.png)

## Spectra and fitted tails

![density of the eigenvalues](spectra.png)
""")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    program.quiet()
    try:
        print(f"written: {report(args)}")
    except UserError as error:
        print(f"esd_report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
