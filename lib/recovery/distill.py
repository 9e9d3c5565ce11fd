"""Distillation of the dense model into the weights that pruning left, which keep their places; zeros stay zeros."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from lib.calibration.hidden import BlockInputs, advance, enter_blocks
from lib.core import processes
from lib.core.digests import digest
from lib.core.errors import UserError
from lib.core.files import readable
from lib.core.lazy import torch
from lib.models import memory, safetensors_io
from lib.models.weights import Block, Weights, is_finite, parameter_place, swapped_parameters
from lib.recovery.adam import Trained
from lib.recovery.block_walk import BlockWalk, DenseStates, WalkLoss, has_room_for_activations, head_loss

log = logging.getLogger(__name__)

BY = ("model", "block")
# Learning rates as a fraction of the root mean square of the weights that are left, or of norms, about 1. Chosen on
# held-out windows of SmolLM2 at 0.7.
RATES = {"surviving": 0.0033, "low_rank": 0.01, "norms": 0.01}
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


def rate_at(step: int, steps: int) -> float:
    """Return the fraction of the learning rate at a ``step``, from 0: a linear rise, then the fall of a cosine."""
    rising = steps * WARMUP
    falling = max(0.0, (step - rising) / (steps - rising))
    return min(1.0, (step + 1) / rising) * (1 + math.cos(math.pi * falling)) / 2


class Distillation:
    """Distillation of the ``dense`` model, or of the text alone if it is None, into what is left of the weights.

    Attributes:
        rate: the learning rate at its highest.
        left: how many weights of each layer are not zero.
        trained: the parameters that are trained at the moment, by name.
        gains: the dense model's norms of the hidden states around the blocks; the pruned one's are trained end to end.
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
            place: a name of HIDDEN_STATES, where the dense model's states are kept; ``auto`` is the CPU's memory.
            dtype: of the products, None for the model's.

        Raises:
            UserError: all weights are zero, or what is needed does not fit in memory.
        """
        self.weights, self.dense, self.options, self.dtype = weights, dense, options, dtype
        # What is free on a GPU before the first step is for Adam's moments and activations.
        self.place = "cpu" if place == "auto" else place
        self.seqlen = windows[0].shape[1]
        mine = windows[0].view(-1, options.batch, self.seqlen)[:, processes.share(options.batch)]
        self.windows, self.held = mine, windows[1][processes.share(len(windows[1]))]
        self.trained: dict[str, Trained] = {}

        model = weights.model
        width, source = (model.config.get_text_config().hidden_size,), dense or weights
        norms = {source.layout[-1][name].name: x for name, x in source.outer_tensors() if x.shape == width}
        self.gains = {name: x.to("cpu", model.dtype, copy=True) for name, x in norms.items()}

        seen = weights.map(_survey)
        self._masks = {name: mask for name, (mask, *_) in seen.items()}
        self.left = {name: left for name, (_, left, _) in seen.items()}
        count, squares = sum(self.left.values()), sum(square for *_, square in seen.values())
        if not count:
            raise UserError("model", None, "has no weight that is not zero", "prune it less")
        scale = (squares / count) ** 0.5
        self.rate = options.learning_rate or RATES[options.train] * (1 if options.train == "norms" else scale)
        log.info("recovery: the root mean square of what is left is %.3g; learning rate %.3g", scale, self.rate)

        step = mine.shape[1]
        stored = {x.name: memory.trained_bytes([x], self.left[x.name] / x.size, options) for x in weights.layers}
        if options.by == "model":
            sizes = (stored, self.seqlen, step, step, dtype)
            self._keeps = has_room_for_activations(weights, sizes, "recovery", "by", "model", "--by block")
            return
        free = memory.free_memory(0)[memory.place_of(weights.device)]
        needed = memory.trained_block_bytes(model, weights.layers, stored, model.dtype, step * self.seqlen)
        log.info("recovery of a block needs %s", readable(needed))
        if needed > free:
            problem = f"{readable(needed)} are needed for a block, its dense one and states; {readable(free)} are free"
            raise UserError("by", "block", problem, "lower --seqlen or --batch, or use --states 8bit")

    def run(self, state: Path | None, keep: Callable, finished: Mapping[int, tuple[Path, list[float]]]) -> dict:
        """Train, in place, and return the loss of each step, in nats a token, on held-out windows before and after, ...

        Blocks that are trained one by one have another loss: their squared error over the square of the dense output.

        Args:
            state: file in which the state of unfinished training is stored, None for no such file.
            keep: stores a block that is trained, by its index, with its losses where blocks are trained one by one.
            finished: blocks that an earlier run has kept already: files and losses.

        Raises:
            UserError: a loss is not finite.
        """
        start = time.perf_counter()
        held = self._dense_states(self.held)
        before = self._held_loss(held)
        losses = self._by_model(state, keep) if self.options.by == "model" else self._by_block(keep, finished)
        for name, (mask, _, squares) in self.weights.map(_survey).items():
            if not math.isfinite(squares):
                raise UserError(None, name, "is not finite after the last step", "lower --learning_rate")
            if mask != self._masks[name]:
                raise RuntimeError(f"{name}: zeros are at other places than before recovery")
        after = self._held_loss(held)
        if after > before:
            text = "recovery made the held-out loss worse, %.3f -> %.3f; lower --learning_rate, which was %.3g"
            log.warning(text, before, after, self.rate)
        return {
            "losses": losses, "held_before": before, "held_after": after, "learning_rate": self.rate,
            "tokens": len(self.windows) * self.options.least_tokens(self.seqlen),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _last_states(self, weights: Weights, windows: torch.Tensor) -> BlockInputs:
        """Return the hidden states of ``windows`` behind the last block, block by block."""
        with processes.single_process():  # its windows were chosen already
            inputs = enter_blocks(weights, windows, self.place)._replace(dtype=self.dtype)
            for block in tqdm(weights.visit(), "states", len(weights.modules), unit="block", disable=None):
                advance(block, inputs)
        return inputs

    def _dense_states(self, windows: torch.Tensor) -> DenseStates:
        """Return what the dense model, if there is one, says of ``windows`` [n, tokens]."""
        leaving = self._last_states(self.dense, windows).hidden if self.dense else None
        return DenseStates(windows, None, leaving, self.gains)

    def _held_loss(self, dense: DenseStates) -> float:
        """Return the loss on the held-out windows, over all processes."""
        inputs = self._last_states(self.weights, dense.windows)
        walk, hidden = BlockWalk(self.weights, inputs, self.dtype, False), list(inputs.hidden.split(1))
        loss = head_loss(walk, dense, hidden, range(len(hidden)))
        totals, counts = zip(*processes.gathered((float(loss.total), loss.count)), strict=True)
        return sum(totals) / sum(counts)

    def _places(self, block: Block) -> dict[str, tuple[torch.nn.Module, str]]:
        """Return where the trained parameters of a block are, by name: its matrices, and its norms and biases."""
        linears = {} if self.options.train == "norms" else block.linears
        matrices = {f"{name}.weight": (linear, "weight") for name, linear in linears.items()}
        vectors = [name for name, x in block.module.named_parameters() if x.ndim == 1]
        return matrices | {f"{block.index}.{name}": parameter_place(block.module, name) for name in vectors}

    def _add(self, places: Mapping[str, tuple], stored: Mapping[str, safetensors_io.Entry]) -> None:
        """Take up parameters of a lent block, or around the blocks, in the state that an earlier run has ``stored``."""
        options = self.options
        for name, place in places.items():
            rank = options.rank if getattr(*place).ndim > 1 and options.train == "low_rank" else None
            seed = zlib.crc32(name.encode())
            self.trained[name] = trained = Trained(place, self.weights.save_dtype, options.states, rank, seed)
            if stored:
                for i, tensor in enumerate(trained.tensors):
                    tensor.copy_(safetensors_io.read_tensor(stored[f"{name} {i}"]))
                trained.write()

    def _lend(self, block: Block) -> AbstractContextManager[dict[str, torch.nn.Parameter]]:
        """Let a block compute with copies of its matrices in the products' dtype."""
        places = self._places(block)
        weights = {name: getattr(*place).detach() for name, place in places.items()}
        copies = {name: x.to(self.dtype or x.dtype) if x.ndim > 1 else x for name, x in weights.items()}
        return swapped_parameters(places, copies)

    def _by_model(self, state: Path | None, keep: Callable) -> list[float]:
        """Train the whole model end to end; return the losses, of an earlier run's steps as well."""
        weights, (steps, mine), tokens = self.weights, self.windows.shape[:2], self.options.batch * self.seqlen
        fit = self._dense_states(self.windows.flatten(0, 1))
        walk = BlockWalk(weights, enter_blocks(weights, self.windows[0][:1]), self.dtype, self._keeps)
        earlier = safetensors_io.read_header(state) if state and state.is_file() else {}
        for block in weights.visit():
            self._add(self._places(block), earlier)
        self._add({name: parameter_place(weights.model, name) for name in self.gains}, earlier)
        losses, stored = [], time.monotonic()
        if earlier:
            losses = safetensors_io.read_tensor(earlier["losses"]).tolist()
            log.info("recovery resumes after step %d", len(losses))

        counts = {"total": steps * tokens, "initial": len(losses) * tokens, "unit": "token", "unit_scale": True}
        with tqdm(desc="recovery", disable=None, **counts) as bar:
            for step in range(len(losses), steps):
                with processes.single_process():
                    hidden = enter_blocks(weights, self.windows[step]).hidden
                batch = range(step * mine, (step + 1) * mine)
                loss_of = partial(head_loss, walk, fit, batch=batch, differentiate=True)
                losses.append(self._step(walk, hidden, loss_of, step, steps))
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                bar.update(tokens)
                if state and processes.is_main() and (time.monotonic() - stored > STORE_EVERY or step + 1 == steps):
                    self._store(state, losses)
                    stored = time.monotonic()
        for block in weights.visit():
            keep(block.index, [])
        return losses

    def _by_block(self, keep: Callable, finished: Mapping[int, tuple[Path, list[float]]]) -> list[float]:
        """Train block after block towards the dense block's output on the pruned model's own hidden states."""
        groups, count = self.windows.shape[:2]
        losses: list[float] = []
        with processes.single_process():
            inputs = enter_blocks(self.weights, self.windows.flatten(0, 1), self.place)._replace(dtype=self.dtype)
        walk = BlockWalk(self.weights, inputs, self.dtype, True)
        blocks = zip(self.dense.visit(), self.weights.visit(write=True), strict=True)
        with tqdm(blocks, "recovery", len(self.weights.modules), unit="block", disable=None) as bar:
            for dense, block in bar:
                if block.index in finished:
                    path, earlier = finished[block.index]
                    self.weights.load_block(block.index, path)
                    losses += earlier
                else:
                    self.trained.clear()
                    self._add(self._places(block), {})
                    for step in range(EPOCHS * groups):
                        hidden = inputs.hidden[step % groups * count :][:count]
                        goals, _ = walk.forward(list(hidden.split(1)), lambda _: nullcontext({}), only=dense)
                        loss_of = partial(block_loss, goals)
                        losses.append(self._step(walk, hidden, loss_of, step, EPOCHS * groups, block))
                        bar.set_postfix(error=f"{losses[-1]:.4f}")
                    keep(block.index, losses[-EPOCHS * groups :])
                advance(block, inputs)
        return losses

    def _step(
        self, walk: BlockWalk, hidden: torch.Tensor, loss_of: Callable[[list], WalkLoss], step: int, steps: int,
        only: Block | None = None,
    ) -> float:  # fmt: skip
        """Pass a step's ``hidden`` states forward and backward; return the mean loss over all processes.

        ``loss_of`` returns the loss of the last block's outputs; ``only`` is a block that is trained alone.
        """
        outputs, activations = walk.forward(list(hidden.split(1)), self._lend, True, only)
        loss = loss_of(outputs)
        total, count = processes.sum_(torch.stack([loss.total, torch.as_tensor(loss.count).to(loss.total)])).tolist()
        if not math.isfinite(total / count):
            place = f"step {step + 1} of {steps}" + (f" of block {only.index}" if only else "")
            fix = "lower --learning_rate, or use --dtype bfloat16 instead of float16"
            raise UserError(None, None, f"the loss is {total / count} at {place}", fix)

        rate, loss = self.rate * rate_at(step, steps), loss._replace(scale=loss.scale * (count / float(loss.count)))

        def take(_: Block | None, scale: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
            self.trained[name].step(gradient, scale, rate, step + 1)

        for name, gradient in loss.by_gain.items():
            take(None, loss.scale, name, gradient)
        walk.backward(loss, activations, self._lend, take, only)
        return total / count

    def _store(self, path: Path, losses: Sequence[float]) -> None:
        """Store the state of unfinished training durably; one that is not finite does not replace the last one."""
        tensors = {f"{name} {i}": x for name, trained in self.trained.items() for i, x in enumerate(trained.tensors)}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise UserError(None, name, f"is not finite after step {len(losses)}", "lower --learning_rate")
        safetensors_io.write_shard(path, tensors | {"losses": torch.tensor(losses, dtype=torch.float64)})


def _survey(_: str, weight: torch.Tensor) -> tuple[str, int, float]:
    """Return a digest of where a matrix is not zero, how many weights are left, and the sum of their squares."""
    left = (weight != 0).cpu()
    return digest(left), int(left.sum()), weight.double().square().sum().item()


def block_loss(goals: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> WalkLoss:
    """Return the squared error of a block's ``outputs``, as a fraction of the square of its ``goals``."""
    errors = [states - goal.to(states.device) for states, goal in zip(outputs, goals, strict=True)]
    error, whole = (sum(x.float().square().sum() for x in xs) for xs in (errors, goals))
    return WalkLoss(error, whole, errors, {}, whole / 2)  # an error is half of a gradient
