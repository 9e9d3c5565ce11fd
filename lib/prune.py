"""Walks the blocks: measures, prunes, passes the data on."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lib import UserError
from lib.allocation import SparsityPlan
from lib.calibration import BlockInputs, catch_block_inputs, input_statistics, run_block
from lib.models import PrunableLayer, resident
from lib.pruners import Pruner
from lib.results import LayerReport
from lib.sparsegpt import NotPositiveDefinite

log = logging.getLogger(__name__)


def sparsity(weight: Tensor) -> float:
    """Return the measured fraction of zeros."""
    return (weight == 0).sum().item() / weight.numel()


PROPAGATE = ("dense", "pruned")


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    layers: Sequence[PrunableLayer],
    plan: SparsityPlan,
    pruner: Pruner,
    windows: Tensor | None,
    metric: Mapping[str, float] | None = None,
) -> list[LayerReport]:
    """Prune ``layers`` in place, block by block, and report what was planned and what came of it.

    For a pruner that wants a statistic, each block sees the calibration ``windows`` [samples, tokens] twice: once
    dense, for the statistics of its layers' inputs, and once pruned, for what the next block gets (as published).

    Args:
        metric: what the plan was made from, by layer name; for the report only.

    Raises:
        UserError: statistics or weights that are not finite, or a Hessian that cannot be factorised; names the layer.
    """
    inputs = None if pruner.statistic is None else catch_block_inputs(model, blocks, windows)
    return prune_blocks(blocks, layers, plan, pruner, inputs, metric)


@torch.no_grad()
def prune_blocks(
    blocks: Sequence[nn.Module],
    layers: Sequence[PrunableLayer],
    plan: SparsityPlan,
    pruner: Pruner,
    inputs: BlockInputs | None,
    metric: Mapping[str, float] | None = None,
    propagate: str = "pruned",
) -> list[LayerReport]:
    """Prune as ``prune_model`` does, given what enters the blocks; a block without layers only passes the data on.

    Args:
        inputs: used up; None for a pruner that wants no statistic.
        propagate: what a block's inputs come from, ``pruned`` or ``dense`` predecessors. Dense: one pass a block.
    """
    report = []
    grouped = {index: list(group) for index, group in groupby(layers, key=lambda layer: layer.block)}
    steps = sorted(grouped) if inputs is None else range(max(grouped) + 1)
    for index in tqdm(steps, desc="pruning", unit="block", disable=None):
        with resident(blocks[index], write=True) as device:
            linears = {layer.name: layer.module for layer in grouped.get(index, ())}
            keep = propagate == "dense"
            for names, prepared in _prepared(linears, pruner, inputs, blocks[index], index, device, keep):
                for name in names:
                    _prune_layer(linears[name], name, plan, pruner, prepared)
            if inputs is not None and index != steps[-1] and not (keep and linears):
                for _ in _passes(blocks[index], index, inputs, device, keep=True):
                    pass
            for layer in grouped.get(index, ()):
                weight = layer.module.weight
                value = None if metric is None else metric[layer.name]
                nm = None if plan.nm is None else plan.nm[layer.name]
                ratio = plan.ratios[layer.name]
                report.append(LayerReport(layer.name, tuple(weight.shape), value, ratio, sparsity(weight), nm))
    return report


@torch.no_grad()
def score_blocks(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    layers: Sequence[PrunableLayer],
    windows: Tensor,
    number: Callable[[list[Tensor]], float],
) -> dict[str, float]:
    """Return, by layer name, ``number`` of the scores |W| * sqrt(s) of the layer's block, in the dense model.

    Args:
        windows: of calibration, [samples, tokens].
        number: what becomes of the scores of a block's layers, each [out, in].
    """
    return block_scores(blocks, layers, catch_block_inputs(model, blocks, windows), number)


@torch.no_grad()
def block_scores(
    blocks: Sequence[nn.Module],
    layers: Sequence[PrunableLayer],
    inputs: BlockInputs,
    number: Callable[[list[Tensor]], float],
) -> dict[str, float]:
    """Score as ``score_blocks`` does, given what enters the blocks, which is used up."""
    values = {}
    grouped = {index: list(group) for index, group in groupby(layers, key=lambda layer: layer.block)}
    for index in tqdm(range(max(grouped) + 1), desc="dense statistics", unit="block", disable=None):
        with resident(blocks[index]) as device:
            linears = {layer.name: layer.module for layer in grouped.get(index, ())}
            for name, module in linears.items():
                _check_finite(name, module)
            passes = _passes(blocks[index], index, inputs, device, keep=True)
            found = input_statistics(linears, "squared_norms", inputs.samples, passes)
            scores = [linears[name].weight.flatten(1).abs() * value.sqrt() for names, value in found for name in names]
            if scores:
                values |= dict.fromkeys(linears, number(scores))
    return values


def _prepared(
    linears: dict[str, nn.Module],
    pruner: Pruner,
    inputs: BlockInputs | None,
    block: nn.Module,
    index: int,
    device: torch.device,
    keep: bool,
) -> Iterator[tuple[list[str], object]]:
    """Yield the layers that share an input, and what the pruner makes of that input's statistic."""
    if inputs is None:
        yield list(linears), None
        return
    passes = _passes(block, index, inputs, device, keep) if linears else ()
    statistics = input_statistics(linears, pruner.statistic, inputs.samples, passes)
    while statistics:
        names, value = statistics.pop(0)  # a Hessian is let go of before the next one is factorised
        try:
            yield names, pruner.prepare(value)
        except NotPositiveDefinite as error:
            raise UserError(f"{names[0]}: {error}; give more calibration data (--nsamples)") from error


