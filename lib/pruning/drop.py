"""Dropping of experts: whole experts of a mixture are removed, the same number in every block."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

from tqdm import tqdm

from lib.calibration.hidden import BlockInputs, advance, pass_samples
from lib.core import processes
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models.experts import active_share, is_experts
from lib.models.layers import Layer
from lib.models.weights import Weights

log = logging.getLogger(__name__)

# How the experts that go are chosen: by their part in the output, by their metric, or at random.
DROP_BY = ("reap", "alpha", "random")


def remaining_experts(model: torch.nn.Module, share: float) -> int:
    """Return how many experts of each block stay without the fraction ``share``; all, or too few, are a UserError."""
    counts = {len(module.down_proj) for module in model.modules() if is_experts(module)}
    if len(counts) != 1:
        raise UserError("drop_experts", share, "needs a mixture with as many experts in each block")
    (count,), config = counts, model.config
    left, active = count - int(count * share + 1e-9), round(count * active_share(model))
    groups = getattr(config, "n_group", 1) or 1
    if left == count:
        raise UserError("drop_experts", share, f"drops none of {count} experts", f"give at least {1 / count:.3g}")
    if left < active or left % groups:
        problem = f"leaves {left} of {count} experts, where a token needs {active}"
        problem += f" and {groups} groups share them" * (groups > 1)
        raise UserError("drop_experts", share, problem, "lower it")
    return left


def reap_scores(weights: Weights, inputs: BlockInputs) -> dict[str, float]:
    """Return the mean, over the tokens of each expert, of the router's weight times its output's norm, by its name.

    This is REAP (arXiv 2510.13999); the router's weights of a token's experts add up to 1 in it. An expert without
    tokens has 0. The ``inputs`` of the blocks are modified in place.
    """
    totals: dict[str, torch.Tensor] = {}  # by experts module, [experts, 2]: what is summed, and the number of tokens

    def normalise(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, index, share = (*args, *kwargs.values())
        return (hidden, index, share / share.sum(-1, keepdim=True)), {}

    def see(total: torch.Tensor, module: torch.nn.Module, _: tuple, output: torch.Tensor) -> None:
        total[0] += (module.row_weights[:, 0].double() * output.float().norm(dim=-1)).sum()
        total[1] += len(output)

    for block in tqdm(weights.visit(), "experts' parts", len(weights.modules), unit="block", disable=None):
        hooks = []
        for owner, experts in block.experts.items():
            totals[owner] = torch.zeros(len(experts.down_proj), 2, dtype=torch.float64, device=block.device)
            hooks.append(experts.register_forward_pre_hook(normalise, with_kwargs=True))
            for number, total in enumerate(totals[owner]):
                down = block.linears[f"{owner}.{number}.down_proj"]
                hooks.append(down.register_forward_hook(partial(see, total)))
        if hooks:
            pass_samples(block, inputs, keep=False)  # without gradients
        for hook in hooks:
            hook.remove()
        advance(block, inputs)
    scores = {}
    for owner, total in totals.items():
        sums, tokens = processes.sum_(total).T
        scores |= {f"{owner}.{i}": score for i, score in enumerate((sums / tokens.clamp(min=1)).tolist())}
    return scores


def alpha_scores(layers: Sequence[Layer], values: Mapping[str, float]) -> dict[str, float]:
    """Return the negative mean metric of each expert's matrices: the less heavy-tailed are dropped."""
    own: dict[str, list[float]] = defaultdict(list)
    for layer in layers:
        own[layer.expert].append(values[layer.name])
    return {expert: -sum(found) / len(found) for expert, found in own.items() if expert}


def random_scores(layers: Sequence[Layer], seed: int) -> dict[str, float]:
    """Return a random number for each expert."""
    draw = random.Random(seed)
    return {expert: draw.random() for expert in dict.fromkeys(layer.expert for layer in layers) if expert}


def kept_experts(scores: Mapping[str, float], count: int, groups: int) -> dict[str, list[int]]:
    """Return the numbers of the ``count`` best experts of each experts module, as many in each of a router's groups."""
    modules: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for name, score in scores.items():
        owner, _, number = name.rpartition(".")
        modules[owner].append((-score, int(number)))
    keep = {}
    for owner, numbered in modules.items():
        size, by_score = len(numbered) // groups, [number for _, number in sorted(numbered)]
        first = [[n for n in by_score if n // size == group][: count // groups] for group in range(groups)]
        keep[owner] = sorted(number for part in first for number in part)
    log.info("%d of %d experts stay in each of %d blocks", count, len(scores) // len(modules), len(modules))
    return keep
