"""Price model: what removing one more weight of each matrix costs, the interface and a language model's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

from tqdm import tqdm

from lib.allocation.block_scores import wanda_scores
from lib.calibration.hidden import BlockInputs, after_blocks, enter_blocks, run_block
from lib.core import cpu
from lib.core.errors import UserError
from lib.core.files import readable
from lib.core.lazy import torch
from lib.models import memory
from lib.models.weights import Block, Weights, swapped_weights

log = logging.getLogger(__name__)

# Names of the dtypes to search in.
SEARCH_DTYPES = ("auto", "float32", "bfloat16")
# Fraction of a row, centred on the threshold, over which the derivative is averaged.
BAND = 0.1
# Factor of the loss before it is differentiated: most gradients of logits (at most 1) would underflow in float16.
LOSS_SCALE = 1024
# Fraction of the free memory up to which the activations of a whole step are kept; beyond, blocks are run twice.
KEEP_WITHIN = 0.75


class PriceModel(Protocol):
    """A model whose matrices have prices, as the search sees it; a plan is a ratio by layer name.

    Attributes:
        samples: how many samples (windows of text, groups of images) prices can be measured on.
        dtype: the dtype of the products.
        advice: what a user may try where numbers are not finite.
    """

    samples: int
    dtype: torch.dtype
    advice: str

    def kl(self, ratios: Mapping[str, float]) -> float:
        """Return the mean KL(dense || pruned) on held-out data, in nats."""

    def prices(self, ratios: Mapping[str, float], batch: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Return the mean KL over a batch (indices of samples), and its derivative by each layer's ratio, by name."""


