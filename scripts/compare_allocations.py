"""Comparison of allocations on one model, for one or several pruners and seeds: a table and a plot."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sweep

from lib.allocation import price
from lib.allocation.block_scores import BLOCK_SCORES
from lib.allocation.formulas import ALLOCATIONS
from lib.cli.command import command, make_parser
from lib.cli.flags import flag
from lib.cli.settings import Experiment
from lib.core import files
from lib.core.errors import UserError
from lib.core.names import check_name
from lib.models import locate
from lib.pruning.pruners import PRUNERS
from lib.run.record import read_run
from lib.run.report import Spread, commit_text, spread_of

# Hyper-parameters of which several values are tried, by suffix; others have main.py's defaults.
TRIED = {"ww": "epsilon", "atp": "atp_beta"}


class Key(NamedTuple):
    """Key of a table row: the pruner, and the allocation with the tried hyper-parameter."""

    pruner: str
    allocation: str


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        cells: perplexity by sparsity.
        seconds: time of the allocation in the longest of its runs; others may have reused its result.
        passes: windows that the allocation passes through the blocks, a backward pass counted as two.
        pruning: seconds of the pruning stage, the mean over runs.

    Seconds are None if the run files are from an older version, which did not record CPU seconds.
    """

    cells: Mapping[float, Spread]
    seconds: float | None
    passes: int
    pruning: float | None


Rows = Mapping[Key, Row]


@dataclass(kw_only=True)
class Comparison(sweep.Several):
    _lists: ClassVar[Sequence[str]] = ("prune_method", "sparsity_ratio", *TRIED.values())
    _spelled: ClassVar[dict[str, str]] = {
        "prune_method": "pruners", "sparsity_ratio": "sparsities", "epsilon": "epsilons", "atp_beta": "atp_betas"
    }  # fmt: skip

    prune_method: str = flag(
        "wanda", f"what prunes: {{{', '.join(PRUNERS)}}}, one or several", aliases=["pruner"], metavar="P,P"
    )
    allocations: str = flag(",".join(ALLOCATIONS), "main.py's suffixes; an empty one is uniform", metavar="A,B")
    sparsity_ratio: str = flag("0.5,0.6,0.7", "sparsities", metavar="S,S")
    epsilon: str = flag("0.1,0.2,0.3", "values of --epsilon, for _ww", metavar="E,E")
    atp_beta: str = flag("0.005,0.010,0.013", "values of --atp_beta, for _atp", metavar="B,B")
    save: str = flag("results/allocations", "run files (a setting has a folder), table and plot", metavar="DIR")

    def pruners(self) -> list[str]:
        names = [check_name("prune_method", name, PRUNERS) for name in sweep.words(self.prune_method)]
        if not names:
            raise UserError("prune_method", f"{self.prune_method!r}: names no pruner")
        return list(dict.fromkeys(names))

    def suffixes(self) -> list[str]:
        names = [check_name("allocations", suffix.strip(), ALLOCATIONS) for suffix in self.allocations.split(",")]
        return list(dict.fromkeys(names))

    def methods(self) -> list[str | None]:
        return [f"{pruner}_{suffix}".rstrip("_") for pruner in self.pruners() for suffix in self.suffixes()]

    def check(self) -> None:
        super().check()
        for suffix, name in TRIED.items():
            if name in self.given and suffix not in self.suffixes():
                raise UserError(name, f"does nothing without _{suffix}; add {suffix} to --allocations")

    def keyed(self) -> list[tuple[Key, Experiment]]:
        """Return the settings of each run, checked, and the row of the table that each belongs to.

        All runs of one seed come before the next seed, so that an interrupted comparison leaves a complete table.
        """
        found = []
        for seed in self.every_seed():
            for pruner in self.pruners():
                for suffix in self.suffixes():
                    found += self._of(pruner, suffix, seed)
        return found

    def _of(self, pruner: str, suffix: str, seed: int) -> list[tuple[Key, Experiment]]:
        name, method = TRIED.get(suffix), f"{pruner}_{suffix}".rstrip("_")
        found = []
        for value in self._tried(name) if name else [None]:
            label = f"{suffix} {name} {value}" if name else suffix or "uniform"
            changes = {name: float(value)} if name else {}
            for sparsity in sweep.numbers("sparsity_ratio", self.sparsity_ratio):
                setting = self.one(method, label.replace(" ", "_"), seed, sparsity_ratio=sparsity, **changes)
                found.append((Key(pruner, label), setting))
        return found

    def _tried(self, name: str) -> list[str]:
        """Return the values of a hyper-parameter as they were given, each number once."""
        sweep.numbers(name, getattr(self, name))
        found: dict[float, str] = {}
        for word in sweep.words(getattr(self, name)):
            found.setdefault(float(word), word)
        return list(found.values())

    def settings(self) -> list[Experiment]:
        return [setting for _, setting in self.keyed()]


