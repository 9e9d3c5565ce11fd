"""Table of the run files under a folder: mean and deviation over seeds, published figures beside them."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core.errors import UserError
from lib.run import report
from lib.run.record import parsed
from lib.run.report import Spread, commit_text, spread_of

PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "published_results.json"
PRUNERS = ("dense", "magnitude", "wanda", "sparsegpt", "alps")  # the order of the rows; others come after them
ALLOCATIONS = {"": "uniform", "ww": "AlphaPruning", "owl": "OWL"}
# Flags in which two runs of one cell may differ without being two settings; a cell is about all of its seeds.
PLACES = {"model", "cache_dir", "save", "save_model", "ww_metric_cache", "prune_method", "sparsity_ratio", "seed"}
EVALUATION = {
    "perplexity": {"eval_wikitext", "eval_data", "eval_windows"},
    "zero_shot": {"eval_zero_shot", "tasks", "num_fewshot", "limit", "eval_batch_size", "include_path"},
}


# Flags that make another method of a run, and the published value of each; the published figure is for those.
OF_METRIC = {"ww_metric": "alpha_peak", "mapping_type": "block_wise", "farms": False}
OF_PRUNER = {"use_variant": False, "refit": None, "damping": None, "pruner_iterations": None, "statistics": "pruned"}
STEERING = OF_METRIC | OF_PRUNER
SETTING = STEERING | {"nsamples": 128, "calib_data": "c4", "eval_windows": None}
FORMATS = ("text", "markdown", "csv", "latex")


@dataclass(kw_only=True)
class Settings(Flags):
    _title: ClassVar[str] = "table"

    folder: str = flag(MISSING, "where the run files are, at any depth", positional=True)
    format: str = flag("text", "of the table", choices=FORMATS, metavar="NAME")
    value: str = flag("perplexity", "what the cells hold", choices=EVALUATION, metavar="NAME")
    published: bool = flag(False, "list the published figures of these models that no run stands beside, too")


PARSER = make_parser(Settings, "table.py", __doc__)


class Column(NamedTuple):
    """A model and its evaluation text: figures on different texts do not belong in one column."""

    model: str
    parameters: int
    evaluation: tuple


class Row(NamedTuple):
    """How the model was pruned; ``extra`` names the flags that distinguish runs which would share a cell."""

    target: float
    method: str
    pattern: str  # N:M, or nothing
    extra: str = ""


class Cell(NamedTuple):
    """A figure over seeds, and whether it was made as published (except for epsilon, which the paper tuned by hand)."""

    figure: Spread
    as_published: bool


def read_runs(folder: Path, value: str) -> list[dict]:
    """Return the complete records under ``folder`` that have a ``value``, newest last; report which are left out."""
    runs = []
    for path in sorted(folder.rglob("run_*.json")):
        try:
            record = parsed(path.read_text(encoding="utf-8"))
            if record["complete"] is not True:
                raise ValueError("not complete")
            if record[value] is not None:
                record["column"] = _column(record, value)
                _check(record, value)
                runs.append(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"table.py: {path} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return sorted(runs, key=lambda record: record["finished"])


def _check(record: dict, value: str) -> None:
    """Refuse a record without what a row is made of, as KeyError, TypeError or ValueError."""
    _measured(record, value) + record["target_sparsity"]
    hash(record["column"])
    texts = record["method"], record["finished"], record["model"]["name"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(record["flags"], dict):
        raise TypeError("it is not a run's record")


def _measured(record: dict, value: str) -> float:
    return record["perplexity"] if value == "perplexity" else 100 * float(record["zero_shot"]["means"]["acc"])


def _column(record: dict, value: str) -> Column:
    flags, model = record["flags"], record["model"]
    if value == "perplexity":
        evaluation = tuple(record["evaluation"][key] for key in ("text", "seqlen", "windows"))
    else:
        evaluation = (flags["tasks"], flags["num_fewshot"], flags["limit"])
    return Column(model["name"], model["parameters"], evaluation)


def cells_of(runs: list[dict], value: str) -> dict[Row, dict[Column, Cell]]:
    """Return the figures by row and column, over seeds; of two runs with the same flags, the newer one counts.

    If runs of one cell differ in a flag (--epsilon, --nsamples ...), each setting gets a separate row.
    """
    grouped: dict[Row, dict[Column, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        pattern = run["flags"].get("sparsity_type", "unstructured")
        row = Row(run["target_sparsity"], run["method"], "" if pattern == "unstructured" else pattern)
        grouped[row][run["column"]].append(run)
    ignored = PLACES | EVALUATION["perplexity"] | EVALUATION["zero_shot"]
    by_seed: dict[tuple[Row, Column], dict[int | None, tuple[float, bool]]] = defaultdict(dict)
    for row, columns in grouped.items():
        differing = {
            flag
            for same in columns.values()
            for flag in set().union(*(run["flags"] for run in same)) - ignored
            if len({str(run["flags"].get(flag)) for run in same}) > 1
        }
        for column, same in columns.items():
            for run in same:
                flags = run["flags"]
                other = {flag for flag, published in STEERING.items() if flags.get(flag, published) != published}
                if not row.method.endswith("_ww"):
                    other &= OF_PRUNER.keys()
                extra = ", ".join(f"{flag} {flags.get(flag)}" for flag in sorted(differing | other))
                as_published = all(flags.get(flag, published) == published for flag, published in SETTING.items())
                figures = by_seed[row._replace(extra=extra), column]
                figures[flags.get("seed")] = _measured(run, value), as_published
    cells: dict[Row, dict[Column, Cell]] = defaultdict(dict)
    for (row, column), figures in by_seed.items():
        measured, as_published = zip(*figures.values(), strict=True)
        cells[row][column] = Cell(spread_of(measured), all(as_published))
    return cells


def published_name(column: Column, published: dict) -> str | None:
    """Return the published name of the column's model, None if it has no published figure."""
    for name, about in published["models"].items():
        if column.model.lower() in about["names"] and column.parameters == about["parameters"]:
            return name
    return None


