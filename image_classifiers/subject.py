"""Image classifier as the subject of a run: its source, images, device and weights, and its accuracy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from image_classifiers import data, models
from image_classifiers.price import CHUNK, FIT, HELD, ImagePriceModel, split
from image_classifiers.settings import ImageExperiment
from lib import sparse
from lib.allocation import price
from lib.calibration.hidden import BlockInputs
from lib.cli.task import Task
from lib.core import cpu, files
from lib.core.errors import UserError, first_line
from lib.core.lazy import torch
from lib.pruning import walk
from lib.recovery.block_walk import fast_dtype
from lib.run import checks
from lib.spectra.tail import WEIGHTWATCHER

log = logging.getLogger("main")


class Accuracy(NamedTuple):
    """Percentages of ``images`` whose label is the most likely class (``top1``) or among the top five (``top5``)."""

    top1: float
    top5: float
    images: int


def accuracy(model: torch.nn.Module, batches: Iterable[tuple], use_amp: bool = False) -> Accuracy:
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

    def prepare(self, settings: ImageExperiment, task: Task) -> None:
        """Take up what a run needs besides the weights, and refuse what cannot work."""
        self.settings, self.device = settings, settings.device
        if self.device == "auto":
            self.device = "cuda" if cpu.gpus() else "cpu"
        for field, device in (("device", self.device), ("hidden_device", settings.hidden_device or self.device)):
            try:
                torch.zeros(1, device=device).item()
            except (RuntimeError, AssertionError) as error:  # an unknown kind, no such device, or torch without CUDA
                raise UserError(field, device, f"cannot be used ({first_line(error)})", "use cpu") from error

        self.source = source = models.locate_classifier(settings.model)
        self.name = source.folder.resolve().name if source.folder else source.given  # of the metric's cache
        self.given = settings.model
        shape = (settings.input_size, settings.nb_classes)
        skeleton, self.size, self.options = models.skeleton(source, settings.resume, *shape)
        pruned, measured = models.find_parts(skeleton)
        self.parameters = sum(p.numel() for p in skeleton.parameters())
        self.prunable = sum(layer.size for layer in pruned.layers)

        measurement = settings.measurement(self.name)
        if task.allocation == "ww" and measurement.metric in WEIGHTWATCHER:
            if any(len(layer.shape) > 2 for layer in measured.layers):
                problem = f"is for matrices, and {settings.model} holds convolutions"
                raise UserError("ww_metric", measurement.metric, problem)
        checks.check_layers(task, self.name, pruned.layers, measured.layers, measurement)
        if settings.save_model:
            files.check_writable("save_model", Path(settings.save_model), 4 * self.parameters)

        self.workers = min(10, len(cpu.usable())) if settings.num_workers is None else settings.num_workers
        self.mean_std = data.MEAN_STD[settings.imagenet_default_mean_and_std]
        self._open_images(settings, task, skeleton.num_classes)

    def _open_images(self, settings: ImageExperiment, task: Task, classes: int) -> None:
        """Find the images that the run reads; a UserError if they are too few, or their classes not the model's."""
        find = partial(data.IMAGE_SETS[settings.data_set], settings.data_path, settings.eval_data_path)
        plain = data.evaluation_transform(self.size, settings.crop_pct, self.mean_std)
        test = find(train=False)
        count = len(test.classes)
        if count != classes:
            problem = f"{count} classes of images, and the model has {classes}"
            fix = f"for a model that has {count}, add --nb_classes {count}"
            raise UserError("data_set", settings.data_set, problem, fix)
        self.test, self.calibration = data.PreparedImages(test, range(len(test.items)), plain), None
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
            split(indices)  # refuses too few
        transform = data.augmenting_transform(self.size, self.mean_std) if random else plain
        self.calibration = data.PreparedImages(training, indices, transform, settings.seed if random else None)

    def describe(self) -> dict:
        """Return what the run's record says of the model and its images."""
        numbers = {name: getattr(self, name) for name in ("parameters", "prunable", "device")}
        model = self.source._asdict() | numbers | {"input_size": self.size}
        return {"model": model, "calibration": None if self.calibration is None else len(self.calibration)}

    def load(self) -> None:
        """Load the dense weights; warn if they were trained on images with another normalisation."""
        model = models.load_classifier(self.source, self.settings.resume, self.options).to(self.device)
        self.weights, self.measured = models.find_parts(model)
        trained = tuple(model.pretrained_cfg["mean"])
        if not self.settings.resume and trained != self.mean_std[0]:
            message = "images are normalised by a mean of %s, and these weights were trained with %s; see %s"
            log.warning(message, self.mean_std[0], trained, "--imagenet_default_mean_and_std")

    def inputs(self) -> BlockInputs:
        """Return the inputs of the first block for the calibration images."""
        batches = data.batches(self.calibration, self.settings.batch_size, self.workers)
        return models.block_inputs(self.weights, batches, self.settings.hidden_device)

    def price_model(self, options: price.SearchOptions, by_magnitude: bool) -> ImagePriceModel:
        """Return the model whose prices are searched, measured on calibration images."""
        images, groups = self.calibration, []
        for indices, count in zip(split(images.indices), (FIT, HELD), strict=True):
            chosen = data.PreparedImages(images.images, indices, images.transform, images.seed)
            groups.append([batch for batch, _ in data.batches(chosen, len(indices) // count, self.workers)])
        dtype = fast_dtype(torch.device(self.device), torch.float32)
        chunk = min(CHUNK, self.settings.batch_size)
        return ImagePriceModel(self.weights, tuple(groups), dtype, by_magnitude, self.settings.hidden_device, chunk)

    def save(self, folder: Path, sparsity: float) -> Path:
        """Write the pruned model to ``folder``, which is returned, and check its ``sparsity`` as it is read back."""
        models.save_classifier(self.weights.model, self.size, folder)
        walk.check_saved(folder, self.weights, sparsity)
        return folder

    def accuracy(self) -> Accuracy:
        """Return the accuracy on the test images."""
        batches = data.batches(self.test, self.settings.batch_size, self.workers)
        return accuracy(self.weights.model, batches, self.settings.use_amp)
