"""Hidden states: what enters the blocks, caught once, and passes through a block."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lib import sparse
from lib.core import processes
from lib.core.errors import UserError
from lib.core.files import readable
from lib.core.lazy import torch, transformers
from lib.models import memory
from lib.models.weights import Block, Weights, swapped_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

PROPAGATE = ("dense", "pruned")
HIDDEN_STATES = ("auto", "gpu", "cpu", "disk")
CALIB_DTYPES = ("bfloat16",)


class BlockInputs(NamedTuple):
    """Inputs that the model passes to its blocks.

    ``hidden`` enters block 0: [samples, tokens, width], or a list of batches, whose shape a block may change;
    ``arguments[i]`` are all other arguments of block i's call (mask, position embeddings ...), the same for every
    sample. They contain no live cache. ``samples`` is what statistics are divided by, over all processes (None: the
    number of tokens). ``tuples`` collects the indices of the blocks that return their hidden states in a tuple.
    ``dtype`` is that of the products in a block, None for the block's own; values passed between layers keep
    their precision.
    """

    hidden: Tensor | list[Tensor]
    arguments: list[tuple[tuple, dict]]
    samples: int | None
    tuples: set[int] | None = None
    dtype: torch.dtype | None = None


# --------------------------------------------------------------------------------------- what enters the blocks


class PassEnded(Exception):
    """Ends a forward pass once the needed values are known."""


def _stub(block: nn.Module, act: Callable[..., Tensor]) -> nn.Module:
    """Return a module that replaces a block and calls ``act`` with the block's arguments."""

    class Stub(torch.nn.Module):
        def __getattr__(self, name: str):  # some models ask a block for its kind of attention
            return getattr(block, name)

        def forward(self, *args, **kwargs) -> Tensor:
            return act(*args, **kwargs)

    return Stub()


