"""Comparison of allocations on one model, for one or several pruners and seeds: a sweep, its table and a plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sweep
import table

from lib.allocation.formulas import ALLOCATIONS
from lib.cli.command import command, make_parser
from lib.cli.flags import flag
from lib.core import files
from lib.core.errors import UserError, check_name
from lib.core.lazy import pandas
from lib.pruning.pruners import PRUNERS


@dataclass(kw_only=True)
class Comparison(sweep.Sweep):
    _lists: ClassVar[Sequence[str]] = (*sweep.Sweep._lists, "atp_beta")
    _spelled: ClassVar[dict[str, str]] = sweep.Sweep._spelled | {"prune_method": "pruners", "atp_beta": "atp_betas"}

    prune_method: str = flag(
        "wanda", f"what prunes: {{{', '.join(PRUNERS)}}}, one or several", aliases=["pruner"], metavar="P,P"
    )
    allocations: str = flag(",".join(ALLOCATIONS), "main.py's suffixes; an empty one is uniform", metavar="A,B")
    sparsity_ratio: str = flag("0.5,0.6,0.7", "sparsities", metavar="S,S")
    epsilon: str = flag("0.1,0.2,0.3", "values of --epsilon, for _ww", metavar="E,E")
    atp_beta: str = flag("0.005,0.010,0.013", "values of --atp_beta, for _atp", metavar="B,B")
    save: str = flag("results/allocations", "run files, table and plot", metavar="DIR")

    def methods(self) -> list[str | None]:
        pruners = [check_name("prune_method", name, PRUNERS) for name in sweep.words(self.prune_method)]
        if not pruners:
            raise UserError("prune_method", repr(self.prune_method), "names no pruner")
        suffixes = [check_name("allocations", name.strip(), ALLOCATIONS) for name in self.allocations.split(",")]
        return list(dict.fromkeys(f"{pruner}_{suffix}".rstrip("_") for pruner in pruners for suffix in suffixes))


PARSER = make_parser(Comparison, "compare_allocations.py", __doc__, sweep.REST)


def tabulated(comparison: Comparison, runs: pandas.DataFrame) -> str:
    """Write allocations.md and allocations.png, and return the former's text."""
    folder, lines = Path(comparison.save), table.formatted(table.by_sparsity(runs), "markdown")
    calibration = f"calibration on {comparison.nsamples} windows of {comparison.seqlen} of {comparison.calib_data}"
    page = f"{lines}\n\n{runs['model'].iloc[0]}: {table.caption(runs)}; {calibration}. {table.NOTES}\n"
    files.write_atomically(folder / "allocations.md", page)
    table.plot(folder / "allocations.png", table.cells_of(runs))
    return f"\n{page}\nwritten: {folder}/allocations.md, allocations.png"


def main(argv: Sequence[str] | None = None) -> int:
    return command(Comparison, partial(sweep.run, report=tabulated), argv, PARSER, resume=sweep.RESUME)


if __name__ == "__main__":
    sys.exit(main())
