"""Image classifier as the subject of a run: its source, images, device and weights, and its accuracy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from image_classifiers import data, models
from image_classifiers.price import CHUNK, FIT, HELD, ImagePriceModel, split
from image_classifiers.settings import ImageExperiment
from lib import sparse
from lib.allocation import price, price_model
from lib.calibration.hidden import BlockInputs
from lib.cli.task import Task
from lib.core import cpu, files
from lib.core.errors import UserError, first_line
from lib.core.lazy import torch
from lib.models.memory import free_memory
from lib.pruning import walk
from lib.run import checks
from lib.run.record import read_run
from lib.spectra.tail import WEIGHTWATCHER

log = logging.getLogger("main")


class Accuracy(NamedTuple):
    """Percentages of ``images`` whose label is the most likely class (``top1``) or among the top five (``top5``)."""

    top1: float
    top5: float
    images: int


def accuracy(
    model: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], use_amp: bool = False
) -> Accuracy:
    """Return the accuracy of ``model`` over all ``batches`` of images and labels; ``use_amp``: in half precision."""
    device = next(model.parameters()).device
    first = five = count = 0
    with sparse.zeros_skipped(model.modules()):
        for images, labels in tqdm(batches, desc="accuracy", unit="batch", disable=None):
            with torch.no_grad(), torch.autocast(device.type, enabled=use_amp):
                logits = model(images.to(device))  # [batch, classes]
            likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = likeliest == labels.to(device)[:, None]
            first += hits[:, 0].sum().item()
            five += hits.sum().item()
            count += len(labels)
    return Accuracy(100 * first / count, 100 * five / count, count)


class Classifier:
    """Image classifier with the images that a run reads; see ``lib.run.pipeline.Subject``.

    Attributes:
        size: side of the images in pixels.
        parameters, prunable: their numbers in the whole model, and in what can be pruned.
        test, calibration: images; ``calibration`` is None if the run needs none.
    """

    dense = calib_dtype = None
    calibration_digest = "images"  # One subject serves one run, so that nothing must be told apart.
    search_digests: Sequence[str] = ()

    def __init__(self) -> None:
        self.scores: dict[tuple, object] = {}

    # ----------------------------------------------------------------------------------- before the weights are loaded

    def prepare(self, settings: ImageExperiment, task: Task) -> None:
        """Take up what a run needs besides the weights, and refuse what cannot work."""
        _warn_of_other_method(Path(settings.save), task)
        self.device = settings.device
        if self.device == "auto":
            self.device = "cuda" if cpu.gpus() else "cpu"
        self.hidden_device = settings.hidden_device
        for field, device in (("device", self.device), ("hidden_device", self.hidden_device or self.device)):
            _check_device(field, device)
        self.source = source = models.locate_classifier(settings.model)
        self.name, self.resume, self.classes = source.label, settings.resume, settings.nb_classes
        skeleton, self.size = models.skeleton(source, settings.input_size, settings.nb_classes)
        pruned, measured = models.find_parts(skeleton)
        self.parameters = sum(p.numel() for p in skeleton.parameters())
        self.prunable = sum(layer.size for layer in pruned.layers)

        measurement = settings.measurement(self.name)
        if "ww" in (task.allocation, task.start) and measurement.metric in WEIGHTWATCHER:
            if any(len(layer.shape) > 2 for layer in measured.layers):
                problem = f"is for matrices, and {settings.model} holds convolutions"
                raise UserError("ww_metric", measurement.metric, problem)
        checks.check_layers(task, self.name, pruned.layers, measured.layers, measurement)
        if settings.save_model:
            files.check_writable("save_model", Path(settings.save_model), 4 * self.parameters)

        self.batch_size, self.use_amp = settings.batch_size, settings.use_amp
        self.workers = min(10, len(cpu.usable())) if settings.num_workers is None else settings.num_workers
        self.price_dtype, self.imagenet_mean = settings.price_dtype, settings.imagenet_default_mean_and_std
        self._open_images(settings, task, skeleton.num_classes)

    def _open_images(self, settings: ImageExperiment, task: Task, classes: int) -> None:
        """Find the images that the run reads, without reading them yet.

        Raises:
            UserError: they are missing, too few, or their classes are not the model's.
        """
        find = partial(data.IMAGE_SETS[settings.data_set], settings.data_path, settings.eval_data_path)
        mean_std = data.MEAN_STD[self.imagenet_mean]
        plain = data.evaluation_transform(self.size, settings.crop_pct, mean_std)
        test = find(train=False)
        count = len(test.classes)
        if count != classes:
            problem = f"{count} classes of images, and the model has {classes}"
            fix = f"for a model that has {count}, add --nb_classes {count}"
            raise UserError("data_set", settings.data_set, problem, fix)
        self.test, self.calibration = data.Prepared(test, range(len(test.items)), plain), None
        if not task.traits & {"calibration", "search"}:
            return

        training = find(train=True)
        if training.classes != test.classes:
            differing = ", ".join(sorted(set(training.classes) ^ set(test.classes))[:5])
            problem = f"calibration and test images differ in their classes ({differing})"
            raise UserError("data_path", settings.data_path, problem)
        random = settings.published_calibration
        indices = data.draw_images(training, settings.nsamples, settings.seed, replacement=random)
        if "search" in task.traits:
            needed = sum(map(len, split(indices))) * 3 * self.size**2 * 4
            free = free_memory(0).get("cpu", needed)
            if needed > free:
                sizes = f"need {files.readable(needed)} and {files.readable(free)} are free"
                raise UserError("nsamples", None, f"the images that prices are found on {sizes}", "lower it")
        transform = data.augmenting_transform(self.size, mean_std) if random else plain
        self.calibration = data.Prepared(training, indices, transform, settings.seed if random else None)

    def describe(self) -> dict:
        """Return what the run's record says of the model and its images."""
        numbers = {name: getattr(self, name) for name in ("parameters", "prunable", "device")}
        model = self.source._asdict() | numbers | {"input_size": self.size}
        return {"model": model, "calibration": None if self.calibration is None else len(self.calibration)}

    # --------------------------------------------------------------------------------------------------- with weights

    def load(self) -> None:
        """Load the dense weights; warn if they were trained on images with another normalisation."""
        model = models.load_classifier(self.source, self.resume, self.size, self.classes).to(self.device)
        self.weights, self.measured = models.find_parts(model)
        trained, mean = tuple(model.pretrained_cfg["mean"]), data.MEAN_STD[self.imagenet_mean][0]
        if not self.resume and trained != mean:
            other = not self.imagenet_mean
            fits = trained == data.MEAN_STD[other][0]
            fix = f"; add --imagenet_default_mean_and_std {str(other).lower()}" if fits else ""
            text = "images are normalised by a mean of %s, and these weights were trained with %s%s"
            log.warning(text, mean, trained, fix)

    def batches(self, images: data.Prepared, size: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``images`` and their labels, ``size`` (default: the flag's batch size) at a time."""
        return data.batches(images, size or self.batch_size, self.workers)

    def inputs(self) -> BlockInputs:
        """Return the inputs of the first block for the calibration images."""
        return models.block_inputs(self.weights, self.batches(self.calibration), self.hidden_device)

    def price_model(self, effort: price.Effort, by_magnitude: bool) -> ImagePriceModel:
        """Return the model whose prices are searched, measured on calibration images."""
        images, groups = self.calibration, []
        for indices, count in zip(split(images.indices), (FIT, HELD), strict=True):
            chosen = data.Prepared(images.images, indices, images.transform, images.seed)
            groups.append([batch for batch, _ in self.batches(chosen, len(indices) // count)])
        dtype = price_model.search_dtype(self.price_dtype, torch.device(self.device), torch.float32)
        chunk = min(CHUNK, self.batch_size)
        return ImagePriceModel(self.weights, tuple(groups), dtype, by_magnitude, self.hidden_device, chunk)

    def save(self, folder: Path, sparsity: float) -> Path:
        """Write the pruned model to ``folder``, which is returned.

        Raises:
            UserError: it cannot be written, or its measured ``sparsity`` is another when read back.
        """
        models.save_classifier(self.weights.model, self.size, folder)
        walk.check_saved(folder, self.weights, sparsity)
        return folder

    def accuracy(self) -> Accuracy:
        """Return the accuracy on the test images."""
        return accuracy(self.weights.model, self.batches(self.test), self.use_amp)


def _warn_of_other_method(save: Path, task: Task) -> None:
    """Warn if another method's accuracy will be replaced: the published file name contains only the sparsity."""
    published = save / f"{task.target}.txt"
    if published.exists() and read_run(save, task.run) is None:
        log.warning("%s of another method will be replaced; its JSON stays", published)


def _check_device(field: str, device: str) -> None:
    """Refuse a ``device`` that cannot be used."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an unknown kind, no such device, or torch without CUDA
        raise UserError(field, device, f"cannot be used ({first_line(error)})", "use cpu") from error