def search_dtype(name: str, device: torch.device, model_dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that a name of SEARCH_DTYPES stands for, None for the model's."""
    if name == "auto":
        pays = device.type == "cpu" and model_dtype == torch.float32 and cpu.multiplies(torch.bfloat16)
        return torch.bfloat16 if pays else None
    dtype = getattr(torch, name)
    return None if dtype == model_dtype else dtype


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return a context in which products are computed in ``dtype``, None for the model's."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def kl_divergence(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of KL(dense || pruned) of logits [tokens, vocabulary], in float32 at least."""
    exact = torch.promote_types(dense.dtype, torch.float32)
    dense, pruned = (torch.log_softmax(logits.to(exact), dim=-1) for logits in (dense, pruned))
    return torch.nn.functional.kl_div(pruned, dense, reduction="sum", log_target=True)


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

    Args:
        gradient: dL/dW at the pruned weights, also where they are pruned.
        weight: the dense W. Both are read in the shape of ``rank``.
    """
    columns = rank.shape[1]
    middle, half = int(columns * ratio), max(1, int(BAND / 2 * columns))
    low, high = max(0, middle - half), min(columns, middle + half)
    exact = torch.promote_types(weight.dtype, torch.float32)
    inside = torch.where((rank >= low) & (rank < high), gradient.reshape(rank.shape).to(exact), 0)
    return -inside.mul_(weight.reshape(rank.shape)).sum() * columns / (high - low)


class Masks:
    """Masks of any plan: the order in which the weights of each matrix are pruned, and copies pruned in that order.

    Attributes:
        dtype: of the products and of the copies, None for the model's.
        by_magnitude: whether the order is magnitude's, within the whole matrix, and not Wanda's.
        whole: whether weights compete within the whole matrix, ranks [1, out * in], or within rows, [out, in].
    """

    def __init__(self, weights: Weights, dtype: torch.dtype | None, by_magnitude: bool, whole: bool = False) -> None:
        self.weights, self.dtype, self.by_magnitude = weights, dtype, by_magnitude
        self.whole = whole or by_magnitude
        self.ranks: dict[str, torch.Tensor] = {}

    def rank(self, inputs: BlockInputs) -> None:
        """Pass ``inputs`` on through the dense blocks, and rank the weights of each."""
        inputs = inputs._replace(dtype=self.dtype)
        for block in tqdm(self.weights.visit(), "ranks", len(self.weights.modules), unit="block", disable=None):
            for name, score in wanda_scores(block, inputs, keep=True):
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


# Weights of a block, by layer name, that replace the model's own while the block is run.
Copies = Callable[[Block], Mapping[str, "torch.Tensor"]]


class BlockActivations(NamedTuple):
    """Inputs, outputs and replaced weights of a block, kept for its backward pass; only the inputs if it runs again."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    leaves: dict[str, torch.nn.Parameter]


class BlockWalk(NamedTuple):
    """Walk of a few windows forward and backward through a model's blocks, each run with other weights than its own.

    The model's own are back in place after each block. Gradients are handed over matrix by matrix and freed at once.

    Attributes:
        weights: of the model, all of them in memory.
        inputs: other arguments of the blocks' calls; the hidden states in it are not read.
        dtype: of the products, None for the model's.
        keeps_activations: whether activations and copies are kept from the forward for the backward pass. If not, each
            block is run again on its inputs (checkpointing): the same bits in less memory, with a quarter more passes.
    """

    weights: Weights
    inputs: BlockInputs
    dtype: torch.dtype | None
    keeps_activations: bool

    def forward(
        self, hidden: list[torch.Tensor], copies: Copies, differentiable: bool = False
    ) -> tuple[list[torch.Tensor], list[BlockActivations]]:
        """Return the last block's outputs for ``hidden``, [1, tokens, width] each, and what ``backward`` needs."""
        activations = []
        keeps = differentiable and self.keeps_activations
        for block in self.weights.visit():
            ran = self._run(block, hidden, copies, keeps)
            hidden = [states.detach() for states in ran.outputs]
            if differentiable:
                activations.append(ran if keeps else BlockActivations(ran.inputs, [], {}))
            del ran  # its copies of the weights, before the next block's are made
        return hidden, activations

    def backward(
        self,
        gradients: list[torch.Tensor],
        scale: torch.Tensor,
        activations: list[BlockActivations],
        copies: Copies,
        take_gradient: Callable[[Block, torch.Tensor, str, torch.Tensor], None],
    ) -> None:
        """Call ``take_gradient(block, scale, name, gradient)`` for each copy, last block first.

        Args:
            gradients: ``scale`` times the loss's gradients by the last block's outputs; the scale changes on the way.
            activations: of ``forward``, used up.
        """
        for block in self.weights.visit(backwards=True):
            # Scaled to 1 at each block, gradients of half precision neither underflow nor overflow.
            gradients = [gradient.to(block.device) for gradient in gradients]
            largest = torch.stack([gradient.abs().amax().float() for gradient in gradients]).amax()
            largest = torch.where(largest > 0, largest, 1)
            gradients, scale = [gradient / largest for gradient in gradients], scale.to(block.device) / largest
            ran = activations.pop()
            if not ran.outputs:
                ran = self._run(block, ran.inputs, copies, True)
            gradients = _block_backward(ran, gradients, partial(take_gradient, block, scale))

    def _run(self, block: Block, hidden: list[torch.Tensor], copies: Copies, differentiable: bool) -> BlockActivations:
        from accelerate.utils import send_to_device

        inputs = [states.to(block.device).detach().requires_grad_(differentiable) for states in hidden]
        arguments = send_to_device(self.inputs.arguments[block.index], block.device)
        with torch.set_grad_enabled(differentiable), swapped_weights(block, copies(block)) as leaves:
            with autocast(block.device, self.dtype):
                outputs = [run_block(block, states, arguments, self.inputs.tuples) for states in inputs]
        return BlockActivations(inputs, outputs, leaves)


def _block_backward(
    ran: BlockActivations, gradients: list[torch.Tensor], take: Callable[[str, torch.Tensor], None]
) -> list[torch.Tensor]:
    """Return the gradients by a block's inputs, given those by its outputs; ``take`` those by its copies."""

    def hand_over(name: str, leaf: torch.nn.Parameter) -> None:
        take(name, leaf.grad)
        leaf.grad = None

    for name, leaf in ran.leaves.items():
        leaf.register_post_accumulate_grad_hook(partial(hand_over, name))
    torch.autograd.backward(ran.outputs, gradients, inputs=[*ran.inputs, *ran.leaves.values()])
    return [states.grad for states in ran.inputs]


class DenseStates(NamedTuple):
    """Windows of token ids, and the dense model's hidden states before the first and after the last block.

    The latter become the dense model's logits whenever they are needed.
    """

    windows: torch.Tensor  # [windows, tokens]
    entering: torch.Tensor  # [windows, tokens, width]
    leaving: torch.Tensor  # [windows, counted tokens, width]


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
        windows_per_step: int,
        token_stride: int = 1,
        dtype: torch.dtype | None = None,
        by_magnitude: bool = False,
    ) -> None:
        """Pass ``windows`` through the dense model and rank its weights.

        Args:
            windows: of calibration, for prices, and held out, for ``kl``; each [windows, tokens], of equal length.
            windows_per_step: how many windows ``prices`` is called with, which decides the memory.
            token_stride: one of so many tokens counts in the loss.
            dtype, by_magnitude: as in ``Masks``.

        Raises:
            UserError: the weights are not in memory, or the work does not fit beside them.
        """
        if not weights.in_memory:
            problem = "needs all weights in memory, and these are streamed or offloaded"
            raise UserError("prune_method", "_price", problem, "use GPUs with more memory, or another allocation")
        count, tokens = sum(map(len, windows)), windows[0].shape[1]
        needs = memory.price_bytes(weights, tokens, windows_per_step, count, dtype, by_magnitude)
        keeps_activations = _has_room_for_activations(needs)
        self.weights, self.samples = weights, len(windows[0])
        self.dtype = dtype or weights.model.dtype
        self._counted = slice(token_stride - 1, None, token_stride)
        self.masks = Masks(weights, dtype, by_magnitude)

        inputs = enter_blocks(weights, windows[0])
        entering = inputs.hidden.clone()
        self.masks.rank(inputs)
        self._fit = DenseStates(windows[0], entering, inputs.hidden[:, self._counted].clone())
        self.walk = BlockWalk(weights, inputs._replace(hidden=[]), dtype, keeps_activations)

        entering = enter_blocks(weights, windows[1]).hidden
        hidden, _ = self.walk.forward(list(entering.split(1)), lambda _: {})
        self._held_out = DenseStates(windows[1], entering, torch.cat([states[:, self._counted] for states in hidden]))

    def kl(self, ratios: Mapping[str, float]) -> float:
        windows = range(len(self._held_out.windows))
        hidden, _ = self.walk.forward(list(self._held_out.entering.split(1)), partial(self.masks.copies, ratios=ratios))
        return self._loss(self._held_out, hidden, windows)[0]

    def prices(self, ratios: Mapping[str, float], batch: Sequence[int]) -> tuple[float, dict[str, float]]:
        copies = partial(self.masks.copies, ratios=ratios)
        hidden, activations = self.walk.forward([self._fit.entering[i : i + 1] for i in batch], copies, True)
        loss, gradients, scale = self._loss(self._fit, hidden, batch, differentiate=True)
        prices: dict[str, torch.Tensor] = {}

        def take(block: Block, scale: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
            weight = block.linears[name].weight.detach()
            prices[name] = band_price(gradient, weight, self.masks.ranks[name], ratios[name]) / scale

        self.walk.backward(gradients, scale, activations, copies, take)
        return loss, {layer.name: prices[layer.name].item() for layer in self.weights.layers}

    def _loss(
        self, dense: DenseStates, hidden: Sequence[torch.Tensor], batch: Sequence[int], differentiate: bool = False
    ) -> tuple[float, list[torch.Tensor], torch.Tensor]:
        """Return the mean KL of the windows in ``batch``, scaled gradients by ``hidden``, and their scale.

        ``hidden`` is the pruned blocks' output for each of them, [1, tokens, width].
        """
        count = len(batch) * dense.leaving.shape[1]
        total, gradients = 0.0, [torch.zeros_like(states) for states in hidden] if differentiate else []
        with after_blocks(self.weights, self.walk.inputs.tuples) as logits, torch.set_grad_enabled(differentiate):
            for i, index in enumerate(batch):
                pieces = []
                chunks = (x.split(memory.LOGIT_TOKENS) for x in (hidden[i][0, self._counted], dense.leaving[index]))
                for pruned_states, dense_states in zip(*chunks, strict=True):
                    pruned_states = pruned_states.detach().requires_grad_(differentiate)
                    with autocast(pruned_states.device, self.masks.dtype):
                        pruned_logits = logits(dense.windows[index], pruned_states)
                        with torch.no_grad():
                            dense_logits = logits(dense.windows[index], dense_states)
                    kl = kl_divergence(dense_logits, pruned_logits)
                    total = total + kl.detach()
                    if differentiate:
                        pieces += torch.autograd.grad(kl, pruned_states, torch.full_like(kl, LOSS_SCALE))
                if differentiate:
                    gradients[i][0, self._counted] = torch.cat(pieces)
        return (total / count).item(), gradients, torch.tensor(float(LOSS_SCALE * count))


def _has_room_for_activations(needs: Mapping[int | str, memory.PriceBytes]) -> bool:
    """Log how much memory a search needs, refuse one that does not fit, and return whether all activations do."""
    free = memory.free_memory(0)
    keeps = all(need.least + need.activations <= KEEP_WITHIN * free[place] for place, need in needs.items())
    least, more = (readable(sum(sizes)) for sizes in zip(*needs.values(), strict=True))
    are = "are used for activations" if keeps else "would make it faster"
    log.info("the price search needs %s beside the weights; up to %s more %s", least, more, are)
    for place, need in needs.items():
        if need.least > free[place]:
            where = "in the CPU's memory" if place == "cpu" else f"on GPU {place}"
            sizes = f"{readable(need.least)} are needed {where} beside the weights and {readable(free[place])} are free"
            raise UserError("prune_method", "_price", sizes, "lower --seqlen, or use more or larger GPUs")
    return keeps
