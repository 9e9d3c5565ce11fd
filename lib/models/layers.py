"""Layers of a model: its blocks, the name and shape of every matrix to prune, and what checkpoints call each tensor."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lib.core.errors import UserError
from lib.core.lazy import torch, transformers
from lib.models.experts import ROLES, Place, is_experts, matrices, router_types

SUPPORTED = (
    "LLaMA 1/2/3, Vicuna, Mistral, Qwen 2/3, SmolLM 2/3, Gemma 1/2/3, Phi 1/2/3, OPT, GPT-NeoX, GPT-J, Falcon, "
    "StableLM, OLMo 2, Granite, Cohere 1/2, GLM-4, StarCoder 2, BLOOM, LFM2, and of mixtures of experts Mixtral, "
    "Qwen 2/3/3.5-MoE, Qwen3-Next, OLMoE, DeepSeek V2/V3, GLM-4-MoE, gpt-oss, Granite-MoE, Ernie 4.5, Nemotron-H"
)


class Layer(NamedTuple):
    """A matrix to prune: its full dotted ``name``, the index of its ``block``, and its ``shape`` [out, in]."""

    name: str
    block: int
    shape: tuple[int, ...]
    expert: str = ""  # full name of the expert that it belongs to

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


def linear_modules(block: torch.nn.Module, routers: tuple[type, ...] = ()) -> dict[str, torch.nn.Linear]:
    """Return the linear layers inside a block by their names within it, the matrices of its experts among them.

    What steers a mixture is left out: linear layers that are, or lie in, modules of the classes ``routers``, and gates
    of one row.
    """
    found: dict[str, torch.nn.Linear] = {}
    steering: tuple[str, ...] = ()
    for name, module in block.named_modules():  # a module comes before those inside it
        steering += (f"{name}.",) if isinstance(module, routers) else ()
        if is_experts(module):
            found |= {f"{name}.{key}": linear for key, linear in matrices(module).items()}
        elif isinstance(module, torch.nn.Linear) and module.out_features > 1 and not f"{name}.".startswith(steering):
            found[name] = module
    return found


def prunable_layers(model: torch.nn.Module) -> tuple[Layer, ...]:
    """Return every linear layer inside the blocks, in the model's order (LLaMA: q k v o gate up down)."""
    (prefix, blocks), layers = find_blocks(model), []
    for key, module in linear_modules(blocks, router_types(model)).items():
        name, block = f"{prefix}.{key}", int(key.partition(".")[0])
        expert = name.rpartition(".")[0] if hasattr(module, "place") else ""
        layers.append(Layer(name, block, tuple(module.weight.shape), expert))
    return tuple(layers)


def check_support(given: str, model: torch.nn.Module) -> None:
    """Refuse the model ``given`` if its blocks contain matrices that would silently be left dense."""
    routers = router_types(model)
    for block in find_blocks(model)[1]:
        experts = [module for module in block.modules() if is_experts(module)]
        known = [m for m in block.modules() if isinstance(m, routers) or getattr(m, "out_features", 0) == 1]
        # A depthwise convolution has a few weights for each channel, as a norm has one.
        known += [m for m in block.modules() if isinstance(m, torch.nn.Conv1d) and m.groups == m.in_channels]
        known += [*experts, *linear_modules(block, routers).values()]
        covered = {id(p) for module in known for p in module.parameters()}
        left_dense = [name for name, p in block.named_parameters() if p.ndim > 1 and id(p) not in covered]
        lists = [m for m in block.modules() if isinstance(m, torch.nn.ModuleList) and any(map(linear_modules, m))]
        if experts and not hasattr(experts[0], "is_concatenated"):
            reason = "a mixture of experts needs transformers 5.8"
        elif experts and not routers:
            reason = "it is a mixture of experts that does not name its routers"
        elif lists or any("expert" in name for name in left_dense):
            reason = "it is a mixture whose experts are not held as transformers marks them"
        elif left_dense:
            reason = f"its blocks hold matrices that are not linear layers ({left_dense[0]})"
        else:
            continue
        problem = f"{architecture(model.config)} is not supported, {reason}"
        raise UserError("model", given, problem, f"supported: {SUPPORTED}")


def refuse_experts(field: str, value: object, layers: Sequence[Layer]) -> None:
    """Refuse a mixture of experts where only dense models are supported."""
    if any(layer.expert for layer in layers):
        raise UserError(field, value, "is not supported for mixtures of experts")


# What is in a model for each tensor of a checkpoint, by its name there.
Layout = dict[str, Place]


def stored_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers that a checkpoint holds; of tied ones the first."""
    persistent = model.state_dict(keep_vars=True).keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def own_layout(model: torch.nn.Module) -> Layout:
    """Return the layout of a checkpoint with the model's own names and experts fused."""
    return {name: Place(name) for name, _ in stored_tensors(model)}


def published_layout(model: torch.nn.Module) -> Layout:
    """Return the layout of the checkpoint that ``save_pretrained`` writes; one that cannot be told is a UserError.

    transformers' own conversion is asked, with numbers in place of weights: those that come together under a name say
    what is stored there.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return own_layout(model)
    meanings, stand_ins, layout = [], {}, {}
    owners = {name: module for name, module in model.named_modules() if is_experts(module)}
    for name, tensor in stored_tensors(model):
        owner, _, leaf = name.rpartition(".")
        own, stand_ins[name] = [Place(name)], torch.full([1] * tensor.ndim, len(meanings))
        if owner in owners and leaf in ROLES:  # [experts, parts, 1], as its matrices lie in there
            places = (linear.place for linear in matrices(owners[owner]).values())
            own = [place._replace(name=name) for place in places if place.name == leaf]
            numbers = torch.arange(len(own)).view(len(tensor), -1, 1) + len(meanings)
            stand_ins[name] = numbers.mT if owners[owner].is_transposed else numbers
        meanings += own

    bare = copy.copy(model)  # how the model was loaded does not matter: it is written under the same names
    vars(bare).pop("_weight_conversions", None)
    state = transformers.core_model_loading.revert_weight_conversion(bare, dict(stand_ins))
    for stored, numbers in state.items():
        first = meanings[int(numbers.flatten()[0])]
        whole = stand_ins[first.name]
        if numbers.numel() > 1 and not torch.equal(numbers.flatten(), whole.flatten()):
            problem = f"its checkpoints hold {stored} in a way that is not supported"
            raise UserError("model", architecture(model.config), problem, f"supported: {SUPPORTED}")
        layout[stored] = Place(first.name) if numbers.numel() == whole.numel() else first
    return layout


def architecture(config: transformers.PreTrainedConfig) -> str:
    """Return the name of the model class that a config is for."""
    return (config.architectures or [type(config).__name__.removesuffix("Config")])[0]
