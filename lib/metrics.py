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

from lib import UserError, esd
from lib.esd import Farms, NoFit, Spectrum, spectrum
from lib.models import PrunableLayer, resident

log = logging.getLogger(__name__)

# A layer's number from its spectrum; a new metric is one function and one line. All are mapped the same way, a larger
# number to a higher sparsity, as published. For alpha, the stable rank and the entropy that is the theory's direction
# (larger: less heavy-tailed, less well trained); for the norms it is the published choice.
METRICS: dict[str, Callable[[Spectrum], float]] = {
    "alpha_peak": esd.alpha_peak,
    "alpha_mid": esd.alpha_mid,
    "alpha": esd.alpha,
    "alpha_weighted": esd.alpha_weighted,
    "log_alpha_norm": esd.log_alpha_norm,
    "spectral_norm": esd.spectral_norm,
    "log_spectral_norm": esd.log_spectral_norm,
    "norm": esd.norm,
    "log_norm": esd.log_norm,
    "stable_rank": esd.stable_rank,
    "entropy": esd.entropy,
}
# Metrics that weightwatcher measures: the column of its table, and what makes it fill that column.
WEIGHTWATCHER: dict[str, tuple[str, dict[str, bool]]] = {
    "mp_softrank": ("mp_softrank", {"mp_fit": True}),
    "random_distance": ("rand_distance", {"randomize": True}),
}

_SAME_WEIGHTS = 1e-3  # relative, of a layer's mean |W|: far above what rounding to half precision does to it
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

    def about(self, metric: str) -> dict:
        """Return what a sidecar says of them, as far as they matter to ``metric``."""
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
    folder: Path,
    metric: str,
    model: str,
    layers: Sequence[PrunableLayer],
    blocks: nn.ModuleList,
    settings: Settings = PUBLISHED,
) -> LayerMetrics:
    """Return the metric of every layer, from ``folder`` if it is there; if not, it is measured and kept there.

    Raises:
        UserError: the cache belongs to something else (see ``read_cache``), or a layer's spectrum admits no fit.
    """
    cached = read_cache(folder, metric, model, layers, settings)
    if cached is not None:
        _check_offloaded(folder / settings.stem(metric), layers, blocks)
        return cached
    measured = measure(metric, model, layers, blocks, settings)
    write_cache(folder, measured, layers, blocks, settings)
    return measured


def measure(
    metric: str,
    model: str,
    layers: Sequence[PrunableLayer],
    blocks: nn.ModuleList,
    settings: Settings = PUBLISHED,
) -> LayerMetrics:
    """Return the metric of every layer, measured block by block on the weights' own devices."""
    values: dict[str, float] = {}
    fell_back: list[str] = []
    with tqdm(total=len(layers), desc=metric, unit="matrix", disable=None) as bar, _single_threaded() as workers:
        for index, group in groupby(layers, key=lambda layer: layer.block):
            group = list(group)
            with resident(blocks[index]) as device:
                _warn_of_zeros(metric, group, values)
                if metric in WEIGHTWATCHER:
                    numbers = _through_weightwatcher(metric, group, settings.seed)
                else:
                    numbers = _map(partial(_value, metric, settings, fell_back), group, workers, device)
                for layer, number in zip(group, numbers, strict=True):
                    values[layer.name] = number
                    bar.update()
    if fell_back:
        names = ", ".join(sorted(fell_back)[:3]) + (" ..." if len(fell_back) > 3 else "")
        log.warning("too ill-conditioned for the fast driver, a float64 SVD was taken: %d, %s", len(fell_back), names)
    return LayerMetrics(metric, model, values)


def _value(metric: str, settings: Settings, fell_back: list[str], layer: PrunableLayer) -> float:
    try:
        spec = spectrum(layer.module.weight, settings.driver, settings.farms)
        if spec.fell_back:
            fell_back.append(layer.name)
        return METRICS[metric](spec)
    except NoFit as error:
        raise UserError(f"{layer.name}: {metric} cannot be computed, {error}") from error


def _warn_of_zeros(metric: str, group: Sequence[PrunableLayer], measured: dict[str, float]) -> None:
    if measured:  # one look at the first block tells a pruned checkpoint
        return
    zeros = sum((layer.module.weight == 0).sum().item() for layer in group)
    share = zeros / sum(layer.module.weight.numel() for layer in group)
    if share > _PRUNED:
        log.warning(
            "%.0f %% of the first block's weights are zero: %s then describes the pruning, not the training",
            100 * share,
            metric,
        )


def _through_weightwatcher(metric: str, group: Sequence[PrunableLayer], seed: int) -> list[float]:
    """Return what weightwatcher makes of each layer, matched by name; it reads float32 on the CPU."""
    from weightwatcher import WeightWatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    column, switches = WEIGHTWATCHER[metric]
    names = {layer.name: layer.name.replace(".", "/") for layer in group}  # a module's name has no dots
    holder = nn.ModuleDict()
    for layer in group:
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.module.weight.detach().float().cpu(), requires_grad=False)
        linear.out_features, linear.in_features = linear.weight.shape
        holder[names[layer.name]] = linear
    np.random.seed(seed % 2**32)  # weightwatcher shuffles the weights with numpy's global generator
    table = WeightWatcher(model=holder).analyze(**switches)
    found = dict(zip(table["longname"], table.get(column, []), strict=False))
    for layer in group:
        value = found.get(names[layer.name])
        if value is None or not np.isfinite(value) or value < 0:  # -1: its fit failed
            what = "weightwatcher skipped it" if value is None else f"weightwatcher gives {value}"
            raise UserError(f"{layer.name}: {metric} cannot be computed, {what}; choose another --ww_metric")
    return [float(found[names[layer.name]]) for layer in group]


