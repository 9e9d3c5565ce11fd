"""Metrics of weight matrices, measured once and cached on disk by layer name."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from lib.core import digests, processes
from lib.core.errors import UserError, first_line, flag_name
from lib.core.lazy import numpy, torch
from lib.models.layers import Layer
from lib.models.memory import free_bytes
from lib.models.weights import Block, Weights
from lib.spectra.spectrum import Farms, NoFit, spectrum
from lib.spectra.tail import METRICS, WEIGHTWATCHER

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_FEW_WORKERS = 4  # with fewer, a CPU is not faster than a GPU
_IN_FLIGHT = 3  # matrices on a GPU at a time
_IN_FLIGHT_SHARE = 0.5  # of the GPU's free memory that they may take
_PRUNED = 0.1  # of a matrix's weights zero: no dense checkpoint has that many


class Settings(NamedTuple):
    """How a metric is measured: the ``driver`` of the spectrum, its FARMS windows, and weightwatcher's ``seed``."""

    driver: str = "exact"
    farms: Farms | None = None
    seed: int = 0

    def stem(self, metric: str) -> str:
        """Return the name of the cache's files without their suffix; the published one for the published settings."""
        windows = "" if self.farms is None else "_farms_{}x{:g}_{}".format(*self.farms)
        return metric + windows + ("" if self.driver == "exact" else f"_{self.driver}")

    def described(self, metric: str) -> dict:
        """Return the sidecar's entry for these settings, as far as they affect ``metric``."""
        if metric in WEIGHTWATCHER:
            return {"seed": self.seed} if metric == "random_distance" else {}
        return {"driver": self.driver, "farms": None if self.farms is None else self.farms._asdict()}


PUBLISHED = Settings()


class LayerMetrics(NamedTuple):
    """The ``values`` of one ``metric`` by layer name, and the ``model`` they belong to."""

    metric: str
    model: str
    values: dict[str, float]


def load_or_measure(
    folder: Path, metric: str, model: str, weights: Weights, settings: Settings = PUBLISHED
) -> LayerMetrics:
    """Return the metric of every layer from the cache in ``folder``; missing values are measured and cached there.

    Raises:
        UserError: the cache does not match (see ``read_cache``), or a layer's spectrum admits no fit.
    """
    cached = processes.on_main(lambda: read_cache(folder, metric, model, weights.layers, settings))
    if cached is not None and _same_weights(folder / settings.stem(metric), weights):
        return cached
    begun = Begun(folder / f".{settings.stem(metric)}.jsonl")
    measured = measure(metric, model, weights, settings, begun)
    write_cache(folder, measured, weights, settings)
    begun.path.unlink(missing_ok=True)
    return measured


# -------------------------------------------------------------------------------------------------------- measuring


