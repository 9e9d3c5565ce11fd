"""Benchmark of lib against plain formulations, timed in turns in the same run: python scripts/bench/bench.py"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import cpu, files
from lib.core.errors import UserError, check_name
from lib.core.lazy import torch
from lib.run.record import provenance
from scripts.bench.cases import PARTS, SIZES, Case, Sizes
from scripts.table import formatted

# TFLOP/s of dense products of halves with float32 sums, as the manufacturer gives them, by a part of the card's name.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}
# Share of zeros or numbers: float32 rounds otherwise in another order, near thresholds and near zero.
LEAST_ALIKE = 0.98
HEADINGS = ("case", "seconds", "GiB", "TFLOP/s", "of peak", "plain seconds", "plain GiB", "plain / ours", "alike")


@dataclass(kw_only=True)
class Benchmark(Flags):
    _title: ClassVar[str] = "benchmark"

    parts: str = flag(",".join(PARTS), "what is compared, with commas between the parts", metavar="P,P")
    device: str = flag("cpu", "where it is computed: {choices}", choices=("cpu", "cuda"))
    shapes: str | None = flag(None, "whose shapes the weights have (default: by the device)", choices=tuple(SIZES))
    blocks: int = flag(2, "blocks that are walked, a count", least=1, metavar="N")
    samples: int = flag(8, "calibration windows, a count", least=1, metavar="N")
    rounds: int = flag(3, "turns of each, of which the fastest counts, a count", least=1, metavar="N")
    threads: int = flag(1, "threads on a CPU, a count", least=1, metavar="N")
    save: str = flag("results/bench", "where bench.json and bench.md are written", metavar="DIR")

    def check(self) -> None:
        for name in self.parts.split(","):
            check_name("parts", name, PARTS)

    def sizes(self) -> Sizes:
        """Return the shapes to measure, with the flags' numbers of blocks and windows."""
        sizes = SIZES[self.shapes or ("llama-7b" if self.device == "cuda" else "smollm2-135m")]
        return sizes._replace(blocks=self.blocks, samples=self.samples)


PARSER = make_parser(
    Benchmark, "bench.py", __doc__,
    "Seconds are CPU seconds of all threads, on a GPU seconds until it is done; GiB: the most beyond what was there.",
)  # fmt: skip


class Cost(NamedTuple):
    """The ``seconds`` of a call, and the most GPU memory that it took beyond what was there (``gib``; CPU: None)."""

    seconds: float
    gib: float | None


class Row(NamedTuple):
    """The lowest cost of a case, ours and plain; ``alike`` is the share of their results that agree."""

    name: str
    ours: Cost
    plain: Cost | None
    alike: float | None
    flops: float | None = None

    @property
    def differs(self) -> bool:
        """Whether the two compute something else, so that their ratio says nothing."""
        return self.alike is not None and not self.alike >= LEAST_ALIKE


def measure(function: Callable[[], Any], device: torch.device) -> tuple[Any, Cost]:
    """Return the result of ``function`` and the cost of this call."""
    if device.type != "cuda":
        start = time.process_time()
        result = function()
        return result, Cost(time.process_time() - start, None)
    torch.zeros(1, device=device)  # before CUDA is initialised, its counters cannot be reset
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, start = torch.cuda.memory_allocated(device), time.perf_counter()
    result = function()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return result, Cost(seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**30)


def compare(case: Case, device: torch.device, rounds: int) -> Row:
    """Return the row of ``case``: ours and plain take turns ``rounds`` times, after a first turn that is compared."""
    functions = [case.ours] if case.plain is None else [case.ours, case.plain]
    results, costs, alike = [], [[] for _ in functions], None
    for turn in range(rounds + 1):
        for function, costs_of_function in zip(functions, costs, strict=True):
            case.reset()
            result, cost = measure(function, device)
            if turn:
                costs_of_function.append(cost)
            elif case.plain is not None:
                results.append(case.read(result))
            del result  # before the next call: its memory is not that call's
        if results:
            alike = case.alike(*results)
            results.clear()
    least = [Cost(min(c.seconds for c in ones), max(c.gib or 0 for c in ones) or ones[0].gib) for ones in costs]
    return Row(case.name, least[0], least[1] if case.plain else None, alike, case.flops)


def table(rows: Sequence[Row], peak: float | None = None) -> str:
    """Return a Markdown table; ``peak``: the card's TFLOP/s in half precision, None if unknown."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = []
    for row in rows:
        rate = None if row.flops is None else row.flops / row.ours.seconds / 1e12
        plain = row.plain or Cost(None, None)
        ratio = None if row.plain is None else plain.seconds / row.ours.seconds
        lines.append([
            row.name, shown(row.ours.seconds, ".4f"), shown(row.ours.gib, ".2f"), shown(rate, ".2f"),
            shown(rate / peak if rate and peak else None, ".1%"), shown(plain.seconds, ".4f"),
            shown(plain.gib, ".2f"), shown(ratio, ".1f"), shown(row.alike, ".4f"),
        ])  # fmt: skip
    return formatted([HEADINGS, *lines], "markdown")


def bench(parts: Sequence[str], sizes: Sizes, device: torch.device, rounds: int) -> list[Row]:
    """Return the rows of all cases of ``parts``; each is told as soon as it is known."""
    rows = []
    for name in parts:
        torch.manual_seed(0)
        for case in PARTS[name](sizes, device):
            rows.append(compare(case, device, rounds))
            print(f"{case.name}: {rows[-1].ours.seconds:.4f} s", file=sys.stderr, flush=True)
    return rows


def run(settings: Benchmark) -> int:
    """Measure, print the table and write it; return 1 if a result differs from its plain formulation's."""
    if settings.device == "cuda" and not cpu.gpus():
        raise UserError("device", "cuda", "no CUDA device here, nothing was measured", "leave --device out")
    files.check_writable("save", Path(settings.save))
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu.model_name()
    rows = bench(settings.parts.split(","), settings.sizes(), device, settings.rounds)
    peak = next((peak for card, peak in PEAKS.items() if card in machine), None)
    markdown = f"{machine}, torch {torch.__version__}, the fastest of {settings.rounds}.\n\n{table(rows, peak)}\n"
    print(markdown)
    content = {"rows": [row._asdict() for row in rows], "settings": settings.flags(), "machine": machine}
    record = json.dumps(content | provenance(), indent=1) + "\n"
    files.write_atomically(Path(settings.save, "bench.md"), markdown)
    files.write_atomically(Path(settings.save, "bench.json"), record)
    for row in rows:
        if row.differs:
            print(f"bench.py: {row.name}: only {row.alike:.4f} of the result is the plain one's", file=sys.stderr)
    return int(any(row.differs for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    return command(Benchmark, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
