"""Report of a model's metric in pictures: python scripts/esd_report.py --model smollm2-135m"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.cli.settings import Allocation, Experiment, Model
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import numpy, torch
from lib.models.layers import Layer
from lib.models.weights import Weights
from lib.run import pipeline
from lib.run.language import LanguageModel
from lib.spectra.measure import Settings as SpectraSettings
from lib.spectra.spectrum import NoFit, Spectrum, spectrum
from lib.spectra.tail import PowerLaw, fit_tail, peak_candidates

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("main")
MOST_TICKS = 40  # on an axis of blocks


@dataclass(kw_only=True)
class Plan(Flags):
    _title: ClassVar[str] = "report"

    sparsity_ratio: float = flag(0.7, "of the plan that is shown, a fraction", above=0, below=1, metavar="S")
    layers: str | None = flag(
        None,
        "names of layers whose spectra are drawn (default: of the smallest, the middle and the largest metric)",
        metavar="A,B",
    )
    save: str = flag("results/esd_report", "where the report is written", metavar="DIR")


@dataclass(kw_only=True)
class Settings(Plan, Model, Allocation):
    """The flags of esd_report.py: main.py's for the metric and the plan, and those for the plots."""

    _without: ClassVar[list[str]] = (
        "owl_m owl_lambda dlp_alpha atp_beta price_steps price_start price_refresh price_dtype price_effort "
        "metrics_only plan save_plan export_llmcompressor"
    ).split()

    def traits(self) -> set[str]:
        return super().traits() | {"_ww"}

    def check(self) -> None:
        super().check()
        if self.epsilon == "auto":
            raise UserError("epsilon", "auto: is a search on text, which the report does not read; give a number")
        self.experiment()

    def experiment(self) -> Experiment:
        """Return the checked settings of the run whose plan is shown."""
        known = {item.name for _, item, _ in Experiment.declared()}
        shared = {item.name: getattr(self, item.name) for _, item, _ in self.declared() if item.name in known}
        made = Experiment(**shared, prune_method="magnitude_ww", eval_wikitext=False)
        made.check()
        return made


PARSER = make_parser(Settings, "esd_report.py", __doc__)


class Report(NamedTuple):
    """Data of the plots: ``values`` of the ``metric`` and planned ``ratios``, by layer name."""

    model: str
    metric: str
    layers: Sequence[Layer]
    values: Mapping[str, float]
    ratios: Mapping[str, float]
    title: str  # of the plan


def report(settings: Settings) -> Path:
    """Write the report and return its page."""
    run, subject, out = settings.experiment(), LanguageModel(), Path(settings.save)
    task = run.task()
    files.prepare("save", out)
    subject.prepare(run, task)
    names = [layer.name for layer in subject.layers]
    chosen = [] if settings.layers is None else [_full_name(name, names) for name in settings.layers.split(",")]
    subject.load()
    measurement = run.measurement(subject.name)
    values, _ = pipeline.measure(subject, task, measurement, run.price_options(task))
    ratios = pipeline.make_plan(task, subject.layers, values).ratios
    title = f"sparsity {run.sparsity_ratio:g}, epsilon {run.epsilon:g}, {run.mapping_type}"
    about = Report(subject.name, run.ww_metric, subject.layers, values, ratios, title)
    spectra = _spectra(subject.weights, chosen or _typical(values), measurement.settings)

    out.mkdir(parents=True, exist_ok=True)
    _write_table(out / "layers.tsv", about)
    files.save_figure(draw_blocks(about), out / "blocks.png", dpi=130)
    files.save_figure(draw_heat_map(about), out / "heat_map.png", dpi=130)
    files.save_figure(draw_spectra(spectra, run.ww_metric), out / "spectra.png", dpi=130)
    _write_page(out / "report.md", about)
    return out / "report.md"


def _full_name(name: str, known: Sequence[str]) -> str:
    found = [full for full in known if full == name or full.endswith("." + name)]
    if len(found) != 1:
        what = f"{len(found)} layers end in that" if found else "layer not found"
        raise UserError("layers", f"{name}: {what}; give names such as {known[0]}")
    return found[0]


