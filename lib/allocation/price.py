"""Prices: what pruning one more weight of each matrix costs, and the ratios at which all matrices cost the same."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from tqdm import tqdm

from lib.calibration.hidden import (
    BlockInputs,
    advance,
    after_blocks,
    enter_blocks,
    hidden_of,
    passes,
    run_block,
)
from lib.calibration.statistics import input_statistics
from lib.core import cpu
from lib.core.errors import UserError
from lib.core.files import readable
from lib.core.lazy import torch
from lib.models.layers import Layer
from lib.models.memory import free_memory
from lib.models.weights import Block, Weights, check_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FIT = 16  # windows to find prices on
LEAST, MOST = 0.001, 0.97  # ratios that a step may lead to
START_LEAST = 0.03  # ratio that a search starts from: from below, a logit hardly moves
STEP, REFRESH_STEP = 0.25, 0.15  # of the logit, at a price that is e times the mean; falls to 0
BAND = 0.1  # share of a row around the threshold from which a price is read
MEMORY = 0.6  # share of the earlier steps in a price
LIFT = 1024  # times the loss: most gradients of logits, which are at most 1, are too small for float16
TOKENS = 256  # whose logits are in memory at a time
HOLD_WITHIN = 0.75  # of the free memory, for all activations of a step; above it blocks are run twice
DTYPES = ("auto", "float32", "bfloat16")


class Effort(NamedTuple):
    """How much a search looks at.

    ``batch`` windows in a step, which are ``shorter`` times than --seqlen, and one of ``every`` tokens in them; after
    each ``check_every`` steps the windows ``held`` out.
    """

    batch: int
    shorter: int
    every: int
    held: int
    check_every: int

    def length(self, seqlen: int) -> int:
        """Return the number of tokens in a window of a search, given that in a window of calibration."""
        return -(-seqlen // self.shorter)


EFFORTS = {"full": Effort(2, 1, 2, 8, 4), "quick": Effort(1, 2, 1, 4, 8)}


class Options(NamedTuple):
    """``steps`` of the search, ``refresh`` more with renewed ranks, ``dtype`` of the products (None: the model's).

    ``by_magnitude``: the masks are magnitude's, not Wanda's.
    """

    steps: int = 16
    refresh: int = 0
    dtype: torch.dtype | None = None
    by_magnitude: bool = False
    effort: Effort = EFFORTS["full"]


def forward_passes(options: Options, started: bool) -> int:
    """Return how many windows a search passes through the blocks, a backward pass counted as two.

    Where there is no room for all activations of a step, its windows pass once more, block by block (checkpointing).

    Args:
        started: whether it starts from another allocation than uniform, which is looked at, too.
    """

    effort = options.effort

    def descent(steps: int) -> int:
        return steps * effort.batch * 3 + math.ceil(steps / effort.check_every) * effort.held

    dense, starts = FIT + effort.held, effort.held * (2 if started else 1)
    renewed = 2 * FIT + effort.held + descent(options.refresh) if options.refresh else 0
    return dense + starts + descent(options.steps) + renewed


class Trail(NamedTuple):
    """What a block's way back needs: what ``entered`` it.

    Unless the block is to be run once more, also what ``left`` it, and its pruned ``leaves`` by layer name.
    """

    entered: list[Tensor]
    left: list[Tensor] | None = None
    leaves: dict[str, nn.Parameter] | None = None


class Step(NamedTuple):
    """A step's ``spread`` of prices, KL on its windows (``fit``), and on all ``held`` out ones after it, if measured.

    The spread is the mean of |log(price / mean price)|, cut at 1 and weighted as the mean is; KL is in nats per token.
    """

    spread: float
    fit: float
    held: float | None


class Found(NamedTuple):
    """The ``ratios`` by layer name that were ``kept``, and the KL on held-out windows of what it was chosen from."""

    ratios: dict[str, float]
    kept: str
    held: dict[str, float]
    steps: list[Step]
    dtype: str

    @classmethod
    def of(cls, content: Mapping) -> Found:
        """Return what ``_asdict`` was made of, after a way through JSON."""
        return cls(**content)._replace(steps=[Step(*step) for step in content["steps"]])


# --------------------------------------------------------------------------------------------------- ranks and bands


def row_ranks(score: Tensor) -> Tensor:
    """Return the position of each of ``score`` [out, in] in its ascending row, of equals the lower column first.

    None is negative, and so they sort like their bits.
    """
    columns = score.shape[1]
    dtype = torch.int16 if columns <= 2**15 else torch.int32
    places = torch.arange(columns, device=score.device)
    if score.device.type == "cpu" and score.dtype == torch.float32:  # numpy sorts integers in a quarter of the time
        keys = score.view(torch.int32).long() << 32 | places
        keys.numpy().sort(axis=1)
        order = keys & (2**32 - 1)
    else:
        order = score.sort(dim=1, stable=True).indices
    ranks = torch.empty(score.shape, dtype=dtype, device=score.device)
    return ranks.scatter_(1, order, places.to(dtype).expand_as(score))


def pruned(weight: Tensor, rank: Tensor, ratio: float) -> Tensor:
    """Return a copy of ``weight`` without the int(n * ratio) lowest ranks of each row of n in ``rank``.

    As Wanda prunes: the rows of ``rank`` are the weight's [out, in], or one row holds the whole matrix.
    """
    return weight * (rank >= int(rank.shape[1] * ratio)).view_as(weight)  # three times as fast as masked_fill


def band_price(gradient: Tensor, weight: Tensor, rank: Tensor, ratio: float) -> Tensor:
    """Return dL/d ratio of a matrix, a scalar tensor: the loss that the weights around the threshold are worth.

    -sum of gradient * weight over the ranks within BAND / 2 of the threshold, by the band's width as a share of the
    row. Half of the band is kept and half is gone, so that the derivatives at both ends of a step are averaged.

    Args:
        gradient: dL/dW at the pruned weights, also where they are pruned.
        weight: W, dense. Both are read in the shape of ``rank``.
    """
    gradient, weight = gradient.reshape(rank.shape), weight.reshape(rank.shape)
    columns = rank.shape[1]
    middle, half = int(columns * ratio), max(1, int(BAND / 2 * columns))
    low, high = max(0, middle - half), min(columns, middle + half)
    exact = torch.promote_types(weight.dtype, torch.float32)
    inside = (rank >= low) & (rank < high)
    worth = torch.where(inside, gradient.to(exact), 0).mul_(weight).sum()
    return -worth * columns / (high - low)


# ---------------------------------------------------------------------------------------------------- ratios by price


def within_budget(logits: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """Return ratios sigmoid(logit + c), cut to [LEAST, MOST], with c such that their mean by size is ``target``."""
    low, high = _bounds(target)
    total = sum(sizes)

    def ratios(c: float) -> list[float]:
        return [min(max(1 / (1 + math.exp(-(x + c))), low), high) for x in logits]

    # At these ends all ratios are at most, and at least, the target.
    left, right = _logit(target) - max(logits), _logit(target) - min(logits)
    while left < (middle := (left + right) / 2) < right:
        over = math.fsum(n * s for n, s in zip(sizes, ratios(middle), strict=True)) >= target * total
        left, right = (left, middle) if over else (middle, right)
    return ratios(right)


def next_logits(
    ratios: Sequence[float], prices: Sequence[float], sizes: Sequence[int], target: float, step: float
) -> tuple[list[float], float]:
    """Return logits that prune more where weights are cheap, and the spread of ``prices`` (per weight).

    logit(ratio) - ``step`` * log(price / mean price), the log within 1 of 0; a price of 0 or less counts as cheapest.
    """
    weighting = [n * s * (1 - s) for n, s in zip(sizes, ratios, strict=True)]
    mean = math.fsum(w * p for w, p in zip(weighting, prices, strict=True)) / math.fsum(weighting)
    logs = [_log_within(price, mean) for price in prices]
    low, high = _bounds(target)
    spread = math.fsum(w * abs(x) for w, x in zip(weighting, logs, strict=True)) / math.fsum(weighting)
    return [_logit(min(max(s, low), high)) - step * x for s, x in zip(ratios, logs, strict=True)], spread


def _log_within(price: float, mean: float) -> float:
    if mean <= 0:  # noise alone: no matrix is dearer than another
        return 0.0
    return min(max(math.log(price / mean), -1.0), 1.0) if price > 0 else -1.0


def _bounds(target: float) -> tuple[float, float]:
    """Return the least and the largest ratio; a target outside of the usual ones leaves room on both sides of it."""
    return min(LEAST, target / 4), max(MOST, (1 + 3 * target) / 4)


def _logit(ratio: float) -> float:
    return math.log(ratio / (1 - ratio))


# ----------------------------------------------------------------------------------------------- a model and its texts


class Prices:
    """Prices of a model's matrices, and its KL(dense || pruned) in nats per token, on a text.

    The weights stay dense: pruned copies stand in their places while a block is run. On the way back a block is run
    once more (checkpointing) unless all activations are held, and each gradient becomes a price and is freed as soon as
    it is known.

    Attributes:
        windows: token ids, [samples, tokens].
        holds: whether activations and pruned copies of all blocks are held for the way back.
        options: those of the search.
        ranks: by layer name, [out, in], or [1, out * in] if weights compete within the ``whole`` matrix.
        counted: tokens whose predictions count.
        leaving: what left the dense blocks for these, [samples, counted, width], for the dense model's logits.
    """

    whole: ClassVar[bool] = False  # whether weights compete within the whole matrix, and not within each row
    advice: ClassVar[str] = "try --dtype bfloat16 or --dtype float32"

    def __init__(
        self,
        weights: Weights,
        windows: Tensor,
        options: Options = Options(),  # noqa: B008  a tuple of numbers
        ranks: dict[str, Tensor] | None = None,
        holds: bool = False,
    ) -> None:
        """Pass ``windows`` [samples, tokens] through the dense model.

        Args:
            options: their dtype is used by autocast.
            ranks: those of another text; None takes them from this one.
            holds: see there; the same prices to the bit for more memory and a quarter fewer passes.
        """
        self.weights, self.windows, self.options, self.holds = weights, windows, options, holds
        every = options.effort.every
        self.counted = slice(every - 1, None, every)
        inputs = enter_blocks(weights, windows)
        self.arguments, self.tuples, self.entering = inputs.arguments, inputs.tuples, inputs.hidden.clone()
        if ranks is None:
            self.ranks = self._ranks(inputs)
        else:
            self.ranks = ranks
            for block in weights.visit():
                with self._autocast(block.device):
                    advance(block, inputs)
        self.leaving = inputs.hidden[:, self.counted].clone()

    def renewed_ranks(self, ratios: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the ranks on the path of ``ratios``: each block's inputs come from pruned blocks, as in pruning."""
        return self._ranks(enter_blocks(self.weights, self.windows), ratios)

    def kl(self, ratios: Mapping[str, float]) -> float:
        """Return the mean of KL(dense || pruned) over all windows."""
        every = range(len(self.windows))
        hidden, _ = self._forward(ratios, every, back=False)
        return self._loss(hidden, every)[0]

    def prices(self, ratios: Mapping[str, float], batch: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Return the mean KL over the windows ``batch``, and its derivative by each layer's ratio, by name.

        Raises:
            UserError: they are not finite.
        """
        hidden, trails = self._forward(ratios, batch, back=True)
        loss, slopes, scale = self._loss(hidden, batch, differentiate=True)
        found: dict[str, Tensor] = {}
        for block in self.weights.visit(backwards=True):
            # Scaled to 1 at each block, gradients of half precision neither underflow nor overflow.
            slopes = [slope.to(block.device) for slope in slopes]
            largest = torch.stack([slope.abs().amax().float() for slope in slopes]).amax()
            largest = torch.where(largest > 0, largest, 1)
            scale = scale.to(block.device) / largest
            slopes, worth = self._back(block, trails.pop(), [slope / largest for slope in slopes], ratios)
            found |= {name: value / scale for name, value in worth.items()}
        return loss, self._checked(loss, found)

    # ------------------------------------------------------------------------------------------------ through blocks

    def _forward(
        self, ratios: Mapping[str, float], batch: Sequence[int], back: bool
    ) -> tuple[list[Tensor], list[Trail]]:
        """Return what leaves the pruned blocks for each of ``batch``, and each block's trail if there is a way back."""
        hidden, trails = [self.entering[i : i + 1] for i in batch], []
        for block in self.weights.visit():
            hidden = [h.to(block.device) for h in hidden]
            if back and self.holds:
                trails.append(self._trail(block, hidden, ratios))
                hidden = [h.detach() for h in trails[-1].left]
                continue
            if back:
                trails.append(Trail(hidden))
            with torch.no_grad(), standing(block, self._copies(block, self.ranks, ratios)):
                hidden = self._run(block, hidden)
        return hidden, trails

    def _trail(self, block: Block, entered: list[Tensor], ratios: Mapping[str, float]) -> Trail:
        """Return the trail of a pruned block, run on what ``entered`` it so that it can be differentiated."""
        entered = [h.detach().requires_grad_() for h in entered]
        with standing(block, self._copies(block, self.ranks, ratios)) as leaves, torch.enable_grad():
            return Trail(entered, self._run(block, entered), leaves)

    def _back(
        self, block: Block, trail: Trail, slopes: list[Tensor], ratios: Mapping[str, float]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the gradients of what entered a block, given those of what left it, and its layers' prices."""
        dense = {name: linear.weight.detach() for name, linear in block.linears.items()}
        worth: dict[str, Tensor] = {}

        def appraise(name: str) -> Callable[[nn.Parameter], None]:
            def hook(leaf: nn.Parameter) -> None:
                worth[name] = band_price(leaf.grad, dense[name], self.ranks[name], ratios[name])
                leaf.grad = None

            return hook

        entered, left, leaves = trail if trail.left else self._trail(block, trail.entered, ratios)
        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(appraise(name))
        torch.autograd.backward(left, slopes, inputs=[*entered, *leaves.values()])
        return [h.grad for h in entered], worth

    def _run(self, block: Block, hidden: Sequence[Tensor]) -> list[Tensor]:
        from accelerate.utils import send_to_device

        arguments = send_to_device(self.arguments[block.index], block.device)
        with self._autocast(block.device):
            outs = [run_block(block.module, h, arguments) for h in hidden]
        return [hidden_of(out, block.index, self.tuples) for out in outs]

    def _checked(self, loss: float, found: Mapping[str, Tensor]) -> dict[str, float]:
        prices = {layer.name: found[layer.name].item() for layer in self.weights.layers}
        for name, price in {"KL": loss, **prices}.items():
            if not math.isfinite(price):
                raise UserError(None, f"{name}: its price is not finite; {self.advice}")
        return prices

    @property
    def own(self) -> torch.dtype:
        """Dtype of the model."""
        return next(self.weights.model.parameters()).dtype

    def _autocast(self, device: torch.device) -> torch.autocast:
        dtype = self.options.dtype
        return torch.autocast(device.type, dtype or self.own, enabled=dtype not in (None, self.own))

    def _copies(
        self, block: Block, ranks: Mapping[str, Tensor], ratios: Mapping[str, float]
    ) -> dict[str, Tensor]:
        dtype = self.options.dtype
        return {
            name: pruned(linear.weight.detach().to(dtype or linear.weight.dtype), ranks[name], ratios[name])
            for name, linear in block.linears.items()
        }

    def _ranks(self, inputs: BlockInputs, ratios: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """Pass ``inputs`` on through the blocks, dense or pruned by ``ratios``, and return the ranks of all scores."""
        found, whole = {}, self.whole or self.options.by_magnitude
        bar = tqdm(self.weights.visit(), "ranks", len(self.weights.modules), unit="block", disable=None)
        for block in bar:
            for name, linear in block.linears.items():
                check_finite(name, linear.weight)
            with self._autocast(block.device):
                steps = passes(block, inputs, keep=ratios is None)
                for names, norms in input_statistics(block.linears, "squared_norms", inputs.samples, steps):
                    for name in names:
                        score = block.linears[name].weight.detach().flatten(1).abs()
                        score = score if self.options.by_magnitude else score * norms.sqrt()
                        found[name] = row_ranks(score.reshape(1, -1) if whole else score)
                if ratios is not None:
                    with standing(block, self._copies(block, found, ratios)):
                        advance(block, inputs)
        return found

    # --------------------------------------------------------------------------------------------------- after blocks

    def _loss(
        self, hidden: Sequence[Tensor], batch: Sequence[int], differentiate: bool = False
    ) -> tuple[float, list[Tensor], Tensor]:
        """Return the mean KL of the windows ``batch``, the gradients of ``hidden``, and what these must be divided by.

        Args:
            hidden: what left the pruned blocks for each window, [1, tokens, width].
        """
        count = len(batch) * self.leaving.shape[1]
        total, slopes = 0.0, []
        with after_blocks(self.weights, self.tuples) as logits, torch.set_grad_enabled(differentiate):
            for h, index in zip(hidden, batch, strict=True):
                window, slope = self.windows[index], torch.zeros_like(h) if differentiate else None
                parts = (h[0, self.counted].split(TOKENS), self.leaving[index].split(TOKENS))
                found = []
                for ours, dense in zip(*parts, strict=True):
                    ours = ours.detach().requires_grad_(differentiate)
                    with self._autocast(ours.device):
                        left = logits(window, ours)
                        with torch.no_grad():
                            right = logits(window, dense)
                    kl = kl_divergence(right, left)
                    total = total + kl.detach()
                    if differentiate:
                        found += torch.autograd.grad(kl, ours, torch.full_like(kl, LIFT))
                if differentiate:
                    slope[0, self.counted] = torch.cat(found)
                    slopes.append(slope)
        return (total / count).item(), slopes, torch.tensor(float(LIFT * count))


def kl_divergence(dense: Tensor, ours: Tensor) -> Tensor:
    """Return the sum over tokens of KL(dense || ours) of logits [tokens, vocabulary], in float32 at least."""
    exact = torch.promote_types(dense.dtype, torch.float32)
    functional = torch.nn.functional
    dense, ours = (functional.log_softmax(part.to(exact), dim=-1) for part in (dense, ours))
    return functional.kl_div(ours, dense, reduction="sum", log_target=True)


@contextmanager
def standing(block: Block, copies: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Let ``copies`` stand in the places of a block's weights, as parameters, which are yielded by name."""
    own = {name: block.linears[name].weight for name in copies}
    leaves = {name: torch.nn.Parameter(copy) for name, copy in copies.items()}
    try:
        for name, leaf in leaves.items():
            block.linears[name]._parameters["weight"] = leaf
        yield leaves
    finally:
        for name, parameter in own.items():
            block.linears[name]._parameters["weight"] = parameter


# ---------------------------------------------------------------------------------------------------------- the search


def search(
    weights: Weights,
    windows: tuple[Tensor, Tensor],
    target: float,
    start: Mapping[str, float] | Sequence[tuple[str, float]] | None = None,
    options: Options = Options(),  # noqa: B008  a tuple of numbers
) -> Found:
    """Return the ratios that ``equalise`` finds for a language model.

    Args:
        windows: of calibration and held out, each [samples, tokens].
        start: ratios by layer name; None for uniform ones.

    Raises:
        UserError: the weights are not in memory, or the search does not fit beside them.
    """
    holds = check_memory(weights, windows[0].shape[1], options)
    fit = Prices(weights, windows[0], options, None, holds)
    return equalise(fit, Prices(weights, windows[1], options, fit.ranks), target, start)


def equalise(
    fit: Prices,
    held: Prices,
    target: float,
    start: Mapping[str, float] | Sequence[tuple[str, float]] | None,
) -> Found:
    """Return the ratios at which pruning one more weight costs the same KL(dense || pruned) in every layer.

    Of where it starts, where it ends and uniform ratios, the best on what is ``held`` out are kept. Masks are Wanda's,
    from statistics of the dense model (or magnitude's); with ``options.refresh``, more steps follow with those of the
    pruned one.
    """
    options = fit.options
    plans = {"uniform": {layer.name: target for layer in fit.weights.layers}}
    if start is not None:
        plans["start"] = dict(start)
    kls = {name: held.kl(plan) for name, plan in plans.items()}
    plans["end"], steps = _descend(fit, held, plans.get("start", plans["uniform"]), target, options.steps, STEP)
    kls["end"] = steps[-1].held
    kept = _best(kls, held.advice)
    if options.refresh:
        fit.ranks = held.ranks = fit.renewed_ranks(plans[kept])
        kls["before refresh"] = held.kl(plans[kept])
        plans["before refresh"] = plans[kept]
        plans["refreshed"], more = _descend(fit, held, plans[kept], target, options.refresh, REFRESH_STEP)
        steps += more
        kls["refreshed"] = more[-1].held
        kept = _best({name: kls[name] for name in ("before refresh", "refreshed")}, held.advice)  # of the same ranks
    shown = ", ".join(f"{name} {value:.4f}" for name, value in kls.items())
    log.info("price search: KL on held-out calibration data: %s; kept: %s", shown, kept)
    return Found(plans[kept], kept, kls, steps, str(options.dtype or fit.own).removeprefix("torch."))


def search_dtype(asked: str, device: torch.device, own: torch.dtype) -> torch.dtype | None:
    """Return the dtype to search in, None for the model's own: a name of DTYPES, resolved."""
    if asked != "auto":
        dtype = getattr(torch, asked)
        return None if dtype == own else dtype
    return torch.bfloat16 if device.type == "cpu" and own == torch.float32 and cpu.multiplies(torch.bfloat16) else None


def _best(kls: Mapping[str, float], advice: str) -> str:
    """Return the name of the lowest finite KL; of equals the first."""
    finite = {name: value for name, value in kls.items() if math.isfinite(value)}
    if not finite:
        raise UserError("sparsity_ratio", f"the KL of every plan is not finite; lower it, or {advice}")
    return min(finite, key=finite.get)


def _descend(
    fit: Prices, held: Prices, start: Mapping[str, float], target: float, count: int, step: float
) -> tuple[dict[str, float], list[Step]]:
    """Return what ``count`` steps make of ``start``, and the steps."""
    layers, effort = fit.weights.layers, fit.options.effort
    names, sizes = [layer.name for layer in layers], [layer.size for layer in layers]
    logits = [_logit(min(max(start[name], START_LEAST), MOST)) for name in names]
    ratios = within_budget(logits, sizes, target)
    draw, order, steps, prices = random.Random(0), [], [], None
    bar = tqdm(range(count), desc="prices", unit="step", disable=None)
    for t in bar:
        if len(order) < effort.batch:
            order = draw.sample(range(len(fit.windows)), len(fit.windows))
        batch, order = order[: effort.batch], order[effort.batch :]
        loss, found = fit.prices(dict(zip(names, ratios, strict=True)), batch)
        now = [found[name] / size for name, size in zip(names, sizes, strict=True)]
        prices = now if prices is None else [MEMORY * p + (1 - MEMORY) * q for p, q in zip(prices, now, strict=True)]
        logits, spread = next_logits(ratios, prices, sizes, target, step * (1 - t / count))
        ratios = within_budget(logits, sizes, target)
        look = (t + 1) % effort.check_every == 0 or t + 1 == count
        steps.append(Step(spread, loss, held.kl(dict(zip(names, ratios, strict=True))) if look else None))
        bar.set_postfix(spread=f"{spread:.2f}", KL=f"{loss:.3f}")
    return dict(zip(names, ratios, strict=True)), steps


# ------------------------------------------------------------------------------------------------------------- memory


def rank_bytes(layers: Sequence[Layer], whole: bool = False) -> int:
    """Return the memory of the ranks of ``layers``, within rows or within the ``whole`` matrix."""
    return sum(layer.size * (2 if (layer.size if whole else layer.shape[1]) <= 2**15 else 4) for layer in layers)


def working_set(
    model: PreTrainedModel, layers: Sequence[Layer], dtype: torch.dtype, tokens: int, effort: Effort
) -> int:
    """Return the bytes that a search needs beside the weights and ranks: an upper bound, from shapes alone.

    They are a block's pruned copies and its activations for the windows of a step, one matrix's sort, what enters each
    block, the hidden states of all windows, and the logits of some tokens with their gradients.

    Args:
        tokens: in a window of the search.
    """
    vocabulary, width = model.get_input_embeddings().weight.shape
    number, blocks = torch.finfo(dtype).bits // 8, layers[-1].block + 1
    inside = [[layer for layer in layers if layer.block == i] for i in range(blocks)]
    largest = max(held_bytes(block, dtype, effort.batch * tokens) for block in inside)
    hidden = (effort.batch * blocks + 3 * (FIT + effort.held)) * tokens * width
    sort = 24 * max(layer.size for layer in layers)  # scores, their order (int64) and its temporaries; a gradient's
    return largest + number * hidden + sort + 6 * 4 * TOKENS * vocabulary


def held_bytes(layers: Sequence[Layer], dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of pruned copies of ``layers`` and of their blocks' activations for all ``tokens`` of a step.

    It is an upper bound.
    """
    activations = tokens * 3 * sum(sum(layer.shape) for layer in layers)
    return torch.finfo(dtype).bits // 8 * (sum(layer.size for layer in layers) + activations)


def check_memory(weights: Weights, tokens: int, options: Options) -> bool:
    """Tell how much memory a search needs, refuse one that does not fit, and return whether all activations do.

    Args:
        tokens: in a window of the search.

    Raises:
        UserError: see there.
    """
    if not weights.in_memory:
        text = "_price needs all weights in memory, and these are streamed or offloaded"
        raise UserError("prune_method", f"{text}; use GPUs with more memory, or another allocation")
    own, step = weights.model.dtype, options.effort.batch * tokens
    work = working_set(weights.model, weights.layers, own, tokens, options.effort)
    inside: dict[int | str, list[Layer]] = {}
    for block in weights.visit():
        place = (block.device.index or 0) if block.device.type != "cpu" else "cpu"
        inside.setdefault(place, []).extend(layer for layer in weights.layers if layer.block == block.index)
    ranks = {place: rank_bytes(layers, options.by_magnitude) for place, layers in inside.items()}
    needs = {place: work + size for place, size in ranks.items()}
    more = {place: held_bytes(layers, options.dtype or own, step) for place, layers in inside.items()}
    free = free_memory(0)
    holds = all(need + more[place] <= HOLD_WITHIN * free[place] for place, need in needs.items())
    text = "the price search needs %s beside the weights: ranks %s, work %s"
    log.info(text, readable(sum(needs.values())), readable(sum(ranks.values())), readable(work * len(needs)))
    text = "for speed it takes up to %s more for activations" if holds else "it would be faster with %s more"
    log.info(text, readable(sum(more.values())))
    for place, size in needs.items():
        if size > free[place]:
            where = "in the CPU's memory" if place == "cpu" else f"on GPU {place}"
            text = f"{readable(size)} are needed {where} beside the weights and {readable(free[place])} are free"
            raise UserError("prune_method", f"_price: {text}; lower --seqlen, or use more or larger GPUs")
    return holds


def draw(found: Found) -> Figure:
    """Return a picture of a search: the spread of prices and the KL by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, len(found.steps) + 1)
    left.plot(steps, [step.spread for step in found.steps], marker=".")
    left.set(xlabel="step", ylabel="spread of prices (mean |log|, cut at 1)", ylim=(0, None))
    right.plot(steps, [step.fit for step in found.steps], marker=".", label="the step's own data")
    looks = [(i, step.held) for i, step in zip(steps, found.steps, strict=True) if step.held is not None]
    right.plot(*zip(*looks, strict=True), marker="o", label="held-out data")
    right.axhline(found.held["uniform"], color="grey", linestyle=":", label="uniform, held-out data")
    right.set(xlabel="step", ylabel="KL(dense || pruned), nats", ylim=(0, None))
    right.legend()
    return figure
