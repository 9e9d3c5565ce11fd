"""Table in the paper's layout of the run files under a folder, the paper's figures beside them."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from lib import UserError, tables
from lib.command import Flags, command, flag, make_parser

PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "published_results.json"
PRUNERS = ("dense", "magnitude", "wanda", "sparsegpt")  # the order of the rows; others come after them
ALLOCATIONS = {"": "uniform", "ww": "AlphaPruning", "owl": "OWL"}
# Flags in which two runs of one cell may differ without being two settings.
PLACES = {"model", "cache_dir", "save", "save_model", "ww_metric_cache", "prune_method", "sparsity_ratio"}
EVALUATION = {
    "perplexity": {"eval_wikitext", "eval_data", "eval_windows"},
    "zero_shot": {"eval_zero_shot", "tasks", "num_fewshot", "limit", "eval_batch_size", "include_path"},
}


# Flags that make another method of a run, and the published value of each; the paper's figure is for those.
STEERING = {"ww_metric": "alpha_peak", "mapping_type": "block_wise", "use_variant": False, "farms": False}
SETTING = STEERING | {"nsamples": 128, "calib_data": "c4", "eval_windows": None}
FORMATS = ("text", "markdown", "csv", "latex")


@dataclass(kw_only=True)
class Settings(Flags):
    _title: ClassVar[str] = "table"

    folder: str = flag(MISSING, "where the run files are, at any depth", positional=True)
    format: str = flag("text", "of the table", choices=FORMATS, metavar="NAME")
    value: str = flag("perplexity", "what the cells hold", choices=EVALUATION, metavar="NAME")


PARSER = make_parser(Settings, "table.py", __doc__)


class Column(NamedTuple):
    """A model and what it was evaluated on: figures on two texts do not belong in one column."""

    model: str
    parameters: int
    evaluation: tuple


class Row(NamedTuple):
    """What was done to the model; ``extra`` names the flags that tell apart runs which would share a cell."""

    target: float
    method: str
    pattern: str  # N:M, or nothing
    extra: str = ""


class Cell(NamedTuple):
    """A figure, and whether it was made as published (but for epsilon, which the paper tuned by hand)."""

    figure: float
    as_published: bool


def read_runs(folder: Path, value: str) -> list[dict]:
    """Return the complete records under ``folder`` that have a ``value``, the newest last; say which are left out."""
    runs = []
    for path in sorted(folder.rglob("run_*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["complete"] is not True:
                raise ValueError("not complete")
            if record[value] is not None:
                _measured(record, value)
                record["column"] = _column(record, value)
                runs.append(record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"table.py: {path} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return sorted(runs, key=lambda record: record["finished"])


def _measured(record: dict, value: str) -> float:
    return record["perplexity"] if value == "perplexity" else 100 * record["zero_shot"]["means"]["acc"]


def _column(record: dict, value: str) -> Column:
    flags, model = record["flags"], record["model"]
    if value == "perplexity":
        evaluation = tuple(record["evaluation"][key] for key in ("text", "seqlen", "windows"))
    else:
        evaluation = (flags["tasks"], flags["num_fewshot"], flags["limit"])
    return Column(model["name"], model["parameters"], evaluation)


def cells_of(runs: list[dict], value: str) -> dict[Row, dict[Column, Cell]]:
    """Return the figures by row and column; of two runs with the same flags the newer one counts.

    Where runs of one cell differ in a flag (--epsilon, --nsamples ...), each setting gets a separate row.
    """
    grouped: dict[Row, dict[Column, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        pattern = run["flags"].get("sparsity_type", "unstructured")
        row = Row(run["target_sparsity"], run["method"], "" if pattern == "unstructured" else pattern)
        grouped[row][run["column"]].append(run)
    ignored = PLACES | EVALUATION["perplexity"] | EVALUATION["zero_shot"]
    cells: dict[Row, dict[Column, Cell]] = defaultdict(dict)
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
                    other &= {"use_variant"}
                extra = ", ".join(f"{flag} {flags.get(flag)}" for flag in sorted(differing | other))
                as_published = all(flags.get(flag, published) == published for flag, published in SETTING.items())
                cells[row._replace(extra=extra)][column] = Cell(_measured(run, value), as_published)
    return cells


def published_name(column: Column, published: dict) -> str | None:
    """Return the paper's name of the column's model, None if it is not among the paper's."""
    for name, about in published["models"].items():
        if column.model.lower() in about["names"] and column.parameters == about["parameters"]:
            return name
    return None