class Begun:
    """Values of an interrupted measurement: a file of one line per matrix, each with the matrix's fingerprint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, tuple[float, str]] = {}
        self.taken: set[str] = set()  # layers whose value was used
        with suppress(OSError):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError):  # the last line may be cut off
                    row = json.loads(line)
                    name, value, mark = row["layer"], float(row["value"]), row["fingerprint"]
                    if math.isfinite(value):
                        self.known[name] = value, mark

    def value(self, name: str, weight: Tensor) -> float | None:
        """Return the value measured for this same matrix, None if missing."""
        if name not in self.known:
            return None
        value, before = self.known[name]
        if not digests.same_weights(before, digests.fingerprint(weight)):
            return None
        self.taken.add(name)
        return value

    def add(self, values: Mapping[str, tuple[float, str]]) -> None:
        """Store values and fingerprints by layer name."""
        rows = [{"layer": name, "value": value, "fingerprint": mark} for name, (value, mark) in values.items()]
        if not processes.is_main():
            return
        with suppress(OSError):  # a full disk is reported at the end of the measurement
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))


def measure(
    metric: str, model: str, weights: Weights, settings: Settings = PUBLISHED, begun: Begun | None = None
) -> LayerMetrics:
    """Return the metric of every layer, measured on the weights' own devices (or see ``Race``).

    If the weights stay in memory, the matrices of all blocks go to the workers at once; otherwise block by block.

    Args:
        begun: supplies the values of an interrupted measurement and stores this one's, block by block.
    """
    pending: dict[str, Future] = {}
    fell_back: list[str] = []
    kept = set()
    mine = _own_part(metric, weights.layers)
    most = len(weights.layers) if weights.in_memory else max(Counter(layer.block for layer in weights.layers).values())
    cores = min(torch.get_num_threads(), most)  # at work at a time
    bar = tqdm(total=len(mine), desc=metric, unit="matrix", disable=None)
    with bar, _workers() as workers, InFlight() as in_flight:
        race = Race(workers, cores, settings, in_flight)
        for block in weights.visit():
            if block.index == 0:
                _warn_of_zeros(metric, block)
            own = {name: linear for name, linear in block.linears.items() if name in mine}
            futures = _submit(race, block._replace(linears=own), metric, settings, fell_back, begun)
            for future in futures.values():
                future.add_done_callback(lambda _: bar.update())
            pending |= futures
            # On a GPU they are computed next. Others would have to wait for one process's numbers at each block.
            on_gpu = block.device.type != "cpu" and not race.on_cpu
            if not weights.in_memory or (on_gpu and processes.count() == 1):
                _keep(block, pending, begun)
                kept.add(block.index)
        try:
            for block in weights.visit() if weights.in_memory else ():
                if block.index not in kept:
                    _keep(block, pending, begun)
            values = {layer.name: pending[layer.name].result() for layer in weights.layers}
        except BaseException:  # the first failure, or Ctrl-C: what has not begun would only delay the answer
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    fell_back = sum(processes.gathered(fell_back), [])
    if fell_back:
        names = ", ".join(sorted(fell_back)[:3]) + (" ..." if len(fell_back) > 3 else "")
        text = "too ill-conditioned for the fast driver, used a float64 SVD instead: %d, %s"
        log.warning(text, len(fell_back), names)
    return LayerMetrics(metric, model, values)


def _own_part(metric: str, layers: Sequence[Layer]) -> set[str]:
    """Return the layers that this process measures; weightwatcher gets whole blocks."""
    if metric in WEIGHTWATCHER:
        return {layer.name for layer in layers if layer.block % processes.count() == processes.rank()}
    owners = processes.owners([layer.size * min(layer.shape) for layer in layers])
    return {layer.name for layer, owner in zip(layers, owners, strict=True) if owner == processes.rank()}


def _keep(block: Block, futures: dict[str, Future], begun: Begun | None) -> None:
    """Wait for a block's values, including those of other processes, and store them."""
    own = {name: futures[name].result() for name in block.linears if name in futures}
    taken = [] if begun is None else [name for name in own if name in begun.taken]
    values = {}
    for found, known in processes.gathered((own, taken)):
        values |= found
        if begun is not None:
            begun.taken.update(known)
    futures |= {name: _done(value) for name, value in values.items() if name not in futures}
    if begun is not None:
        new = {name: value for name, value in values.items() if name not in begun.taken}
        marks = {name: digests.fingerprint(block.linears[name].weight) for name in new}
        begun.add({name: (value, marks[name]) for name, value in new.items()})


class InFlight:
    """Matrices on a GPU whose values are computed at the same time, each in a thread and on a stream of its own.

    Eigenvalues are a long chain of small kernels, with parts on the CPU in between: one matrix leaves the GPU idle.
    """

    def __init__(self) -> None:
        self._pool, self._own = None, threading.local()

    def submit(self, value: Callable[[Tensor], float], weight: Tensor) -> Future:
        """Return the pending ``value`` of a weight, or compute it at once where memory is short.

        ``value`` returns a number, so that its stream is done with the weight by then.
        """
        gram = weight.numel() * min(weight.shape[:2]) // max(weight.shape[:2])
        need = 8 * (3 * weight.numel() + 4 * gram)  # float64: the weight and its copies, Gram matrices and workspace
        if need * _IN_FLIGHT > _IN_FLIGHT_SHARE * free_bytes(weight.device):
            return _done(value(weight))
        ready = torch.cuda.current_stream(weight.device).record_event()  # the weight may still be on its way
        return self._pool.submit(self._compute, value, weight, ready)

    def _compute(self, value: Callable[[Tensor], float], weight: Tensor, ready: torch.cuda.Event) -> float:
        streams = vars(self._own)
        name = str(weight.device)
        if name not in streams:
            streams[name] = torch.cuda.Stream(weight.device)
        with torch.cuda.stream(streams[name]):
            streams[name].wait_event(ready)
            return value(weight)

    def __enter__(self) -> InFlight:
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # after a failure what has not begun would only delay the answer


