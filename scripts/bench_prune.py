"""Benchmark of the pruners against their plain formulations, CPU seconds and memory: python scripts/bench_prune.py"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plain_methods
from bench_metrics import cpu_name
from rich.console import Console

from lib.calibration import hidden
from lib.calibration import statistics as calibration
from lib.calibration.texts import calibration_windows
from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.allocator import give_back_freed_memory
from lib.core.lazy import numpy, torch, transformers
from lib.core.names import check_name
from lib.models.load import empty_llm, load_llm, load_tokenizer
from lib.models.locate import SMOLLM2, locate
from lib.models.safetensors_io import Checkpoint
from lib.models.streamed import Streamed
from lib.models.weights import Weights, weights_of
from lib.pruning import walk
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS
from lib.pruning.thresholds import nth_smallest, row_smallest
from lib.run import report
from lib.run.record import Record, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

PARTS = ("entry", "dense pass", "statistics", "factorisation", "solve or select", "pruned pass", "rest")
SHAPES_7B = "llama-7b-block"
MODELS = (SMOLLM2, SHAPES_7B)
SELECT = 4096  # rows and columns of the matrix whose selection is timed


@dataclass(kw_only=True)
class Benchmark(Flags):
    _title: ClassVar[str] = "benchmark"

    pruners: str = flag(",".join(PRUNERS), "pruners, with commas between them", metavar="P,P")
    models: str = flag(",".join(MODELS), "what is pruned, with commas between them", metavar="M,M")
    sparsity_ratio: float = flag(0.7, "fraction of the weights to remove, in [0, 1)", least=0, below=1, metavar="S")
    calib_data: str = flag("wiki_leads", "calibration text", metavar="TEXT")
    nsamples: int = flag(16, f"calibration windows of {SMOLLM2}, a count", least=1, metavar="N")
    seqlen: int = flag(512, f"window length of {SMOLLM2}, tokens", least=2, metavar="N")
    blocks: int | None = flag(None, f"of {SMOLLM2}, the first ones (default: all)", least=1, metavar="N")
    block_nsamples: int = flag(2, f"random windows of {SHAPES_7B}, a count", least=1, metavar="N")
    block_seqlen: int = flag(128, f"window length of {SHAPES_7B}, tokens", least=2, metavar="N")
    rounds: int = flag(2, "of which the fastest counts, a count", least=1, metavar="N")
    stream: bool = flag(
        False, f"ours reads {SMOLLM2} a block at a time and writes it to disk, as main.py --stream always", nargs="?"
    )
    threads: int = flag(1, "of each process, a count", least=1, metavar="N")
    selection: bool = flag(True, f"time the selections in a matrix of {SELECT}x{SELECT}, too", nargs="?")
    cache_dir: str = flag("llm_weights", "where SmolLM2 is kept", in_repository=True, metavar="DIR")
    save: str = flag("results/bench_prune", "where the figures and the chart are written", metavar="DIR")

    def check(self) -> None:
        for field, names in (("pruners", PRUNERS), ("models", MODELS)):
            for name in getattr(self, field).split(","):
                check_name(field, name, names)


PARSER = make_parser(
    Benchmark,
    "bench_prune.py",
    __doc__,
    "Every pruning runs in a separate process, ours and plain in turns. CPU seconds are those of all threads.",
)


class Cost(NamedTuple):
    """CPU ``seconds`` of a prune stage and its parts, its peak memory, and a file of the resulting ``zeros``.

    The zeros are bits; the ``first`` ones belong to the first block.
    """

    seconds: float
    parts: dict[str, float]
    peak_mb: int
    zeros: str
    first: int


# --------------------------------------------------------------------------------------------- in a separate process


class Clock:
    """CPU seconds by part; a part nested in another is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside, self._since = ["rest"], time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    def timed(self, name: str, function: Callable | None) -> Callable | None:
        """Return ``function`` with its seconds counted as the part ``name``."""

        def run(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return function and run


def load(model: str, settings: Benchmark, streamed: bool) -> tuple[Weights, Tensor]:
    """Return a model in float32, in memory or ``streamed``, and calibration windows [samples, tokens] for it."""
    if model == SMOLLM2:
        source = locate(model, settings.cache_dir)
        asked = (settings.calib_data, load_tokenizer(source), settings.nsamples, settings.seqlen, 0)
        dtype, folder = torch.float32, Path(source.path)
        loaded = empty_llm(source, folder, dtype) if streamed else load_llm(source, dtype, device="cpu")
        loaded.model.layers = loaded.model.layers[: settings.blocks]
        loaded.config.num_hidden_layers = len(loaded.model.layers)
        windows = calibration_windows(*asked)
        if streamed:
            return Streamed(loaded, Checkpoint(folder), torch.device("cpu"), dtype), windows
        return weights_of(loaded), windows
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    torch.manual_seed(0)
    windows = torch.randint(config.vocab_size, (settings.block_nsamples, settings.block_seqlen))
    return weights_of(transformers.LlamaForCausalLM(config).eval()), windows


def ours(weights: Weights, windows: Tensor, name: str, ratio: float, clock: Clock) -> None:
    """Prune ``weights`` in place with lib's walk."""
    pruner = PRUNERS[name]
    pruner = pruner._replace(
        prepare=clock.timed("factorisation", pruner.prepare),
        prune=clock.timed("solve or select", pruner.prune),
        group=clock.timed("solve or select", pruner.group),
    )
    statistics = {key: clock.timed("statistics", add) for key, add in calibration.STATISTICS.items()}
    with ExitStack() as patches:
        for owner, part, new in (
            (calibration, "STATISTICS", statistics),
            (walk, "input_statistics", clock.timed("dense pass", walk.input_statistics)),
            (walk, "advance", clock.timed("pruned pass", walk.advance)),
        ):
            patches.enter_context(mock.patch.object(owner, part, new))
        enter = clock.timed("entry", hidden.enter_blocks)
        plan = SparsityPlan(ratio, {layer.name: ratio for layer in weights.layers})
        walk.walk(weights, plan, pruner, enter(weights, windows) if pruner.statistic else None)


def plain(weights: Weights, windows: Tensor, name: str, ratio: float, clock: Clock) -> None:
    """Prune ``weights``, which are in memory, with the plain formulation."""
    method = plain_methods.METHODS[name]
    method = method._replace(
        prune=clock.timed("solve or select", method.prune), statistic=clock.timed("statistics", method.statistic)
    )
    parts = {
        "enter": "entry", "dense_pass": "dense pass", "pruned_pass": "pruned pass", "inverse_factor": "factorisation",
    }  # fmt: skip
    with ExitStack() as patches:
        for function, part in parts.items():
            new = clock.timed(part, getattr(plain_methods, function))
            patches.enter_context(mock.patch.object(plain_methods, function, new))
        plain_methods.walk(weights.model, windows, method, ratio)


WAYS = {"ours": ours, "plain": plain}


def cost(way: str, model: str, name: str, settings: Benchmark, folder: str) -> Cost:
    """Prune ``model`` and return the cost; the resulting zeros are written to ``folder``."""
    for package in ("torchvision", "triton"):  # not required on a CPU, and imported where they are there: 80 MB each
        sys.modules[package] = None
    torch.set_num_threads(settings.threads)
    weights, windows = load(model, settings, settings.stream and way == "ours")
    give_back_freed_memory()  # a text's tokens, as every run of main.py does
    record = Record(Path(folder), way)
    with record.stage("prune"), torch.no_grad():
        clock = Clock()
        start = time.process_time()
        with clock.part("rest"):
            WAYS[way](weights, windows, name, settings.sparsity_ratio, clock)
        seconds = time.process_time() - start
    path = Path(folder) / f"{way}.npy"
    masks = weights.map(lambda _, weight: (weight == 0).flatten().numpy())
    numpy.save(path, numpy.packbits(numpy.concatenate([*masks.values()])))
    first = sum(layer.size for layer in weights.layers if layer.block == 0)
    return Cost(seconds, dict(clock.seconds), record.stages["prune"]["peak_rss_mb"], str(path), first)


# ------------------------------------------------------------------------------------------------------ the benchmark


def separately(function: Callable, *args) -> object:
    """Return the result of ``function``, run in a separate process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args).result()


def measure(model: str, name: str, settings: Benchmark) -> dict:
    """Return the row of a pruner: its cheapest round, ours and plain, and the share of weights on which they agree."""
    found: dict[str, list[Cost]] = {way: [] for way in WAYS if way == "ours" or name in plain_methods.METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(settings.rounds):
            for way, costs in found.items():
                costs.append(separately(cost, way, model, name, settings, folder))
        zeros = [numpy.unpackbits(numpy.load(costs[0].zeros)) for costs in found.values()]
    row: dict = {"model": model, "pruner": name}
    for way, costs in found.items():
        best = min(costs, key=lambda cost: cost.seconds)
        row[way] = {"seconds": best.seconds, "parts": best.parts, "peak_mb": max(cost.peak_mb for cost in costs)}
    if len(zeros) > 1:
        row["ratio"] = row["plain"]["seconds"] / row["ours"]["seconds"]
        same = zeros[0] == zeros[1]
        row |= {"agree": same.mean().item(), "agree_in_first_block": same[: best.first].mean().item()}
    return row


def select(settings: Benchmark) -> list[dict]:
    """Return a row for each selection in a SELECT x SELECT matrix; its mask must equal that of the sort."""
    torch.set_num_threads(settings.threads)
    score = torch.randn(SELECT, SELECT, generator=torch.Generator().manual_seed(0)).abs()
    count, index = int(SELECT * settings.sparsity_ratio), int(score.numel() * settings.sparsity_ratio)

    def sorted_rows() -> Tensor:
        first = score.sort(dim=-1, stable=True).indices[:, :count]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, first, True)

    cases: dict[str, tuple[Callable, Callable]] = {
        "wanda": (lambda: row_smallest(score, count), sorted_rows),
        "magnitude": (
            lambda: score <= nth_smallest(score, index),
            lambda: score <= score.flatten().sort().values[index],
        ),
    }
    rows = []
    for name, functions in cases.items():
        if not torch.equal(functions[0](), functions[1]()):
            raise AssertionError(f"{name}: the selection is not that of the sort")
        seconds = [[_seconds(function) for function in functions] for _ in range(settings.rounds)]
        quick, slow = (min(column) for column in zip(*seconds, strict=True))
        rows.append({"select": name, "seconds": quick, "plain_seconds": slow, "ratio": slow / quick})
    return rows


def _seconds(function: Callable) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


# ------------------------------------------------------------------------------------------------------------ results


def cells(row: Mapping) -> Iterator[tuple[str, ...]]:
    """Yield two lines of the table for a row of ``measure``: ours, and plain."""
    for way in WAYS:
        if way not in row:
            continue
        own = row[way]
        ratio = f"{row['ratio']:.2f}" if way == "ours" and "ratio" in row else ""
        parts = (f"{own['parts'].get(part, 0):.1f}" for part in PARTS)
        yield (f"{row['pruner']}, {way}", f"{own['seconds']:.1f}", ratio, str(own["peak_mb"]), *parts)


def draw(rows: Sequence[Mapping], title: str) -> Figure:
    """Return a bar chart of the parts of each prune stage, ours beside plain, one panel per model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.42 * 2 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        bars = [
            (f"{row['pruner']}, {way}", row[way]) for row in rows if row["model"] == model for way in WAYS if way in row
        ]
        left = [0.0] * len(bars)
        for part in PARTS:
            widths = [own["parts"].get(part, 0) for _, own in bars]
            axes.barh([label for label, _ in bars], widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(title=model, xlabel="CPU seconds")
    figure.axes[0].legend(fontsize=8)
    return figure


def show(console: Console, rows: Sequence[Mapping], title: str) -> None:
    """Print the table of a model's rows, and the agreement of ours and plain."""
    headings = ("pruner", "seconds", "plain / ours", "peak MB", *PARTS)
    report.show(console, title, headings, [line for row in rows for line in cells(row)])
    for row in rows:
        if "agree" in row:
            first, every = (f"{100 * row[key]:.3f} %" for key in ("agree_in_first_block", "agree"))
            text = f"zero in both or in neither: {first} of the first block's weights, {every} of all"
            report.line(console, f"{row['pruner']}: {text}")


def run(settings: Benchmark) -> None:
    """Measure, print a table per model, and write the figures and a chart, with the machine's description."""
    folder, console = Path(settings.save), Console(width=150)
    files.check_writable("save", folder)
    rows = []
    machine = {"cpu": cpu_name(), "threads": settings.threads} | provenance()
    for model in settings.models.split(","):
        for name in settings.pruners.split(","):
            rows.append(measure(model, name, settings))
            print(f"{model}, {name}: {rows[-1]['ours']['seconds']:.1f} s", file=sys.stderr, flush=True)
        title = f"{model} at {settings.sparsity_ratio}: CPU seconds of the prune stage; {machine['cpu']}"
        show(console, [row for row in rows if row["model"] == model], title)
    selections = separately(select, settings) if settings.selection else []
    figures = [
        [row["select"], *(f"{row[key]:.3f}" for key in ("plain_seconds", "seconds", "ratio"))] for row in selections
    ]
    if figures:
        title = f"selection in {SELECT}x{SELECT}, CPU seconds"
        report.show(console, title, ("pruner", "sort", "ours", "sort / ours"), figures)
    content = {"rows": rows, "selections": selections, "settings": settings.flags(), "machine": machine}
    files.write_atomically(folder / "bench_prune.json", json.dumps(content, indent=1) + "\n")
    chart = draw(rows, f"prune stage at {settings.sparsity_ratio}, threads: {settings.threads}; {machine['cpu']}")
    files.save_figure(chart, folder / "bench_prune.png", dpi=130)
    print(f"written: {folder}/bench_prune.json and .png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    return command(Benchmark, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
