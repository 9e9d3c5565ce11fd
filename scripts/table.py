"""Table of the run files under a folder: mean and deviation over seeds, published figures beside them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tabulate import tabulate

from lib.allocation import price
from lib.allocation.block_scores import BLOCK_SCORES
from lib.allocation.formulas import ALLOCATIONS
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.cli.settings import Experiment
from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import numpy, pandas
from lib.pruning.pruners import PRUNERS
from lib.run.record import parsed

PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "published_results.json"
# Of allocations; the others are called by their suffix.
LABELS = {"": "uniform", "ww": "AlphaPruning", "owl": "OWL"}
LEFT = ("method", "pruner", "allocation", "model", "engine", "case")  # headings of columns of words
FORMATS = {"text": "rounded_outline", "markdown": "pipe", "csv": "", "latex": "latex"}  # tabulate's names

# Flags in which runs of one cell may differ without being two settings; a cell is about all of its seeds.
IGNORED = set(
    "model cache_dir save save_model ww_metric_cache prune_method sparsity_ratio seed eval_wikitext eval_data "
    "eval_windows eval_zero_shot tasks num_fewshot limit eval_batch_size include_path".split()
)
# Flags that make another method of a run, and the published value of each; the published figure is for those.
OF_METRIC = {"ww_metric": "alpha_peak", "mapping_type": "block_wise", "farms": False}
OF_PRUNER = {"use_variant": False, "refit": None, "damping": None, "pruner_iterations": None, "statistics": "pruned"}
OF_MIXTURE = {"only": None, "drop_experts": 0.0}
SETTING = {"nsamples": 128, "calib_data": "c4", "eval_windows": None, "sparsity_type": "unstructured"}

# What names a row and a column of the table. Figures on different texts do not belong in one column.
METHOD = ["pruner", "suffix", "extra"]
ROW = ["target", "pattern", *METHOD]
COLUMN = ["model", "parameters", "evaluation", "on_published_text"]

NOTES = (
    "Bold: a mean below every other one of its pruner and sparsity by more than the larger of the two standard "
    "deviations; of one seed the noise is unknown, and nothing is bold. Seconds: of the allocation, in the longest of "
    "its runs (what runs share is found once, a metric is kept on disk). Passes: windows through the blocks for the "
    "allocation alone, a backward pass counted as two. Pruning s: mean seconds of the pruning stage. On a CPU they are "
    "CPU seconds of all threads."
)  # on the table ``by_sparsity``


@dataclass(kw_only=True)
class Settings(Flags):
    _title: ClassVar[str] = "table"

    folder: str = flag(MISSING, "where the run files are, at any depth", positional=True)
    format: str = flag("text", "of the table", choices=list(FORMATS), metavar="NAME")
    value: str = flag("perplexity", "what the cells hold", choices=["perplexity", "zero_shot"], metavar="NAME")
    published: bool = flag(False, "list the published figures of these models that no run stands beside, too")


PARSER = make_parser(Settings, "table.py", __doc__)


@cache
def published() -> dict:
    """Return the published figures: their models, setting and sources."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def read_runs(paths: Iterable[Path], value: str = "perplexity") -> pandas.DataFrame:
    """Return ``runs_of`` the complete runs that have a ``value``; report which files are left out."""
    rows = []
    for path in paths:
        try:
            record = parsed(path.read_text(encoding="utf-8"))
            if record["complete"] is not True:
                raise ValueError("not complete")
            if record[value] is not None:
                rows.append(row_of(record, value))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"table.py: {path} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return runs_of(rows)


