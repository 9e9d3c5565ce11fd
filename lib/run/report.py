"""Tables printed by the commands."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib.allocation.epsilon import Trial, best
from lib.allocation.price import Found
from lib.cli.settings import Experiment
from lib.models.layers import Layer
from lib.pruning.walk import LayerReport
from lib.run.record import provenance

if TYPE_CHECKING:
    from rich.console import Console


class Spread(NamedTuple):
    """A figure over runs that differ only in their seed: ``mean``, sample standard deviation (None for one), count."""

    mean: float
    deviation: float | None = None
    count: int = 1

    def text(self, most: int = 1) -> str:
        """Return the figure with two decimals, followed by the number of runs if below ``most``."""
        text = f"{self.mean:.2f}" if math.isfinite(self.mean) else str(self.mean)
        if self.deviation is not None:
            text += f" ± {self.deviation:.2f}"
        return text if self.count >= most else f"{text} ({self.count})"

    def below(self, other: Spread) -> bool:
        """Return whether the mean is below the ``other`` one by more than the larger of the two deviations.

        False for single runs, whose noise is unknown.
        """
        if self.deviation is None or other.deviation is None:
            return False
        return other.mean - self.mean > max(self.deviation, other.deviation)


def spread_of(figures: Sequence[float]) -> Spread:
    """Return the spread of one or more ``figures``."""
    deviation = statistics.stdev(figures) if len(figures) > 1 and all(map(math.isfinite, figures)) else None
    return Spread(math.fsum(figures) / len(figures), deviation, len(figures))


def commit_text(records: Iterable[Mapping]) -> str:
    """Return one sentence that names the commits with which the runs of ``records`` were made."""
    found = dict.fromkeys((record.get("git_commit") or "unknown") for record in records)
    commits = [commit[:12] + ("-dirty" if commit.endswith("-dirty") else "") for commit in found]
    return f"Commit{'s' if len(commits) > 1 else ''}: {', '.join(commits)}."


def show(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned and the others right-aligned."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def line(console: Console, text: str) -> None:
    """Print one line unchanged."""
    console.print(text, highlight=False, soft_wrap=True)


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


def show_prices(console: Console, found: Found | None, data: str = "windows", of: str = "token") -> None:
    """Print the steps of the search for prices at which the held-out ``data`` were evaluated, if any.

    Args:
        of: what the KL is a mean over.
    """
    if found is None:
        return
    rows = [
        (str(i), f"{step.spread:.3f}", f"{step.fit:.4f}", f"{step.held:.4f}")
        for i, step in enumerate(found.steps, 1)
        if step.held is not None
    ]
    headings = ("step", "spread of prices", f"KL, its {data}", f"KL, held-out {data}")
    show(console, f"price search in {found.dtype}: KL(dense || pruned), nats per {of}", headings, rows)
    each = ", ".join(f"{name} {kl:.4f}" + (" <- kept" if name == found.kept else "") for name, kl in found.held.items())
    line(console, f"held-out {data}: {each}")


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