class Published(NamedTuple):
    """A published figure and the name of its source."""

    figure: Spread
    source: str


def published_figure(row: Row, column: Column, published: dict) -> Published | None:
    """Return the published perplexity for this model, row and evaluation text, or None."""
    setting = published["setting"]
    same = column.evaluation[:2] == (setting["text"], setting["seqlen"]) and not row.pattern
    if not same or row.target not in (0, setting["sparsity"]):
        return None
    name = published_name(column, published)
    for source, figures in published["perplexity"].items():
        found = figures.get(row.method, {}).get(name)
        if found is not None:
            return Published(Spread(*found) if isinstance(found, list) else Spread(found), source)
    return None


def without_runs(cells: dict[Row, dict[Column, Cell]], published: dict) -> list[Row]:
    """Return rows for the published figures of the columns' models that have no run."""
    columns = {column for row in cells.values() for column in row}
    methods = {method: None for figures in published["perplexity"].values() for method in figures}
    rows = [Row(0 if method == "dense" else published["setting"]["sparsity"], method, "") for method in methods]
    have = {row._replace(extra="") for row in cells}
    return [row for row in rows if row not in have and any(published_figure(row, c, published) for c in columns)]


def beside(cells: dict[Row, dict[Column, Cell]], published: dict) -> dict[tuple[Row, Column], Published]:
    """Return the published figures by cell: for cells made as published, and for rows without a run."""
    columns = {column for row in cells.values() for column in row}
    return {
        (row, column): found
        for row, own in cells.items()
        for column in (columns if not own else own)
        if (not own or own[column].as_published) and (found := published_figure(row, column, published))
    }


