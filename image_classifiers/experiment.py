"""Image experiment: checks before the weights are loaded, and the values that an allocation needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from image_classifiers import data, models, pruning
from image_classifiers.price import CHUNK, EFFORT, FIT, HELD, ImagePriceModel, split
from image_classifiers.settings import ImageExperiment, wants_images
from lib.allocation import block_scores, price, price_model
from lib.calibration.hidden import BlockInputs
from lib.cli.settings import Task
from lib.core import cpu, files
from lib.core.errors import UserError, first_line
from lib.core.files import readable
from lib.core.lazy import torch
from lib.models.memory import free_memory
from lib.run.pipeline import make_plan, model_folder, warn_of_replacement
from lib.run.record import read_run
from lib.spectra import measure
from lib.spectra.tail import WEIGHTWATCHER

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("main")


class Sets(NamedTuple):
    """Images that a run reads; ``calibration`` is None if not needed."""

    test: data.Prepared
    calibration: data.Prepared | None


class Prepared(NamedTuple):
    """Everything known before the weights are loaded."""

    source: models.Source
    size: int  # side of the images in pixels
    parameters: int  # of the model ...
    prunable: int  # ... and those of them that can be pruned
    device: str
    cache: Path
    sets: Sets


# ------------------------------------------------------------------------------------- before the weights are loaded


def prepare(settings: ImageExperiment, task: Task) -> Prepared:
    """Check everything that can be checked without the weights, so that errors surface before any work."""
    files.check_writable("save", Path(settings.save))
    warn_of_replacement(settings, task)
    warn_of_other_method(settings, task)
    device = settings.device
    if device == "auto":
        device = "cuda" if cpu.gpus() else "cpu"
    check_device("device", device)
    check_device("hidden_device", settings.hidden_device or device)
    source = models.locate(settings.model)
    skeleton, size = models.skeleton(source, settings.input_size, settings.nb_classes)
    parameters = sum(p.numel() for p in skeleton.parameters())
    parts = models.find_parts(skeleton)
    cache = Path(settings.ww_metric_cache) / source.label
    for part in (task, task.first) if task.pruner else ():
        check_allocation(settings, part, source, parts, cache)
    if settings.save_model:
        files.check_writable("save_model", model_folder(settings, task).parent, 4 * parameters)
    sets = open_images(settings, task, size, skeleton.num_classes)
    prunable = sum(layer.size for layer in parts.pruned.layers)
    return Prepared(source, size, parameters, prunable, device, cache, sets)


def check_allocation(
    settings: ImageExperiment, task: Task, source: models.Source, parts: models.Parts, cache: Path
) -> None:
    """Refuse a metric that these layers or the cache cannot give, and shapes that cannot meet the target."""
    if task.wants == "metric":
        metric, layers = settings.ww_metric, parts.measured.layers
        if metric in WEIGHTWATCHER and any(len(layer.shape) > 2 for layer in layers):
            raise UserError("ww_metric", f"{metric}: is for matrices, and {settings.model} holds convolutions")
        if not measure.has_cache(cache, metric, source.label, layers):
            files.check_writable("ww_metric_cache", cache)
    elif task.wants is None:
        make_plan(settings, task, parts.pruned.layers, None)  # from shapes alone: it is met, or refused here


def warn_of_other_method(settings: ImageExperiment, task: Task) -> None:
    """Warn if another method's accuracy will be replaced: the published file name contains only the sparsity."""
    published = Path(settings.save) / f"{task.target}.txt"
    if published.exists() and read_run(Path(settings.save), task.run) is None:
        log.warning("%s of another method will be replaced; its JSON stays", published)