def published_figure(row: Row, column: Column, published: dict) -> float | None:
    """Return the paper's perplexity of a cell, None if it has none for this model, row and evaluation text."""
    setting = published["setting"]
    same = column.evaluation[:2] == (setting["text"], setting["seqlen"]) and not row.pattern
    if not same or row.target not in (0, setting["sparsity"]):
        return None
    return published["perplexity"].get(row.method, {}).get(published_name(column, published))


def table(cells: dict[Row, dict[Column, Cell]], value: str, published: dict) -> list[list[str]]:
    """Return the lines of the table as text, headings first; a paper's figure stands to the right of its cell."""
    order = list(published["models"])
    columns = {column for row in cells.values() for column in row}
    names = {column: published_name(column, published) or column.model for column in columns}
    columns = sorted(columns, key=lambda c: (order.index(names[c]) if names[c] in order else 99, c.parameters, str(c)))
    paper = {
        (row, column): figure
        for row in cells
        for column, cell in cells[row].items()
        if cell.as_published
        and value == "perplexity"
        and (figure := published_figure(row, column, published)) is not None
    }
    headings = ["method", "allocation", "sparsity"]
    for column in columns:
        several = sum(names[other] == names[column] for other in columns) > 1
        headings.append(f"{names[column]} ({evaluation_text(column, value)})" if several else names[column])
        headings += ["paper"] if any(c == column for _, c in paper) else []
    lines = [headings]
    for row in sorted(cells, key=_row_order):
        pruner, _, suffix = row.method.partition("_")
        allocation = ALLOCATIONS.get(suffix, suffix) if pruner != "dense" else ""
        labels = [pruner, ", ".join(filter(None, (allocation, row.extra))), row.pattern or f"{row.target:g}"]
        for column in columns:
            labels.append(_figure(cells[row][column].figure if column in cells[row] else None))
            labels += [_figure(paper.get((row, column)))] if any(c == column for _, c in paper) else []
        lines.append(labels)
    return lines


def _row_order(row: Row) -> tuple:
    pruner, _, suffix = row.method.partition("_")
    place = PRUNERS.index(pruner) if pruner in PRUNERS else len(PRUNERS)
    return row.target, row.pattern, place, pruner, suffix, row.extra


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if math.isfinite(value) else str(value)


def evaluation_text(column: Column, value: str) -> str:
    """Return in words what the column was evaluated on."""
    if value == "perplexity":
        text, seqlen, windows = column.evaluation
        return f"{text}, {windows} windows of {seqlen}"
    tasks, shots, limit = column.evaluation
    return f"{tasks}, {shots}-shot" + (f", {limit} questions each" if limit else "")


def caption(columns: set[Column], value: str) -> str:
    """Return one line that says what the figures are."""
    what = "perplexity" if value == "perplexity" else "mean zero-shot accuracy (acc), %"
    texts = {evaluation_text(column, value) for column in columns}
    return f"{what} on {texts.pop()}" if len(texts) == 1 else what


# ------------------------------------------------------------------------------------------------------ formats


def as_markdown(lines: list[list[str]], title: str) -> str:
    rule = [":--"] * 2 + ["--:"] * (len(lines[0]) - 2)
    rows = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in (rows[0], rule, *rows[1:]))


def as_latex(cells: list[list[str]], title: str) -> str:
    def escape(text: str) -> str:
        return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)

    rows = [" & ".join(map(escape, line)) + r" \\" for line in cells]
    begin = f"\\begin{{tabular}}{{ll{'r' * (len(cells[0]) - 2)}}}"
    lines = [f"% {title}", begin, r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def show(lines: list[list[str]], title: str, form: str) -> None:
    """Print the ``lines``, headings first, in a format of FORMATS."""
    if form == "text":
        console = Console(width=10_000)  # never squeezed into the 80 columns that rich takes a file to have
        tables.line(console, title)
        tables.show(console, "", lines[0], lines[1:])
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
    cells = cells_of(runs, settings.value)
    lines = table(cells, settings.value, json.loads(PUBLISHED.read_text(encoding="utf-8")))
    show(lines, caption({run["column"] for run in runs}, settings.value), settings.format)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    return command(Settings, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