PARSER = make_parser(Comparison, "compare_allocations.py", __doc__, sweep.REST)


# ---------------------------------------------------------------------------------------------------------- the rows


def passes(setting: Experiment) -> int:
    """Return how many calibration windows a run's allocation passes through the blocks, from its flags.

    Two windows of half the length count as one. The passes of pruning itself are not counted: they are the same for all
    allocations.
    """
    task = setting.task()
    scored = sum(setting.nsamples for part in (task, task.starting_task) if part.needs in BLOCK_SCORES)
    if task.needs != "price":
        return scored if task.needs in BLOCK_SCORES else 0
    options = setting.price_options(task)
    return scored + -(-price.forward_passes(options, bool(task.start)) // options.effort.shorter)


def seconds_of(record: Mapping, *stages: str) -> float | None:
    """Return the seconds of some stages of a run: CPU seconds on a CPU, which others may have used too."""
    kind = "cpu_seconds" if str(record["device"][0]).startswith("cpu") else "seconds"
    found = [record["stages"][stage].get(kind) for stage in stages]
    return None if None in found else sum(found)


def rows_of(keys: Sequence[Key], settings: Sequence[Experiment], records: Sequence[dict | None]) -> dict[Key, Row]:
    """Return the rows of the table; runs that failed or measured no perplexity are left out, one of inf counts."""
    found: dict[Key, list[tuple[Experiment, dict]]] = {}
    seconds: dict[str, list[float | None]] = {}
    for key, setting, record in zip(keys, settings, records, strict=True):
        if sweep.measured([record]):
            found.setdefault(key, []).append((setting, record))
            seconds.setdefault(key.allocation, []).append(seconds_of(record, "measure", "allocate"))
    rows = {}
    for key, runs in found.items():
        figures: dict[float, list[float]] = {}
        for _, record in runs:
            figures.setdefault(record["target_sparsity"], []).append(record["perplexity"])
        cells = {sparsity: spread_of(values) for sparsity, values in figures.items()}
        pruning = _known(seconds_of(record, "prune") for _, record in runs)
        longest = max(_known(seconds[key.allocation]), default=None)
        mean = spread_of(pruning).mean if pruning else None
        rows[key] = Row(cells, longest, passes(runs[0][0]), mean)
    return rows


def _known(seconds: Iterable[float | None]) -> list[float]:
    return [value for value in seconds if value is not None]


def stands_out(rows: Rows, key: Key, sparsity: float) -> bool:
    """Return whether a cell is below every other one of its pruner and sparsity by more than the noise of both."""
    others = [row.cells.get(sparsity) for other, row in rows.items() if other.pruner == key.pruner and other != key]
    own, others = rows[key].cells.get(sparsity), [cell for cell in others if cell]
    return bool(own and others) and all(own.below(cell) for cell in others)


# ----------------------------------------------------------------------------------------------------------- outputs


def table(rows: Rows, sparsities: Sequence[float]) -> str:
    """Return a Markdown table: perplexity as mean ± standard deviation over seeds, and the cost of each allocation."""
    most = max(cell.count for row in rows.values() for cell in row.cells.values())
    headings = [f"{s:g}" for s in sparsities] + ["seconds", "passes", "pruning s"]
    lines = ["| pruner | allocation | " + " | ".join(headings) + " |", "|---|---" + "|---:" * len(headings) + "|"]
    for key, row in rows.items():
        cells = [row.cells[s].text(most) if s in row.cells else "-" for s in sparsities]
        cells = [
            f"**{cell}**" if stands_out(rows, key, s) else cell for s, cell in zip(sparsities, cells, strict=True)
        ]
        seconds, pruning = ("-" if value is None else f"{value:.0f}" for value in (row.seconds, row.pruning))
        cells += [seconds, str(row.passes), pruning]
        lines.append(f"| {key.pruner} | {key.allocation} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def notes(records: Sequence[dict], seeds: Sequence[int]) -> str:
    """Return notes on the table's figures, in full sentences to print below it."""
    first = records[0]
    calibration = next((record["calibration"] for record in records if record["calibration"]), None)
    texts = [f"Perplexity of {first['model']['name']} on {_windows(first['evaluation'])}"]
    texts += [f"calibration on {_windows(calibration)}"] if calibration else []
    single = "one seed, so the noise is unknown and nothing is bold (--seeds 3 measures it)"
    many = (
        "mean ± sample standard deviation over seeds, (n): of n of them only; bold: the lowest mean of its pruner and "
        "sparsity, below every other one by more than the larger of the two standard deviations"
    )
    several = any(record["flags"]["seed"] != first["flags"]["seed"] for record in records)
    return (
        f"{'; '.join(texts)}; seeds {', '.join(map(str, seeds))}: {many if several else single}.\n"
        "Seconds: of the allocation, in the longest of its runs (what runs share is found once, a metric is kept on "
        "disk). Passes: windows through the blocks for the allocation alone, a backward pass counted as two. "
        "Pruning s: mean seconds of the pruning stage. On a CPU they are CPU seconds of all threads.\n"
        f"{commit_text(records)}\n"
    )


def _windows(text: Mapping) -> str:
    return f"{text['windows']} windows of {text['seqlen']} of {text['text']}"


def plot(rows: Rows, sparsities: Sequence[float], title: str, path: Path) -> None:
    """Write a PNG: a line for each pruner and allocation, a mark for its perplexity at each sparsity, log axis.

    The bar through a mark is the standard deviation over seeds. A mean that is not finite has no place on the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for sparsity in sparsities:
        points = [(row.cells[sparsity], y) for y, row in enumerate(rows.values()) if sparsity in row.cells]
        points = [(cell, y) for cell, y in points if math.isfinite(cell.mean)]
        means, places = [cell.mean for cell, _ in points], [y for _, y in points]
        bars = [cell.deviation or 0.0 for cell, _ in points]
        axes.errorbar(means, places, xerr=bars, fmt="o", capsize=2, label=f"sparsity {sparsity:g}")
    axes.set_yticks(range(len(rows)), [f"{key.pruner}, {key.allocation}" for key in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set(xscale="log", xlabel="perplexity", title=title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    files.save_figure(figure, path, dpi=150)


def run(comparison: Comparison) -> int:
    """Run the comparison; return 0, or 1 if a setting failed."""
    folder = Path(comparison.save)
    files.prepare("save", folder)
    locate.locate(comparison.model, comparison.cache_dir)  # or every setting would fail
    keys, settings = zip(*comparison.keyed(), strict=True)
    records, _ = sweep.run_all(settings, comparison.force)
    # As they are on disk, where commit and versions are, too.
    written = [
        record and read_run(Path(setting.save), setting.task().run)
        for setting, record in zip(settings, records, strict=True)
    ]
    rows = rows_of(keys, settings, written)
    if rows:
        found = sweep.measured(written)
        sparsities = sorted({sparsity for row in rows.values() for sparsity in row.cells})
        text = f"{table(rows, sparsities)}\n{notes(found, comparison.every_seed())}"
        files.write_atomically(folder / "allocations.md", text)
        plot(rows, sparsities, found[0]["model"]["name"], folder / "allocations.png")
        print(f"\n{text}\nwritten: {folder}/allocations.md, allocations.png")
    return 1 if None in records else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a setting failed, 2 for a wrong flag."""
    return command(Comparison, run, argv, PARSER, resume=sweep.RESUME)


if __name__ == "__main__":
    sys.exit(main())
