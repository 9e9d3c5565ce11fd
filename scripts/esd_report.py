"""Report of a model's metric in pictures: python scripts/esd_report.py --model smollm2-135m"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli.command import command, make_parser
from lib.cli.flags import flag
from lib.cli.settings import AllocationFlags, Experiment, ModelFlags
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import numpy, pandas, torch
from lib.run import pipeline
from lib.run.language import LanguageModel
from lib.spectra.spectrum import NoFit, Spectrum, spectrum
from lib.spectra.tail import PowerLaw, fit_tail, peak_candidates

log = logging.getLogger("main")

PAGE = """# {title}

{count} matrices; {metric} from {lowest:.3f} ({first}) to {highest:.3f} ({last}), mean {mean:.3f}.
Plan: {plan}. Every matrix is in [layers.tsv](layers.tsv).

![mean metric and planned sparsity of each block](blocks.png)

![metric of each type of matrix in each block](heat_map.png)

![spectra and fitted tails](spectra.png)
"""


@dataclass(kw_only=True)
class Settings(ModelFlags, AllocationFlags):
    """The flags of esd_report.py: main.py's for the metric and the plan, and those for the plots."""

    _title: ClassVar[str] = "report"
    _without: ClassVar[list[str]] = (
        "owl_m owl_lambda dlp_alpha atp_beta price_steps price_effort metrics_only plan save_plan export_llmcompressor"
    ).split()

    sparsity_ratio: float = flag(0.7, "of the plan that is shown, a fraction", above=0, below=1, metavar="S")
    save: str = flag("results/esd_report", "where the report is written", metavar="DIR")

    def traits(self) -> set[str]:
        return super().traits() | {"_ww"}

    def check(self) -> None:
        super().check()
        if self.epsilon == "auto":
            raise UserError("epsilon", "auto", "is a search on text, which the report does not read", "give a number")
        self.experiment()

    def experiment(self) -> Experiment:
        """Return the checked settings of the run whose plan is shown."""
        names = {item.name for _, item, _ in Experiment.declared()}
        shared = {item.name: getattr(self, item.name) for _, item, _ in self.declared() if item.name in names}
        settings = Experiment(**shared, prune_method="magnitude_ww", eval_wikitext=False)
        settings.check()
        return settings


PARSER = make_parser(Settings, "esd_report.py", __doc__)


