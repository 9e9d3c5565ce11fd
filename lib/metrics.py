"""Every layer's number, computed once, kept on disk under the layer's name."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lib import UserError
from lib.esd import NoFit, Spectrum, alpha_mid, alpha_peak, spectrum
from lib.models import PrunableLayer, resident

log = logging.getLogger(__name__)

# A layer's number from its spectrum; a new metric is one function and one line.
METRICS: dict[str, Callable[[Spectrum], float]] = {"alpha_peak": alpha_peak, "alpha_mid": alpha_mid}

_SAME_WEIGHTS = 1e-3  # relative, of a layer's mean |W|: far above what rounding to half precision does to it


class LayerMetrics(NamedTuple):
    """The ``values`` of one ``metric`` by layer name, and the ``model`` they belong to."""

    metric: str
    model: str
    values: dict[str, float]


def load_or_measure(
    folder: Path, metric: str, model: str, layers: Sequence[PrunableLayer], blocks: nn.ModuleList
) -> LayerMetrics:
    """Return the metric of every layer, from ``folder`` if it is there; if not, it is measured and kept there.

    Raises:
        UserError: the cache belongs to something else (see ``read_cache``), or a layer's spectrum admits no fit.
    """
    cached = read_cache(folder, metric, model, layers)
    if cached is not None:
        return cached
    measured = measure(metric, model, layers, blocks)
    write_cache(folder, measured, layers, blocks)
    return measured


def measure(metric: str, model: str, layers: Sequence[PrunableLayer], blocks: nn.ModuleList) -> LayerMetrics:
    """Return the metric of every layer, measured block by block on the weights' own devices."""
    values: dict[str, float] = {}
    with tqdm(total=len(layers), desc=metric, unit="matrix", disable=None) as bar, _single_threaded() as workers:
        for index, group in groupby(layers, key=lambda layer: layer.block):
            group = list(group)
            with resident(blocks[index]) as device:
                for layer, value in zip(group, _map(partial(_value, metric), group, workers, device), strict=True):
                    values[layer.name] = value
                    bar.update()
    return LayerMetrics(metric, model, values)


def _value(metric: str, layer: PrunableLayer) -> float:
    try:
        return METRICS[metric](spectrum(layer.module.weight))
    except NoFit as error:
        raise UserError(f"{layer.name}: {metric} cannot be computed, {error}") from error


def _map(function: Callable, items: Sequence, workers: ThreadPoolExecutor, device: torch.device) -> Iterable:
    return workers.map(function, items) if device.type == "cpu" else map(function, items)


@contextmanager
def _single_threaded() -> Iterator[ThreadPoolExecutor]:
    """Yield as many workers as there were threads, each with one thread for its linear algebra.

    Faster than one matrix at a time on all threads, and the rounding of an SVD, and with it the bin in which the peak of
    a spectrum falls, no longer depends on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


def read_cache(folder: Path, metric: str, model: str, layers: Sequence[PrunableLayer]) -> LayerMetrics | None:
    """Return the values in ``folder``, None if it has none of this metric.

    ``layers`` may be those of a model without weights; if they have weights, those must be the ones that were measured.

    Raises:
        UserError: the file is damaged, or belongs to another model, or to other layers or weights.
    """
    path, sidecar = folder / f"{metric}.npy", folder / f"{metric}.json"
    if not path.exists():
        return None
    mend = f"give another --ww_metric_cache, or delete {path} to have it computed"
    try:
        values = np.load(path, allow_pickle=False).astype(np.float64)
        has_sidecar = sidecar.exists()
        about = json.loads(sidecar.read_text()) if has_sidecar else None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a metric cache ({error}); {mend}") from error
    if values.ndim != 1 or len(values) != len(layers):
        raise UserError(f"{path}: holds {values.size} values and {model} has {len(layers)} matrices; {mend}")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds values that are not finite; {mend}")
    if has_sidecar:
        try:
            _check_sidecar(about, metric, model, layers, f"{path}: ", f"; {mend}")
        except (KeyError, TypeError) as error:
            raise UserError(f"{sidecar}: is no sidecar of a metric cache ({error!r}); {mend}") from error
    elif not all(layer.module.weight.is_meta for layer in layers):  # said once, when the model is there
        log.warning("%s has no %s beside it: whether it belongs to %s cannot be checked", path, sidecar.name, model)
    return LayerMetrics(metric, model, dict(zip((layer.name for layer in layers), values.tolist(), strict=True)))


def _check_sidecar(
    about: dict, metric: str, model: str, layers: Sequence[PrunableLayer], path: str, mend: str
) -> None:
    if about["model"] != model:
        raise UserError(f"{path}belongs to the model {about['model']}, not to {model}{mend}")
    if about["metric"] != metric:
        raise UserError(f"{path}holds {about['metric']}, not {metric}{mend}")
    if about["layers"] != [layer.name for layer in layers]:
        raise UserError(f"{path}belongs to layers of other names ({about['layers'][0]} ...){mend}")
    for layer, shape, mean in zip(layers, about["shapes"], about["mean_abs"], strict=True):
        weight = layer.module.weight
        if list(weight.shape) != shape:
            raise UserError(f"{path}{layer.name} had the shape {shape} and has {list(weight.shape)} now{mend}")
        if not weight.is_meta and abs(_mean_abs(layer.module) - mean) > _SAME_WEIGHTS * mean:
            raise UserError(f"{path}was measured on other weights of the name {model} (see {layer.name}){mend}")


def write_cache(
    folder: Path, metrics: LayerMetrics, layers: Sequence[PrunableLayer], blocks: nn.ModuleList
) -> None:
    """Write ``<metric>.npy`` (float64, one value per matrix in model order, as published) and its sidecar."""
    means = []
    for index, group in groupby(layers, key=lambda layer: layer.block):
        with resident(blocks[index]):
            means += [_mean_abs(layer.module) for layer in group]
    about = {
        "model": metrics.model,
        "metric": metrics.metric,
        "layers": [layer.name for layer in layers],
        "shapes": [list(layer.module.weight.shape) for layer in layers],
        "dtype": str(layers[0].module.weight.dtype).removeprefix("torch."),
        "mean_abs": means,  # tells weights apart that have the same names and shapes
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    path = folder / f"{metrics.metric}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The sidecar first: values without one would be taken for a published file.
        tmp = folder / f".{metrics.metric}.json.{os.getpid()}"
        tmp.write_text(json.dumps(about, indent=1) + "\n")
        tmp.rename(folder / f"{metrics.metric}.json")
        tmp = folder / f".{metrics.metric}.{os.getpid()}.npy"
        np.save(tmp, np.array([metrics.values[layer.name] for layer in layers], dtype=np.float64))
        tmp.rename(path)
    except OSError as error:
        raise UserError(f"--ww_metric_cache {folder}: cannot be written ({error.strerror or error})") from error


def _mean_abs(module: nn.Module) -> float:
    return module.weight.detach().abs().mean(dtype=module.weight.float().dtype).item()