def row_of(record: Mapping, value: str = "perplexity") -> dict:
    """Return how a run was pruned and evaluated, its figure, and what it cost."""
    flags, model, setting = record["flags"], record["model"], published()["setting"]
    pruner, _, suffix = record["method"].partition("_")
    name = next((
        published_name for published_name, entry in published()["models"].items()
        if model["name"].lower() in entry["names"] and model["parameters"] == entry["parameters"]
    ), model["name"])  # fmt: skip
    if value == "perplexity":
        evaluation = "{text}, {windows} windows of {seqlen}".format(**record["evaluation"])
        on_published_text = all(record["evaluation"][key] == setting[key] for key in ("text", "seqlen"))
        figure = float(record["perplexity"])
    else:
        limit = f", {flags['limit']} questions each" if flags["limit"] else ""
        evaluation = f"{flags['tasks']}, {flags['num_fewshot']}-shot{limit}"
        on_published_text = False
        figure = 100 * float(record["zero_shot"]["means"]["acc"])
    # A CPU may have been used by others, too: the run's own seconds count.
    clock = "cpu_seconds" if str(record["device"][0]).startswith("cpu") else "seconds"
    seconds = {stage: cost[clock] for stage, cost in record["stages"].items()}
    usual = OF_PRUNER | OF_MIXTURE | (OF_METRIC if suffix == "ww" else {})
    return {
        "target": float(record["target_sparsity"]),
        "pattern": "" if flags["sparsity_type"] == "unstructured" else flags["sparsity_type"],
        "pruner": pruner,
        "suffix": suffix,
        "model": name,
        "parameters": model["parameters"],
        "evaluation": evaluation,
        "on_published_text": on_published_text,
        "seed": flags["seed"],
        "figure": figure,
        "flags": flags,
        "steering": {name for name, value in usual.items() if flags.get(name, value) != value},
        "as_published": all(flags.get(name, value) == value for name, value in (usual | SETTING).items()),
        "finished": str(record["finished"]),
        "commit": record["git_commit"] or "unknown",
        "allocating": seconds.get("measure", 0.0) + seconds.get("allocate", 0.0),
        "pruning": seconds.get("prune", 0.0),
    }


def runs_of(rows: Sequence[dict]) -> pandas.DataFrame:
    """Return a frame with a row per run, the newest last.

    ``extra`` names the flags that make another method of a run, or in which runs of one cell differ (--epsilon,
    --nsamples ...): each setting gets a separate row of the table.
    """
    if not rows:
        return pandas.DataFrame()
    runs = pandas.DataFrame(rows).sort_values("finished", kind="stable", ignore_index=True)
    flags = pandas.DataFrame(
        [{name: str(value) for name, value in flags.items() if name not in IGNORED} for flags in runs["flags"]]
    )
    runs["extra"] = ""
    for _, method in runs.groupby(["pattern", "pruner", "suffix"]):
        differing = set()
        for _, cell in method.groupby(["target", *COLUMN]):
            differing |= set(flags.columns[flags.loc[cell.index].nunique(dropna=False) > 1])
        for i in method.index:
            names = sorted(differing | runs.at[i, "steering"])
            runs.at[i, "extra"] = ", ".join(f"{name} {runs.at[i, 'flags'].get(name)}" for name in names)
    return runs


def cells_of(runs: pandas.DataFrame) -> pandas.DataFrame:
    """Return a row per cell: mean, sample standard deviation and count of seeds; of two runs of one, the newer."""
    newest = runs.drop_duplicates([*ROW, *COLUMN, "seed"], keep="last")
    cells = newest.groupby([*ROW, *COLUMN], as_index=False, dropna=False).agg(
        # A figure that is not a number is a result, and not skipped.
        mean=("figure", lambda figures: figures.mean(skipna=False)),
        deviation=("figure", lambda figures: figures.std() if numpy.isfinite(figures).all() else math.nan),
        seeds=("figure", "size"),
        as_published=("as_published", "all"),
    )
    cells["text"] = [figure_text(*figures) for figures in zip(cells["mean"], cells["deviation"], strict=True)]
    # How many seeds there are is said where they are fewer; nothing is drawn for the dense model, which has one.
    fewer = (cells["seeds"] < cells["seeds"].max()) & (cells["pruner"] != "dense")
    cells.loc[fewer, "text"] += cells["seeds"].map(" ({})".format)
    return cells


def figure_text(mean: float, deviation: float = math.nan) -> str:
    """Return a figure with two decimals, and its deviation if there is one."""
    return f"{mean:.2f}" + ("" if math.isnan(deviation) else f" ± {deviation:.2f}")


def label_of(suffix: str, extra: str) -> str:
    """Return the name of an allocation, followed by the flags that tell it from others of that name."""
    allocation = suffix.removesuffix("recovered").removesuffix("_")
    name = LABELS.get(allocation, allocation) + " + recovery" * (allocation != suffix)
    return ", ".join(filter(None, (name, extra)))


def _place(row: tuple) -> tuple:
    """Return the key by which rows are sorted: the last three entries of ROW, after whatever comes before them."""
    *before, pruner, suffix, extra = row
    places = {name: place for place, name in enumerate(["dense", *PRUNERS, *ALLOCATIONS])}
    return *before, places.get(pruner, 99), pruner, places.get(suffix, 99), suffix, extra


