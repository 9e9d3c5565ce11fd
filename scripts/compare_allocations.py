"""Comparison of every allocation on one model and pruner: a table and a plot, loaded and calibrated once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sweep

from lib import UserError, files
from lib.allocation import ALLOCATIONS
from lib.command import command, flag, make_parser
from lib.pruners import PRUNERS
from lib.registry import check_name
from lib.settings import Experiment

# Hyper-parameters of which several values are tried, by suffix; others have main.py's defaults.
TRIED = {"ww": "epsilon", "atp": "atp_beta"}

Rows = Mapping[str, Mapping[float, float]]  # perplexity by sparsity, by label


@dataclass(kw_only=True)
class Comparison(sweep.Several):
    _lists: ClassVar[Sequence[str]] = ("prune_method", "sparsity_ratio", *TRIED.values())
    _spelled: ClassVar[dict[str, str]] = {
        "prune_method": "pruner", "sparsity_ratio": "sparsities", "epsilon": "epsilons", "atp_beta": "atp_betas"
    }  # fmt: skip

    prune_method: str = flag("wanda", "what prunes:", choices=PRUNERS, metavar="NAME")
    allocations: str = flag(",".join(ALLOCATIONS), "main.py's suffixes; an empty one is uniform", metavar="A,B")
    sparsity_ratio: str = flag("0.5,0.6,0.7", "sparsities", metavar="S,S")
    epsilon: str = flag("0.1,0.2,0.3", "values of --epsilon, for _ww", metavar="E,E")
    atp_beta: str = flag("0.005,0.010,0.013", "values of --atp_beta, for _atp", metavar="B,B")
    save: str = flag("results/allocations", "run files (a setting has a folder), table and plot", metavar="DIR")

    def suffixes(self) -> list[str]:
        return [check_name("allocations", suffix.strip(), ALLOCATIONS) for suffix in self.allocations.split(",")]

    def methods(self) -> list[str | None]:
        return [f"{self.prune_method}_{suffix}".rstrip("_") for suffix in self.suffixes()]

    def check(self) -> None:
        super().check()
        for suffix, name in TRIED.items():
            if name in self.given and suffix not in self.suffixes():
                raise UserError(name, f"does nothing without _{suffix}; add {suffix} to --allocations")

    def labelled(self) -> list[tuple[str, Experiment]]:
        """Return the settings of each run, checked, and the label of each one's row in the table."""
        found = []
        for suffix, method in zip(self.suffixes(), self.methods(), strict=True):
            name = TRIED.get(suffix)
            for value in sweep.words(getattr(self, name)) if name else [None]:
                label = f"{suffix} {name} {value}" if name else suffix or "uniform"
                changes = {name: sweep.number(name, value)} if name else {}
                for sparsity in sweep.numbers("sparsity_ratio", self.sparsity_ratio):
                    setting = self.one(method, label.replace(" ", "_"), sparsity_ratio=sparsity, **changes)
                    found.append((label, setting))
        return found

    def settings(self) -> list[Experiment]:
        return [setting for _, setting in self.labelled()]


PARSER = make_parser(Comparison, "compare_allocations.py", __doc__, sweep.REST)


def table(rows: Rows, sparsities: Sequence[float]) -> str:
    """Return a Markdown table of perplexities, the best of each column in bold."""
    best = {s: min((found[s] for found in rows.values() if s in found), default=None) for s in sparsities}
    lines = [
        "| allocation | " + " | ".join(f"{s:g}" for s in sparsities) + " |",
        "|---" + "|---:" * len(sparsities) + "|",
    ]
    for label, found in rows.items():
        cells = [f"{found[s]:.2f}" if s in found else "-" for s in sparsities]
        cells = [f"**{cell}**" if found.get(s) == best[s] else cell for s, cell in zip(sparsities, cells, strict=True)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Rows, sparsities: Sequence[float], title: str, path: Path) -> None:
    """Write a PNG: a line for each allocation, a mark for its perplexity at each sparsity, log axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for sparsity in sparsities:
        points = [(found[sparsity], y) for y, found in enumerate(rows.values()) if sparsity in found]
        axes.plot(*zip(*points, strict=True), "o", label=f"sparsity {sparsity:g}")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set(xscale="log", xlabel="perplexity", title=title)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    files.save_figure(figure, path, dpi=150)


def run(comparison: Comparison) -> int:
    """Run the comparison; return 0, or 1 if a setting failed."""
    folder = Path(comparison.save)
    files.prepare("save", folder)
    labels, settings = zip(*comparison.labelled(), strict=True)
    records, _ = sweep.run_all(settings, comparison.force)
    rows: dict[str, dict[float, float]] = {}
    for label, record in zip(labels, records, strict=True):
        for found in sweep.measured([record]):
            rows.setdefault(label, {})[found["target_sparsity"]] = found["perplexity"]
    if rows:
        sparsities = sorted({sparsity for found in rows.values() for sparsity in found})
        text = table(rows, sparsities)
        files.write_atomically(folder / "allocations.md", text)
        name = sweep.measured(records)[0]["model"]["name"]
        plot(rows, sparsities, f"{name}, {comparison.prune_method}", folder / "allocations.png")
        print(f"\n{text}\nwritten: {folder}/allocations.md, allocations.png")
    return 1 if None in records else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, 1 if a setting failed, 2 for a wrong flag."""
    return command(Comparison, run, argv, PARSER, resume=sweep.RESUME)


if __name__ == "__main__":
    sys.exit(main())
