"""Price model of a language model: what removing one more weight of each of its matrices costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from tqdm import tqdm

from lib.allocation.block_scores import wanda_scores
from lib.allocation.price import SearchOptions
from lib.calibration.hidden import BlockInputs, enter_blocks
from lib.core.lazy import torch
from lib.models import memory
from lib.models.weights import Block, Weights, swapped_weights
from lib.recovery.block_walk import BlockWalk, DenseStates, has_room_for_activations, head_loss

# Fraction of a row, centred on the threshold, over which the derivative is averaged.
BAND = 0.1


def row_ranks(score: torch.Tensor) -> torch.Tensor:
    """Return each score's position in its ascending row, [out, in]; of equal scores, the lower column comes first."""
    columns = score.shape[1]
    dtype = torch.int16 if columns <= 2**15 else torch.int32
    places = torch.arange(columns, device=score.device)
    if score.device.type == "cpu" and score.dtype == torch.float32:
        # numpy sorts integers in a quarter of the time: the bits of the score, which is not negative, and its column.
        keys = score.view(torch.int32).long() << 32 | places
        keys.numpy().sort(axis=1)
        order = keys & (2**32 - 1)
    else:
        order = score.sort(dim=1, stable=True).indices
    ranks = torch.empty(score.shape, dtype=dtype, device=score.device)
    return ranks.scatter_(1, order, places.to(dtype).expand_as(score))


def pruned_copy(weight: torch.Tensor, rank: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return a copy of ``weight`` without the int(n * ratio) lowest ranks of each row of n: this is how Wanda prunes.

    The rows of ``rank`` are the weight's [out, in], or one row holds the whole matrix.
    """
    # The product with the mask is three times as fast as masked_fill.
    return weight * (rank >= int(rank.shape[1] * ratio)).view_as(weight)


def band_price(gradient: torch.Tensor, weight: torch.Tensor, rank: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return dL/d ratio of a matrix, a scalar tensor: the loss that the weights around the threshold are worth.

    It is -sum of gradient * weight over the ranks within BAND / 2 of the threshold, divided by the band's width as a
    fraction of the row. Half of the band is kept and half is gone: the mean of the derivatives at both ends of a step.
    The ``gradient`` is dL/dW at the pruned weights, also where they are pruned, and the ``weight`` is dense; both are
    read in the shape of ``rank``.
    """
    columns = rank.shape[1]
    middle, half = int(columns * ratio), max(1, int(BAND / 2 * columns))
    low, high = max(0, middle - half), min(columns, middle + half)
    exact = torch.promote_types(weight.dtype, torch.float32)
    inside = torch.where((rank >= low) & (rank < high), gradient.reshape(rank.shape).to(exact), 0)
    return -inside.mul_(weight.reshape(rank.shape)).sum() * columns / (high - low)


class Masks:
    """Masks of any plan: the order in which the weights of each matrix are pruned, and copies pruned in that order.

    It is Wanda's, within rows, ranks [out, in], or in the ``whole`` matrix, [1, out * in], as magnitude's always is.
    Products and copies are of the ``dtype``, None for the model's.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype | None, by_magnitude: bool, whole: bool = False) -> None:
        self.weights, self.dtype, self.by_magnitude = weights, dtype, by_magnitude
        self.whole = whole or by_magnitude
        self.ranks: dict[str, torch.Tensor] = {}

    def rank(self, inputs: BlockInputs) -> None:
        """Pass ``inputs`` on through the dense blocks, and rank the weights of each."""
        inputs = inputs._replace(dtype=self.dtype)
        for block in tqdm(self.weights.visit(), "ranks", len(self.weights.modules), unit="block", disable=None):
            for name, score in wanda_scores(block, inputs):
                if self.by_magnitude:
                    score = block.linears[name].weight.detach().flatten(1).abs()
                self.ranks[name] = row_ranks(score.reshape(1, -1) if self.whole else score)

    def copies(self, block: Block, ratios: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Return pruned copies of a block's weights by layer name."""
        weights = {name: linear.weight.detach() for name, linear in block.linears.items()}
        return {
            name: pruned_copy(weight.to(self.dtype or weight.dtype), self.ranks[name], ratios[name])
            for name, weight in weights.items()
        }


class LanguagePriceModel:
    """Prices of a language model's matrices: a ``PriceModel`` in nats per token.

    The weights stay dense: pruned copies replace them while a block is run, and each gradient becomes a price and is
    freed as soon as it is computed.
    """

    advice = "try --dtype bfloat16 or --dtype float32"

    def __init__(
        self,
        weights: Weights,
        windows: tuple[torch.Tensor, torch.Tensor],
        options: SearchOptions,
        dtype: torch.dtype | None = None,
        by_magnitude: bool = False,
    ) -> None:
        """Pass ``windows`` through the dense model and rank its weights, which must have room for the work beside them.

        The windows are those of calibration, for prices, and held-out ones, for ``kl``, each [windows, tokens], of
        equal length; how many of them a step has, by the ``options``, decides the memory. The rest is as in ``Masks``.
        """
        count, tokens = sum(map(len, windows)), windows[0].shape[1]
        ranks = {layer.name: memory.rank_bytes([layer], by_magnitude) for layer in weights.layers}
        sizes = (ranks, tokens, options.windows_per_step, count, dtype)
        how = ("the price search", "prune_method", "_price", "another allocation")
        keeps_activations = has_room_for_activations(weights, sizes, *how)
        self.weights, self.samples = weights, len(windows[0])
        self.dtype = dtype or weights.model.dtype
        self._counted = slice(options.token_stride - 1, None, options.token_stride)
        self.masks = Masks(weights, dtype, by_magnitude)

        inputs = enter_blocks(weights, windows[0])
        entering = inputs.hidden.clone()
        self.masks.rank(inputs)
        self._fit = DenseStates(windows[0], entering, inputs.hidden[:, self._counted].clone())
        self.walk = BlockWalk(weights, inputs._replace(hidden=[]), dtype, keeps_activations)

        entering = enter_blocks(weights, windows[1]).hidden
        hidden, _ = self.walk.forward(list(entering.split(1)), lambda block: swapped_weights(block, {}))
        self._held_out = DenseStates(windows[1], entering, torch.cat([states[:, self._counted] for states in hidden]))

    def kl(self, ratios: Mapping[str, float]) -> float:
        windows = range(len(self._held_out.windows))
        hidden, _ = self.walk.forward(list(self._held_out.entering.split(1)), partial(self._pruned, ratios))
        loss = head_loss(self.walk, self._held_out, hidden, windows, self._counted)
        return (loss.total / loss.count).item()

    def prices(self, ratios: Mapping[str, float], batch: Sequence[int]) -> tuple[float, dict[str, float]]:
        pruned = partial(self._pruned, ratios)
        hidden, activations = self.walk.forward([self._fit.entering[i : i + 1] for i in batch], pruned, True)
        loss = head_loss(self.walk, self._fit, hidden, batch, self._counted, differentiate=True)
        prices: dict[str, torch.Tensor] = {}

        def take(block: Block, scale: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
            weight = block.linears[name].weight.detach()
            prices[name] = band_price(gradient, weight, self.masks.ranks[name], ratios[name]) / scale

        self.walk.backward(loss, activations, pruned, take)
        by_layer = {layer.name: prices[layer.name].item() for layer in self.weights.layers}
        return (loss.total / loss.count).item(), by_layer

    def _pruned(self, ratios: Mapping[str, float], block: Block) -> AbstractContextManager:
        return swapped_weights(block, self.masks.copies(block, ratios))