def report(settings: Settings) -> Path:
    """Write the report and return its page."""
    run, subject, folder = settings.experiment(), LanguageModel(), Path(settings.save)
    task = run.task()
    files.check_writable("save", folder)
    subject.prepare(run, task)
    subject.load()
    measurement = run.measurement(subject.name)
    values, _ = pipeline.measure_values(subject, task, measurement, run.price_options())
    ratios = pipeline.make_plan(task, subject.layers, values).ratios
    layers = pandas.DataFrame({
        "name": [layer.name for layer in subject.layers],
        "block": [layer.block for layer in subject.layers],
        "shape": ["x".join(map(str, layer.shape)) for layer in subject.layers],
        run.ww_metric: [values[layer.name] for layer in subject.layers],
        "planned_ratio": [ratios[layer.name] for layer in subject.layers],
    })  # fmt: skip
    ordered = layers.sort_values(run.ww_metric)["name"].tolist()
    spectra = dict.fromkeys([ordered[0], ordered[len(ordered) // 2], ordered[-1]])
    for block in subject.weights.visit():
        for name in block.linears.keys() & spectra.keys():
            whole = spectrum(block.linears[name].weight, measurement.driver, measurement.farms)
            spectra[name] = whole._replace(eigs=whole.eigs.cpu())

    title = f"{subject.name}: {run.ww_metric}"
    plan = f"sparsity {run.sparsity_ratio:g}, epsilon {run.epsilon:g}, {run.mapping_type}"
    sizes = pandas.Series([layer.size for layer in subject.layers])
    files.write_atomically(folder / "layers.tsv", layers.to_csv(sep="\t", index=False, float_format="%.6f"))
    files.save_figure(draw_blocks(layers, sizes, f"{subject.name}: {plan}"), folder / "blocks.png")
    files.save_figure(draw_heat_map(layers, title), folder / "heat_map.png")
    files.save_figure(draw_spectra(spectra, run.ww_metric), folder / "spectra.png")
    metric = layers[run.ww_metric]
    page = PAGE.format(
        title=title, plan=plan, count=len(layers), metric=run.ww_metric, first=ordered[0], last=ordered[-1],
        lowest=metric.min(), highest=metric.max(), mean=metric.mean(),
    )  # fmt: skip
    files.write_atomically(folder / "report.md", page)
    return folder / "report.md"


def draw_blocks(layers: pandas.DataFrame, sizes: pandas.Series, title: str):
    """Draw each block's mean metric and its planned ratio, weighted by size, as bars, one above the other."""
    metric, blocks = layers.columns[3], layers["block"]
    means = layers.groupby("block")[metric].mean()
    ratios = (layers["planned_ratio"] * sizes).groupby(blocks).sum() / sizes.groupby(blocks).sum()
    figure, (upper, lower) = files.new_figure(max(6.0, 2.0 + 0.16 * len(means)), 5.5, rows=2)
    upper.bar(means.index, means, color="tab:blue")
    upper.set(ylabel=f"mean {metric}", title=title)
    lower.bar(ratios.index, ratios, color="tab:orange")
    lower.axhline(ratios.mean(), color="black", linewidth=0.8, linestyle="--")
    lower.set(ylabel="planned sparsity", ylim=(0, 1), xlabel="block")
    for axes in (upper, lower):
        label_blocks(axes, len(means))
    return figure


def draw_heat_map(layers: pandas.DataFrame, title: str):
    """Draw the metric, a row for each type of matrix and a column for each block; of experts the mean."""
    metric, kinds = layers.columns[3], layers["name"].str.rpartition(".")[2]
    grid = layers.assign(kind=kinds).pivot_table(index="kind", columns="block", values=metric).loc[kinds.unique()]
    rows, columns = grid.shape
    figure, (axes,) = files.new_figure(max(6.0, 2.5 + 0.16 * columns), 1.2 + 0.35 * rows)
    low, high = numpy.nanpercentile(grid, [1, 99])  # one outlier would leave the rest in one colour
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(rows), grid.index)
    axes.set(xlabel="block", title=title)
    label_blocks(axes, columns)
    figure.colorbar(image, ax=axes, label=metric, extend="both")
    return figure


def label_blocks(axes, count: int) -> None:
    """Label at most 40 of the blocks on the horizontal axis; more labels would overlap."""
    axes.set_xticks(range(0, count, -(-count // 40)))
    axes.tick_params(axis="x", labelsize=8)


def draw_spectra(spectra: Mapping[str, Spectrum], metric: str):
    """Draw the density of each layer's positive eigenvalues over log axes, and the power law of their tail."""
    from matplotlib.ticker import LogLocator

    figure, grid = files.new_figure(4.2 * len(spectra), 3.6, columns=len(spectra))
    for (name, spec), axes in zip(spectra.items(), grid, strict=True):
        eigs = spec.eigs[spec.eigs > 0]
        largest = eigs[-1].item()
        bins = numpy.geomspace(eigs[0].item(), largest, 60)
        bins[[0, -1]] *= 1 - 1e-6, 1 + 1e-6  # rounding would leave the largest outside
        axes.hist(eigs.numpy(), bins=bins, density=True, color="tab:blue", alpha=0.6)
        fit = _fit(eigs, metric)
        if fit is not None:
            start, share = eigs[fit.index].item(), 1 - fit.index / len(eigs)
            x = numpy.geomspace(start, largest, 50)
            law = share * (fit.alpha - 1) / start * (x / start) ** -fit.alpha
            axes.plot(x, law, color="tab:red", label=f"alpha {fit.alpha:.2f}")
            axes.axvline(start, color="black", linewidth=0.8, linestyle="--", label="start of the tail")
            axes.legend(fontsize=8, loc="lower left")
        axes.set(xscale="log", yscale="log", xlabel="eigenvalue of W'W", ylabel="density")
        axes.set_title(name, fontsize=8)
        # Powers of ten are labelled, or 1 2 5 if the axis spans few of them; labels in between would overlap.
        axes.xaxis.set_minor_formatter("")
        if largest / eigs[0].item() < 50:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
    return figure


def _fit(eigs: torch.Tensor, metric: str) -> PowerLaw | None:
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


def main(argv: Sequence[str] | None = None) -> int:
    return command(Settings, lambda settings: print(f"written: {report(settings)}"), argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