def _check_finite(name: str, module: nn.Module) -> None:
    if not torch.isfinite(module.weight).all():
        raise UserError(f"{name}: its weights are not finite; the checkpoint is damaged")


def _prune_layer(module: nn.Module, name: str, plan: SparsityPlan, pruner: Pruner, prepared: object) -> None:
    _check_finite(name, module)
    if plan.ratios[name] == 0:  # the published thresholds would take the smallest weight all the same
        return
    nm = None if plan.nm is None else plan.nm[name]
    # A 1x1 convolution [out, in, 1, 1] is the matrix that it is.
    weight = pruner.prune(module.weight.data.flatten(1), prepared, plan.ratios[name], nm)
    if not torch.isfinite(weight).all():
        raise UserError(f"{name}: its pruned weights are not finite; try --dtype bfloat16 or --dtype float32")
    module.weight.data.copy_(weight.view_as(module.weight))


def _passes(block: nn.Module, index: int, inputs: BlockInputs, device: torch.device, keep: bool) -> Iterator[None]:
    """Run every sample or batch through ``block``, a step each; with ``keep``, what comes out replaces what went in."""
    from accelerate.utils import send_to_device

    arguments = send_to_device(inputs.arguments[index], device)
    hidden = inputs.hidden if isinstance(inputs.hidden, list) else inputs.hidden.unsqueeze(1)  # views, one sample each
    for i in range(len(hidden)):
        out = run_block(block, hidden[i].to(device), arguments)
        if keep:
            hidden[i] = out.to(hidden[i].device)
        yield


def snapshot(blocks: nn.ModuleList, layers: Sequence[PrunableLayer]) -> list[Tensor]:
    """Return a copy of every layer's weight, in the memory of the CPU, for ``restore``."""
    kept = []
    for index, group in groupby(layers, key=lambda layer: layer.block):
        with resident(blocks[index]):
            kept += [layer.module.weight.detach().to("cpu", copy=True) for layer in group]
    return kept


def restore(blocks: nn.ModuleList, layers: Sequence[PrunableLayer], kept: Sequence[Tensor]) -> None:
    """Put the weights of a ``snapshot`` back."""
    for index, group in groupby(zip(layers, kept, strict=True), key=lambda pair: pair[0].block):
        with resident(blocks[index], write=True):
            for layer, weight in group:
                layer.module.weight.data.copy_(weight)


def count_zeros(blocks: nn.ModuleList, layers: Sequence[PrunableLayer]) -> list[int]:
    """Return the number of zeros of each layer."""
    zeros = []
    for index, group in groupby(layers, key=lambda layer: layer.block):
        with resident(blocks[index]):
            zeros += [(layer.module.weight == 0).sum().item() for layer in group]
    return zeros


def check_saved(folder: Path, layers: Sequence[PrunableLayer], measured: float) -> None:
    """Read a saved folder back: its sparsity must be the one that the model in memory has."""
    written = checkpoint_sparsity(folder, [layer.name for layer in layers])
    if written != measured:
        raise RuntimeError(f"{folder}: holds a sparsity of {written}, the model has {measured}")


def checkpoint_sparsity(folder: Path, names: Sequence[str]) -> float:
    """Return the fraction of zeros in the named layers of a saved folder, read back from its safetensors files."""
    from safetensors import safe_open

    wanted = {f"{name}.weight" for name in names}
    zeros = total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in wanted.intersection(file.keys()):
                tensor = file.get_tensor(key)
                zeros, total = zeros + (tensor == 0).sum().item(), total + tensor.numel()
    return zeros / total