class Race:
    """Where spectra of weights on a GPU are computed: there, or each on one of the CPU's cores.

    A GPU's exact SVD makes poor use of it, and many cores may be faster. The first matrix starts the GPU's library, the
    second is timed there, and the third on one core; the result is logged. On the GPU they are computed one after
    another, as timed. The fast driver stays on the GPU, with several matrices in flight.
    """

    def __init__(self, workers: ThreadPoolExecutor, cores: int, settings: Settings, in_flight: InFlight) -> None:
        """Prepare it for ``workers`` of which as many as ``cores`` are at work at a time."""
        self.workers, self.cores, self.in_flight = workers, cores, in_flight
        self.several = settings.driver == "fast" and settings.farms is None  # FARMS fills a GPU with its windows
        self.seconds: list[float] = []  # by the work in a matrix
        self.on_cpu = None if settings.driver == "exact" and cores >= _FEW_WORKERS else False

    def submit(self, value: Callable[[Tensor], float], weight: Tensor) -> Future:
        """Return the ``value`` of a weight, pending if it goes to the workers."""
        if weight.device.type == "cpu":
            return self.workers.submit(value, weight)
        if self.several:
            return self.in_flight.submit(value, weight)
        if self.on_cpu is False:
            return _done(value(weight))
        if self.on_cpu:
            return self.workers.submit(lambda: value(weight.cpu()))
        start, last = time.perf_counter(), len(self.seconds) == 2
        result = self.workers.submit(lambda: value(weight.cpu())).result() if last else value(weight)
        self.seconds.append((time.perf_counter() - start) / (weight.numel() * min(weight.shape)))
        if last:
            _, gpu, core = self.seconds
            self.on_cpu = core / self.cores < gpu
            text = "an exact SVD takes %.1f times as long on one of %d cores as on the GPU: computed on the %s"
            log.info(text, core / gpu, self.cores, "CPU" if self.on_cpu else "GPU")
        return _done(result)


def _submit(
    race: Race,
    block: Block,
    metric: str,
    settings: Settings,
    fell_back: list[str],
    begun: Begun | None,
) -> dict[str, Future]:
    """Return the values of a block's layers, pending or, on a GPU, possibly computed here."""
    if metric in WEIGHTWATCHER and block.linears:
        numbers = _through_weightwatcher(metric, block, settings.seed)
        return {name: _done(number) for name, number in numbers.items()}
    jobs = {}
    for name, linear in block.linears.items():
        before = None if begun is None else begun.value(name, linear.weight)
        if before is not None:
            jobs[name] = _done(before)
            continue
        value = partial(_value, name, metric=metric, settings=settings, fell_back=fell_back)
        jobs[name] = race.submit(value, linear.weight)
    return jobs


def _done(result: float) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def _value(name: str, weight: Tensor, metric: str, settings: Settings, fell_back: list[str]) -> float:
    try:
        spec = spectrum(weight, settings.driver, settings.farms)
        if spec.fell_back:
            fell_back.append(name)
        return METRICS[metric](spec)
    except NoFit as error:
        hint = f"; choose another {flag_name('ww_metric')}, or another allocation" if (weight == 0).all() else ""
        raise UserError(None, f"{name}: {metric} cannot be computed, {error}{hint}") from error
    except torch.linalg.LinAlgError as error:
        text = f"{name}: its singular values do not converge ({str(error).splitlines()[0]}); try --esd_driver fast"
        raise UserError(None, text) from error


