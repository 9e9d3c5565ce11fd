"""Perplexity of a model on windows of tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from tqdm import tqdm

from lib import sparse
from lib.calibration.hidden import advance, after_blocks, enter_blocks, entry_device
from lib.core import processes
from lib.core.lazy import torch, transformers
from lib.models.weights import Weights

log = logging.getLogger(__name__)

# Tokens whose loss is computed at a time: a float32 copy of all logits of a large vocabulary would be gigabytes.
_LOSS_TOKENS = 512


def perplexity(model: transformers.PreTrainedModel, windows: torch.Tensor) -> float:
    """Return exp of the mean over ``windows`` [count, seqlen] of the mean next-token loss (nats, float32).

    It is infinite or NaN if the pruned model is broken; this is reported, with a warning.
    """
    mine = windows[processes.share(len(windows))]
    with torch.no_grad(), sparse.zeros_skipped(model.modules()):
        logits = (model(window[None].to(entry_device(model)), use_cache=False).logits[0] for window in mine)
        return _perplexity(logits, mine)


def perplexity_by_blocks(weights: Weights, windows: torch.Tensor) -> float:
    """Return the same; a model larger than the memory passes all windows through a block, which it fetches once."""
    if weights.in_memory:
        return perplexity(weights.model, windows)
    inputs = enter_blocks(weights, windows)
    for block in tqdm(weights.visit(by_matrix=False), "evaluating", len(weights.modules), unit="block", disable=None):
        advance(block, inputs)
    mine = windows[processes.share(len(windows))]
    with after_blocks(weights, inputs.tuples) as logits:
        return _perplexity(map(logits, mine, inputs.hidden), mine)


def _perplexity(logits_by_window: Iterable[torch.Tensor], windows: torch.Tensor) -> float:
    """Return the perplexity of the logits [seqlen, vocabulary] of each window, over all processes."""
    losses, cross_entropy = [], torch.nn.functional.cross_entropy
    pairs = zip(logits_by_window, windows, strict=True)
    for logits, window in tqdm(pairs, "perplexity", len(windows), unit="window", disable=None):
        logits, targets = logits[:-1], window[1:].to(logits.device)
        chunks = zip(logits.split(_LOSS_TOKENS), targets.split(_LOSS_TOKENS), strict=True)
        total = sum(cross_entropy(chunk.float(), target, reduction="sum") for chunk, target in chunks)
        losses.append(total / len(targets))
    losses = torch.cat(processes.gathered(torch.stack(losses).cpu() if losses else torch.empty(0)))
    result = losses.mean().exp().item()
    if not math.isfinite(result):
        text = "the perplexity is not finite (%s): the model is broken, or overflows in float16 (try --dtype bfloat16)"
        log.warning(text, result)
    return result