def with_published(cells: pandas.DataFrame, every: bool = False) -> pandas.DataFrame:
    """Return the cells with the ``published`` figure and its ``source`` beside those that were made as published.

    Args:
        every: add a row for each published figure of these models that has no run, too.
    """
    setting, row = published()["setting"], ["target", "pattern", "pruner", "suffix"]
    figures = []
    for source, methods in published()["perplexity"].items():
        for method, of_models in methods.items():
            pruner, _, suffix = method.partition("_")
            method_row = (0.0 if method == "dense" else setting["sparsity"], "", pruner, suffix)
            for model, figure in of_models.items():
                cell = figure_text(*figure[:2]) if isinstance(figure, list) else figure_text(figure)
                figures.append((*method_row, model, cell, published()["sources"][source]))
    figures = pandas.DataFrame(figures, columns=[*row, "model", "published", "source"])

    table = cells.merge(figures, how="left", on=[*row, "model"])
    table.loc[~(table["as_published"] & table["on_published_text"]), ["published", "source"]] = ""
    if every:
        alone = figures.merge(cells.loc[cells["on_published_text"], COLUMN].drop_duplicates(), on="model")
        alone = alone[~alone.set_index(row).index.isin(cells.set_index(row).index)]
        table = pandas.concat([table, alone.assign(extra="", text="")], ignore_index=True)
    return table.fillna({"published": "", "source": ""})


def by_model(cells: pandas.DataFrame) -> list[list[str]]:
    """Return the lines of a table with a column per model and text, headings first (``with_published``)."""
    models = list(published()["models"])
    columns = [(name, cell.set_index(ROW)) for name, cell in cells.groupby(COLUMN)]
    columns.sort(key=lambda c: (models.index(c[0][0]) if c[0][0] in models else 99, c[0][1:]))
    names = [model for (model, *_), _ in columns]
    texts = [(model, evaluation) for (model, _, evaluation, _), _ in columns]
    headings, lines = ["method", "allocation", "sparsity"], {}
    for row in sorted(cells[ROW].itertuples(index=False, name=None), key=_place):
        target, pattern, pruner, suffix, extra = row
        lines[row] = [pruner, extra if pruner == "dense" else label_of(suffix, extra), pattern or f"{target:g}"]
    for (model, parameters, evaluation, _), column in columns:
        headings.append(f"{model} ({evaluation})" if names.count(model) > 1 else model)
        if texts.count((model, evaluation)) > 1:  # such as one without some of its experts
            headings[-1] += f", {parameters:,} parameters"
        figures = ["text", "published"] if column["published"].any() else ["text"]
        headings += figures[1:]
        for row, line in lines.items():
            line += list(column.loc[row, figures]) if row in column.index else [""] * len(figures)
    return [headings, *lines.values()]


def by_sparsity(runs: pandas.DataFrame, costs: bool = True) -> list[list[str]]:
    """Return the lines of a table of one model with a column per sparsity, headings first; ``NOTES`` explains it.

    Args:
        costs: add seconds and passes.
    """
    runs = runs[runs["pruner"] != "dense"]
    cells = cells_of(runs)
    for i, cell in cells.iterrows():
        rivals = cells[(cells["pruner"] == cell["pruner"]) & (cells["target"] == cell["target"])].drop(i)
        noise = numpy.maximum(rivals["deviation"], cell["deviation"])  # not a number for a single seed
        if len(rivals) and (rivals["mean"] - cell["mean"] > noise).all():
            cells.at[i, "text"] = f"**{cell['text']}**"

    targets = sorted(cells["target"].unique())
    lines = [["pruner", "allocation", *(f"{target:g}" for target in targets)]]
    lines[0] += ["seconds", "passes", "pruning s"] if costs else []
    allocating = runs.groupby(["suffix", "extra"])["allocating"].max()  # other runs may have reused its result
    for row, of_row in sorted(runs.groupby(METHOD), key=lambda group: _place(group[0])):
        texts = cells[(cells[METHOD] == row).all(axis=1)].set_index("target")["text"]
        line = [row[0], label_of(*row[1:]), *(texts.get(target, "-") for target in targets)]
        if costs:
            passes = passes_of(Experiment(**of_row["flags"].iloc[0]))
            line += [f"{allocating[row[1:]]:.0f}", str(passes), f"{of_row['pruning'].mean():.0f}"]
        lines.append(line)
    return lines


