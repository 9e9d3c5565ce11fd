"""Pruning of image classifiers: Wanda with one threshold per matrix, and the inputs of the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lib.calibration.hidden import BlockInputs
from lib.core.lazy import torch
from lib.models.weights import Weights
from lib.pruning.pruners import PRUNERS, Pruner, magnitude

if TYPE_CHECKING:
    from torch import Tensor


def wanda_of_matrix(weight: Tensor, mean_squares: Tensor, ratio: float, nm: None = None) -> Tensor:
    """Zero everything <= the int(n * ratio)-th (from 0) of the sorted |W| * sqrt(s), one threshold for the matrix.

    Args:
        weight: [out, in].
        mean_squares: s [in] float32, the mean over tokens of x^2.
    """
    kept = magnitude(weight.abs() * mean_squares.sqrt(), None, ratio, None) != 0
    return weight.masked_fill(~kept, 0)


# As in the language models, but for Wanda, which compares within the matrix and not within each row (published).
IMAGE_PRUNERS: dict[str, Pruner] = PRUNERS | {"wanda": Pruner(wanda_of_matrix, "squared_norms")}


class _Caught(Exception):
    """Ends a forward pass once the first block's input is known."""


def block_inputs(weights: Weights, batches: Iterable[tuple[Tensor, Tensor]], kept_on: str | None) -> BlockInputs:
    """Return the inputs of the first block for each of ``batches``; statistics will be means over tokens.

    Args:
        batches: of images [batch, 3, height, width] and labels, which are not read.
        kept_on: the device that holds the hidden states; None for the model's.
    """
    hidden: list[Tensor] = []

    def catch(_, args: tuple) -> None:
        hidden.append(args[0].to(kept_on or args[0].device))
        raise _Caught

    device = next(weights.model.parameters()).device
    handle = weights.modules[0].register_forward_pre_hook(catch)
    try:
        for images, _ in batches:
            try:
                with torch.no_grad():
                    weights.model(images.to(device))
            except _Caught:
                pass
    finally:
        handle.remove()
    return BlockInputs(hidden, [((), {})] * len(weights.modules), samples=None)
