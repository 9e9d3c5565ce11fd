"""Search by price: the ratios at which pruning one more weight costs the same in every matrix of a model."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from tqdm import tqdm

from lib.core import files
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models.layers import Layer

# Windows of calibration on which a language model's prices are measured.
FIT_WINDOWS = 16
# The smallest and the largest ratio that a step may lead to.
MIN_RATIO = 0.001
MAX_RATIO = 0.97
# Change of a ratio's logit where the price is e times the mean price; it falls linearly to 0 over the steps.
STEP = 0.25
# Weight of the earlier steps in the running mean of a price.
MOMENTUM = 0.6


class SearchOptions(NamedTuple):
    """Number of ``steps`` of a search, and how much data it looks at."""

    windows_per_step: int
    window_divisor: int  # a window has --seqlen / window_divisor tokens
    token_stride: int  # one of so many tokens counts
    held_out_windows: int
    evaluate_every: int  # steps after which the plan is evaluated on the held-out windows
    steps: int = 16

    def length(self, seqlen: int) -> int:
        """Return the number of tokens in a window of the search, given that in a window of calibration."""
        return -(-seqlen // self.window_divisor)


EFFORTS = {
    "full": SearchOptions(windows_per_step=2, window_divisor=1, token_stride=2, held_out_windows=8, evaluate_every=4),
    "quick": SearchOptions(windows_per_step=1, window_divisor=2, token_stride=1, held_out_windows=4, evaluate_every=8),
}


class PriceModel(Protocol):
    """A model whose matrices have prices, as the search sees it; a plan is a ratio by layer name."""

    samples: int  # windows of text, or groups of images, that prices can be measured on
    dtype: torch.dtype  # of the products
    advice: str  # what a user may try where numbers are not finite

    def kl(self, ratios: Mapping[str, float]) -> float:
        """Return the mean KL(dense || pruned) on held-out data, in nats."""

    def prices(self, ratios: Mapping[str, float], batch: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Return the mean KL over a batch (indices of samples), and its derivative by each layer's ratio, by name."""


class SearchResult(NamedTuple):
    """The ``ratios`` by layer name that were ``kept``, and how they were found; KL is in nats per token."""

    ratios: dict[str, float]
    kept: str  # name of the plan
    held: dict[str, float]  # KL on held-out windows of each plan
    # The ``spread`` of prices, KL on the step's windows (``fit``), and after it on the ``held`` out ones, or None.
    steps: list[dict[str, float | None]]
    dtype: str


def search(model: PriceModel, layers: Sequence[Layer], target: float, options: SearchOptions) -> SearchResult:
    """Return the ratios at which pruning one more weight costs the same KL(dense || pruned) in every layer.

    The search starts from uniform ratios. Of these and its end, the plan with the lower KL on held-out data is kept.
    Masks come from statistics of the dense model. A price, or every plan's KL, that is not finite is a UserError.
    """
    plans = {"uniform": {layer.name: target for layer in layers}}
    kls = {"uniform": model.kl(plans["uniform"])}
    plans["end"], steps = _descend(model, layers, target, options)
    kls["end"] = steps[-1]["held"]
    finite = {name: value for name, value in kls.items() if math.isfinite(value)}
    if not finite:
        raise UserError("sparsity_ratio", None, "the KL of every plan is not finite", f"lower it, or {model.advice}")
    kept = min(finite, key=finite.get)
    return SearchResult(plans[kept], kept, kls, steps, str(model.dtype).removeprefix("torch."))


