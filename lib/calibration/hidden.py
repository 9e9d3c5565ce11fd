"""Hidden states: what enters the blocks, caught once, and passes through a block."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import NamedTuple

from lib import sparse
from lib.core import processes
from lib.core.errors import UserError
from lib.core.files import readable
from lib.core.lazy import torch, transformers
from lib.models import memory
from lib.models.experts import replaced_forwards
from lib.models.weights import Block, Weights, swapped_weights

log = logging.getLogger(__name__)

PROPAGATE = ("dense", "pruned")
HIDDEN_STATES = ("auto", "gpu", "cpu", "disk")
CALIB_DTYPES = ("bfloat16",)


class BlockInputs(NamedTuple):
    """Inputs that the model passes to its blocks."""

    # What enters block 0: [samples, tokens, width], or a list of batches, whose shape a block may change.
    hidden: torch.Tensor | list[torch.Tensor]
    # All else that a block is called with (mask, position embeddings ...), the same for every sample; no live cache.
    arguments: list[tuple[tuple, dict]]
    samples: int | None  # what statistics are divided by, over all processes; None: the number of tokens
    tuples: set[int]  # collects the indices of the blocks that return their hidden states in a tuple
    dtype: torch.dtype | None = None  # of a block's products, None: its own; what layers pass on keeps its precision
    expert_weighting: str = "auto"  # a name of EXPERT_WEIGHTING, for statistics


class PassEnded(Exception):
    """Ends a forward pass as soon as it has given the needed values."""


def _stubbed_blocks(weights: Weights, act: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
    """Let each block call ``act(index, hidden, *args, **kwargs)`` in place of its own forward."""
    return replaced_forwards({block: partial(act, index) for index, block in enumerate(weights.modules)})


def _block_calls(weights: Weights, window: torch.Tensor, whole: bool) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
    """Return the hidden states that enter the blocks for a ``window`` [tokens], and each block's other arguments.

    A model that does not run its blocks once, in order and on what the block before returned, is a UserError.
    ``whole``: the pass goes on after the last block, to see that it calls none again.
    """
    arguments: list[tuple[tuple, dict]] = []
    entering: torch.Tensor | None = None
    state, in_tuple = (), False

    def without_cache(value: object) -> object:
        return None if isinstance(value, transformers.Cache) else value

    def record(index: int, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor | tuple[torch.Tensor]:
        nonlocal entering, state, in_tuple
        entering = hidden if entering is None else entering
        # The stubs return what they are given, so that all blocks see the same memory, never written to in between.
        state = state or (hidden.data_ptr(), hidden._version)
        if index != len(arguments) or state != (hidden.data_ptr(), hidden._version):
            raise _unsupported(weights, "it does not run its blocks once, in order, each on what the last returned")
        arguments.append((tuple(map(without_cache, args)), {k: without_cache(v) for k, v in kwargs.items()}))
        if index == len(weights.modules) - 1 and not whole:
            raise PassEnded
        in_tuple |= hidden.ndim < entering.ndim  # BLOOM and Falcon take the first of what a block returns
        return (entering,) if in_tuple else entering

    with _stubbed_blocks(weights, record), suppress(PassEnded):
        weights.model(window[None].to(entry_device(weights.model)), use_cache=False)
    if len(arguments) < len(weights.modules):
        raise _unsupported(weights, f"it runs {len(arguments)} of its {len(weights.modules)} blocks")
    return entering, arguments


def _unsupported(weights: Weights, problem: str) -> UserError:
    return UserError("model", type(weights.model).__name__, f"{problem}, which is not supported")


def enter_blocks(weights: Weights, windows: torch.Tensor, place: str = "auto") -> BlockInputs:
    """Return the inputs of the blocks for this process's share of ``windows`` [samples, tokens] of token ids.

    The embedding and everything else before the blocks are the model's own. ``place`` is a name of HIDDEN_STATES, where
    the hidden states are kept. A model that passes its blocks something that depends on the text, such as a padding
    mask, or runs them in another way than one after the other, is a UserError.
    """
    mine = windows[processes.share(len(windows))]
    # The other arguments need a window and are compared with those of a second one, also where there are fewer.
    uniform = torch.full_like(windows[:1], int(windows[0, 0]))
    passed = mine if len(mine) > 1 else torch.cat([mine, uniform, windows[:1]])[:2]
    with weights.outer_parameters(), torch.no_grad():
        for sample, window in enumerate(passed):
            entering, given = _block_calls(weights, window, whole=sample == 0)
            if sample == 0:
                arguments = given
                hidden = _allocate_hidden_states((len(mine), *entering.shape[1:]), entering, place)
            elif sample == 1 and not _same(arguments, given):
                raise _unsupported(weights, "what its blocks are given depends on the text")
            if sample < len(mine):
                hidden[sample] = entering[0]
    return BlockInputs(hidden, arguments, len(windows), set(), expert_weighting=weights.expert_weighting)


@contextmanager
def after_blocks(weights: Weights, tuples: set[int]) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Hold the parameters after the blocks; yield a function of a window [tokens] and of the blocks' output for it.

    It returns the logits [n, vocabulary] of hidden states [n, width] of some or all of the window's tokens. ``tuples``
    are the blocks that return tuples (``BlockInputs``).
    """

    def logits(window: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
        def hand_back(index: int, entering: torch.Tensor, *args, **kwargs) -> torch.Tensor | tuple[torch.Tensor]:
            hidden = leaving[None].to(entering.device) if index == 0 else entering
            return (hidden,) if index in tuples else hidden

        with _stubbed_blocks(weights, hand_back):
            return weights.model(window[None].to(entry_device(weights.model)), use_cache=False).logits[0]

    with weights.outer_parameters(), torch.no_grad():
        yield logits


def entry_device(model: torch.nn.Module) -> torch.device:
    """Return the device on which the model expects its token ids."""
    weight = getattr(model.get_input_embeddings(), "weight", None)  # none if packed, which is for the CPU
    # An offloaded one is "meta": its hook fetches the ids.
    return torch.device("cpu") if weight is None or weight.is_meta else weight.device


def _allocate_hidden_states(shape: tuple[int, ...], like: torch.Tensor, place: str) -> torch.Tensor:
    """Return a buffer for hidden states; ``auto``: on a GPU only if that leaves most of its free memory.

    A model spread over GPU and CPU has filled the GPU; Hessians and activations need the rest.
    """
    size = math.prod(shape) * like.element_size()
    if place == "auto":
        place = "gpu" if like.is_cuda and 4 * size <= memory.free_bytes(like.device) else "cpu"
        if like.is_cuda and place == "cpu":
            log.info("hidden states (%s) are kept in the CPU's memory: the GPU has little room", readable(size))
    if place == "gpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if place == "cpu":
        return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)

    file = tempfile.NamedTemporaryFile(prefix="hidden-states-")  # removed with the last reference to its pages
    try:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk would end the process at a later write
    except OSError as error:
        problem = f"{tempfile.gettempdir()} has no room for {readable(size)} ({error.strerror})"
        raise UserError("hidden_states", "disk", problem, "set TMPDIR to a folder that has") from error
    return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=like.dtype).view(shape)