def _map(function: Callable, items: Sequence, workers: ThreadPoolExecutor, device: torch.device) -> Iterable:
    return workers.map(function, items) if device.type == "cpu" else map(function, items)


@contextmanager
def _single_threaded() -> Iterator[ThreadPoolExecutor]:
    """Yield as many workers as there were threads, each with one thread for its linear algebra.

    Faster than one matrix at a time on all threads, and the rounding of an SVD, and with it the bin in which the peak
    of a spectrum falls, no longer depends on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)


def read_cache(
    folder: Path, metric: str, model: str, layers: Sequence[PrunableLayer], settings: Settings = PUBLISHED
) -> LayerMetrics | None:
    """Return the values in ``folder``, None if it has none of this metric.

    ``layers`` may be those of a model without weights; if they have weights, those must be the ones that were measured.

    Raises:
        UserError: the file is damaged, or belongs to another model, or to other layers or weights.
    """
    stem = settings.stem(metric)
    path, sidecar = folder / f"{stem}.npy", folder / f"{stem}.json"
    if not path.exists():
        return None
    mend = f"give another --ww_metric_cache, or delete {path} to have it computed"
    try:
        values = np.load(path, allow_pickle=False)
        if not isinstance(values, np.ndarray) or values.ndim != 1:
            raise ValueError("it holds no list of numbers")
        values = values.astype(np.float64)
        has_sidecar = sidecar.exists()
        about = json.loads(sidecar.read_text()) if has_sidecar else None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a metric cache ({error}); {mend}") from error
    if len(values) != len(layers):
        raise UserError(f"{path}: holds {len(values)} values and {model} has {len(layers)} matrices; {mend}")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: holds values that are not finite; {mend}")
    if has_sidecar:
        try:
            _check_sidecar(about, LayerMetrics(metric, model, {}), layers, f"{path}: ", f"; {mend}")
            said = about.get("settings", settings.about(metric))  # sidecars of older runs have none
            if said != settings.about(metric):
                raise UserError(f"{path}: was measured with {said}, not {settings.about(metric)}; {mend}")
        except (KeyError, TypeError) as error:
            raise UserError(f"{sidecar}: is no sidecar of a metric cache ({error!r}); {mend}") from error
    elif not all(layer.module.weight.is_meta for layer in layers):  # said once, when the model is there
        log.warning("%s has no %s beside it: whether it belongs to %s cannot be checked", path, sidecar.name, model)
    return LayerMetrics(metric, model, dict(zip((layer.name for layer in layers), values.tolist(), strict=True)))


def _check_sidecar(about: dict, wanted: LayerMetrics, layers: Sequence[PrunableLayer], path: str, mend: str) -> None:
    metric, model = wanted.metric, wanted.model
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
        if not weight.is_meta:
            _check_mean(layer, mean, path, mend)


def _check_mean(layer: PrunableLayer, mean: float, path: str, mend: str) -> None:
    if not same_weights(layer.module, mean):
        raise UserError(f"{path}was measured on other weights of the same name and shape (see {layer.name}){mend}")


def _check_offloaded(stem: Path, layers: Sequence[PrunableLayer], blocks: nn.ModuleList) -> None:
    """Check the weights that ``read_cache`` has not seen, since accelerate keeps them outside the modules."""
    sidecar = stem.with_name(f"{stem.name}.json")
    means = json.loads(sidecar.read_text())["mean_abs"] if sidecar.exists() else []
    away = [(layer, mean) for layer, mean in zip(layers, means, strict=False) if layer.module.weight.is_meta]
    for index, group in groupby(away, key=lambda pair: pair[0].block):
        with resident(blocks[index]):
            for layer, mean in group:
                _check_mean(layer, mean, f"{sidecar}: ", "; give another --ww_metric_cache, or delete it and its .npy")


def write_cache(
    folder: Path,
    metrics: LayerMetrics,
    layers: Sequence[PrunableLayer],
    blocks: nn.ModuleList,
    settings: Settings = PUBLISHED,
) -> None:
    """Write ``<metric>.npy`` (float64, one value per matrix in model order, as published) and its sidecar."""
    means = []
    for index, group in groupby(layers, key=lambda layer: layer.block):
        with resident(blocks[index]):
            means += [mean_abs(layer.module) for layer in group]
    about = {
        "model": metrics.model,
        "metric": metrics.metric,
        "settings": settings.about(metrics.metric),
        "layers": [layer.name for layer in layers],
        "shapes": [list(layer.module.weight.shape) for layer in layers],
        "dtype": str(layers[0].module.weight.dtype).removeprefix("torch."),
        "mean_abs": means,  # tells weights apart that have the same names and shapes
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    stem = settings.stem(metrics.metric)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The sidecar first: values without one would be taken for a published file.
        tmp = folder / f".{stem}.json.{os.getpid()}"
        tmp.write_text(json.dumps(about, indent=1) + "\n")
        tmp.rename(folder / f"{stem}.json")
        tmp = folder / f".{stem}.{os.getpid()}.npy"
        np.save(tmp, np.array([metrics.values[layer.name] for layer in layers], dtype=np.float64))
        tmp.rename(folder / f"{stem}.npy")
    except OSError as error:
        raise UserError(f"--ww_metric_cache {folder}: cannot be written ({error.strerror or error})") from error


def same_weights(module: nn.Module, mean: float) -> bool:
    """Return whether ``mean`` is that of the module's |W|, but for rounding."""
    own = mean_abs(module)
    return abs(own - mean) <= _SAME_WEIGHTS * min(own, mean)


def mean_abs(module: nn.Module) -> float:
    """Return the mean of |W|, which tells weights apart that have the same name and shape."""
    return module.weight.detach().abs().mean(dtype=torch.float32).item()