def table(
    cells: dict[Row, dict[Column, Cell]], value: str, published: dict, paper: dict[tuple[Row, Column], Published]
) -> list[list[str]]:
    """Return the lines of the table as text, headings first; a published figure appears to the right of its cell."""
    order = list(published["models"])
    columns = {column for row in cells.values() for column in row}
    names = {column: published_name(column, published) or column.model for column in columns}
    columns = sorted(columns, key=lambda c: (order.index(names[c]) if names[c] in order else 99, c.parameters, str(c)))
    headings = ["method", "allocation", "sparsity"]
    for column in columns:
        several = sum(names[other] == names[column] for other in columns) > 1
        headings.append(f"{names[column]} ({evaluation_text(column, value)})" if several else names[column])
        headings += ["published"] if any(c == column for _, c in paper) else []
    lines = [headings]
    most = max((cell.figure.count for row in cells.values() for cell in row.values()), default=1)
    for row in sorted(cells, key=_row_order):
        pruner, _, suffix = row.method.partition("_")
        allocation = ALLOCATIONS.get(suffix, suffix) if pruner != "dense" else ""
        labels = [pruner, ", ".join(filter(None, (allocation, row.extra))), row.pattern or f"{row.target:g}"]
        wanted = 1 if pruner == "dense" else most  # nothing is drawn for the dense model
        for column in columns:
            labels.append(cells[row][column].figure.text(wanted) if column in cells[row] else "")
            if any(c == column for _, c in paper):
                labels.append(paper[row, column].figure.text() if (row, column) in paper else "")
        lines.append(labels)
    return lines


def _row_order(row: Row) -> tuple:
    pruner, _, suffix = row.method.partition("_")
    place = PRUNERS.index(pruner) if pruner in PRUNERS else len(PRUNERS)
    return row.target, row.pattern, place, pruner, suffix, row.extra


def evaluation_text(column: Column, value: str) -> str:
    """Return a description of the column's evaluation text."""
    if value == "perplexity":
        text, seqlen, windows = column.evaluation
        return f"{text}, {windows} windows of {seqlen}"
    tasks, shots, limit = column.evaluation
    return f"{tasks}, {shots}-shot" + (f", {limit} questions each" if limit else "")


def caption(runs: list[dict], value: str, sources: list[str]) -> str:
    """Return one line that explains the figures and names their sources and those of the published ones."""
    what = "perplexity" if value == "perplexity" else "mean zero-shot accuracy (acc), %"
    texts = {evaluation_text(run["column"], value) for run in runs}
    parts = [f"{what} on {texts.pop()}" if len(texts) == 1 else what]
    seeds = sorted({run["flags"]["seed"] for run in runs if "seed" in run["flags"]})
    if len(seeds) > 1:
        parts.append(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}, or (n) of them")
    elif seeds:
        parts.append(f"seed {seeds[0]}")
    parts.append(commit_text(runs).rstrip("."))
    return "; ".join(parts + [f"published: {source}" for source in sources])


# ------------------------------------------------------------------------------------------------------ formats


def as_markdown(lines: list[list[str]], title: str) -> str:
    rule = [":--"] * 2 + ["--:"] * (len(lines[0]) - 2)
    rows = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in (rows[0], rule, *rows[1:]))


def as_latex(cells: list[list[str]], title: str) -> str:
    def escape(text: str) -> str:
        return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text).replace("±", "$\\pm$")

    rows = [" & ".join(map(escape, line)) + r" \\" for line in cells]
    begin = f"\\begin{{tabular}}{{ll{'r' * (len(cells[0]) - 2)}}}"
    lines = [f"% {title}", begin, r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def show(lines: list[list[str]], title: str, form: str) -> None:
    """Print the ``lines``, headings first, in a format of FORMATS."""
    if form == "text":
        console = Console(width=10_000)  # never squeezed into the 80 columns that rich takes a file to have
        report.line(console, title)
        report.show(console, "", lines[0], lines[1:])
    elif form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
    else:
        sys.stdout.write((as_markdown if form == "markdown" else as_latex)(lines, title))


def run(settings: Settings) -> None:
    """Read the run files and print the table."""
    folder = Path(settings.folder)
    runs = read_runs(folder, settings.value)
    if not runs:
        what = f"holds no complete run with a {settings.value} (run_*.json)" if folder.is_dir() else "folder not found"
        raise UserError(None, f"{folder}: {what}; give the --save folder of main.py")
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    cells = cells_of(runs, settings.value)
    if settings.published:
        cells |= {row: {} for row in without_runs(cells, published)}
    paper = beside(cells, published) if settings.value == "perplexity" else {}
    sources = [published["sources"][name] for name in dict.fromkeys(found.source for found in paper.values())]
    show(table(cells, settings.value, published, paper), caption(runs, settings.value, sources), settings.format)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    return command(Settings, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
