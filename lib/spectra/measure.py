"""Measurement of a metric on every weight matrix of a model, one matrix per core."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from lib.core import digests, files, processes
from lib.core.errors import UserError, first_line, flag_name
from lib.core.lazy import numpy, torch
from lib.models import memory
from lib.models.weights import Weights
from lib.spectra.cache import LayerMetrics, Measurement, MetricCache
from lib.spectra.spectrum import NoFit, spectrum
from lib.spectra.tail import METRICS, WEIGHTWATCHER

log = logging.getLogger(__name__)

# Seconds of a matrix from which the time of the others is estimated; fewer may be those of LAPACK's start.
_SAMPLE = 1.0


class _Result(NamedTuple):
    name: str
    value: float
    fingerprint: str
    fell_back: bool = False
    seconds: float = 0.0


def load_or_measure(how: Measurement, model: str, weights: Weights) -> LayerMetrics:
    """Return the metric of every layer from its cache, or measured and cached; a foreign cache is a UserError."""
    cache = MetricCache(how, model, weights.layers)
    cached = processes.on_main(cache.read)
    if cached is not None:
        cache.check_weights(cached, weights)
        return cached

    measured = measure(how, weights, cache.progress())
    cache.write(measured)
    return measured


def measure(how: Measurement, weights: Weights, progress: files.Progress | None = None) -> LayerMetrics:
    """Return the metric of every layer. Several processes share the matrices.

    Exact spectra are LAPACK's, on the CPU's cores, wherever the weights are: neither a GPU nor the number of cores
    changes their bits. Fast ones are computed where the weights are. ``progress`` supplies the values of an interrupted
    measurement, and keeps those of this one.
    """
    # An SVD's time grows with the number of weights times the shorter side.
    work = {layer.name: layer.size * min(layer.shape[:2]) for layer in weights.layers}
    owners = processes.owners(list(work.values()))
    names = {name for name, owner in zip(work, owners, strict=True) if owner == processes.rank()}
    if how.metric in WEIGHTWATCHER:
        results = _by_weightwatcher(how, weights, names)
    else:
        results = _by_spectrum(how, weights, names, progress)

    finished: dict[str, _Result] = {}
    announced, cores = how.driver != "exact", torch.get_num_threads()
    with closing(results), tqdm(total=len(names), desc=how.metric, unit="matrix", disable=None) as bar:
        for result in results:
            finished[result.name] = result
            bar.update()
            if progress is not None and result.seconds:  # it was measured now
                progress.add("value", result.name, (result.value, result.fingerprint))
            if not announced and result.seconds >= _SAMPLE:
                announced = True
                left = sum(work[name] for name in names - finished.keys()) / work[result.name]
                minutes = result.seconds * left / cores / 60
                if minutes > 2:  # else it is not worth a line
                    message = "exact spectra take about %.0f more minutes on %d of the CPU's cores; %s takes less"
                    log.info(message, minutes, cores, "--esd_driver fast")

    shares = {name: result for share in processes.gathered(finished) for name, result in share.items()}
    ordered = [shares[layer.name] for layer in weights.layers]
    fell_back = [result.name for result in ordered if result.fell_back]
    if fell_back:
        log.warning("too ill-conditioned for the fast driver, used a float64 SVD instead: %s", ", ".join(fell_back))
    values = {result.name: result.value for result in ordered}
    return LayerMetrics(values, {result.name: result.fingerprint for result in ordered})


def _by_spectrum(
    how: Measurement, weights: Weights, names: set[str], progress: files.Progress | None
) -> Iterator[_Result]:
    """Yield the values of the layers ``names`` as they become ready.

    Each core works on a matrix by itself, with one thread. This is faster than one matrix at a time on all cores, and
    the rounding of an SVD, and so the bin of a spectrum's peak, depends on the number of LAPACK's threads.
    """
    threads = torch.get_num_threads()
    # A core holds a matrix, its float32 copy and LAPACK's: half of the free memory must have room for all of them.
    room = memory.free_ram() // processes.processes_on_machine() // 2
    cores = max(1, min(threads, room // (12 * max(layer.size for layer in weights.layers))))
    value = partial(_value, how, progress)
    pending: set[Future] = set()
    torch.set_num_threads(1)
    try:
        # The number counts for the thread that sets it only, so that each worker must set it, too.
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            for name, weight in _matrices(weights, names):
                if how.driver == "exact":
                    weight = weight.cpu()
                if weight.is_cuda:  # one matrix fills a GPU
                    yield value(name, weight)
                    continue
                # Each matrix is held in memory, also after its block has been left: no more of them than cores.
                if len(pending) == cores:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                pending.add(workers.submit(value, name, weight))
            yield from (future.result() for future in as_completed(pending))
    finally:
        torch.set_num_threads(threads)


def _value(how: Measurement, progress: files.Progress | None, name: str, weight: torch.Tensor) -> _Result:
    start, fingerprint = time.perf_counter(), digests.fingerprint(weight)
    before = progress.get("value", name) if progress else None
    if before and digests.same_weights(before[1], fingerprint):
        return _Result(name, before[0], fingerprint)

    try:
        its_spectrum = spectrum(weight, how.driver, how.farms)
        number = METRICS[how.metric](its_spectrum)
    except NoFit as error:
        fix = f"choose another {flag_name('ww_metric')}, or another allocation" if (weight == 0).all() else None
        raise UserError(None, name, f"{how.metric} cannot be computed, {error}", fix) from error
    except torch.linalg.LinAlgError as error:
        problem = f"its singular values do not converge ({first_line(error)})"
        raise UserError(None, name, problem, f"try {flag_name('esd_driver')} fast") from error
    return _Result(name, number, fingerprint, its_spectrum.fell_back, time.perf_counter() - start)


def _matrices(weights: Weights, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for block in weights.visit():
        for name in (name for name in block.linears if name in names):
            yield name, block.linears[name].weight.detach()


def _by_weightwatcher(how: Measurement, weights: Weights, names: set[str]) -> Iterator[_Result]:
    """Yield weightwatcher's values for the layers ``names``, one after another; it reads float32 on the CPU."""
    from weightwatcher import WeightWatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    column, switches = WEIGHTWATCHER[how.metric]
    for name, weight in _matrices(weights, names):
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight.float().cpu(), requires_grad=False)
        numpy.random.seed(how.seed % 2**32)  # weightwatcher shuffles the weights with numpy's global generator
        table = WeightWatcher(model=torch.nn.Sequential(linear)).analyze(**switches)
        number = next(iter(table.get(column, [])), None)
        if number is None or not numpy.isfinite(number) or number < 0:  # -1: its fit failed
            reason = "weightwatcher skipped it" if number is None else f"weightwatcher gives {number}"
            fix = f"choose another {flag_name('ww_metric')}"
            raise UserError(None, name, f"{how.metric} cannot be computed, {reason}", fix)
        yield _Result(name, float(number), digests.fingerprint(weight))