def passes_of(settings: Experiment) -> int:
    """Return how many calibration windows a run's allocation passes through the blocks; two of half the length are one.

    The passes of pruning itself are not counted: they are the same for all allocations.
    """
    task = settings.task()
    if task.needs != "price":
        return settings.nsamples if task.needs in BLOCK_SCORES else 0
    options = settings.price_options()
    return -(-forward_passes(options) // options.window_divisor)


def forward_passes(options: price.SearchOptions) -> int:
    """Return how many windows a search passes through the blocks, a backward pass counted as two.

    Where there is no room for all activations of a step, its windows pass once more (checkpointing).
    """
    evaluations = 2 + math.ceil(options.steps / options.evaluate_every)  # the dense model's, and of uniform ratios: 2
    return price.FIT_WINDOWS + evaluations * options.held_out_windows + 3 * options.steps * options.windows_per_step


def caption(runs: pandas.DataFrame, value: str = "perplexity", sources: Iterable[str] = ()) -> str:
    """Return one line that explains the figures and names their commits and the sources of the published ones."""
    texts, seeds = runs["evaluation"].unique(), sorted(runs["seed"].unique())
    name = "perplexity" if value == "perplexity" else "mean zero-shot accuracy (acc), %"
    clauses = [f"{name} on {texts[0]}" if len(texts) == 1 else name, f"seed {seeds[0]}"]
    if len(seeds) > 1:
        clauses[1] = f"mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}, or (n) of them"
    commits = [commit[:12] + ("-dirty" if commit.endswith("-dirty") else "") for commit in runs["commit"].unique()]
    clauses.append(f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}")
    return "; ".join(clauses + [f"published: {source}" for source in sources])


def formatted(lines: Sequence[Sequence[str]], form: str) -> str:
    """Return a table as text, its ``lines`` headings first."""
    align = ["left" if heading in LEFT else "right" for heading in lines[0]]
    table = tabulate(lines[1:], lines[0], tablefmt=FORMATS[form], disable_numparse=True, colalign=align)
    return table.replace("±", r"$\pm$") if form == "latex" else table


def plot(path: Path, *panels: pandas.DataFrame, xlabel: str = "perplexity", xscale: str = "log") -> None:
    """Write a PNG with a panel for the cells of each model: a row for each method, and in it a mark for each sparsity.

    The bar through a mark is the standard deviation over seeds, and a dotted line stands for the dense model. A mean
    that is not finite has no place on the axis: the label of its row names it.
    """
    most = max(cells.groupby(METHOD).ngroups for cells in panels)
    figure, all_axes = files.new_figure(7.5 * len(panels), 1.4 + 0.32 * most, columns=len(panels))
    for axes, cells in zip(all_axes, panels, strict=True):
        finite = cells["mean"].where(numpy.isfinite(cells["mean"]))
        pruned = cells[cells["pruner"] != "dense"]
        rows = sorted(set(pruned[METHOD].itertuples(index=False, name=None)), key=_place)
        labels = [f"{pruner}, {label_of(suffix, extra)}" for pruner, suffix, extra in rows]
        heights = pandas.Series([rows.index(tuple(row)) for row in pruned[METHOD].to_numpy()], pruned.index, dtype=int)
        for sparsity, marks in pruned.groupby("target"):
            places, bars = heights[marks.index], marks["deviation"].fillna(0)
            axes.errorbar(finite[marks.index], places, xerr=bars, fmt="o", capsize=2, label=f"sparsity {sparsity:g}")
            for i in marks.index[finite[marks.index].isna()]:
                labels[heights[i]] += f", {cells.at[i, 'mean']} at {sparsity:g}"
        for i in cells.index[cells["pruner"] == "dense"]:
            axes.axvline(finite[i], color="black", linewidth=0.8, linestyle=":", label=f"dense, {cells.at[i, 'text']}")
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.set(xscale=xscale if finite.notna().any() else "linear", xlabel=xlabel, title=cells["model"].iloc[0])
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    files.save_figure(figure, path)


def run(settings: Settings) -> None:
    """Read the run files and print the table."""
    folder = Path(settings.folder)
    runs = read_runs(sorted(folder.rglob("run_*.json")), settings.value)
    if runs.empty:
        problem = f"holds no complete run with a {settings.value}" if folder.is_dir() else "folder not found"
        raise UserError(None, folder, problem, "give the --save folder of main.py")
    cells = with_published(cells_of(runs), settings.published)
    lines = by_model(cells)
    if settings.format == "csv":
        pandas.DataFrame(lines).to_csv(sys.stdout, header=False, index=False)
        return
    title = caption(runs, settings.value, filter(None, cells["source"].unique()))
    print(f"{'% ' if settings.format == 'latex' else ''}{title}\n\n{formatted(lines, settings.format)}")


def main(argv: Sequence[str] | None = None) -> int:
    return command(Settings, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
