"""Prices of an image classifier's matrices: what pruning one more weight of each costs, from the logits of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from image_classifiers import models
from lib.allocation.price import SearchOptions
from lib.allocation.price_model import Masks, band_price
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models.weights import Weights, swapped_weights
from lib.recovery.block_walk import kl_divergence

# A group of images is to a classifier what a window is to a language model.
FIT = 8  # groups on which prices are measured
HELD = 4  # groups that are held out
GROUP = 256  # the most images of a group
CHUNK = 32  # the most images that are differentiated at a time
EFFORT = SearchOptions(windows_per_step=1, window_divisor=1, token_stride=1, held_out_windows=HELD, evaluate_every=8)


def split(images: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Return FIT groups of ``images`` that prices are measured on, and HELD groups of other images, all of one size.

    Drawn with replacement, an image may be among ``images`` several times; it is then in one of the two only.
    """
    fit = images[: len(images) * FIT // (FIT + HELD)]
    seen = set(fit)
    held = [image for image in images[len(fit) :] if image not in seen]
    size = min(len(fit) // FIT, len(held) // HELD, GROUP)
    if not size:
        raise UserError("nsamples", len(images), f"the search for prices needs at least {FIT + HELD} different images")
    return fit[: FIT * size], held[: HELD * size]


class ImagePriceModel:
    """Prices of a classifier's matrices: derivatives of KL(dense || pruned), in nats per image.

    The whole model is run and differentiated at once, with pruned copies of all matrices; weights compete within the
    matrix. Its public members are those of ``price.PriceModel``; a sample is a group of images.
    """

    advice = "use another allocation"

    def __init__(
        self,
        weights: Weights,
        groups: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        dtype: torch.dtype | None = None,
        by_magnitude: bool = False,
        kept_on: str | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """Compute the dense model's logits of all groups, and rank its weights.

        Args:
            groups: for prices, and held out; each [images, 3, height, width].
            dtype, by_magnitude: of ``Masks``.
            kept_on: the device that holds the hidden states while weights are ranked; None for the model's.
            chunk: images that are differentiated at a time.
        """
        first = next(weights.model.parameters())
        self.weights, self.samples = weights, len(groups[0])
        self.device, self.dtype = first.device, dtype or first.dtype
        self.masks = Masks(weights, dtype, by_magnitude, whole=True)
        with torch.no_grad():  # a list of chunks for each group: images, and the dense logits [images, classes]
            self._fit, self._held_out = (
                [[(images, self._logits(images)) for images in group.split(chunk)] for group in half] for half in groups
            )
        self.masks.rank(models.block_inputs(weights, sum(self._fit, []), kept_on))

    def kl(self, ratios: Mapping[str, float]) -> float:
        chunks = sum(self._held_out, [])
        with torch.no_grad(), self._pruned(ratios):
            losses = [kl_divergence(logits, self._logits(images))[0] for images, logits in chunks]
        return torch.stack(losses).sum().item() / sum(len(images) for images, _ in chunks)

    def prices(self, ratios: Mapping[str, float], batch: Sequence[int]) -> tuple[float, dict[str, float]]:
        dense = self.weights.map(lambda _, weight: weight)
        prices, losses = dict.fromkeys(dense, 0), []

        def take(name: str, leaf: torch.nn.Parameter) -> None:
            prices[name] = prices[name] + band_price(leaf.grad, dense[name], self.masks.ranks[name], ratios[name])
            leaf.grad = None

        chunks = sum((self._fit[i] for i in batch), [])
        count = sum(len(images) for images, _ in chunks)
        with self._pruned(ratios) as leaves, torch.enable_grad():
            for name, leaf in leaves.items():
                leaf.register_post_accumulate_grad_hook(partial(take, name))
            for images, logits in chunks:
                pruned = self._logits(images)
                loss, slope = kl_divergence(logits, pruned, 1 / count)
                torch.autograd.backward(pruned, slope, inputs=list(leaves.values()))
                losses.append(loss)
        return torch.stack(losses).sum().item() / count, {name: price.item() for name, price in prices.items()}

    @contextmanager
    def _pruned(self, ratios: Mapping[str, float]) -> Iterator[dict[str, torch.nn.Parameter]]:
        """Replace all matrices by pruned copies meanwhile, as parameters, which are yielded by name."""
        with ExitStack() as stack:
            leaves: dict[str, torch.nn.Parameter] = {}
            for block in self.weights.visit():
                leaves |= stack.enter_context(swapped_weights(block, self.masks.copies(block, ratios)))
            yield leaves

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        dtype = self.masks.dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.weights.model(images.to(self.device))
