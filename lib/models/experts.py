"""Experts of a mixture: each matrix of each expert as a linear layer, a view of the fused parameter that holds it.

transformers holds all experts of a block in one module with parameters of three dimensions, and marks that module with
how they lie in there (``transformers.integrations.moe.use_experts_implementation``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from lib.core.lazy import torch

# The matrices in each fused parameter of an experts module, and their names, which are those of most checkpoints.
ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
# What configs call the number of experts, and that of a token's.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_k", "moe_topk")
_MARKS = ("has_gate", "has_bias", "is_transposed")  # and, from transformers 5.8 on, is_concatenated


class Place(NamedTuple):
    """Place of a tensor: the parameter or buffer ``name``, or of an ``expert`` in it the matrix ``part`` of ROLES."""

    name: str
    expert: int | None = None
    part: int = 0

    def view(self, model: torch.nn.Module, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tensor in the ``model``, of which it is a view, or in another ``tensor`` of that name.

        Of an expert it is the matrix [out, in], or its bias [out].
        """
        owner, _, leaf = self.name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = getattr(module, leaf).data if tensor is None else tensor
        if self.expert is None:
            return tensor
        own = tensor[self.expert]
        own = own.mT if own.ndim == 2 and module.is_transposed else own
        parts = len(ROLES[leaf.removesuffix("_bias")])
        return own.chunk(parts)[self.part] if getattr(module, "is_concatenated", True) else own[self.part :: parts]


def is_experts(module: torch.nn.Module) -> bool:
    """Return whether ``module`` holds a mixture's experts, fused and marked as transformers marks them."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, torch.nn.Parameter) and down.ndim == 3 and all(hasattr(module, mark) for mark in _MARKS)


def matrices(experts: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the matrices of an experts module as linear layers by ``NUMBER.ROLE``, always the same ones.

    Each has a ``place``. They are not in the model's tree, where each weight would be listed twice. Their weights are
    on the meta device except while their block is lent (``bound_experts``).
    """
    if "matrices" not in vars(experts):
        fused = [name for name in ROLES if isinstance(getattr(experts, name, None), torch.nn.Parameter)]
        numbers = range(len(experts.down_proj))
        found = [Place(name, e, part) for e in numbers for name in fused for part in range(len(ROLES[name]))]
        vars(experts)["matrices"] = linears = {}
        for place in found:
            out, columns = place.view(experts).shape
            linear = torch.nn.Linear(columns, out, bias=experts.has_bias, device="meta").requires_grad_(False)
            linear.place = place
            linears[f"{place.expert}.{ROLES[place.name][place.part]}"] = linear
    return vars(experts)["matrices"]


@contextmanager
def bound_experts(block: torch.nn.Module) -> Iterator[None]:
    """Let the matrices of a block's experts be views of its parameters, and the block be computed with them.

    Other blocks, and this one afterwards, are computed as the model's configuration says.
    """
    found = [module for module in block.modules() if is_experts(module)]
    for experts in found:
        for linear in matrices(experts).values():
            for kind, end in (("weight", ""), ("bias", "_bias"))[: 1 + experts.has_bias]:
                place = linear.place._replace(name=linear.place.name + end)
                linear._parameters[kind] = torch.nn.Parameter(place.view(experts), requires_grad=False)
    try:
        with replaced_forwards({experts: partial(_by_expert, experts) for experts in found}):
            yield
    finally:
        for linear in (linear for experts in found for linear in matrices(experts).values()):
            linear.to("meta")  # or their memory would be held as long as they are
            vars(linear).pop("row_weights", None)


@contextmanager
def replaced_forwards(forwards: Mapping[torch.nn.Module, Callable]) -> Iterator[None]:
    """Let each of these modules call another function in place of its own forward."""
    before = [vars(module).get("forward") for module in forwards]  # accelerate sets some
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in zip(forwards, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _by_expert(
    self: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the experts' output [tokens, width], computed by their matrices: ``forward`` of an experts module.

    The numbers of each token's experts and the router's weights for them are [tokens, k], ``hidden`` [tokens, width].
    Each matrix is called once in a pass, also with no rows, and finds the router's weights of its rows [rows, 1] in
    its ``row_weights``.
    """
    linears, out, experts = matrices(self), torch.zeros_like(hidden), len(self.down_proj)
    counts = top_k_index.flatten().bincount(minlength=experts).tolist()  # one synchronisation for all experts
    places = top_k_index.flatten().argsort(stable=True)
    tokens, shares = (places // top_k_index.shape[1]).split(counts), top_k_weights.flatten()[places, None].split(counts)
    for expert, token, share in zip(range(experts), tokens, shares, strict=False):
        gate, up, down = (linears.get(f"{expert}.{role}") for role in ("gate_proj", "up_proj", "down_proj"))
        x = hidden[token]  # one tensor for gate and up, which so share a statistic
        for linear in filter(None, (gate, up, down)):
            linear.row_weights = share
        parts = [linear(x) for linear in (gate, up) if linear is not None]
        split = gate is not None and not self.is_concatenated  # gate's and up's columns in turns
        inner = torch.stack(parts, -1).flatten(-2) if split else torch.cat(parts, -1)
        y = down(self.act_fn(inner) if gate is None else self._apply_gate(inner))
        y = self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y
        out.index_add_(0, token, (y * share).to(out.dtype))
    return out


def router_types(model: torch.nn.Module) -> tuple[type, ...]:
    """Return the classes of a model's routers, () where its definition does not name them."""
    found = []
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in recorded if isinstance(recorded, (list, tuple)) else [recorded]:
            kind = getattr(recorder, "target_class", recorder)
            found += [kind] if isinstance(kind, type) else []
    return tuple(dict.fromkeys(found))


def active_share(model: torch.nn.Module) -> float:
    """Return through which fraction of a block's experts a token passes, 1 in a dense model."""
    config = getattr(model, "config", None)
    active, count = (max(getattr(config, name, None) or 0 for name in names) for names in (_ACTIVE, COUNTS))
    return active / count if active and count else 1.0