def _warn_of_zeros(metric: str, block: Block) -> None:
    """Warn if the checkpoint is already pruned, judging by its first block."""
    zeros = sum((linear.weight == 0).sum().item() for linear in block.linears.values())
    share = zeros / max(1, sum(linear.weight.numel() for linear in block.linears.values()))
    if share > _PRUNED:
        log.warning(
            "%.0f %% of the first block's weights are zero: %s then describes the pruning, not the training",
            100 * share,
            metric,
        )


def _through_weightwatcher(metric: str, block: Block, seed: int) -> dict[str, float]:
    """Return weightwatcher's value for each layer, matched by name; it reads float32 on the CPU."""
    from weightwatcher import WeightWatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    column, switches = WEIGHTWATCHER[metric]
    names = {name: name.replace(".", "/") for name in block.linears}  # a module's name has no dots
    holder = torch.nn.ModuleDict()
    for name, linear in block.linears.items():
        copy = torch.nn.Linear(1, 1, bias=False, device="meta")
        copy.weight = torch.nn.Parameter(linear.weight.detach().float().cpu(), requires_grad=False)
        copy.out_features, copy.in_features = copy.weight.shape
        holder[names[name]] = copy
    numpy.random.seed(seed % 2**32)  # weightwatcher shuffles the weights with numpy's global generator
    table = WeightWatcher(model=holder).analyze(**switches)
    found = dict(zip(table["longname"], table.get(column, []), strict=False))
    for name in block.linears:
        value = found.get(names[name])
        if value is None or not numpy.isfinite(value) or value < 0:  # -1: its fit failed
            what = "weightwatcher skipped it" if value is None else f"weightwatcher gives {value}"
            text = f"{name}: {metric} cannot be computed, {what}; choose another {flag_name('ww_metric')}"
            raise UserError(None, text)
    return {name: float(found[names[name]]) for name in block.linears}


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Yield as many workers as there were threads, each with one thread for its linear algebra.

    This is faster than one matrix at a time on all threads, and the rounding of an SVD, and so the bin of a spectrum's
    peak, no longer depends on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- caching