def check_device(field: str, device: str) -> None:
    """Refuse a ``device`` that cannot be used."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an unknown kind, no such device, or torch without CUDA
        raise UserError(field, f"{device}: cannot be used ({first_line(error)}); use cpu") from error


def open_images(settings: ImageExperiment, task: Task, size: int, classes: int) -> Sets:
    """Return the images that the run reads, without reading them yet.

    Raises:
        UserError: they are missing, too few, or their classes are not the model's.
    """
    find = partial(data.DATASETS[settings.data_set], settings.data_path, settings.eval_data_path)
    mean_std = data.MEAN_STD[settings.imagenet_default_mean_and_std]
    plain = data.evaluation_transform(size, settings.crop_pct, mean_std)
    found = find(train=False)
    if len(found.classes) != classes:
        text = f"{len(found.classes)} classes of images, and the model has {classes}"
        fix = f"for a model that has {len(found.classes)}, add --nb_classes {len(found.classes)}"
        raise UserError("data_set", f"{settings.data_set}: {text}; {fix}")
    calibration = None
    if wants_images(task):
        training = find(train=True)
        if training.classes != found.classes:
            others = ", ".join(sorted(set(training.classes) ^ set(found.classes))[:5])
            text = f"calibration and test images differ in their classes ({others})"
            raise UserError("data_path", f"{settings.data_path}: {text}")
        random = settings.published_calibration
        indices = data.draw(training, settings.nsamples, settings.seed, replacement=random)
        if task.wants == "price":
            check_room(sum(map(len, split(indices))) * 3 * size**2 * 4)
        transform = data.augmenting_transform(size, mean_std) if random else plain
        calibration = data.Prepared(training, indices, transform, settings.seed if random else None)
    return Sets(data.Prepared(found, range(len(found.items)), plain), calibration)


def check_room(needed: int) -> None:
    """Refuse images of a search for prices that do not fit in the memory of the CPU."""
    free = free_memory(0).get("cpu", needed)
    if needed > free:
        text = f"the images that prices are found on need {readable(needed)} and {readable(free)} are free; lower it"
        raise UserError("nsamples", text)


def described(settings: ImageExperiment, task: Task, known: Prepared) -> dict:
    """Return the content of a run's record before anything is measured."""
    about = {name: getattr(known, name) for name in ("parameters", "prunable", "device")}
    return {
        "method": task.method,
        "target_sparsity": task.target,
        "sparsity": None,
        "dense_zeros": None,
        "dense": None,
        "accuracy": None,
        "model": known.source._asdict() | about | {"input_size": known.size},
        "calibration": None if known.sets.calibration is None else len(known.sets.calibration),
        "saved_model": None,
        "flags": settings.flags(),
    }


# ------------------------------------------------------------------------------------------------------ with weights


def warn_of_normalisation(settings: ImageExperiment, model: nn.Module) -> None:
    """Warn about weights that were trained on images with a different normalisation."""
    own, ours = tuple(model.pretrained_cfg["mean"]), data.MEAN_STD[settings.imagenet_default_mean_and_std][0]
    if not settings.resume and own != ours:
        other = not settings.imagenet_default_mean_and_std
        fix = f"; add --imagenet_default_mean_and_std {str(other).lower()}" if own == data.MEAN_STD[other][0] else ""
        log.warning("images are normalised by a mean of %s, and these weights were trained with %s%s", ours, own, fix)


def reader(
    settings: ImageExperiment, batch_size: int | None = None
) -> Callable[[data.Prepared], Iterator[tuple[Tensor, Tensor]]]:
    """Return a function that yields the batches of given images; ``batch_size``: another than the flag's."""
    workers = min(10, len(cpu.usable())) if settings.num_workers is None else settings.num_workers
    return partial(data.batches, batch_size=batch_size or settings.batch_size, workers=workers)


def enter_blocks(settings: ImageExperiment, parts: models.Parts, images: data.Prepared) -> BlockInputs:
    """Return the inputs of the first block for the calibration ``images``."""
    return pruning.block_inputs(parts.pruned, reader(settings)(images), settings.hidden_device)


def measure_values(
    settings: ImageExperiment, task: Task, known: Prepared, parts: models.Parts, enter: Callable[[], BlockInputs]
) -> Mapping[str, float] | None:
    """Return the values that the allocation needs for each layer, None if it needs none."""
    if task.wants is None:
        return None
    if task.wants == "metric":
        return measure.load_or_measure(known.cache, settings.ww_metric, known.source.label, parts.measured).values
    return block_scores.measure_scores(task.wants, parts.pruned, task.target, enter, settings.owl_m)


def find_prices(
    settings: ImageExperiment, task: Task, known: Prepared, parts: models.Parts, enter: Callable[[], BlockInputs]
) -> price.Found | None:
    """Return the result of the search for ratios of equal price on calibration images, None for another allocation."""
    if task.wants != "price":
        return None
    start = None
    if task.start:
        values = measure_values(settings, task.first, known, parts, enter)
        start = make_plan(settings, task.first, parts.pruned.layers, values).ratios
    given, groups = known.sets.calibration, []
    for part, count in zip(split(given.indices), (FIT, HELD), strict=True):
        images = data.Prepared(given.images, part, given.transform, given.seed)
        groups.append([batch for batch, _ in reader(settings, len(part) // count)(images)])
    dtype = price_model.search_dtype(settings.price_dtype, torch.device(known.device), torch.float32)
    chunk = min(CHUNK, settings.batch_size)
    model = ImagePriceModel(parts.pruned, tuple(groups), dtype, task.by_magnitude, settings.hidden_device, chunk)
    options = price.Options(settings.price_steps, settings.price_refresh, EFFORT)
    return price.search(model, parts.pruned.layers, task.target, start, options)
