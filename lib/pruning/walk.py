"""Pruning walk over the blocks: each is measured, pruned and passed through in turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tqdm import tqdm

from lib.calibration.hidden import BlockInputs, advance, pass_samples
from lib.calibration.statistics import input_statistics
from lib.core import processes
from lib.core.errors import UserError, flag_name
from lib.core.lazy import torch
from lib.models import safetensors_io
from lib.models.weights import Block, Weights, check_finite, is_finite
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import Pruner
from lib.pruning.sparsegpt import NotPositiveDefinite

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)


class LayerReport(NamedTuple):
    """One row of the per-layer table: planned ``ratio`` and measured ``sparsity`` are fractions of the matrix.

    ``nm`` is (N, M) if N of every M columns were kept.
    """

    name: str
    shape: tuple[int, ...]
    metric: float | None
    ratio: float
    sparsity: float
    nm: tuple[int, int] | None = None


class FinishedBlocks(Protocol):
    """Blocks that are stored durably, each in a file, so that a walk which is interrupted can resume.

    Attributes:
        failure: the error of a block that could not be stored; no later one is.
    """

    failure: UserError | None

    def __contains__(self, index: int) -> bool:
        """Return whether the block of this index is stored."""

    def path(self, index: int) -> Path:
        """Return the safetensors file of a block."""

    def rows(self, index: int) -> list[LayerReport]:
        """Return the layer reports of a stored block."""

    def add(self, index: int, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, rows: list[LayerReport]) -> None:
        """Store a block."""


def walk(
    weights: Weights,
    plan: SparsityPlan,
    pruner: Pruner,
    inputs: BlockInputs | None,
    metric: Mapping[str, float] | None = None,
    propagate: str = "pruned",
    journal: FinishedBlocks | None = None,
) -> list[LayerReport]:
    """Prune the layers in place, block by block, and report planned and measured sparsities.

    For a pruner that needs a statistic, each block sees the calibration samples twice: once dense, for the statistics
    of its layers' inputs, and once pruned, for the inputs of the next block (as published). A block without layers only
    passes the data on.

    Args:
        inputs: inputs of the blocks, modified in place; None for a pruner that needs no statistic.
        metric: the values behind the plan, by layer name; for the report only.
        propagate: whether a block's inputs come from ``pruned`` or ``dense`` predecessors. Dense: one pass per block.
        journal: stores each finished block; blocks that it already holds are taken from it.

    Raises:
        UserError: statistics or weights that are not finite, or a Hessian that cannot be factorised; names the layer.
    """
    torch.set_float32_matmul_precision("highest")  # where an environment variable asks for TF32: masks would change
    report, last = [], max(layer.block for layer in weights.layers)
    dense = propagate == "dense" and inputs is not None
    with torch.no_grad(), tqdm(total=last + 1, desc="pruning", unit="block", disable=None) as bar:
        for block in weights.visit(write=True):
            if block.index > last:
                break
            done = journal is not None and block.index in journal
            keep = dense and bool(block.linears)  # its dense outputs replace its inputs
            if done:
                if dense and block.linears:
                    pass_samples(block, inputs, keep=True)  # while it is dense, as in a run without a stop
                weights.load_block(block.index, journal.path(block.index))
                rows = journal.rows(block.index)
            else:
                _prune_block(block, plan, pruner, inputs, keep, weights.save_dtype)
                rows = _report(block, plan, metric)
            if inputs is not None and block.index != last and not keep:
                advance(block, inputs)
            if journal is not None and not done and not journal.failure:
                _keep(block, weights, journal, rows)
            report += rows
            bar.update()
    return report


def _keep(block: Block, weights: Weights, journal: FinishedBlocks, rows: list[LayerReport]) -> None:
    """Store a finished block durably; if the disk is full, pruning continues in memory without it."""
    try:
        journal.add(block.index, weights.tensors(block.index), weights.save_dtype or weights.model.dtype, rows)
    except UserError as error:
        if weights.streamed:
            raise
        log.warning("%s; pruning continues, the figures can still be had", error)
        journal.failure = error
        return
    weights.set_block_file(block.index, journal.path(block.index))


def _prune_block(
    block: Block,
    plan: SparsityPlan,
    pruner: Pruner,
    inputs: BlockInputs | None,
    keep: bool,
    save_dtype: torch.dtype | None,
) -> None:
    owners = {}
    for names, prepared, owner in _prepared(block, pruner, inputs, keep):
        if owner == processes.rank():
            with _named(names[0]):
                _prune_layers({name: block.linears[name] for name in names}, plan, pruner, prepared, save_dtype)
        del prepared  # a factor of the Hessian: not to outlive its layers
        owners |= dict.fromkeys(names, owner)
    for name, owner in owners.items() if inputs is not None else ():
        processes.broadcast(block.linears[name].weight.data, owner)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the layer whose Hessian cannot be factorised."""
    try:
        yield
    except NotPositiveDefinite as error:
        text = f"{name}: {error}; give more calibration data ({flag_name('nsamples')})"
        raise UserError(None, text) from error