@contextmanager
def _in_place_of_blocks(weights: Weights, act: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the blocks by ``act(index, hidden, *args, **kwargs)``; the parameters around them are in memory."""
    blocks = weights.modules
    originals = list(blocks)
    with weights.outer_parameters(), torch.no_grad():
        try:
            for i, block in enumerate(originals):
                blocks[i] = _stub(block, partial(act, i))
            yield
        finally:
            for i, block in enumerate(originals):
                blocks[i] = block


def enter_blocks(
    weights: Weights, windows: Tensor, place: str = "auto", dtype: torch.dtype | None = None
) -> BlockInputs:
    """Return the inputs of the blocks for this process's share of ``windows`` [samples, tokens] of token ids.

    The embedding and everything else before the blocks are the model's own; stubs replace the blocks.

    Args:
        place: a name of HIDDEN_STATES, where the hidden states are kept.
        dtype: of the products in the blocks (``BlockInputs``).

    Raises:
        UserError: the model passes its blocks something that depends on the text, such as a padding mask.
    """
    calls: list[tuple] = []
    hidden, last = None, len(weights.modules) - 1
    mine = windows[processes.share(len(windows))]

    def note(index: int, entering: Tensor, *args, **kwargs) -> Tensor:
        calls.append((entering, _without_cache(args), _without_cache(kwargs)))
        if index == last:
            raise PassEnded
        return entering

    with _in_place_of_blocks(weights, note):
        for sample, window in enumerate(mine if len(mine) else windows[:1]):  # their other arguments are needed
            calls.clear()
            with suppress(PassEnded):
                weights.model(window[None].to(entry_device(weights.model)), use_cache=False)
            entering = calls[0][0]
            if hidden is None:
                hidden = _room_for((len(mine), *entering.shape[1:]), entering, place)
                arguments = [(args, kwargs) for _, args, kwargs in calls]
            elif sample == 1 and not _same(arguments[0], calls[0][1:]):
                text = "what its blocks are given depends on the text; not supported"
                raise UserError(None, f"{type(weights.model).__name__}: {text}")
            if len(mine):
                hidden[sample] = entering[0]
    return BlockInputs(hidden, arguments, len(windows), set(), dtype)


@contextmanager
def after_blocks(weights: Weights, tuples: set[int]) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Hold the parameters after the blocks; yield a function of a window [tokens] and of the blocks' output for it.

    It returns the logits [n, vocabulary] of hidden states [n, width] of some or all of the window's tokens.
    ``tuples``: the blocks that return tuples (``BlockInputs``).
    """
    leaving: list[Tensor] = []

    def hand_back(index: int, entering: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor]:
        hidden = leaving[0].to(entering.device) if index == 0 else entering
        return (hidden,) if index in tuples else hidden

    def logits(window: Tensor, hidden: Tensor) -> Tensor:
        leaving[:] = [hidden[None]]
        return weights.model(window[None].to(entry_device(weights.model)), use_cache=False).logits[0]

    with _in_place_of_blocks(weights, hand_back):
        yield logits


def leave_blocks(weights: Weights, windows: Tensor, inputs: BlockInputs) -> Iterator[Tensor]:
    """Yield the logits [tokens, vocabulary] of each window, given the blocks' output for it."""
    with after_blocks(weights, inputs.tuples) as logits:
        for window, hidden in zip(windows, inputs.hidden, strict=True):
            yield logits(window, hidden)


def entry_device(model: nn.Module) -> torch.device:
    """Return the device on which the model expects its token ids."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: its hook fetches the ids


def _room_for(shape: tuple[int, ...], like: Tensor, place: str) -> Tensor:
    """Return a buffer for hidden states; ``auto``: on a GPU only if that leaves most of its free memory.

    A model spread over GPU and CPU has filled the GPU; Hessians and activations need the rest.
    """
    size = math.prod(shape) * like.element_size()
    if place == "auto":
        place = "gpu" if like.is_cuda and 4 * size <= memory.free_bytes(like.device) else "cpu"
        if like.is_cuda and place == "cpu":
            text = "hidden states (%.1f GiB) are kept in the memory of the CPU: the GPU has little room"
            log.info(text, size / 2**30)
    if place == "gpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if place == "disk":
        file = tempfile.NamedTemporaryFile(prefix="hidden-states-")  # removed with the last reference to its pages
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a full disk would end the process at a later write
        except OSError as error:
            text = f"disk: {tempfile.gettempdir()} has no room for {readable(size)} ({error.strerror})"
            raise UserError("hidden_states", f"{text}; set TMPDIR to a folder that has") from error
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=like.dtype).view(shape)
    return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)


def _without_cache(arguments):
    cache = transformers.Cache
    if isinstance(arguments, dict):
        return {name: None if isinstance(value, cache) else value for name, value in arguments.items()}
    return tuple(None if isinstance(value, cache) else value for value in arguments)


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or a == b


# ------------------------------------------------------------------------------------------ through a block


def run_block(block: nn.Module, hidden: Tensor, arguments: tuple[tuple, dict]) -> Tensor | tuple:
    """Return the output of ``block`` for ``hidden`` [batch, tokens, width], or a tuple that begins with it."""
    args, kwargs = arguments
    return block(hidden, *args, **kwargs)


def hidden_of(out: Tensor | tuple, index: int, tuples: set[int] | None) -> Tensor:
    """Return the hidden states in the output of block ``index``; a block that returns a tuple is recorded."""
    if not isinstance(out, tuple):
        return out
    if tuples is not None:
        tuples.add(index)
    return out[0]


def passes(block: Block, inputs: BlockInputs, keep: bool) -> Iterator[None]:
    """Run every sample or batch through ``block``, one per step; with ``keep``, the output replaces the input.

    Without it, a pass may stop early (``input_statistics``).
    """
    from accelerate.utils import send_to_device

    arguments = send_to_device(inputs.arguments[block.index], block.device)
    hidden = inputs.hidden if isinstance(inputs.hidden, list) else inputs.hidden.unsqueeze(1)  # views, one sample each
    # Copies of the weights in the dtype of the products: autocast would make them for each sample.
    linears = {} if inputs.dtype is None else block.linears
    copies = {name: linear.weight.detach().to(inputs.dtype) for name, linear in linears.items()}
    with swapped_weights(block, copies):
        for i in range(len(hidden)):
            with torch.no_grad(), _autocast(block, inputs.dtype), nullcontext() if keep else suppress(PassEnded):
                out = run_block(block.module, hidden[i].to(block.device), arguments)
                out = hidden_of(out, block.index, inputs.tuples)
                if keep and isinstance(hidden, list):
                    hidden[i] = out.to(hidden[i].device)
                elif keep:
                    hidden[i].copy_(out)  # into pinned memory, where it lies there: no copy that is not pinned between
            yield


def _autocast(block: Block, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(block.device.type, dtype)


def advance(block: Block, inputs: BlockInputs) -> None:
    """Replace the hidden states by the output of ``block``; on the CPU the zeros of its weights are skipped."""
    with sparse.zeros_skipped(block.linears.values()):
        for _ in passes(block, inputs, keep=True):
            pass
