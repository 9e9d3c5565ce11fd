"""Accuracy: the share of the test images that a model classifies correctly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from lib import sparse
from lib.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Accuracy(NamedTuple):
    """Percentages of ``images`` whose label is the most likely class (``top1``) or among the top five (``top5``)."""

    top1: float
    top5: float
    images: int


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], use_amp: bool = False) -> Accuracy:
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
