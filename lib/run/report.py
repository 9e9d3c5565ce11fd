"""Tables printed by the commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tabulate import tabulate

from lib.allocation import price
from lib.allocation.epsilon import best
from lib.allocation.price import SearchResult
from lib.core import files, processes
from lib.models.layers import Layer
from lib.run.record import Record, provenance
from lib.spectra.cache import Measurement


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned and the others right-aligned."""
    align = ["left"] + ["right"] * (len(headings) - 1)
    line(title)
    line(tabulate(rows, headings, tablefmt="rounded_outline", disable_numparse=True, colalign=align))


def line(sentence: str) -> None:
    """Print ``sentence``, in one process."""
    if processes.is_main():
        print(sentence, flush=True)


def show_metric(model: str, layers: Sequence[Layer], values: Mapping[str, float], measurement: Measurement) -> None:
    """Print the metric of a ``model`` by type of matrix."""
    kinds = {"all": list(values.values())}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(values[layer.name])
    figures = {kind: (min(numbers), sum(numbers) / len(numbers), max(numbers)) for kind, numbers in kinds.items()}
    rows = [(kind, *(f"{figure:.4f}" for figure in three)) for kind, three in figures.items()]
    show(f"{model}: {measurement.metric}", ("matrix", "smallest", "mean", "largest"), rows)
    line(f"cached in: {measurement.folder}/{measurement.stem}.npy")


def show_trials(record: Record, trials: Mapping[float, float]) -> None:
    """Print and record the perplexity of each epsilon that --epsilon auto has tried, if any."""
    if not trials:
        return
    chosen = best(trials)
    record.content["epsilon"] = chosen
    record.content["epsilon_search"] = [{"epsilon": trial, "perplexity": value} for trial, value in trials.items()]
    rows = [(f"{trial:.2f}", f"{value:.2f}" + " <- taken" * (trial == chosen)) for trial, value in trials.items()]
    show("--epsilon auto: perplexity on held-out calibration text", ("epsilon", "perplexity"), rows)


def show_prices(record: Record, search: SearchResult | None, data: str = "windows", of: str = "token") -> None:
    """Print, record and plot the search for prices, if there was one; printed are the steps evaluated on held-out data.

    ``data`` is what the search evaluates on, ``of`` what the KL is a mean over.
    """
    if search is None:
        return
    outcome = {"kept": search.kept, "dtype": search.dtype, "held_out_kl": search.held, "steps": search.steps}
    record.content["price_search"] = outcome
    files.save_figure(price.draw_search(search), record.folder / f"price_{record.run}.png")

    evaluated = [(i, step) for i, step in enumerate(search.steps, 1) if step["held"] is not None]
    rows = [(str(i), f"{x['spread']:.3f}", f"{x['fit']:.4f}", f"{x['held']:.4f}") for i, x in evaluated]
    headings = ("step", "spread of prices", f"KL, its {data}", f"KL, held-out {data}")
    show(f"price search in {search.dtype}: KL(dense || pruned), nats per {of}", headings, rows)
    kept = {name: " <- kept" if name == search.kept else "" for name in search.held}
    line(f"held-out {data}: {', '.join(f'{name} {kl:.4f}{kept[name]}' for name, kl in search.held.items())}")


def show_run(record: Record) -> None:
    """Print the figures of a run of main.py, and where they were written."""
    content, stages = record.content, record.stages.values()
    seconds, peak = sum(stage["seconds"] for stage in stages), max(stage["peak_rss_mb"] for stage in stages)
    perplexity = "-" if content["perplexity"] is None else f"{content['perplexity']:.4f}"
    row = (content["method"], f"{content['target_sparsity']:g}", f"{content['sparsity']:.4f}", perplexity)
    headings = ("method", "target", "sparsity", "perplexity", "seconds", "peak memory")
    show(f"{content['model']['given']}: {content['method']}", headings, [(*row, f"{seconds:.1f}", f"{peak} MB")])
    if recovery := content.get("recovery"):
        before, after = recovery["perplexity_before"], content["perplexity"]
        pairs = (("before", recovery["sparsity_before"], recovery["held_before"], before),
                 ("after", content["sparsity"], recovery["held_after"], after))  # fmt: skip
        rows = [(name, f"{zeros:.4f}", f"{loss:.4f}", f"{ppl:.4f}" if ppl else "-") for name, zeros, loss, ppl in pairs]
        title = f"recovery: {recovery['tokens']} tokens in {recovery['seconds']:.0f} s, learning rate "
        show(f"{title}{recovery['learning_rate']:.3g}", ("", "sparsity", "held-out loss", "perplexity"), rows)
    commit = (provenance()["git_commit"] or "unknown")[:12]
    line(f"model:   {content['model']['name']}, seed {content['flags']['seed']}, commit {commit}")
    line(f"written: {record.folder}/*_{record.run}.*")
    if content["saved_model"]:
        line(f"saved:   {content['saved_model']}")
