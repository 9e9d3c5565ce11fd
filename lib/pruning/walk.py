"""Pruning walk over the blocks: for each block statistics, pruning and propagation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol

from tqdm import tqdm

from lib.calibration.hidden import BlockInputs, advance, pass_samples
from lib.calibration.statistics import input_statistics
from lib.core import processes
from lib.core.errors import UserError, flag_name
from lib.core.lazy import torch
from lib.models import memory, safetensors_io
from lib.models.weights import Block, Weights, check_finite, is_finite, swapped_weights
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import Pruner
from lib.pruning.sparsegpt import NotPositiveDefinite

log = logging.getLogger(__name__)


class LayerReport(NamedTuple):
    """Row of the layers' table: planned ``ratio`` and measured ``sparsity``, fractions, and ``nm``, (N, M) or None."""

    name: str
    shape: tuple[int, ...]
    metric: float | None
    ratio: float
    sparsity: float
    nm: tuple[int, int] | None = None
    tokens: int | None = None  # of calibration, that reached the matrix of an expert


class FinishedBlocks(Protocol):
    """Blocks that are stored durably, a file each, so that an interrupted walk can resume (``run.journal.Journal``)."""

    finished: Mapping[int, list]  # rows by index of the block
    failure: UserError | None  # of a block that could not be stored; no later one is stored

    def path(self, index: int) -> Path: ...
    def add(self, index: int, weights: Weights, rows: list[LayerReport]) -> None: ...


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
    passes the data on. Statistics or weights that are not finite, and a Hessian that cannot be factorised, are a
    UserError that names the layer.

    Args:
        inputs: inputs of the blocks, modified in place; None for a pruner that needs no statistic.
        metric: the values behind the plan, by layer name; for the report only.
        propagate: whether a block's inputs come from ``pruned`` or ``dense`` predecessors. Dense: one pass per block.
        journal: stores each finished block; blocks that it already holds are taken from it.
    """
    torch.set_float32_matmul_precision("highest")  # where an environment variable asks for TF32: masks would change
    report, last = [], max(layer.block for layer in weights.layers)
    with torch.no_grad(), tqdm(total=last + 1, desc="pruning", unit="block", disable=None) as bar:
        for block in weights.visit(write=True):
            if block.index > last:
                break
            stored = journal is not None and block.index in journal.finished
            # Its dense outputs replace its inputs.
            keep = propagate == "dense" and inputs is not None and bool(block.linears)
            if stored:
                if keep:
                    pass_samples(block, inputs, keep=True)  # while it is dense, as in a run without a stop
                weights.load_block(block.index, journal.path(block.index))
                rows = [LayerReport(*row) for row in journal.finished[block.index]]
            else:
                tokens = _prune_block(block, plan, pruner, inputs, keep, weights.save_dtype)
                rows = _report(block, plan, metric, tokens)
                if any(row.tokens for row in rows) and not any(row.tokens for row in report):
                    _show_tokens(rows)
            if inputs is not None and block.index != last and not keep:
                advance(block, inputs)
            if journal is not None and not stored and not journal.failure:
                _store(block, weights, journal, rows)
            report += rows
            bar.update()
    return report


def _store(block: Block, weights: Weights, journal: FinishedBlocks, rows: list[LayerReport]) -> None:
    """Store a finished block durably; if the disk is full, pruning continues in memory without it."""
    try:
        journal.add(block.index, weights, rows)
    except UserError as error:
        if weights.streamed:
            raise
        log.warning("%s; pruning continues, the figures can still be had", error)
        journal.failure = error


def _prune_block(
    block: Block, plan: SparsityPlan, pruner: Pruner, inputs: BlockInputs | None, keep: bool, dtype: torch.dtype | None
) -> dict[str, int | None]:
    """Prune the layers of a block; those that share an input, and so a statistic, are pruned by one process.

    Return how many tokens reached each matrix of an expert, None for others, by layer name.
    """
    if inputs is None:  # no statistic: every process prunes all layers
        _prune_layers(block, list(block.linears), plan, pruner, None, dtype)
        return {}
    tokens: dict[str, int | None] = {}
    dense: dict[str, torch.Tensor] = {}
    by_groups = block.experts and pruner.statistic == "hessian"
    batches = memory.hessian_groups(block) if by_groups else [list(block.linears)]
    for batch in batches:
        # What an expert is given depends on no other expert: they can be pruned batch by batch, with all else in the
        # last one. Dense outputs need the dense experts once more.
        last = batch is batches[-1]
        with swapped_weights(block, dense if last else {}):
            groups = input_statistics(block, inputs, pruner.statistic, keep and last, batch)
        if keep and not last:
            dense |= {name: block.linears[name].weight.detach().clone() for name in batch}
        owners = processes.owners([_cost(block, group.layers, group.value) for group in groups])
        owner_of = {name: owner for group, owner in zip(groups, owners, strict=True) for name in group.layers}
        for owner in owners:
            names, statistic, count = groups.pop(0)  # frees the statistic of the group before: Hessians are large
            tokens |= dict.fromkeys(names, count)
            try:
                if owner == processes.rank():
                    _prune_layers(block, names, plan, pruner, statistic, dtype)
            except NotPositiveDefinite as error:
                fix = f"give more calibration data ({flag_name('nsamples')})"
                raise UserError(None, names[0], str(error), fix) from error
        for name, owner in owner_of.items():
            processes.broadcast(block.linears[name].weight.data, owner)
    return tokens


def _cost(block: Block, names: list[str], statistic: torch.Tensor) -> float:
    """Return the relative time that a pruner takes for layers that share a statistic."""
    columns, rows = len(statistic), sum(len(block.linears[name].weight) for name in names)
    return columns**2 * (columns + rows) if statistic.ndim == 2 else columns * rows


def _prune_layers(
    block: Block, names: list[str], plan: SparsityPlan, pruner: Pruner, statistic: object, dtype: torch.dtype | None
) -> None:
    """Prune layers that share a ``statistic``; ``dtype``, if any, is the one that they will be saved in."""
    prepared = pruner.prepare(statistic)
    for name in names:
        check_finite(name, block.linears[name].weight)
    # The published thresholds would take the smallest weight of a layer of ratio 0 all the same.
    # A 1x1 convolution [out, in, 1, 1] is pruned as a matrix.
    weights = {name: block.linears[name].weight.data.flatten(1) for name in names if plan.ratios[name] > 0}
    nm = plan.nm or dict.fromkeys(weights)
    for name, weight in pruner.prune_all(weights, prepared, plan.ratios, nm) if weights else ():
        weight = weight.to(dtype or weight.dtype)
        if not is_finite(weight):
            fix = "try --dtype bfloat16 or --dtype float32"
            raise UserError(None, name, "its pruned weights are not finite", fix)
        target = block.linears[name].weight.data
        target.copy_(weight.view_as(target))


def _report(
    block: Block, plan: SparsityPlan, metric: Mapping[str, float] | None, tokens: Mapping[str, int | None]
) -> list[LayerReport]:
    zeros = [(linear.weight == 0).sum() for linear in block.linears.values()]
    counts = torch.stack(zeros).tolist() if zeros else []  # one synchronisation
    rows = []
    for (name, linear), count in zip(block.linears.items(), counts, strict=True):
        value, nm = metric and metric[name], plan.nm and plan.nm[name]
        shape, sparsity = tuple(linear.weight.shape), count / linear.weight.numel()
        rows.append(LayerReport(name, shape, value, plan.ratios[name], sparsity, nm, tokens.get(name)))
    return rows


def _show_tokens(rows: list[LayerReport]) -> None:
    """Log how many tokens reach the experts of a block, and warn if those of some are fewer than its columns."""
    rows = [row for row in rows if row.tokens is not None and row.name.endswith(".up_proj")]  # one of each expert
    counts, few = [row.tokens for row in rows], [row for row in rows if row.tokens < row.shape[1]]
    line = "calibration tokens of an expert of the first block with experts: %d at least, median %d"
    log.info(line, min(counts), median(counts))
    if few:
        line = "%d of %d experts see fewer tokens than they have columns, %d none; more --nsamples would help"
        log.warning(line, len(few), len(counts), counts.count(0))


def check_saved(folder: Path, weights: Weights, measured: float) -> None:
    """Read a saved folder back, and raise a UserError unless its sparsity is the one ``measured`` in memory."""
    written = checkpoint_sparsity(folder, weights.pruned_tensors())
    if written != measured:
        problem = f"holds a sparsity of {written:.6f} as read back, and the pruned model has {measured:.6f}"
        raise UserError(None, folder, problem, "delete the folder, and the same command makes it anew")


def checkpoint_sparsity(folder: Path, names: Collection[str]) -> float:
    """Return the fraction of zeros in the named tensors of a saved folder, read back from its safetensors files."""
    zeros = total = 0
    for name, entry in safetensors_io.checkpoint_entries(folder).items():
        if name in names:
            tensor = safetensors_io.read_tensor(entry)
            zeros, total = zeros + (tensor == 0).sum().item(), total + tensor.numel()
    return zeros / total
