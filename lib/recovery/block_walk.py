"""Walk of a few windows forward and backward through a model's blocks, and the loss that is differentiated on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from lib.calibration.hidden import BlockInputs, after_blocks, run_block
from lib.core import cpu
from lib.core.errors import UserError
from lib.core.files import readable
from lib.core.lazy import torch
from lib.models import memory
from lib.models.weights import Block, Weights, swapped_parameters

log = logging.getLogger(__name__)

# Names of the dtypes in which products may be computed.
SEARCH_DTYPES = ("auto", "float32", "bfloat16")
# Factor of the loss before it is differentiated: most gradients of logits (at most 1) would underflow in float16.
LOSS_SCALE = 1024
# Fraction of the free memory up to which the activations of a whole step are kept; beyond, blocks are run twice.
KEEP_WITHIN = 0.75


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


# Replaces parameters of a block while it is run, and yields those that are differentiated, by name.
Lend = Callable[[Block], AbstractContextManager[dict[str, "torch.nn.Parameter"]]]


class BlockActivations(NamedTuple):
    """Inputs, outputs and replaced weights of a block, kept for its backward pass; only the inputs if it runs again."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    leaves: dict[str, torch.nn.Parameter]


class BlockWalk(NamedTuple):
    """Walk of a few windows forward and backward through a model's blocks, each run with the parameters lent to it.

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
        self, hidden: list[torch.Tensor], lend: Lend, differentiable: bool = False
    ) -> tuple[list[torch.Tensor], list[BlockActivations]]:
        """Return the last block's outputs for ``hidden``, [1, tokens, width] each, and what ``backward`` needs."""
        activations = []
        keeps = differentiable and self.keeps_activations
        for block in self.weights.visit():
            ran = self.run(block, hidden, lend, keeps)
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
        lend: Lend,
        take_gradient: Callable[[Block, torch.Tensor, str, torch.Tensor], None],
    ) -> None:
        """Call ``take_gradient(block, scale, name, gradient)`` for each lent parameter, last block first.

        Args:
            gradients: ``scale`` times the loss's gradients by the last block's outputs; the scale changes on the way.
            activations: of ``forward``, used up.
        """
        for block in self.weights.visit(backwards=True):
            ran = activations.pop()
            if not ran.outputs:
                ran = self.run(block, ran.inputs, lend, True)
            gradients, scale = block_backward(block, ran, gradients, scale, take_gradient)

    def run(self, block: Block, hidden: list[torch.Tensor], lend: Lend, differentiable: bool) -> BlockActivations:
        """Run a block on each of ``hidden``, and keep the graph if the outputs are to be differentiated."""
        from accelerate.utils import send_to_device

        inputs = [states.to(block.device).detach().requires_grad_(differentiable) for states in hidden]
        arguments = send_to_device(self.inputs.arguments[block.index], block.device)
        with torch.set_grad_enabled(differentiable), lend(block) as leaves:
            with autocast(block.device, self.dtype):
                outputs = [run_block(block, states, arguments, self.inputs.tuples) for states in inputs]
        return BlockActivations(inputs, outputs, leaves)