def _typical(values: Mapping[str, float]) -> list[str]:
    ordered = sorted(values, key=values.get)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _spectra(weights: Weights, names: Sequence[str], how: SpectraSettings) -> dict[str, Spectrum]:
    """Return the spectra of the layers ``names``, in that order, on the CPU."""
    found = {}
    for block in weights.visit():
        for name in block.linears.keys() & set(names):
            spec = spectrum(block.linears[name].weight, how.driver, how.farms)
            found[name] = spec._replace(eigs=spec.eigs.cpu())
    return {name: found[name] for name in names}


def _by_block(about: Report, numbers: Mapping[str, float]) -> list[float]:
    """Return the mean over each block's matrices, weighted by size for ratios."""
    means = []
    for _, group in groupby(about.layers, key=lambda layer: layer.block):
        group = list(group)
        sizes = [layer.size if numbers is about.ratios else 1 for layer in group]
        means.append(float(numpy.average([numbers[layer.name] for layer in group], weights=sizes)))
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
    lower.axhline(numpy.average(ratio), color="black", linewidth=0.8, linestyle="--")
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
    grid = numpy.full((len(kinds), count), numpy.nan)
    for layer in about.layers:
        grid[kinds.index(layer.name.rpartition(".")[2]), layer.block] = about.values[layer.name]
    figure = Figure(figsize=(max(6.0, 2.5 + 0.16 * count), 1.2 + 0.35 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    low, high = numpy.nanpercentile(grid, [1, 99])  # one outlier would leave the rest in one colour
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title(f"{about.model}: {about.metric}")
    _tick_blocks(axes, count)
    figure.colorbar(image, ax=axes, label=about.metric, extend="both")
    return figure


def draw_spectra(spectra: Mapping[str, Spectrum], metric: str):
    """Draw the density of each layer's eigenvalues over log axes, and its fitted tail."""
    from matplotlib.figure import Figure

    columns = min(3, len(spectra))
    rows = -(-len(spectra) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(spectra) :]:
        axes.set_axis_off()
    for (name, spec), axes in zip(spectra.items(), grid, strict=False):
        _draw_spectrum(axes, name, spec.eigs, metric)
    return figure


def _draw_spectrum(axes, name: str, eigs: Tensor, metric: str) -> None:
    eigs = eigs[eigs > 0]
    bins = numpy.logspace(numpy.log10(eigs[0].item()), numpy.log10(eigs[-1].item()), 60)
    bins[[0, -1]] *= 1 - 1e-6, 1 + 1e-6  # rounding would leave the largest outside
    axes.hist(eigs.numpy(), bins=bins, density=True, color="tab:blue", alpha=0.6)
    fit = _fit(eigs, metric)
    if fit is not None:
        tail = eigs[fit.index :]
        start, share = tail[0].item(), len(tail) / len(eigs)
        x = numpy.logspace(numpy.log10(start), numpy.log10(eigs[-1].item()), 50)
        law = share * (fit.alpha - 1) / start * (x / start) ** -fit.alpha
        axes.plot(x, law, color="tab:red", label=f"alpha {fit.alpha:.2f}")
        axes.axvline(start, color="black", linewidth=0.8, linestyle="--", label="start of the tail")
        axes.legend(fontsize=8, loc="lower left")
    axes.set(xscale="log", yscale="log", xlabel="eigenvalue of W'W", ylabel="density")
    axes.set_title(name, fontsize=8)
    _tick_log(axes, (eigs[-1] / eigs[0]).item())


def _tick_log(axes, span: float) -> None:
    """Label powers of ten, or 1 2 5 if the axis spans few of them; labels in between would overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_minor_formatter(NullFormatter())
    if span < 50:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _fit(eigs: Tensor, metric: str) -> PowerLaw | None:
    """Return the fit behind the metric, or that of alpha_peak for a metric without a fit."""
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
        shape = "x".join(map(str, layer.shape))
        lines.append(
            f"{layer.name}\t{layer.block}\t{shape}\t{about.values[layer.name]:.6f}\t{about.ratios[layer.name]:.6f}"
        )
    files.write_atomically(path, "\n".join(lines) + "\n")


def _write_page(path: Path, about: Report) -> None:
    lowest, _, highest = _typical(about.values)
    found = numpy.array(list(about.values.values()))
    files.write_atomically(path, f"""# {about.model}: {about.metric}

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    return command(Settings, lambda settings: print(f"written: {report(settings)}"), argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
