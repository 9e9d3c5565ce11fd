"""Layers of a model: where its blocks are, and the name and shape of every matrix to prune."""

from __future__ import annotations

import math
from typing import NamedTuple

from lib.core.errors import UserError
from lib.core.lazy import torch, transformers

SUPPORTED = (
    "LLaMA 1/2/3, Vicuna, Mistral, Qwen 2/3, SmolLM 2/3, Gemma 1/2/3, Phi 1/2/3, OPT, GPT-NeoX, GPT-J, Falcon, "
    "StableLM, OLMo 2, Granite, Cohere 1/2, GLM-4, StarCoder 2, BLOOM, LFM2 (its attention blocks)"
)


class Layer(NamedTuple):
    """A matrix to prune: its full dotted ``name``, the index of its ``block``, and its ``shape`` [out, in]."""

    name: str
    block: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def find_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """Return the dotted name of the list of a causal language model's transformer blocks, and the list.

    It is the outermost ModuleList whose entries all contain linear layers and whose length matches the config. If there
    is no such list, the model is not supported: a UserError.
    """
    lists: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and not inside and module and all(map(linear_modules, module)):
            lists[name] = module
    count = model.config.get_text_config().num_hidden_layers
    matching = [(name, blocks) for name, blocks in lists.items() if len(blocks) == count]
    if len(matching) != 1:
        problem = f"{architecture(model.config)} is not supported, its transformer blocks cannot be found"
        raise UserError("model", None, problem, f"supported: {SUPPORTED}")
    return matching[0]


def linear_modules(block: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers inside a block by their names within it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}


def prunable_layers(model: torch.nn.Module) -> tuple[Layer, ...]:
    """Return every linear layer inside the blocks, in the model's order (LLaMA: q k v o gate up down)."""
    prefix, blocks = find_blocks(model)
    return tuple(
        Layer(f"{prefix}.{i}.{name}", i, tuple(module.weight.shape))
        for i, block in enumerate(blocks)
        for name, module in linear_modules(block).items()
    )


def prunable_modules(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the modules of the prunable layers of a model in memory, by their full names."""
    return {layer.name: model.get_submodule(layer.name) for layer in prunable_layers(model)}


def check_support(given: str, model: torch.nn.Module) -> None:
    """Refuse the model ``given`` if its blocks contain matrices that would silently be left dense."""
    for block in find_blocks(model)[1]:
        linear = {id(p) for module in linear_modules(block).values() for p in module.parameters()}
        left_dense = [name for name, p in block.named_parameters() if p.ndim > 1 and id(p) not in linear]
        lists = [m for m in block.modules() if isinstance(m, torch.nn.ModuleList) and any(map(linear_modules, m))]
        if lists or any("expert" in name for name in left_dense):
            reason = "it is a mixture of experts"
        elif left_dense:
            reason = f"its blocks hold matrices that are not linear layers ({left_dense[0]})"
        else:
            continue
        problem = f"{architecture(model.config)} is not supported, {reason}"
        raise UserError("model", given, problem, f"supported: {SUPPORTED}")


def architecture(config: transformers.PreTrainedConfig) -> str:
    """Return the name of the model class that a config is for."""
    return (config.architectures or [type(config).__name__.removesuffix("Config")])[0]