def _prepared(
    block: Block, pruner: Pruner, inputs: BlockInputs | None, keep: bool
) -> Iterator[tuple[list[str], object, int]]:
    """Yield the layers that share an input, the pruner's prepared statistic, and the process that owns them.

    Pruners that need no statistic are fast and run in every process.
    """
    if inputs is None:
        if block.linears:
            yield list(block.linears), None, processes.rank()
        return
    statistics = input_statistics(block, inputs, pruner.statistic, keep)
    owners = processes.owners([_cost(block, names, value) for names, value in statistics])
    for owner in owners:
        names, value = statistics.pop(0)  # each Hessian is freed before the next one is factorised
        prepared = None
        if owner == processes.rank():
            with _named(names[0]):
                prepared = pruner.prepare(value)
        del value
        yield names, prepared, owner
        del prepared


def _cost(block: Block, names: list[str], statistic: Tensor) -> float:
    """Return the relative time that a pruner takes for layers that share a statistic."""
    columns, rows = len(statistic), sum(len(block.linears[name].weight) for name in names)
    return columns**2 * (columns + rows) if statistic.ndim == 2 else columns * rows


def _prune_layers(
    linears: Mapping[str, nn.Module],
    plan: SparsityPlan,
    pruner: Pruner,
    prepared: object,
    save_dtype: torch.dtype | None,
) -> None:
    """Prune layers that share their input."""
    for name, linear in linears.items():
        check_finite(name, linear.weight)
    # The published thresholds would take the smallest weight of a layer of ratio 0 all the same.
    # A 1x1 convolution [out, in, 1, 1] is the matrix that it is.
    weights = {name: linear.weight.data.flatten(1) for name, linear in linears.items() if plan.ratios[name] > 0}
    nm = dict.fromkeys(weights) if plan.nm is None else plan.nm
    for name, weight in pruner.prune_all(weights, prepared, plan.ratios, nm) if weights else ():
        if save_dtype is not None:
            weight = weight.to(save_dtype)
        if not is_finite(weight):
            text = f"{name}: its pruned weights are not finite; try --dtype bfloat16 or --dtype float32"
            raise UserError(None, text)
        linears[name].weight.data.copy_(weight.view_as(linears[name].weight))


def _report(block: Block, plan: SparsityPlan, metric: Mapping[str, float] | None) -> list[LayerReport]:
    zeros = [(linear.weight == 0).sum() for linear in block.linears.values()]
    rows = []
    for (name, linear), count in zip(block.linears.items(), torch.stack(zeros).tolist() if zeros else [], strict=True):
        value = None if metric is None else metric[name]
        nm = None if plan.nm is None else plan.nm[name]
        shape = tuple(linear.weight.shape)
        rows.append(LayerReport(name, shape, value, plan.ratios[name], count / linear.weight.numel(), nm))
    return rows


def check_saved(folder: Path, weights: Weights, measured: float) -> None:
    """Read a saved folder back: its sparsity must equal that of the model in memory.

    Raises:
        UserError: it does not, so that something else wrote there, or the disk is at fault.
    """
    written = checkpoint_sparsity(folder, [layer.name for layer in weights.layers])
    if written != measured:
        what = f"holds a sparsity of {written:.6f} as read back, and the pruned model has {measured:.6f}"
        raise UserError(None, f"{folder}: {what}; delete the folder, and the same command makes it anew")


def checkpoint_sparsity(folder: Path, names: list[str]) -> float:
    """Return the fraction of zeros in the named layers of a saved folder, read back from its safetensors files.

    Raises:
        RuntimeError: the files contain none of these layers.
    """
    wanted = {f"{name}.weight" for name in names}
    zeros = total = 0
    for path in folder.glob("*.safetensors"):
        for name, entry in safetensors_io.read_header(path).items():
            if name in wanted:
                tensor: Tensor = safetensors_io.read_tensor(entry)
                zeros, total = zeros + (tensor == 0).sum().item(), total + tensor.numel()
    if not total:
        raise RuntimeError(f"{folder}: holds none of the layers that were pruned ({names[0]} ...)")
    return zeros / total