def read_cache(
    folder: Path, metric: str, model: str, layers: Sequence[Layer], settings: Settings = PUBLISHED
) -> LayerMetrics | None:
    """Return the values cached in ``folder``, None if it has none for this metric.

    ``load_or_measure`` checks later, once it has the weights, that they are the ones that were measured.

    Raises:
        UserError: the file is damaged, or belongs to another model or other layers.
    """
    stem = settings.stem(metric)
    path, sidecar = folder / f"{stem}.npy", folder / f"{stem}.json"
    if not path.exists():
        return None
    fix = _fix(path)
    try:
        values = numpy.load(path, allow_pickle=False)
        if not isinstance(values, numpy.ndarray) or values.ndim != 1:
            raise ValueError("it does not hold a list of numbers")
        values = values.astype(numpy.float64)
        has_sidecar = sidecar.exists()
        about = json.loads(sidecar.read_text()) if has_sidecar else None
    except Exception as error:  # numpy's, also those of a zip archive that the first bytes promise, and json's
        raise UserError(None, f"{path}: cannot be read as a metric cache ({first_line(error)}); {fix}") from error
    if len(values) != len(layers):
        raise UserError(None, f"{path}: holds {len(values)} values and {model} has {len(layers)} matrices; {fix}")
    if not numpy.isfinite(values).all():
        raise UserError(None, f"{path}: holds values that are not finite; {fix}")
    if has_sidecar:
        try:
            _check_sidecar(about, LayerMetrics(metric, model, {}), layers, path, fix)
            said = about.get("settings", settings.described(metric))  # sidecars of older runs have none
            if said != settings.described(metric):
                wanted = settings.described(metric)
                raise UserError(None, f"{path}: was measured with {said}, not {wanted}; {fix}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(None, f"{sidecar}: is not the sidecar of a metric cache ({error!r}); {fix}") from error
    return LayerMetrics(metric, model, dict(zip((layer.name for layer in layers), values.tolist(), strict=True)))


def has_cache(
    folder: Path, metric: str, model: str, layers: Sequence[Layer], settings: Settings = PUBLISHED
) -> bool:
    """Return whether ``folder`` holds all values, so that nothing will be written there; False for an older cache.

    Raises:
        UserError: as ``read_cache`` does.
    """
    if read_cache(folder, metric, model, layers, settings) is None:
        return False
    sidecar = folder / f"{settings.stem(metric)}.json"
    return not sidecar.exists() or json.loads(sidecar.read_text()).get("fingerprints") is not None


def _fix(path: Path) -> str:
    return f"give another {flag_name('ww_metric_cache')}, or delete {path} to have it computed"


def _check_sidecar(about: dict, wanted: LayerMetrics, layers: Sequence[Layer], path: Path, fix: str) -> None:
    if about["model"] != wanted.model:
        raise UserError(None, f"{path}: belongs to the model {about['model']}, not to {wanted.model}; {fix}")
    if about["metric"] != wanted.metric:
        raise UserError(None, f"{path}: holds {about['metric']}, not {wanted.metric}; {fix}")
    if about["layers"] != [layer.name for layer in layers]:
        raise UserError(None, f"{path}: belongs to layers of other names ({about['layers'][0]} ...); {fix}")
    for layer, shape in zip(layers, about["shapes"], strict=True):
        if list(layer.shape) != shape:
            text = f"{path}: {layer.name} had the shape {shape} and has {list(layer.shape)} now; {fix}"
            raise UserError(None, text)


def _same_weights(stem: Path, weights: Weights) -> bool:
    """Return whether the cache's fingerprints identify ``weights`` as the measured ones; False for an older cache.

    Raises:
        UserError: it was measured on other weights of the same names and shapes.
    """
    path, sidecar = stem.with_name(f"{stem.name}.npy"), stem.with_name(f"{stem.name}.json")
    if not sidecar.exists():  # a published file
        text = "%s has no %s beside it: whether it belongs to this model cannot be checked"
        log.warning(text, path, sidecar.name)
        return True
    before = json.loads(sidecar.read_text()).get("fingerprints")
    if before is None:
        log.warning("%s was cached by an older version, without fingerprints of the weights: measured again", path)
        return False
    changed = digests.first_difference(before, fingerprints(weights))
    if changed:
        text = f"was measured on other weights of the same name and shape (see {changed})"
        raise UserError(None, f"{path}: {text}; {_fix(path)}")
    return True


def fingerprints(weights: Weights) -> dict[str, str]:
    """Return every layer's fingerprint by name."""
    return weights.map(lambda _, weight: digests.fingerprint(weight))


def write_cache(folder: Path, metrics: LayerMetrics, weights: Weights, settings: Settings = PUBLISHED) -> None:
    """Write ``<metric>.npy`` (float64, one value per matrix in model order, as published) and its sidecar."""
    about = {
        "model": metrics.model,
        "metric": metrics.metric,
        "settings": settings.described(metrics.metric),
        "layers": [layer.name for layer in weights.layers],
        "shapes": [list(layer.shape) for layer in weights.layers],
        "fingerprints": fingerprints(weights),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    _write(folder, settings.stem(metrics.metric), about, [metrics.values[layer.name] for layer in weights.layers])


def _write(folder: Path, stem: str, about: Mapping, values: Sequence[float]) -> None:
    if not processes.is_main():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The sidecar first: values without one would be taken for a published file.
        tmp = folder / f".{stem}.json.{os.getpid()}"
        tmp.write_text(json.dumps(about, indent=1) + "\n")
        tmp.rename(folder / f"{stem}.json")
        tmp = folder / f".{stem}.{os.getpid()}.npy"
        numpy.save(tmp, numpy.array(values, dtype=numpy.float64))
        tmp.rename(folder / f"{stem}.npy")
    except OSError as error:
        raise UserError("ww_metric_cache", f"{folder}: cannot be written ({error.strerror or error})") from error