def _same(a: object, b: object) -> bool:
    """Return whether two blocks' arguments are equal, tensors inside them included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or a == b


def run_block(block: Block, hidden: torch.Tensor, arguments: tuple[tuple, dict], tuples: set[int]) -> torch.Tensor:
    """Return what ``block`` makes of ``hidden`` [batch, tokens, width]; one that returns a tuple joins ``tuples``."""
    args, kwargs = arguments
    output = block.module(hidden, *args, **kwargs)
    if not isinstance(output, tuple):
        return output
    tuples.add(block.index)
    return output[0]


def pass_samples(block: Block, inputs: BlockInputs, keep: bool, after_each: Callable[[], None] = lambda: None) -> None:
    """Run every sample or batch through ``block`` and call ``after_each``.

    With ``keep``, the output replaces the input; without it, a pass may stop early, by PassEnded.
    """
    from accelerate.utils import send_to_device

    arguments = send_to_device(inputs.arguments[block.index], block.device)
    # Views of one sample each: [1, tokens, width].
    hidden = inputs.hidden if isinstance(inputs.hidden, list) else inputs.hidden.unsqueeze(1)
    autocast = torch.autocast(block.device.type, inputs.dtype, enabled=inputs.dtype is not None)
    # Copies of the weights in the dtype of the products: autocast would make them for each sample.
    cast = block.linears.items() if inputs.dtype is not None else ()
    copies = {name: linear.weight.detach().to(inputs.dtype) for name, linear in cast}
    with torch.no_grad(), autocast, swapped_weights(block, copies):
        for i in range(len(hidden)):
            with suppress(PassEnded):
                output = run_block(block, hidden[i].to(block.device), arguments, inputs.tuples)
                if keep and isinstance(hidden, list):
                    hidden[i] = output.to(hidden[i].device)
                elif keep:
                    hidden[i].copy_(output)  # in place, so that pinned memory stays pinned
            after_each()


def advance(block: Block, inputs: BlockInputs) -> None:
    """Replace the hidden states by the output of ``block``; on the CPU the zeros of its weights are skipped."""
    with sparse.zeros_skipped(block.linears.values()):
        pass_samples(block, inputs, keep=True)
