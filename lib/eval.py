"""How good is the model now."""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lib.models import entry_device

_LOSS_TOKENS = 512  # at a time: a float32 copy of all logits of a large vocabulary would be gigabytes


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Return exp of the mean over ``windows`` [count, seqlen] of the mean next-token loss (nats, float32).

    Not finite if the model's logits are not: a pruned model may be that broken, and then that is the result.
    """
    losses = []
    for window in tqdm(windows, desc="perplexity", unit="window", disable=None):
        ids = window[None].to(entry_device(model))
        logits = model(ids, use_cache=False).logits[0, :-1]  # [seqlen - 1, vocabulary]
        targets = ids[0, 1:].to(logits.device)
        parts = zip(logits.split(_LOSS_TOKENS), targets.split(_LOSS_TOKENS), strict=True)
        total = sum(F.cross_entropy(part.float(), target, reduction="sum") for part, target in parts)
        losses.append(total / len(targets))
    return torch.stack(losses).mean().exp().item()
