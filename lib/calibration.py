"""Tokens become hidden states, and hidden states become statistics of each layer's input."""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lib import UserError
from lib.models import entry_device

log = logging.getLogger(__name__)

STRIP = 4096  # rows of a Hessian that are added at a time on a GPU


class BlockInputs(NamedTuple):
    """What the model hands to its blocks.

    ``hidden`` enters block 0: [samples, tokens, width], or a list of batches, whose shape a block may change;
    ``arguments[i]`` are all other arguments of block i's call (mask, position embeddings ...), the same for every
    sample. No live cache is among them. ``samples`` is what statistics are divided by, None for the number of tokens.
    """

    hidden: Tensor | list[Tensor]
    arguments: list[tuple[tuple, dict]]
    samples: int | None


class InputStatistic(NamedTuple):
    """A statistic and the names of the layers that share it, since they share their input."""

    layers: list[str]
    value: Tensor


def squared_norms(x: Tensor, total: Tensor | None) -> Tensor:
    """Add to ``total`` [in] the sum over tokens of x^2, x: [tokens, in] of any dtype, in float32 (Wanda)."""
    norms = x.float().square().sum(0)
    return norms if total is None else total.add_(norms)


def hessian(x: Tensor, total: Tensor | None) -> Tensor:
    """Add to ``total`` [in, in] 2 X'X, x: [tokens, in], any dtype, in float32 (SparseGPT; there X is [in, tokens])."""
    halves = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    if halves and "dtype" in torch.ops.aten.mm.overloads():  # mm's out_dtype: since torch 2.8, and on CUDA only
        return _hessian_of_halves(x, total)
    x = x.float()
    return (x.T @ x).mul_(2) if total is None else total.addmm_(x.T, x, alpha=2)


def _hessian_of_halves(x: Tensor, total: Tensor | None) -> Tensor:
    """Return what ``hessian`` does, on tensor cores: products of halves are exact in float32, where they are added up.

    In strips, lest the product be a second matrix of that size; addmm adds in place only in some versions of torch.
    """
    size = x.shape[1]
    total = torch.zeros(size, size, dtype=torch.float32, device=x.device) if total is None else total
    for left in range(0, size, STRIP):
        strip = slice(left, left + STRIP)
        total[strip].add_(torch.mm(x[:, strip].T, x, out_dtype=torch.float32), alpha=2)
    return total


# What a pruner may want to know of a layer's input: added up over the samples, then divided by their number.
STATISTICS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"squared_norms": squared_norms, "hessian": hessian}


class _Caught(Exception):
    """Ends a forward pass once the blocks' inputs are known."""


class _Stub(nn.Module):
    """Stands in a block's place: notes the call and hands the hidden states on."""

    def __init__(self, block: nn.Module, calls: list, last: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule: its weights are not this module's
        self.calls, self.last = calls, last

    def __getattr__(self, name: str):  # some models ask a block for its kind of attention
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        self.calls.append((hidden, args, kwargs))
        if self.last:
            raise _Caught
        return hidden


@torch.no_grad()
def catch_block_inputs(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor) -> BlockInputs:
    """Return what enters the blocks for ``windows`` [samples, tokens] of token ids.

    The embedding and whatever else comes before the blocks are the model's own; stubs stand in the blocks' places.

    Raises:
        UserError: the other arguments depend on the tokens, so that one set of them would be wrong for the rest.
    """
    calls: list[tuple] = []
    originals = list(blocks)
    hidden = None
    try:
        for i, block in enumerate(originals):
            blocks[i] = _Stub(block, calls, last=i == len(originals) - 1)
        for sample, window in enumerate(windows):
            calls.clear()
            try:
                model(window[None].to(entry_device(model)), use_cache=False)
            except _Caught:
                pass
            entering = calls[0][0]
            if hidden is None:
                size = len(windows) * entering.numel() * entering.element_size()
                where = _room_for(size, entering.device)
                hidden = torch.empty(len(windows), *entering.shape[1:], dtype=entering.dtype, device=where)
                arguments = [(_without_cache(args), _without_cache(kwargs)) for _, args, kwargs in calls]
            elif sample == 1 and not _same(arguments[0], (_without_cache(calls[0][1]), _without_cache(calls[0][2]))):
                raise UserError(f"{type(model).__name__}: what its blocks are given depends on the text; not supported")
            hidden[sample] = entering[0]
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
    return BlockInputs(hidden, arguments, len(hidden))


def _room_for(size: int, device: torch.device) -> torch.device | str:
    """Return where hidden states of ``size`` bytes are kept: on a GPU only if they leave it most of its room.

    A model that was spread over GPU and CPU has filled the GPU; Hessians and activations need what is left.
    """
    if device.type != "cuda" or 4 * size <= torch.cuda.mem_get_info(device)[0]:
        return device
    log.info("hidden states (%.1f GiB) are kept in the memory of the CPU: the GPU has little room", size / 2**30)
    return "cpu"


def run_block(block: nn.Module, hidden: Tensor, arguments: tuple[tuple, dict]) -> Tensor:
    """Return what ``block`` makes of ``hidden`` [batch, tokens, width]."""
    args, kwargs = arguments
    out = block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def input_statistics(
    linears: dict[str, nn.Module], statistic: str, samples: int | None, passes: Iterable[object]
) -> list[InputStatistic]:
    """Return the mean over samples of a statistic of each layer's input, once per distinct input.

    Args:
        linears: the layers by name; 1x1 convolutions are the linear layers that they are.
        statistic: a name of STATISTICS.
        samples: the number of samples that the passes hold in all; None for the mean over tokens.
        passes: an iterable that makes one forward pass through the layers at each step.

    Raises:
        UserError: a statistic is not finite, or a layer was not reached.
    """
    add = STATISTICS[statistic]
    totals: dict[str, Tensor | None] = {}
    tokens: dict[str, int] = {}
    sharing: dict[str, list[str]] = {}  # layer that does the adding -> the layers with the same input
    seen: list[tuple[Tensor, str]] = []  # inputs of the pass under way, kept so that identity means identity

    def watch(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            (x,) = args
            if any(name in names[1:] for names in sharing.values()):
                return
            twin = next((leader for tensor, leader in seen if tensor is x), None)
            if twin is not None:
                sharing[twin].append(name)
                return
            seen.append((x, name))
            sharing.setdefault(name, [name])
            x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x  # [batch, in, height, width]: channels last
            x = x.reshape(-1, x.shape[-1])
            totals[name] = add(x.float(), totals.get(name))
            tokens[name] = tokens.get(name, 0) + len(x)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        for _ in passes:
            seen.clear()
    finally:
        for handle in hooks:
            handle.remove()
    unreached = set(linears) - {name for names in sharing.values() for name in names}
    if unreached:
        raise UserError(
            f"{sorted(unreached)[0]}: the forward pass does not reach this layer; the model is not supported"
        )
    result = []
    for leader, names in sharing.items():
        value = totals.pop(leader).div_(samples or tokens[leader])
        if not torch.isfinite(value).all():
            raise UserError(f"{names[0]}: its input overflows (not finite); try --dtype bfloat16 or --dtype float32")
        result.append(InputStatistic(names, value))
    return result


def _without_cache(arguments):
    if isinstance(arguments, dict):
        return {name: None if isinstance(value, Cache) else value for name, value in arguments.items()}
    return tuple(None if isinstance(value, Cache) else value for value in arguments)


def _same(a, b) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or a == b
