"""Experts of a mixture: each matrix of each expert as a linear layer, a view of the fused parameter that holds it.

transformers holds all experts of a block in one module with parameters of three dimensions, and marks that module with
how they lie in there (``transformers.integrations.moe.use_experts_implementation``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from lib.core.lazy import torch, transformers

# The matrices in each fused parameter of an experts module, and their names, which are those of most checkpoints.
ROLES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
# What configs call the number of experts, and that of a token's.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_k", "moe_topk")
_MARKS = ("has_gate", "has_bias", "is_transposed")


class Place(NamedTuple):
    """Place of a matrix in an experts module: the parameter ``fused``, the number of the ``expert``, and which part."""

    fused: str
    expert: int
    part: int

    def view(self, experts: torch.nn.Module, fused: torch.Tensor) -> torch.Tensor:
        """Return the matrix [out, in] in ``fused`` [experts, ...], or the bias [out] in a bias [experts, ...]."""
        own = fused[self.expert]
        own = own.mT if own.ndim == 2 and experts.is_transposed else own
        parts = len(ROLES[self.fused])
        if parts == 1:
            return own
        return own.chunk(parts)[self.part] if experts.is_concatenated else own[self.part :: parts]


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
            out, columns = place.view(experts, getattr(experts, place.fused).to("meta")).shape
            linear = torch.nn.Linear(columns, out, bias=experts.has_bias, device="meta").requires_grad_(False)
            linear.place = place
            linears[f"{place.expert}.{ROLES[place.fused][place.part]}"] = linear
    return vars(experts)["matrices"]


@contextmanager
def bound_experts(block: torch.nn.Module) -> Iterator[None]:
    """Let the matrices of a block's experts be views of its parameters, and the block be computed with them.

    Other blocks, and this one afterwards, are computed as the model's configuration says.
    """
    found = [module for module in block.modules() if is_experts(module)]
    forwards = [vars(experts).get("forward") for experts in found]  # accelerate sets some
    for experts in found:
        for linear in matrices(experts).values():
            for kind, end in (("weight", ""), ("bias", "_bias"))[: 1 + experts.has_bias]:
                view = linear.place.view(experts, getattr(experts, linear.place.fused + end).data)
                linear._parameters[kind] = torch.nn.Parameter(view, requires_grad=False)
        experts.forward = partial(_by_expert, experts)
    try:
        yield
    finally:
        for experts, forward in zip(found, forwards, strict=True):
            del experts.forward
            if forward is not None:
                experts.forward = forward
            for linear in matrices(experts).values():  # or their memory would be held as long as they are
                linear.to("meta")
                vars(linear).pop("row_weights", None)


def _by_expert(
    self: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the experts' output [tokens, width], computed by their matrices: ``forward`` of an experts module.

    Args:
        hidden: [tokens, width].
        top_k_index, top_k_weights: the numbers of each token's experts and the router's weights for them, [tokens, k].

    Each matrix is called once in a pass, also with no rows, and finds the router's weights of its rows [rows, 1] in
    its ``row_weights``.
    """
    linears, out, experts = matrices(self), torch.zeros_like(hidden), len(self.down_proj)
    chosen = top_k_index.flatten()
    counts = chosen.bincount(minlength=experts).tolist()  # one synchronisation, and not one for each expert
    for expert, places in zip(range(experts), chosen.argsort(stable=True).split(counts), strict=False):
        token, slot = places // top_k_index.shape[1], places % top_k_index.shape[1]
        gate, up, down = (linears.get(f"{expert}.{role}") for role in ("gate_proj", "up_proj", "down_proj"))
        x, share = hidden[token], top_k_weights[token, slot, None]  # one tensor for gate and up, which so share it
        for linear in filter(None, (gate, up, down)):
            linear.row_weights = share

        if gate is None:
            inner = self.act_fn(up(x))
        elif self.is_concatenated:
            inner = self._apply_gate(torch.cat([gate(x), up(x)], -1))
        else:
            inner = self._apply_gate(torch.stack([gate(x), up(x)], -1).flatten(-2))
        y = down(inner)
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


def active_experts(model: torch.nn.Module) -> int:
    """Return through how many experts a token passes in each block, 0 in a dense model."""
    return max(getattr(getattr(model, "config", None), name, None) or 0 for name in _ACTIVE)


def set_experts(config: transformers.PreTrainedConfig, count: int) -> None:
    """Write the number of experts of a smaller model into its ``config``."""
    sizes = {name: getattr(config, name) for name in COUNTS if isinstance(getattr(config, name, None), int)}
    for name in (name for name, size in sizes.items() if size == max(sizes.values())):
        setattr(config, name, count)


def with_fewer_experts(model: torch.nn.Module, count: int) -> torch.nn.Module:
    """Return a model like ``model`` with ``count`` experts in each block, on the meta device."""
    config = copy.deepcopy(model.config)
    set_experts(config, count)
    with torch.device("meta"):
        return type(model)._from_config(config, dtype=config.dtype).eval()


def without_experts(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], keep: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    """Return what stays of the ``tensor`` of this name in a smaller model, where it has the ``shape``.

    Which experts stay is said for each experts module in ``keep``; the tensors beside it are the router's.
    """
    owners = [owner for owner in keep if name.startswith(owner.rpartition(".")[0] + ".")]
    for dimension, size in enumerate(shape):
        if tensor.shape[dimension] != size:
            rows = torch.tensor(keep[max(owners, key=len)], device=tensor.device)
            return tensor.index_select(dimension, rows)
    return tensor
