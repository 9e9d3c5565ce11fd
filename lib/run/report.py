"""Tables printed by the commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from lib.allocation.epsilon import Trial, best
from lib.allocation.price import Found
from lib.cli.settings import Experiment
from lib.models.layers import Layer
from lib.pruning.walk import LayerReport
from lib.run.record import provenance

if TYPE_CHECKING:
    from rich.console import Console


def show(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned and the others right-aligned."""
    align = ["left"] + ["right"] * (len(headings) - 1)
    line(console, title)
    line(console, tabulate(rows, headings, tablefmt="rounded_outline", disable_numparse=True, colalign=align))


def line(console: Console, sentence: str) -> None:
    """Print ``sentence`` unchanged, on one line however long it is."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def show_metric(
    console: Console, settings: Experiment, layers: Sequence[Layer], values: Mapping[str, float], cache: Path
) -> None:
    """Print the metric by type of matrix."""
    kinds: dict[str, list[float]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(values[layer.name])
    rows = []
    for kind, numbers in [*kinds.items(), ("all", list(values.values()))]:
        figures = (min(numbers), sum(numbers) / len(numbers), max(numbers))
        rows.append((kind, *(f"{x:.4f}" for x in figures)))
    title = f"{settings.model}: {settings.ww_metric}"
    show(console, title, ("matrix", "smallest", "mean", "largest"), rows)
    line(console, f"cached in: {cache}")


def show_trials(console: Console, trials: Sequence[Trial]) -> None:
    """Print the trials of --epsilon auto, if any."""
    if not trials:
        return
    chosen = best(trials)
    rows = [(f"{t.epsilon:.2f}", f"{t.perplexity:.2f}" + (" <- taken" if t is chosen else "")) for t in trials]
    show(console, "--epsilon auto: perplexity on held-out calibration text", ("epsilon", "perplexity"), rows)


def show_prices(console: Console, search: Found | None, data: str = "windows", of: str = "token") -> None:
    """Print the steps of the search for prices at which the held-out ``data`` were evaluated, if any.

    Args:
        of: what the KL is a mean over.
    """
    if search is None:
        return
    rows = [
        (str(i), f"{step.spread:.3f}", f"{step.fit:.4f}", f"{step.held:.4f}")
        for i, step in enumerate(search.steps, 1)
        if step.held is not None
    ]
    headings = ("step", "spread of prices", f"KL, its {data}", f"KL, held-out {data}")
    show(console, f"price search in {search.dtype}: KL(dense || pruned), nats per {of}", headings, rows)
    kept = {name: " <- kept" if name == search.kept else "" for name in search.held}
    line(console, f"held-out {data}: {', '.join(f'{name} {kl:.4f}{kept[name]}' for name, kl in search.held.items())}")


def show_run(console: Console, record: Mapping, stages: Mapping[str, Mapping], rows: Sequence[LayerReport]) -> None:
    """Print the figures of a run of main.py."""
    seconds = sum(stage["seconds"] for stage in stages.values())
    peak = max(stage["peak_rss_mb"] for stage in stages.values())
    perplexity = "-" if record["perplexity"] is None else f"{record['perplexity']:.4f}"
    row = (record["method"], f"{record['target_sparsity']:g}", f"{record['sparsity']:.4f}", perplexity)
    headings = ("method", "target", "sparsity", "perplexity", "seconds", "peak memory")
    show(console, f"{record['model']['given']}: {record['method']}", headings, [(*row, f"{seconds:.1f}", f"{peak} MB")])
    commit = (provenance()["git_commit"] or "unknown")[:12]
    line(console, f"model:   {record['model']['name']}, seed {record['flags']['seed']}, commit {commit}")
    patterns = Counter("{}:{}".format(*report.nm) for report in rows if report.nm)
    if len(patterns) > 1:
        each = ", ".join(f"{count} at {pattern}" for pattern, count in sorted(patterns.items()))
        line(console, f"layers:  {each} (see the .tsv)")
