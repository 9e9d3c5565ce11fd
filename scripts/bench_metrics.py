"""Benchmark of spectra and power-law fits against the plain formulation: python scripts/bench_metrics.py"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core import files
from lib.core.lazy import torch
from lib.models.load import load_llm
from lib.models.locate import locate
from lib.models.weights import weights_of
from lib.run import report
from lib.run.record import provenance
from lib.spectra.spectrum import Spectrum, spectrum
from lib.spectra.tail import alpha_peak, fit_tail, peak_candidates

if TYPE_CHECKING:
    from torch import Tensor

FIT_SIZES = (576, 4096, 8192)
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096))
LLAMA_7B = ((4096, 4096), (11008, 4096))


@dataclass(kw_only=True)
class Benchmark(Flags):
    _title: ClassVar[str] = "benchmark"

    rounds: int = flag(3, "measured rounds, whose median is reported", least=1, metavar="N")
    llama_7b: bool = flag(False, "measure LLaMA-7B's shapes only, once, and compute what {cores} need for all of it")
    cores: int = flag(64, "number of cores assumed by {llama_7b}", least=1, only="llama_7b", metavar="N")
    cache_dir: str = flag("llm_weights", "where SmolLM2 is kept", in_repository=True, metavar="DIR")
    save: str = flag("results", "where bench_metrics.json is written", metavar="DIR")


PARSER = make_parser(Benchmark, "bench_metrics.py", __doc__)


def plain_fit(eigs: Tensor, candidates: Tensor) -> tuple[int, float]:
    """Return the index and alpha of the best candidate by the published formulation, a Python loop over all of them."""
    logs, total = eigs.log(), len(eigs)
    best = (math.inf, -1, math.nan)
    for i in candidates.tolist():
        count = float(total - i)
        alpha = 1 + count / (logs[i:].sum() - count * logs[i])
        if alpha > 1:
            gap = 1 - (eigs[i:] / eigs[i]) ** (1 - alpha) - torch.arange(total - i, device=eigs.device) / count
            distance = gap.abs().max().item()
            if distance < best[0]:
                best = (distance, i, alpha.item())
    return best[1:]


def plain_spectrum(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.float()).square().flip(0)


def compare(plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median seconds of both, measured in turns."""
    seconds: tuple[list, list] = ([], [])
    for _ in range(rounds):
        for function, into in zip((plain, ours), seconds, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            into.append(time.perf_counter() - start)
    return median(seconds[0]), median(seconds[1])


def draws(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return spectra of three kinds: of a heavy-tailed matrix, and drawn from a Pareto and a squared Student law."""
    weight = torch.randn(size, size, generator=generator) / torch.rand(size, 1, generator=generator).sqrt()
    pareto = torch.rand(size, generator=generator, dtype=torch.float64).pow(-1 / 1.5).float()
    normal = torch.randn(4, size, generator=generator)
    student = normal[0].square() / normal[1:].square().mean(0)  # three degrees of freedom
    return {"matrix": plain_spectrum(weight), "Pareto": pareto.sort().values, "Student": student.sort().values}


def bench_fit(rounds: int) -> list[dict]:
    rows = []
    generator = torch.Generator().manual_seed(0)
    for size in FIT_SIZES:
        every = torch.arange(size - 1)
        for kind, eigs in draws(size, generator).items():
            if fit_tail(eigs, every).index != plain_fit(eigs, every)[0]:
                raise AssertionError(f"{kind}, N = {size}: the two fits differ")
            times = compare(lambda e=eigs, c=every: plain_fit(e, c), lambda e=eigs, c=every: fit_tail(e, c), rounds)
            rows.append(_row(f"fit, all candidates, {kind}, N = {size}", *times))
    return rows


def bench_spectra(rounds: int) -> list[dict]:
    rows = []
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator)
        for driver in ("exact", "fast"):
            times = compare(lambda w=weight: plain_spectrum(w), lambda w=weight, d=driver: spectrum(w, d), rounds)
            fell_back = " (fell back to an SVD)" if spectrum(weight, driver).fell_back else ""
            rows.append(_row(f"spectrum, {driver}, {shape[0]}x{shape[1]}{fell_back}", *times))
    return rows


def bench_model(rounds: int, cache_dir: str) -> list[dict]:
    model = load_llm(locate("smollm2-135m", cache_dir), torch.float32, device="cpu")
    weights = list(weights_of(model).map(lambda _, weight: weight).values())

    def plain() -> None:
        for weight in weights:
            eigs = plain_spectrum(weight)
            plain_fit(eigs, peak_candidates(eigs))

    def ours(driver: str) -> None:
        for weight in weights:
            alpha_peak(spectrum(weight, driver))

    def every(fit: Callable) -> None:
        for eigs in spectra:
            fit(eigs, torch.arange(len(eigs) - 1))

    spectra = [plain_spectrum(weight) for weight in weights]
    wrong = sum(fit_tail(e, c).index != plain_fit(e, c)[0] for e in spectra for c in (torch.arange(len(e) - 1),))
    rows = [
        _row(f"SmolLM2, alpha_peak, {driver}", *compare(plain, lambda d=driver: ours(d), rounds))
        for driver in ("exact", "fast")
    ]
    rows.append(
        _row("SmolLM2, fits over all candidates", *compare(lambda: every(plain_fit), lambda: every(fit_tail), rounds))
    )
    jumps = sum(
        abs(alpha_peak(Spectrum(e, w.shape)) / alpha_peak(spectrum(w, "fast")) - 1) > 1e-3
        for e, w in zip(spectra, weights, strict=True)
    )
    print(f"SmolLM2: {wrong} of {len(weights)} fits choose another index; alpha_peak jumps on {jumps} if fast")
    return rows


def qr_first(weight: Tensor) -> Tensor:
    """Return the exact driver's eigenvalues of a tall matrix, computed from its R.

    LAPACK does this itself when the rows are at least 11/6 of the columns: this shows that nothing is gained.
    """
    return torch.linalg.svdvals(torch.linalg.qr(weight.float(), mode="r").R).square().flip(0)


def bench_llama_7b(shapes: Sequence[tuple[int, int]], cores: int) -> list[dict]:
    """Return seconds of each driver per matrix shape, and of the plain SVD; print the time on ``cores``."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for shape in shapes:
        weight = torch.randn(shape, generator=generator)
        ways = {driver: (lambda w, d=driver: spectrum(w, d)) for driver in ("exact", "fast")}
        for name, way in (ways | ({"exact, QR first": qr_first} if shape[0] > shape[1] else {})).items():
            times = compare(lambda w=weight: plain_spectrum(w), lambda w=weight, f=way: f(w), 1)
            rows.append(_row(f"7B spectrum, {name}, {shape[0]}x{shape[1]}", *times))
    found = {row["what"]: row["seconds"] for row in rows}
    for driver in ("exact", "fast"):
        square, tall = (found[f"7B spectrum, {driver}, {a}x{b}"] for a, b in shapes)
        seconds = seconds_of_7b(square, tall, cores)
        print(f"{driver}: 32 x (4 square, 3 tall), {cores} at once: {seconds:.0f} s, computed from these two")
    return rows


def seconds_of_7b(square: float, tall: float, cores: int) -> float:
    """Return the seconds of 128 ``square`` and 96 ``tall`` matrices, each on one of ``cores``, undisturbed."""
    return (128 * square + 96 * tall) / cores


def bench_cuda(rounds: int) -> list[dict]:
    rows = []
    for shape in LLAMA_7B:
        weight = torch.randn(shape, device="cuda")
        spectrum(weight, "fast"), plain_spectrum(weight)  # warm up
        times = compare(lambda w=weight: plain_spectrum(w), lambda w=weight: spectrum(w, "fast"), rounds)
        rows.append(_row(f"CUDA spectrum, fast, {shape[0]}x{shape[1]}", *times))
    return rows


def _row(what: str, plain: float, ours: float) -> dict:
    print(f"{what}: {plain / ours:.1f}", flush=True)
    return {"what": what, "plain_seconds": plain, "seconds": ours, "ratio": plain / ours}


def run(settings: Benchmark) -> None:
    """Measure, print a table, and write it together with the machine's description."""
    torch.set_num_threads(1)
    folder, rounds = Path(settings.save), settings.rounds
    files.prepare("save", folder)
    if settings.llama_7b:
        rows = bench_llama_7b(LLAMA_7B, settings.cores)
    else:
        rows = bench_fit(rounds) + bench_spectra(rounds) + bench_model(rounds, settings.cache_dir)
        rows += bench_cuda(rounds) if torch.cuda.is_available() else []
    machine = {"cpu": cpu_name(), "load": os.getloadavg()[0], "threads": 1} | provenance()
    text = json.dumps({"rows": rows, "machine": machine}, indent=1) + "\n"
    files.write_atomically(folder / "bench_metrics.json", text)
    figures = [
        (row["what"], f"{row['plain_seconds']:.4f}", f"{row['seconds']:.4f}", f"{row['ratio']:.1f}") for row in rows
    ]
    title = f"seconds, one thread, median of {rounds}; {machine['cpu']}"
    report.show(Console(), title, ("what", "plain", "ours", "ratio"), figures)
    print(f"written: {folder}/bench_metrics.json")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 for an error that the user can fix."""
    return command(Benchmark, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
