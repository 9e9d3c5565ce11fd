"""Images become what enters the blocks, and a statistic becomes one threshold per matrix."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lib.calibration import BlockInputs
from lib.pruners import PRUNERS, Pruner, magnitude


def wanda_of_matrix(weight: Tensor, mean_squares: Tensor, ratio: float, nm: None = None) -> Tensor:
    """Zero everything <= the int(n * ratio)-th (from 0) of the sorted |W| * sqrt(s), one threshold for the matrix.

    Args:
        mean_squares: s [in] float32, the mean over tokens of x^2.
    """
    kept = magnitude(weight.abs() * mean_squares.sqrt(), None, ratio, None) != 0
    return weight.masked_fill(~kept, 0)


# As in the language models, but for Wanda, which compares within the matrix and not within each row (published).
IMAGE_PRUNERS: dict[str, Pruner] = PRUNERS | {"wanda": Pruner(wanda_of_matrix, "squared_norms")}


class _Caught(Exception):
    """Ends a forward pass once the first block's input is known."""


@torch.no_grad()
def block_inputs(
    model: nn.Module, blocks: nn.ModuleList, batches: Iterable[tuple[Tensor, Tensor]], kept_on: str | None
) -> BlockInputs:
    """Return what enters the first of ``blocks`` for each of ``batches``; statistics will be means over tokens.

    Args:
        kept_on: the device that holds the hidden states; None for the model's own.
    """
    hidden: list[Tensor] = []

    def catch(_, args: tuple) -> None:
        hidden.append(args[0].to(kept_on or args[0].device))
        raise _Caught

    device = next(model.parameters()).device
    handle = blocks[0].register_forward_pre_hook(catch)
    try:
        for images, _ in batches:
            try:
                model(images.to(device))
            except _Caught:
                pass
    finally:
        handle.remove()
    return BlockInputs(hidden, [((), {})] * len(blocks), samples=None)
