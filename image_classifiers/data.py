"""Images: their sources, their conversion to tensors, and their batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.core.errors import UserError, first_line
from lib.core.lazy import numpy, timm, torch, torchvision

# Of the channels, by --imagenet_default_mean_and_std.
MEAN_STD = {True: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), False: ((0.5,) * 3, (0.5,) * 3)}
CROPPED = range(33, 384)  # Images of other sides are not cropped, but squashed (published).
CROP = 224 / 256  # Share of an image that is kept where it is cropped.
DIGITS_TEST = 450  # of the 1,797 digits


class Images(NamedTuple):
    """``items[i]`` is (RGB image, label); ``classes`` are the class names; ``paths`` those of the files, if any."""

    items: Sequence
    classes: list[str]
    paths: list[str] | None = None


def imnet(data_path: str | None, eval_data_path: str | None, train: bool) -> Images:
    """ImageNet's layout: a folder per class in DATA_PATH/train and DATA_PATH/val."""
    return _folder("data_path", data_path, "train" if train else "val")


def image_folder(data_path: str | None, eval_data_path: str | None, train: bool) -> Images:
    """A folder per class in DATA_PATH (calibration) and in EVAL_DATA_PATH (test)."""
    return _folder("data_path", data_path) if train else _folder("eval_data_path", eval_data_path)


def cifar(data_path: str | None, eval_data_path: str | None, train: bool) -> Images:
    """CIFAR-100 in DATA_PATH, downloaded if it is missing."""
    if data_path is None:
        raise UserError("data_path", None, "is missing", "give the folder that holds CIFAR-100 or is to hold it")
    try:
        items = torchvision.datasets.CIFAR100(data_path, train=train, download=True)
    except Exception as error:  # the network's errors, a full disk, a damaged archive
        problem = f"CIFAR-100 cannot be read or downloaded ({first_line(error)})"
        raise UserError("data_path", data_path, problem) from error
    return Images(items, items.classes)


def digits(data_path: str | None, eval_data_path: str | None, train: bool) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed, stratified quarter is the test set."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    options = {"test_size": DIGITS_TEST, "stratify": digits.target, "random_state": 0}
    parts = train_test_split(digits.images, digits.target, **options)
    pixels, labels = parts[::2] if train else parts[1::2]
    grey = (pixels * (255 / 16)).round().astype(numpy.uint8)
    items = [(Image.fromarray(image).convert("RGB"), int(label)) for image, label in zip(grey, labels, strict=True)]
    return Images(items, [str(digit) for digit in range(10)])


# Images by name: a function of --data_path, --eval_data_path, and of the split, so that only one is read.
IMAGE_SETS = {"IMNET": imnet, "CIFAR": cifar, "image_folder": image_folder, "digits": digits}
READERS = {"data_path": ("IMNET", "CIFAR", "image_folder"), "eval_data_path": ("image_folder",)}  # of each flag


def _folder(field: str, folder: str | None, split: str = "") -> Images:
    if folder is None:
        raise UserError(field, None, "is missing", "give the folder of the images (--data_set tells their layout)")
    path = Path(folder) / split
    try:
        images = torchvision.datasets.ImageFolder(str(path))
    except (OSError, ValueError) as error:  # no such folder, no folder inside, or one without images
        problem = f"{path} should hold a folder of images per class ({first_line(error)})"
        raise UserError(field, folder, problem) from error
    return Images(images, images.classes, [sample[0] for sample in images.samples])


def evaluation_transform(size: int, crop_pct: float | None, mean_std: tuple) -> Callable:
    """Return the transform from image to tensor [3, size, size]: resized (bicubic), cropped, normalised (published)."""
    crops = size in CROPPED
    return timm.data.transforms_factory.transforms_imagenet_eval(
        img_size=size, crop_pct=crop_pct or (CROP if crops else 1.0), interpolation="bicubic",
        crop_mode="center" if crops or crop_pct else "squash", mean=mean_std[0], std=mean_std[1],
    )  # fmt: skip


def augmenting_transform(size: int, mean_std: tuple) -> Callable:
    """Return the random training transform used by the published code for calibration."""
    return timm.data.create_transform(
        input_size=size, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1, mean=mean_std[0], std=mean_std[1],
    )  # fmt: skip


def draw_images(images: Images, count: int, seed: int, replacement: bool) -> list[int]:
    """Return ``count`` random indices of ``images``; a UserError if they are too few to draw without replacement."""
    have = len(images.items)
    generator = torch.Generator().manual_seed(seed)
    if replacement:
        return torch.randint(have, (count,), generator=generator).tolist()
    if count > have:
        raise UserError("nsamples", count, f"there are only {have} training images", "lower it")
    return torch.randperm(have, generator=generator)[:count].tolist()


class PreparedImages:
    """Images at ``indices`` as tensors, with their labels; an unreadable image is replaced by its error.

    With a ``seed``, each image is transformed with its own random state, so that neither the batch size nor the
    number of workers matters.
    """

    def __init__(self, images: Images, indices: Sequence[int], transform: Callable, seed: int | None = None) -> None:
        self.images, self.indices, self.transform, self.seed = images, indices, transform, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int] | str:
        if self.seed is not None:
            state = (self.seed * 1_000_003 + i) % 2**32
            random.seed(state)
            numpy.random.seed(state)
            torch.manual_seed(state)
        try:
            image, label = self.images.items[self.indices[i]]
            return self.transform(image), label
        except (OSError, SyntaxError, ValueError) as error:  # PIL's, of what is no image or is cut off
            path = self.images.paths[self.indices[i]]
            return f"{path}: cannot be read as an image ({first_line(error)}); replace or remove it"


def batches(prepared: PreparedImages, batch_size: int, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tensors [batch, 3, height, width] and labels [batch], in order; a UserError names an unreadable image."""
    generator = torch.Generator().manual_seed(0)  # workers get their seeds from it, not from the global one
    options = {"num_workers": workers, "collate_fn": _collate, "generator": generator}
    for batch in torch.utils.data.DataLoader(prepared, batch_size, **options):
        if isinstance(batch, str):
            raise UserError(None, None, batch)
        yield batch


def _collate(items: list) -> tuple[torch.Tensor, torch.Tensor] | str:
    wrong = next((item for item in items if isinstance(item, str)), None)  # an error raised here would lose its type
    return wrong or (torch.stack([x for x, _ in items]), torch.tensor([label for _, label in items]))
