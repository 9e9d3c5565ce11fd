"""Walk of a few windows forward and backward through a model's blocks, and the loss that is differentiated on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

from lib.calibration.hidden import BlockInputs, after_blocks, run_block
from lib.core import cpu
from lib.core.errors import UserError
from lib.core.files import readable
from lib.core.lazy import torch
from lib.models import memory
from lib.models.weights import Block, Weights, parameter_place, swapped_parameters

log = logging.getLogger(__name__)

# Factor of the loss before it is differentiated: most gradients of logits (at most 1) would underflow in float16.
LOSS_SCALE = 1024
# Fraction of the free memory up to which the activations of a whole step are kept; beyond, blocks are run twice.
KEEP_WITHIN = 0.75


def fast_dtype(device: torch.device, model_dtype: torch.dtype) -> torch.dtype | None:
    """Return bfloat16 for the products of a float32 model on a CPU that multiplies it, else None, the model's dtype."""
    pays = device.type == "cpu" and model_dtype == torch.float32 and cpu.multiplies(torch.bfloat16)
    return torch.bfloat16 if pays else None


def kl_divergence(
    dense: torch.Tensor, pruned: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return KL(dense || pruned) of logits [tokens, vocabulary], summed over tokens, and ``scale`` times its gradient.

    Computed in float32 at least. The gradient by ``pruned``, of its dtype, takes fewer passes than autograd's; without
    a ``scale`` there is none.
    """
    exact = torch.promote_types(dense.dtype, torch.float32)
    with torch.no_grad():
        target, log = (torch.log_softmax(logits.to(exact), dim=-1) for logits in (dense, pruned))
        probability = target.exp()
        total = target.sub_(log).mul_(probability).sum()
        return total, None if scale is None else log.exp_().sub_(probability).mul_(scale).to(pruned.dtype)


# Replaces parameters of a block while it is run, and yields those that are differentiated, by name.
Lend = Callable[[Block], AbstractContextManager[dict[str, "torch.nn.Parameter"]]]
# Takes the gradient of a parameter of a block, by its name, after the factor by which it is larger than the loss's.
Take = Callable[[Block, "torch.Tensor", str, "torch.Tensor"], None]


class BlockActivations(NamedTuple):
    """Inputs, outputs and replaced weights of a block, kept for its backward pass; only the inputs if it runs again."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    leaves: dict[str, torch.nn.Parameter]


class BlockWalk(NamedTuple):
    """Walk of a few windows forward and backward through a model's blocks, each run with the parameters lent to it.

    The model's own are back in place after each block. Gradients are handed over matrix by matrix and freed at once.

    Attributes:
        weights: of the model, all of them in memory if it is walked as a whole.
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
        self, hidden: list[torch.Tensor], lend: Lend, differentiable: bool = False, only: Block | None = None
    ) -> tuple[list[torch.Tensor], list[BlockActivations]]:
        """Return the last block's outputs for ``hidden``, [1, tokens, width] each, and what ``backward`` needs.

        ``only`` is a lent block that is run alone.
        """
        activations = []
        keeps = differentiable and self.keeps_activations
        for block in [only] if only else self.weights.visit():
            ran = self._run(block, hidden, lend, keeps)
            hidden = [states.detach() for states in ran.outputs]
            if differentiable:
                activations.append(ran if keeps else BlockActivations(ran.inputs, [], {}))
            del ran  # its copies of the weights, before the next block's are made
        return hidden, activations

    def backward(
        self, loss: WalkLoss, activations: list[BlockActivations], lend: Lend, take: Take, only: Block | None = None
    ) -> None:
        """Hand over the gradient of each lent parameter, last block first; the ``activations`` are used up."""
        gradients, scale = loss.gradients, loss.scale

        def hand_over(block: Block, scale: torch.Tensor, name: str, leaf: torch.nn.Parameter) -> None:
            take(block, scale, name, leaf.grad)
            leaf.grad = None

        for block in [only] if only else self.weights.visit(backwards=True):
            # Scaled to 1 at each block, gradients of half precision neither underflow nor overflow.
            gradients = [gradient.to(block.device) for gradient in gradients]
            largest = torch.stack([gradient.abs().amax().float() for gradient in gradients]).amax()
            largest = torch.where(largest > 0, largest, 1)
            gradients, scale = [gradient / largest for gradient in gradients], scale.to(block.device) / largest
            ran = activations.pop()
            if not ran.outputs:
                ran = self._run(block, ran.inputs, lend, True)
            for name, leaf in ran.leaves.items():
                leaf.register_post_accumulate_grad_hook(partial(hand_over, block, scale, name))
            torch.autograd.backward(ran.outputs, gradients, inputs=[*ran.inputs, *ran.leaves.values()])
            gradients = [states.grad for states in ran.inputs]

    def _run(self, block: Block, hidden: list[torch.Tensor], lend: Lend, differentiable: bool) -> BlockActivations:
        from accelerate.utils import send_to_device

        inputs = [states.to(block.device).detach().requires_grad_(differentiable) for states in hidden]
        arguments = send_to_device(self.inputs.arguments[block.index], block.device)
        autocast = torch.autocast(block.device.type, self.dtype, enabled=self.dtype is not None)
        with torch.set_grad_enabled(differentiable), lend(block) as leaves, autocast:
            outputs = [run_block(block, states, arguments, self.inputs.tuples) for states in inputs]
        return BlockActivations(inputs, outputs, leaves)


class DenseStates(NamedTuple):
    """Windows of token ids, and the dense model's hidden states before the first and after the last block.

    The latter become the dense model's logits whenever they are needed.
    """

    windows: torch.Tensor  # [windows, tokens]
    entering: torch.Tensor | None  # [windows, tokens, width]; None where they are computed when needed
    leaving: torch.Tensor | None  # [windows, counted tokens, width]; None: the loss is that of the next token
    gains: Mapping[str, torch.Tensor] = {}  # its values of the parameters behind the blocks that are trained


class WalkLoss(NamedTuple):
    """Loss behind the last block: a sum, the ``count`` by which it becomes a mean, and ``scale`` times its gradients.

    They are those by the blocks' outputs, [1, tokens, width] each, and ``by_gain`` those by the parameters behind them.
    """

    total: torch.Tensor
    count: int | torch.Tensor
    gradients: list[torch.Tensor]
    by_gain: dict[str, torch.Tensor]
    scale: torch.Tensor


def head_loss(
    walk: BlockWalk,
    dense: DenseStates,
    hidden: Sequence[torch.Tensor],
    batch: Sequence[int],
    counted: slice = slice(None),
    differentiate: bool = False,
) -> WalkLoss:
    """Return the loss of the windows in ``batch`` in nats, with the logits of few tokens in memory at a time.

    Args:
        dense: its ``leaving`` decide the loss: KL(dense || pruned) of the logits, or the next token's.
        hidden: the pruned blocks' output for each of the windows, [1, tokens, width].
        counted: the tokens of a window that count.
    """
    model, by_gain = walk.weights.model, {}
    total, gradients = 0.0, [torch.zeros_like(states) for states in hidden] if differentiate else []
    count = len(batch) * len(range(hidden[0].shape[1])[counted])
    # One context for all of them: a copy of the head in the products' dtype is made once.
    with (
        after_blocks(walk.weights, walk.inputs.tuples) as logits,
        torch.set_grad_enabled(differentiate),
        torch.autocast(hidden[0].device.type, walk.dtype, enabled=walk.dtype is not None),
    ):
        places = {name: parameter_place(model, name) for name in dense.gains}
        trained = {name: getattr(*place) for name, place in places.items()}
        gains = {name: gain.to(trained[name].device) for name, gain in dense.gains.items()}
        for i, index in enumerate(batch):
            window, pieces = dense.windows[index], []
            # Nothing follows a window's last token.
            goals = torch.cat([window[1:], window.new_full((1,), -100)])[counted]
            goals = goals if dense.leaving is None else dense.leaving[index]
            chunks = (x.split(memory.LOGIT_TOKENS) for x in (hidden[i][0, counted], goals))
            for states, goal in zip(*chunks, strict=True):
                states, goal = states.detach().requires_grad_(differentiate), goal.to(states.device)
                pruned = logits(window, states)
                if dense.leaving is None:
                    loss = torch.nn.functional.cross_entropy(pruned.float(), goal.to(pruned.device), reduction="sum")
                    differentiated, slope = loss, torch.full_like(loss, LOSS_SCALE)
                else:
                    with torch.no_grad(), swapped_parameters(places, gains):
                        goal = logits(window, goal)
                    loss, slope = kl_divergence(goal, pruned, LOSS_SCALE if differentiate else None)
                    differentiated = pruned
                total = total + loss.detach()
                if differentiate:
                    by = [states, *trained.values()]
                    by = torch.autograd.grad(differentiated, by, slope, allow_unused=True)
                    pieces.append(by[0])
                    for name, gradient in zip(trained, by[1:], strict=True):
                        if gradient is not None:  # a norm before the blocks has none
                            by_gain[name] = by_gain.get(name, 0) + gradient.float()
            if differentiate:
                gradients[i][0, counted] = torch.cat(pieces)
    return WalkLoss(total, count, gradients, by_gain, torch.tensor(float(LOSS_SCALE * count)))


def has_room_for_activations(weights: Weights, sizes: tuple, work: str, field: str, value: str, instead: str) -> bool:
    """Log how much memory the ``work`` needs, refuse what does not fit, and return whether all activations do.

    Args:
        sizes: the arguments of ``memory.gradient_bytes`` after the weights.
        field, value: the flag that asks for the work; ``instead`` is what to use otherwise.
    """
    fix = f"use GPUs with more memory, or {instead}"
    if not weights.in_memory:
        raise UserError(field, value, "needs all weights in memory, and these are streamed or offloaded", fix)
    needs, free = memory.gradient_bytes(weights, *sizes), memory.free_memory(0)
    keeps = all(sum(need) <= KEEP_WITHIN * free[place] for place, need in needs.items())
    least, more = (readable(sum(sizes)) for sizes in zip(*needs.values(), strict=True))
    are = "are used for activations" if keeps else "would make it faster"
    log.info("%s needs %s beside the weights; up to %s more %s", work, least, more, are)
    for place, (least, _) in needs.items():
        if least > free[place]:
            where = "in the CPU's memory" if place == "cpu" else f"on GPU {place}"
            sizes = f"{readable(least)} are needed {where} beside the weights and {readable(free[place])} are free"
            raise UserError(field, value, sizes, f"lower --seqlen, {fix}")
    return keeps
