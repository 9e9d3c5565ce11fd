"""Walks the blocks: measures, prunes, passes the data on."""

import logging
from collections.abc import Iterator, Mapping, Sequence
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

    For a pruner that wants a statistic, each block sees the calibration ``windows`` [samples, tokens] twice: once dense,
    for the statistics of its layers' inputs, and once pruned, for what the next block gets (as published).

    Args:
        metric: what the plan was made from, by layer name; for the report only.

    Raises:
        UserError: statistics or weights that are not finite, or a Hessian that cannot be factorised; names the layer.
    """
    inputs = None if pruner.statistic is None else catch_block_inputs(model, blocks, windows)
    report = []
    grouped = [list(group) for _, group in groupby(layers, key=lambda layer: layer.block)]
    for group in tqdm(grouped, desc="pruning", unit="block", disable=None):
        index = group[0].block
        with resident(blocks[index]) as device:
            linears = {layer.name: layer.module for layer in group}
            for names, prepared in _prepared(linears, pruner, inputs, blocks[index], index, device):
                for name in names:
                    _prune_layer(linears[name], name, plan, pruner, prepared)
            if inputs is not None and group is not grouped[-1]:
                for _ in _passes(blocks[index], index, inputs, device, keep=True):
                    pass
            for layer in group:
                weight = layer.module.weight
                value = None if metric is None else metric[layer.name]
                ratio = plan.ratios[layer.name]
                report.append(LayerReport(layer.name, tuple(weight.shape), value, ratio, sparsity(weight)))
    return report


def _prepared(
    linears: dict[str, nn.Module],
    pruner: Pruner,
    inputs: BlockInputs | None,
    block: nn.Module,
    index: int,
    device: torch.device,
) -> Iterator[tuple[list[str], object]]:
    """Yield the layers that share an input, and what the pruner makes of that input's statistic."""
    if inputs is None:
        yield list(linears), None
        return
    passes = _passes(block, index, inputs, device, keep=False)
    statistics = input_statistics(linears, pruner.statistic, len(inputs.hidden), passes)
    while statistics:
        names, value = statistics.pop(0)  # a Hessian is let go of before the next one is factorised
        try:
            yield names, pruner.prepare(value)
        except NotPositiveDefinite as error:
            raise UserError(f"{names[0]}: {error}; give more calibration text (--nsamples)") from error


def _prune_layer(module: nn.Module, name: str, plan: SparsityPlan, pruner: Pruner, prepared: object) -> None:
    if not torch.isfinite(module.weight).all():
        raise UserError(f"{name}: its weights are not finite; the checkpoint is damaged")
    weight = pruner.prune(module.weight.data, prepared, plan.ratios[name], plan.nm)
    if not torch.isfinite(weight).all():
        raise UserError(f"{name}: its pruned weights are not finite; try --dtype bfloat16 or --dtype float32")
    module.weight.data.copy_(weight)


def _passes(
    block: nn.Module, index: int, inputs: BlockInputs, device: torch.device, keep: bool
) -> Iterator[None]:
    """Run every sample through ``block``, a step each; with ``keep``, what comes out replaces what went in."""
    from accelerate.utils import send_to_device

    arguments = send_to_device(inputs.arguments[index], device)
    for sample in range(len(inputs.hidden)):
        out = run_block(block, inputs.hidden[sample : sample + 1].to(device), arguments)
        if keep:
            inputs.hidden[sample : sample + 1] = out
        yield


def count_zeros(blocks: nn.ModuleList, layers: Sequence[PrunableLayer]) -> list[int]:
    """Return the number of zeros of each layer."""
    zeros = []
    for index, group in groupby(layers, key=lambda layer: layer.block):
        with resident(blocks[index]):
            zeros += [(layer.module.weight == 0).sum().item() for layer in group]
    return zeros


def copy_weights(blocks: nn.ModuleList, layers: Sequence[PrunableLayer]) -> list[Tensor]:
    """Return a copy of each layer's weight, in CPU memory."""
    weights = []
    for index, group in groupby(layers, key=lambda layer: layer.block):
        with resident(blocks[index]):
            weights += [layer.module.weight.detach().to("cpu", copy=True) for layer in group]
    return weights


def set_weights(blocks: nn.ModuleList, layers: Sequence[PrunableLayer], weights: Sequence[Tensor]) -> None:
    """Give each layer the weight that ``copy_weights`` returned for it."""
    remaining = iter(weights)
    for index, group in groupby(layers, key=lambda layer: layer.block):
        with resident(blocks[index]):
            for layer in group:
                layer.module.weight.data.copy_(next(remaining))


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