def block_backward(
    block: Block,
    ran: BlockActivations,
    gradients: list[torch.Tensor],
    scale: torch.Tensor,
    take_gradient: Callable[[Block, torch.Tensor, str, torch.Tensor], None],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the gradients by a block's inputs and their scale, given those by its outputs; see ``backward``."""
    # Scaled to 1 at each block, gradients of half precision neither underflow nor overflow.
    gradients = [gradient.to(block.device) for gradient in gradients]
    largest = torch.stack([gradient.abs().amax().float() for gradient in gradients]).amax()
    largest = torch.where(largest > 0, largest, 1)
    gradients, scale = [gradient / largest for gradient in gradients], scale.to(block.device) / largest

    def hand_over(name: str, leaf: torch.nn.Parameter) -> None:
        take_gradient(block, scale, name, leaf.grad)
        leaf.grad = None

    for name, leaf in ran.leaves.items():
        leaf.register_post_accumulate_grad_hook(partial(hand_over, name))
    torch.autograd.backward(ran.outputs, gradients, inputs=[*ran.inputs, *ran.leaves.values()])
    return [states.grad for states in ran.inputs], scale


class DenseStates(NamedTuple):
    """Windows of token ids, and the dense model's hidden states before the first and after the last block.

    The latter become the dense model's logits whenever they are needed.
    """

    windows: torch.Tensor  # [windows, tokens]
    entering: torch.Tensor | None  # [windows, tokens, width]; None where they are computed when needed
    leaving: torch.Tensor | None  # [windows, counted tokens, width]; None: the loss is that of the next token


class HeadLoss(NamedTuple):
    """Loss behind the last block: its sum over ``count`` tokens in nats, and ``scale`` times the mean's gradients.

    They are those by the blocks' outputs, [1, tokens, width] each, and ``by_gain`` those by the last norm's parameters.
    """

    total: torch.Tensor
    count: int
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
    dense_gains: Mapping[str, torch.Tensor] | None = None,
) -> HeadLoss:
    """Return the loss of the windows in ``batch`` and its gradients, with the logits of few tokens in memory at a time.

    Args:
        dense: its ``leaving`` decide the loss: KL(dense || pruned) of the logits, or the next token's.
        hidden: the pruned blocks' output for each of the windows, [1, tokens, width].
        counted: the tokens of a window that count.
        dense_gains: the dense model's values of those parameters behind the blocks that are trained, by their names.
    """
    model, gains, by_gain = walk.weights.model, dense_gains or {}, {}
    total, gradients = 0.0, [torch.zeros_like(states) for states in hidden] if differentiate else []
    count = len(batch) * len(range(hidden[0].shape[1])[counted])
    device = hidden[0].device
    # One context for all of them: a copy of the head in the products' dtype is made once.
    with (
        after_blocks(walk.weights, walk.inputs.tuples) as logits,
        torch.set_grad_enabled(differentiate),
        autocast(device, walk.dtype),
    ):
        trained = {name: model.get_parameter(name) for name in gains}
        gains = {name: gain.to(trained[name].device) for name, gain in gains.items()}
        for i, index in enumerate(batch):
            window, pieces = dense.windows[index], []
            # Nothing follows a window's last token.
            goals = torch.cat([window[1:], window.new_full((1,), -100)])[counted]
            goals = goals if dense.leaving is None else dense.leaving[index]
            chunks = (x.split(memory.LOGIT_TOKENS) for x in (hidden[i][0, counted], goals))
            for states, goal in zip(*chunks, strict=True):
                states, goal = states.detach().requires_grad_(differentiate), goal.to(states.device)
                pruned_logits = logits(window, states)
                if dense.leaving is not None:
                    with torch.no_grad(), swapped_parameters(model, gains):
                        goal = logits(window, goal)
                loss = _token_loss(pruned_logits, goal.to(pruned_logits.device))
                total = total + loss.detach()
                if differentiate:
                    by = [states, *trained.values()]
                    by = torch.autograd.grad(loss, by, torch.full_like(loss, LOSS_SCALE), allow_unused=True)
                    pieces.append(by[0])
                    for name, gradient in zip(trained, by[1:], strict=True):
                        if gradient is not None:  # a norm before the blocks has none
                            by_gain[name] = by_gain.get(name, 0) + gradient.float()
            if differentiate:
                gradients[i][0, counted] = torch.cat(pieces)
    return HeadLoss(total, count, gradients, by_gain, torch.tensor(float(LOSS_SCALE * count)))


def _token_loss(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the sum of the KL to the dense logits [tokens, vocabulary], or of the loss of the next tokens [tokens]."""
    if goal.ndim == 2:
        return kl_divergence(goal, logits)
    return torch.nn.functional.cross_entropy(logits.float(), goal, reduction="sum")


def has_room_for_activations(needs: Mapping[int | str, memory.PriceBytes], work: str, field: str, value: str) -> bool:
    """Log how much memory the ``work`` needs, refuse what does not fit, and return whether all activations do.

    ``field`` and its ``value`` are the flag that asks for the work.
    """
    free = memory.free_memory(0)
    keeps = all(need.least + need.activations <= KEEP_WITHIN * free[place] for place, need in needs.items())
    least, more = (readable(sum(sizes)) for sizes in zip(*needs.values(), strict=True))
    are = "are used for activations" if keeps else "would make it faster"
    log.info("%s needs %s beside the weights; up to %s more %s", work, least, more, are)
    for place, need in needs.items():
        if need.least > free[place]:
            where = "in the CPU's memory" if place == "cpu" else f"on GPU {place}"
            sizes = f"{readable(need.least)} are needed {where} beside the weights and {readable(free[place])} are free"
            raise UserError(field, value, sizes, "lower --seqlen, or use more or larger GPUs")
    return keeps