def _descend(
    model: PriceModel, layers: Sequence[Layer], target: float, options: SearchOptions
) -> tuple[dict[str, float], list[dict]]:
    """Return the ratios to which the steps lead from uniform ones, and the steps."""
    names, sizes = [layer.name for layer in layers], [layer.size for layer in layers]
    ratios = [target] * len(layers)
    # A few windows seldom use some experts, whose price near 0 proves nothing, and some experts carry a whole model
    # (arXiv 2507.23279): each keeps half of what uniform ratios would leave of it.
    highest = [(1 + target) / 2 if layer.expert else _bounds(target)[1] for layer in layers]
    draw, order, steps, prices = random.Random(0), [], [], None
    bar = tqdm(range(options.steps), desc="prices", unit="step", disable=None)
    for t in bar:
        if len(order) < options.windows_per_step:
            order = draw.sample(range(model.samples), model.samples)
        batch, order = order[: options.windows_per_step], order[options.windows_per_step :]
        loss, slopes = model.prices(dict(zip(names, ratios, strict=True)), batch)
        for name, value in {"KL": loss, **slopes}.items():
            if not math.isfinite(value):
                raise UserError(None, name, "its price is not finite", model.advice)
        latest = [slopes[name] / size for name, size in zip(names, sizes, strict=True)]
        if prices is not None:
            latest = [MOMENTUM * p + (1 - MOMENTUM) * q for p, q in zip(prices, latest, strict=True)]
        prices = latest
        logits, spread = next_logits(ratios, prices, sizes, target, STEP * (1 - t / options.steps))
        ratios = within_budget(logits, sizes, target, highest)
        evaluates = (t + 1) % options.evaluate_every == 0 or t + 1 == options.steps
        held = model.kl(dict(zip(names, ratios, strict=True))) if evaluates else None
        steps.append({"spread": spread, "fit": loss, "held": held})
        bar.set_postfix(spread=f"{spread:.2f}", KL=f"{loss:.3f}")
    return dict(zip(names, ratios, strict=True)), steps


def within_budget(
    logits: Sequence[float], sizes: Sequence[int], target: float, highest: Sequence[float] | None = None
) -> list[float]:
    """Return ratios sigmoid(logit + c), cut at the bounds, with c such that their mean by size is ``target``.

    ``highest`` are the upper bounds, each at least the target, if they are not the usual ones.
    """
    low, high = _bounds(target)
    highest = [high] * len(logits) if highest is None else highest

    def ratios(c: float) -> list[float]:
        return [min(max(1 / (1 + math.exp(-(x + c))), low), top) for x, top in zip(logits, highest, strict=True)]

    # At these ends all ratios are at most, and at least, the target.
    left, right = _logit(target) - max(logits), _logit(target) - min(logits)
    while left < (middle := (left + right) / 2) < right:
        over = math.fsum(n * s for n, s in zip(sizes, ratios(middle), strict=True)) >= target * sum(sizes)
        left, right = (left, middle) if over else (middle, right)
    return ratios(right)


def next_logits(
    ratios: Sequence[float], prices: Sequence[float], sizes: Sequence[int], target: float, step_size: float
) -> tuple[list[float], float]:
    """Return logits that prune more where weights are cheap, and the spread of ``prices`` (per weight): mean |log|.

    logit(ratio) - ``step_size`` * log(price / mean price), the log within 1 of 0; a price of 0 or less counts as
    cheapest. Where the mean itself is not positive, prices are noise, and no matrix is dearer than another.
    """
    weighting = [n * s * (1 - s) for n, s in zip(sizes, ratios, strict=True)]
    mean = math.fsum(w * p for w, p in zip(weighting, prices, strict=True)) / math.fsum(weighting)
    logs = [0.0] * len(prices)
    if mean > 0:
        logs = [min(max(math.log(price / mean), -1.0), 1.0) if price > 0 else -1.0 for price in prices]
    low, high = _bounds(target)
    spread = math.fsum(w * abs(x) for w, x in zip(weighting, logs, strict=True)) / math.fsum(weighting)
    return [_logit(min(max(s, low), high)) - step_size * x for s, x in zip(ratios, logs, strict=True)], spread


def _bounds(target: float) -> tuple[float, float]:
    """Return the smallest and the largest ratio; an unusual target is left room on both sides."""
    return min(MIN_RATIO, target / 4), max(MAX_RATIO, (1 + 3 * target) / 4)


def _logit(ratio: float) -> float:
    return math.log(ratio / (1 - ratio))


def draw_search(result: SearchResult):
    """Return a matplotlib Figure of a search: the spread of prices and the KL by step."""
    figure, (left, right) = files.new_figure(7, 4, columns=2)
    steps = range(1, len(result.steps) + 1)
    left.plot(steps, [step["spread"] for step in result.steps], marker=".")
    left.set(xlabel="step", ylabel="spread of prices (mean |log|, cut at 1)", ylim=(0, None))
    right.plot(steps, [step["fit"] for step in result.steps], marker=".", label="the step's own data")
    evaluated = [(i, step["held"]) for i, step in zip(steps, result.steps, strict=True) if step["held"] is not None]
    right.plot(*zip(*evaluated, strict=True), marker="o", label="held-out data")
    right.axhline(result.held["uniform"], color="grey", linestyle=":", label="uniform, held-out data")
    right.set(xlabel="step", ylabel="KL(dense || pruned), nats", ylim=(0, None))
    right.legend()
    return figure
