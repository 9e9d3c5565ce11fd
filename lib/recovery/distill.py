"""Distillation of the dense model into the weights that pruning left, which keep their places; zeros stay zeros."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib.calibration.hidden import BlockInputs, advance, enter_blocks
from lib.core import files, processes
from lib.core.digests import digest
from lib.core.errors import UserError
from lib.core.lazy import torch
from lib.models import memory, safetensors_io
from lib.models.weights import Block, Weights, is_finite, swapped_parameters, swapped_weights
from lib.recovery.adam import LowRank, Survivors
from lib.recovery.block_walk import (
    BlockWalk,
    DenseStates,
    block_backward,
    has_room_for_activations,
    head_loss,
)

log = logging.getLogger(__name__)

BY = ("model", "block")
# Learning rates: as a fraction of the root mean square of the weights that are left, and of norms alone, which are
# about 1. Chosen on held-out windows of SmolLM2 at 0.7.
RATES = {"surviving": 0.0033, "low_rank": 0.01}
NORMS_RATE = 0.01
# Fraction of the steps over which the learning rate rises; then it falls to 0 as a cosine does.
WARMUP = 0.1
# Windows that are not trained on, on which the loss is measured before and after.
HELD_OUT = 8
# How often a block passes over its windows, where blocks are trained one by one.
EPOCHS = 4
# Seconds between two states that are stored.
STORE_EVERY = 300


class RecoveryOptions(NamedTuple):
    """How a model is recovered: with how many ``tokens``, ``batch`` windows of them a step, and what is trained."""

    tokens: int
    train: str = "surviving"
    rank: int = 32
    learning_rate: float | None = None
    batch: int = 2
    states: str = "float32"
    by: str = "model"

    def least_tokens(self, seqlen: int) -> int:
        """Return the smallest number of tokens: a step, or one of each pass over the windows of a block."""
        return self.batch * seqlen * (EPOCHS if self.by == "block" else 1)

    def windows(self, seqlen: int) -> int:
        """Return how many different windows are read."""
        return self.tokens // self.least_tokens(seqlen) * self.batch


class RecoveryReport(NamedTuple):
    """What a recovery did: the loss of each step, and on held-out windows before and after, in nats a token.

    Blocks that are trained one by one have another loss: their squared error over the square of the dense output.
    """

    losses: list[float]
    held_before: float
    held_after: float
    learning_rate: float
    tokens: int
    seconds: float


class Training:
    """Parameters that are trained: each is lent to the walk, and steps as soon as its gradient is known.

    Attributes:
        parameters: by name; that of a block's norm or bias begins with the block's index.
        outer: the parameters among them that are behind the blocks.
        rate, count: of the current step.
    """

    def __init__(self, weights: Weights, options: RecoveryOptions, dtype: torch.dtype | None) -> None:
        self.weights, self.options, self.dtype = weights, options, dtype
        self.parameters: dict[str, Survivors | LowRank] = {}
        self.outer: dict[str, torch.Tensor] = {}
        self.rate, self.count = 0.0, 0

    def add(self, block: Block) -> None:
        """Take up the parameters of a block, and forget those of the last one if blocks are trained one by one."""
        if self.options.by == "block":
            self.parameters.clear()
        for name, weight in self.tensors(block).items():
            if weight.ndim > 1 and self.options.train == "low_rank":
                rank = LowRank(weight, self.options.states, self.options.rank, zlib.crc32(name.encode()))
                self.parameters[name] = rank
            elif weight.ndim == 1 or self.options.train == "surviving":
                self.parameters[name] = Survivors(weight, self.options.states)

    def tensors(self, block: Block) -> dict[str, torch.Tensor]:
        """Return a block's parameters that can be trained, by their names in ``parameters``."""
        weights = {name: linear.weight for name, linear in block.linears.items()}
        return weights | {f"{block.index}.{name}": tensor for name, tensor in _vectors(block).items()}

    @contextmanager
    def lend(self, block: Block) -> Iterator[dict[str, torch.nn.Parameter]]:
        """Let a block compute with copies of its matrices in the products' dtype; yield what is trained."""
        copies = {name: linear.weight.detach() for name, linear in block.linears.items()}
        copies = {name: weight.to(self.dtype or weight.dtype) for name, weight in copies.items()}
        with swapped_weights(block, copies) as matrices, swapped_parameters(block.module, _vectors(block)) as vectors:
            vectors = {f"{block.index}.{name}": leaf for name, leaf in vectors.items()}
            yield vectors if self.options.train == "norms" else matrices | vectors

    def write(self, name: str, weight: torch.Tensor) -> None:
        """Put a parameter into its place, rounded for saving."""
        self.parameters[name].write(weight, self.weights.save_dtype or weight.dtype)

    def take(self, block: Block, scale: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
        """Step by the gradient of one of a block's parameters."""
        self.step(name, self.tensors(block)[name].detach(), gradient, scale)

    def step(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor) -> None:
        """Step by the gradient of ``weight``, ``scale`` times the loss's, and round the result for saving."""
        self.parameters[name].step(weight, gradient, scale, self.rate, self.count)
        self.write(name, weight)

    def set_step(self, step: int, steps: int, rate: float) -> None:
        """Set the learning rate of a ``step``, from 0: it rises linearly, then falls to 0 as a cosine does."""
        self.count, rising = step + 1, steps * WARMUP
        falling = max(0.0, (step - rising) / (steps - rising))
        self.rate = rate * min(1.0, (step + 1) / rising) * (1 + math.cos(math.pi * falling)) / 2


def _vectors(block: Block) -> dict[str, torch.Tensor]:
    """Return a block's norms and biases, all of its parameters of one dimension, by their names within it."""
    return {name: tensor.detach() for name, tensor in block.module.named_parameters() if tensor.ndim == 1}


class Distillation:
    """Distillation of the ``dense`` model, or of the text alone if it is None, into what is left of the weights.

    Attributes:
        rate: the learning rate at its highest.
    """

    def __init__(
        self,
        weights: Weights,
        dense: Weights | None,
        options: RecoveryOptions,
        windows: tuple[torch.Tensor, torch.Tensor],
        place: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Look at the pruned ``weights``.

        Args:
            windows: to train on, and held out, [windows, tokens] each, of equal length.
            place: a name of HIDDEN_STATES, where the dense model's states are kept.
            dtype: of the products, None for the model's.

        Raises:
            UserError: no weight is zero, or all of them are.
        """
        self.weights, self.dense, self.options, self.place, self.dtype = weights, dense, options, place, dtype
        self.seqlen = windows[0].shape[1]
        mine = windows[0].view(-1, options.batch, self.seqlen)[:, processes.share(options.batch)]
        self.windows, self.held = mine, windows[1][processes.share(len(windows[1]))]
        seen = weights.map(_zeros_and_squares)
        self._zeros = {name: places for name, (places, *_) in seen.items()}
        self.left = {name: left for name, (_, left, _) in seen.items()}
        count, squares = sum(self.left.values()), sum(square for *_, square in seen.values())
        if not 0 < count < sum(layer.size for layer in weights.layers):
            problem = "is not pruned, no weight of it is zero" if count else "has no weight that is not zero"
            raise UserError("model", None, problem, "prune it first")
        scale = (squares / count) ** 0.5
        default = RATES[options.train] * scale if options.train in RATES else NORMS_RATE
        self.rate = options.learning_rate or default
        log.info(
            "recovery: the weights that are left have a root mean square of %.3g; learning rate %.3g", scale, self.rate
        )
        self._gains: dict[str, torch.Tensor] = {}

    def _last_states(self, weights: Weights, windows: torch.Tensor) -> BlockInputs:
        """Return the hidden states of ``windows`` behind the last block, block by block."""
        with processes.single_process():  # its windows were chosen already
            inputs = enter_blocks(weights, windows, self.place)._replace(dtype=self.dtype)
            for block in tqdm(weights.visit(), "states", len(weights.modules), unit="block", disable=None):
                advance(block, inputs)
        return inputs

    def _learn_from_dense(self, windows: torch.Tensor) -> DenseStates:
        """Return the dense model's last states for ``windows`` [n, tokens], and keep the norm that follows them."""
        dense, model = self.dense or self.weights, self.weights.model
        leaving = self._last_states(dense, windows).hidden
        for name, tensor in dense.outer_tensors():
            if tensor.shape == leaving.shape[-1:]:
                self._gains[dense.layout[-1][name].name] = tensor.to("cpu", model.dtype, copy=True)
        return DenseStates(windows, None, leaving if self.dense else None)

    def _held_loss(self, dense: DenseStates) -> float:
        """Return the loss on the held-out windows, over all processes."""
        inputs = self._last_states(self.weights, dense.windows)
        walk = BlockWalk(self.weights, inputs._replace(hidden=[]), self.dtype, False)
        hidden = list(inputs.hidden.split(1))
        loss = head_loss(walk, dense, hidden, range(len(hidden)), dense_gains=self._gains)
        totals, counts = zip(*processes.gathered((float(loss.total), loss.count)), strict=True)
        return sum(totals) / sum(counts)

    @property
    def behind(self) -> list[str]:
        """Names of the parameters behind the blocks that are trained."""
        return list(self._gains) if self.options.by == "model" else []

    def run(
        self, state: Path | None, keep: Callable[[Block, list], None], finished: Mapping[int, tuple[Path, list]]
    ) -> RecoveryReport:
        """Train, and return the losses; the weights are changed in place.

        Args:
            state: file in which the state of unfinished training is stored, None for no such file.
            keep: called with each block when it is trained, and its losses where blocks are trained one by one.
            finished: such blocks that an earlier run has trained already: files and losses.

        Raises:
            UserError: what is needed does not fit, or a loss is not finite.
        """
        start = time.perf_counter()
        held, windows = self.held, self.windows.flatten(0, 1)
        by_model = self.options.by == "model"
        keeps = by_model and self._has_room()
        learned = self._learn_from_dense(torch.cat([held, windows]) if by_model else held)
        leaving = learned.leaving
        held, fit = (
            DenseStates(ids, None, None if leaving is None else leaving[at])
            for ids, at in ((held, slice(len(held))), (windows, slice(len(held), None)))
        )
        before = self._held_loss(held)
        losses = self._by_model(fit, keeps, state, keep) if by_model else self._by_block(keep, finished)
        if name := next((n for n, z in self.weights.map(_zeros_and_squares).items() if z[0] != self._zeros[n]), None):
            raise RuntimeError(f"{name}: zeros are at other places than before recovery")
        steps = len(losses) // (1 if by_model else len(self.weights.modules))
        tokens = steps * self.options.batch * self.seqlen
        seconds = time.perf_counter() - start
        return RecoveryReport(losses, before, self._held_loss(held), self.rate, tokens, seconds)

    def _has_room(self) -> bool:
        """Refuse what does not fit, and return whether all activations of a step do."""
        weights, options, step = self.weights, self.options, self.windows.shape[1]
        if not weights.in_memory:
            problem = "needs all weights in memory, and these are streamed or offloaded"
            raise UserError("by", "model", problem, "use --by block, or GPUs with more memory")
        how = (options.train, options.rank, options.states)
        stored = {layer.name: memory.trained_bytes(layer, self.left[layer.name], *how) for layer in weights.layers}
        needs = memory.gradient_bytes(weights, stored, self.seqlen, step, step, self.dtype)
        return has_room_for_activations(needs, "recovery", "recover", str(options.tokens))

    def _by_model(
        self, fit: DenseStates, keeps: bool, state: Path | None, keep: Callable[[Block, list], None]
    ) -> list[float]:
        """Train the whole model end to end; return the losses, of an earlier run's steps as well."""
        weights, options, steps = self.weights, self.options, len(self.windows)
        inputs = enter_blocks(weights, self.windows[0][:1])
        walk = BlockWalk(weights, inputs._replace(hidden=[]), self.dtype, keeps)
        training = Training(weights, options, self.dtype)
        for block in weights.visit():
            training.add(block)
        training.outer = {name: weights.model.get_parameter(name).detach() for name in self._gains}
        for name, gain in training.outer.items():
            training.parameters[name] = Survivors(gain, options.states)
        losses = _restored(state, training)
        stored = time.monotonic()

        with tqdm(total=steps, initial=len(losses), desc="recovery", unit="step", disable=None) as bar:
            for step in range(len(losses), steps):
                training.set_step(step, steps, self.rate)
                losses.append(self._step(walk, training, fit, step))
                if not math.isfinite(losses[-1]):
                    last = f"it was {losses[-2]:.4f} in the step before" if step else "it never was finite"
                    fix = "lower --learning_rate" + (
                        ", or use --dtype bfloat16" if weights.model.dtype == torch.float16 else ""
                    )
                    raise UserError(None, None, f"the loss is {losses[-1]} at step {step + 1} of {steps}, {last}", fix)
                bar.set_postfix(loss=f"{losses[-1]:.4f}", tokens_per_s=round(self._tokens_a_second(bar)))
                bar.update()
                if state and processes.is_main() and (time.monotonic() - stored > STORE_EVERY or step + 1 == steps):
                    _store(state, training, losses)
                    stored = time.monotonic()
        for block in weights.visit():
            keep(block, [])
        return losses

    def _tokens_a_second(self, bar: tqdm) -> float:
        return (bar.format_dict["rate"] or 0) * self.options.batch * self.seqlen

    def _step(self, walk: BlockWalk, training: Training, fit: DenseStates, step: int) -> float:
        """Pass a step's windows forward and backward, and return the mean loss over all processes."""
        mine = self.windows.shape[1]
        with processes.single_process():
            hidden = enter_blocks(self.weights, self.windows[step]).hidden
        hidden, activations = walk.forward(list(hidden.split(1)), training.lend, True)
        batch = range(step * mine, (step + 1) * mine)
        loss = head_loss(walk, fit, hidden, batch, differentiate=True, dense_gains=self._gains)
        total = self.options.batch * self.seqlen  # tokens of all processes
        mean = processes.sum_(loss.total.reshape(1).clone()).item() / total
        if math.isfinite(mean):
            scale = loss.scale * (total / loss.count)
            for name, gradient in loss.by_gain.items():
                training.step(name, training.outer[name], gradient, scale)
            walk.backward(loss.gradients, scale, activations, training.lend, training.take)
        return mean

    def _by_block(self, keep: Callable[[Block, list], None], finished: Mapping[int, tuple[Path, list]]) -> list[float]:
        """Train block after block towards the dense block's output on the pruned model's own hidden states."""
        groups, count = self.windows.shape[:2]
        training, losses = Training(self.weights, self.options, self.dtype), []
        with processes.single_process():
            inputs = enter_blocks(self.weights, self.windows.flatten(0, 1), self.place)._replace(dtype=self.dtype)
        walk = BlockWalk(self.weights, inputs._replace(hidden=[]), self.dtype, True)
        blocks = zip(self.dense.visit(), self.weights.visit(write=True), strict=True)
        with tqdm(blocks, "recovery", len(self.weights.modules), unit="block", disable=None) as bar:
            for dense, block in bar:
                if block.index in finished:
                    path, earlier = finished[block.index]
                    self.weights.load_block(block.index, path)
                    losses += earlier
                else:
                    training.add(block)
                    for step in range(EPOCHS * groups):
                        training.set_step(step, EPOCHS * groups, self.rate)
                        at = step % groups * count
                        losses.append(self._block_step(walk, training, dense, block, inputs.hidden[at : at + count]))
                        bar.set_postfix(error=f"{losses[-1]:.4f}")
                    keep(block, losses[-EPOCHS * groups :])
                advance(block, inputs)
        return losses

    def _block_step(
        self, walk: BlockWalk, training: Training, dense: Block, block: Block, hidden: torch.Tensor
    ) -> float:
        """Step towards the outputs of the ``dense`` block for ``hidden`` [windows, tokens, width]; return the error."""
        hidden = list(hidden.split(1))
        with torch.no_grad():
            goals = walk.run(dense, hidden, lambda _: nullcontext({}), False).outputs
        ran = walk.run(block, hidden, training.lend, True)
        errors = [(y.detach() - goal.to(y.device)).float() for y, goal in zip(ran.outputs, goals, strict=True)]
        squares = torch.stack([sum(x.float().square().sum() for x in xs) for xs in (errors, goals)])
        error, whole = processes.sum_(squares).tolist()
        if not math.isfinite(error / whole):
            raise UserError(None, None, f"the error of block {block.index} is not finite", "lower --learning_rate")
        largest = torch.stack([x.abs().amax() for x in errors]).amax().clamp_(min=torch.finfo(torch.float32).tiny)
        gradients = [(x / largest).to(ran.outputs[0].dtype) for x in errors]
        block_backward(block, ran, gradients, whole / 2 / largest, training.take)
        return error / whole


def _zeros_and_squares(_: str, weight: torch.Tensor) -> tuple[str, int, float]:
    """Return a hash of the number of zeros in each row and column, how many weights are left, and sum w^2."""
    zeros = weight.flatten(1) == 0
    *places, squares = torch.cat([zeros.sum(1), zeros.sum(0), weight.double().square().sum()[None]]).tolist()
    return digest(places), weight.numel() - round(sum(places) / 2), squares


def _store(path: Path, training: Training, losses: Sequence[float]) -> None:
    """Store the state of unfinished training durably; a parameter that is not finite is refused."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in training.parameters.items():
        for key, tensor in parameter.tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise UserError(None, name, f"is not finite after step {len(losses)}", "lower --learning_rate")
            tensors[f"{name} {key}"] = tensor
    safetensors_io.write_shard(path, tensors)


def _restored(path: Path | None, training: Training) -> list[float]:
    """Return the losses of an earlier run's steps, whose state is taken up and written into the weights."""
    if path is None or not path.is_file():
        return []
    entries = safetensors_io.read_header(path)
    for name, parameter in training.parameters.items():
        for key, tensor in parameter.tensors.items():
            tensor.copy_(safetensors_io.read_tensor(entries[f"{name} {key}"]))
    for block in training.weights.visit():
        for name, tensor in training.tensors(block).items():
            if name in training.parameters:
                training.write(name, tensor.detach())
    for name in training.outer:
        training.write(name, training.outer[name])
    losses = safetensors_io.read_tensor(entries["losses"]).tolist()
    log.info("recovery goes on after step %d", len(losses))
    return losses


def draw_losses(report: RecoveryReport):
    """Return a matplotlib Figure of the loss by step, and on the held-out windows before and after."""
    figure, (axes,) = files.new_figure(6, 4)
    axes.plot(range(1, len(report.losses) + 1), report.losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title=f"held out: {report.held_before:.3f} -> {report.held_after:.3f}")
    return figure
