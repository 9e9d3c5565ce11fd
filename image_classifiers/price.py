"""Prices of an image classifier's matrices: what pruning one more weight of each costs, from the logits of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar

from image_classifiers import models
from lib.allocation.price import Effort, Options, Prices, band_price, kl_divergence, standing
from lib.calibration.hidden import BlockInputs
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn

FIT, HELD = 8, 4  # groups of images: to find prices on, and held out
GROUP = 256  # images that count as one window of text in a search, at most
PART = 32  # images that are differentiated at a time, at most
EFFORT = Effort(batch=1, shorter=1, every=1, held=HELD, check_every=8)


def split(images: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Return which of ``images`` prices are found on, FIT groups of one size, and HELD such groups of others.

    Drawn with replacement, an image may be there several times; it is then in one part only.

    Raises:
        UserError: too few images.
    """
    fit = images[: len(images) * FIT // (FIT + HELD)]
    seen = set(fit)
    held = [image for image in images[len(fit) :] if image not in seen]
    size = min(len(fit) // FIT, len(held) // HELD, GROUP)
    if not size:
        text = f"{len(images)}: the search for prices needs at least {FIT + HELD} different images"
        raise UserError("nsamples", text)
    return fit[: FIT * size], held[: HELD * size]


class ImagePrices(Prices):
    """Prices of a classifier's matrices, and its KL(dense || pruned) in nats per image.

    Its images are small beside a language model's windows: pruned copies of all matrices stand in their places, the
    whole model is run and differentiated at once, and only the dense logits are kept. As in pruning, weights compete
    within the matrix.

    Attributes:
        windows: groups of images, each [images, 3, height, width].
        dense: the dense model's logits of each group, [images, classes].
    """

    whole: ClassVar[bool] = True
    advice: ClassVar[str] = "use another allocation"

    def __init__(
        self,
        weights: Weights,
        windows: Sequence[Tensor],
        options: Options,
        ranks: dict[str, Tensor] | None = None,
        kept_on: str | None = None,
        part: int = PART,
    ) -> None:
        """Pass the groups ``windows`` through the dense model.

        Args:
            options: their dtype is used by autocast.
            ranks: those of other images; None takes them from these.
            kept_on: the device that holds the hidden states while ranks are found; None for the model's.
            part: images that are differentiated at a time.
        """
        self.weights, self.windows, self.options, self.kept_on, self.part = weights, windows, options, kept_on, part
        self.arguments, self.tuples = [((), {})] * len(weights.modules), None
        with torch.no_grad():
            self.dense = [torch.cat([self._logits(images) for images in group.split(part)]) for group in windows]
        self.ranks = self._ranks(self._enter()) if ranks is None else ranks

    def renewed_ranks(self, ratios: Mapping[str, float]) -> dict[str, Tensor]:
        return self._ranks(self._enter(), ratios)

    def kl(self, ratios: Mapping[str, float]) -> float:
        every = range(len(self.windows))
        with torch.no_grad(), self._pruned(ratios):
            return torch.stack(list(self._losses(every))).sum().item() / self._count(every)

    def prices(self, ratios: Mapping[str, float], batch: Sequence[int]) -> tuple[float, dict[str, float]]:
        found: dict[str, Tensor] = {}
        dense = {name: m.weight.detach() for block in self.weights.visit() for name, m in block.linears.items()}

        def appraise(name: str) -> Callable[[nn.Parameter], None]:
            def hook(leaf: nn.Parameter) -> None:
                price = band_price(leaf.grad, dense[name], self.ranks[name], ratios[name])
                found[name] = found.get(name, 0) + price
                leaf.grad = None

            return hook

        count, total = self._count(batch), []
        with self._pruned(ratios) as leaves, torch.enable_grad():
            for name, leaf in leaves.items():
                leaf.register_post_accumulate_grad_hook(appraise(name))
            for loss in self._losses(batch):
                torch.autograd.backward(loss / count, inputs=list(leaves.values()))
                total.append(loss.detach())
        loss = torch.stack(total).sum().item() / count
        return loss, self._checked(loss, found)

    def _count(self, batch: Sequence[int]) -> int:
        return sum(len(self.windows[i]) for i in batch)

    @contextmanager
    def _pruned(self, ratios: Mapping[str, float]) -> Iterator[dict[str, nn.Parameter]]:
        """Let pruned copies stand in the places of all matrices, as parameters, which are yielded by name."""
        with ExitStack() as stack:
            leaves: dict[str, nn.Parameter] = {}
            for block in self.weights.visit():
                leaves |= stack.enter_context(standing(block, self._copies(block, self.ranks, ratios)))
            yield leaves

    def _losses(self, batch: Sequence[int]) -> Iterator[Tensor]:
        """Yield the sum over images of KL(dense || pruned) for each part of the groups ``batch``."""
        for index in batch:
            parts = self.windows[index].split(self.part), self.dense[index].split(self.part)
            for part, dense in zip(*parts, strict=True):
                yield kl_divergence(dense, self._logits(part))

    def _logits(self, images: Tensor) -> Tensor:
        device = next(self.weights.model.parameters()).device
        with self._autocast(device):
            return self.weights.model(images.to(device))

    def _enter(self) -> BlockInputs:
        batches = ((part, None) for group in self.windows for part in group.split(self.part))
        return models.block_inputs(self.weights, batches, self.kept_on)
