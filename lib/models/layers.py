"""Layers of a model: where each family keeps its blocks, and the name and shape of every matrix to prune."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lib.core.errors import UserError
from lib.core.lazy import torch, transformers

if TYPE_CHECKING:
    from torch import nn

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


def decoder_blocks(model: nn.Module) -> str | None:
    """Return the name of the ModuleList of transformer blocks of a causal language model, None if not found.

    It is the outermost ModuleList whose entries all contain linear layers and whose length matches the config.
    """
    found: list[str] = []
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, torch.nn.ModuleList) and not inside and module and all(map(linear_modules, module)):
            found.append(name)
    found = [name for name in found if len(model.get_submodule(name)) == count]
    return found[0] if len(found) == 1 else None


# How the blocks of a kind of model are found; a new kind is one function and one line.
FAMILIES: dict[str, Callable[[nn.Module], str | None]] = {"decoder": decoder_blocks}


def find_blocks(model: nn.Module, family: str = "decoder") -> tuple[str, nn.ModuleList]:
    """Return the dotted name of the list of blocks, and the list."""
    name = FAMILIES[family](model)
    if name is None:
        raise UserError(None, f"{type(model).__name__}: its transformer blocks cannot be found; supported: {SUPPORTED}")
    return name, model.get_submodule(name)


def linear_modules(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside a block by their names within it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}


def prunable_layers(model: nn.Module, family: str = "decoder") -> tuple[Layer, ...]:
    """Return every linear layer inside the blocks, in the model's order (LLaMA: q k v o gate up down)."""
    prefix, blocks = find_blocks(model, family)
    return tuple(
        Layer(f"{prefix}.{i}.{name}", i, tuple(module.weight.shape))
        for i, block in enumerate(blocks)
        for name, module in linear_modules(block).items()
    )


def check_support(model: nn.Module) -> None:
    """Refuse, by name, a model whose blocks contain matrices that would silently be left dense.

    Raises:
        UserError: names the unsupported part.
    """
    reason = _unsupported(model)
    if reason:
        raise UserError(None, f"{architecture(model.config)} is not supported, {reason}; supported: {SUPPORTED}")


def prunable_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the modules of the prunable layers of a model in memory, by their full names."""
    return {layer.name: model.get_submodule(layer.name) for layer in prunable_layers(model)}


def _unsupported(model: nn.Module) -> str | None:
    if any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules()):
        return "its layers are transformers' Conv1D, not nn.Linear"
    name = decoder_blocks(model)
    if name is None:
        return "its transformer blocks cannot be found"
    for block in model.get_submodule(name):
        linear = {id(p) for module in linear_modules(block).values() for p in module.parameters()}
        other = [n for n, p in block.named_parameters() if p.ndim > 1 and id(p) not in linear]
        lists = [m for m in block.modules() if isinstance(m, torch.nn.ModuleList) and any(map(linear_modules, m))]
        if lists or any("expert" in n for n in other):
            return "it is a mixture of experts"
        if other:
            return f"its blocks hold matrices that are not linear layers ({other[0]})"
    return None


def architecture(config) -> str:
    """Return the name of the model class that a config is for."""
    return (config.architectures or [type(config).__name__.removesuffix("Config")])[0]
