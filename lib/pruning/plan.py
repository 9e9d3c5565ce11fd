"""Plan files with the sparsity of each layer, and llm-compressor recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lib.core.errors import UserError
from lib.core.files import reading, write_atomically
from lib.models.layers import Layer

# llm-compressor's modifier for each of our pruners; its magnitude modifier takes one sparsity for all layers.
LLM_COMPRESSOR = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}


class SparsityPlan(NamedTuple("SparsityPlan", [("target", float), ("ratios", dict), ("nm", dict | None)])):
    """Plan of what to remove: ``ratios`` by layer name, and the ``target`` that they average to, weighted by size.

    With ``nm``, {layer name: (N, M)} or one (N, M) for all, N of every M columns are kept and each ratio is 1 - N/M.
    """

    def __new__(cls, target: float, ratios: dict[str, float], nm: dict | tuple[int, int] | None = None):
        for name, ratio in ratios.items():
            if not 0 <= ratio <= 1:  # a NaN fails too
                raise ValueError(f"{name}: a ratio of {ratio} is outside [0, 1]")
        return super().__new__(cls, target, ratios, dict.fromkeys(ratios, nm) if isinstance(nm, tuple) else nm)


def save_plan(path: Path, plan: SparsityPlan, model: str, layers: Sequence[Layer], made_by: dict) -> None:
    """Write ``plan`` as JSON: its model, what made it, and each layer's ratio (and N:M) and shape by name."""
    rows = {layer.name: {"ratio": plan.ratios[layer.name], "shape": list(layer.shape)} for layer in layers}
    for name, nm in (plan.nm or {}).items():
        rows[name]["nm"] = list(nm)
    content = {"model": model, "target": plan.target, "made_by": made_by, "layers": rows}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def load_plan(path: Path, model: str, layers: Sequence[Layer]) -> SparsityPlan:
    """Return the plan in ``path``, which must match ``layers`` of ``model`` and its own target, or is a UserError."""
    content = read_plan(path)
    target, rows = content["target"], content["layers"]
    if content["model"] != model:
        raise UserError("plan", path, f"is a plan for the model {content['model']}, not for {model}")
    shapes, planned = {x.name: list(x.shape) for x in layers}, {name: row["shape"] for name, row in rows.items()}
    for name in shapes | planned:
        if shapes.get(name) != planned.get(name):
            problem = f"{name} has shape {planned.get(name)} there, and {shapes.get(name)} in the model"
            raise UserError("plan", path, problem, "make the plan again with --save_plan")
    with reading(path, "is not a sparsity plan", "plan"):
        ratios = {layer.name: float(rows[layer.name]["ratio"]) for layer in layers}
        nm = {name: tuple(row["nm"]) for name, row in rows.items() if "nm" in row} or None
        plan = SparsityPlan(target, ratios, nm)
        for layer in layers if nm else ():
            n, m = nm[layer.name]
            if not 0 < n <= m or layer.shape[1] % m or abs(ratios[layer.name] - (1 - n / m)) > 1e-9:
                raise ValueError(f"{layer.name}: {n}:{m} does not fit its ratio or its {layer.shape[1]} columns")
    mean = sum(ratios[layer.name] * layer.size for layer in layers) / sum(layer.size for layer in layers)
    if abs(mean - target) > 1e-3:  # mixed N:M misses it by less
        raise UserError("plan", path, f"its ratios add up to {mean:.4f} and its target is {target}", "fix one of them")
    return plan


def read_plan(path: Path) -> dict:
    """Return the content of a plan's file: ``model``, ``target`` in (0, 1), ``layers``."""
    with reading(path, "is not a sparsity plan", "plan"):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["layers"].values():
            row["ratio"], row["shape"]
        if not (isinstance(content["model"], str) and 0 < content["target"] < 1):
            raise ValueError("its model or target is not what it should be")
    return content


def llm_compressor_recipe(plan: SparsityPlan, layers: Sequence[Layer], pruner: str) -> str:
    """Return an llm-compressor recipe (YAML): a sparsity for each target, in model order, by a LLM_COMPRESSOR pruner.

    Layers of ratio 0 are left out: llm-compressor's SparseGPT would remove a weight or two from each. Mixed N:M, which
    llm-compressor cannot express, is a UserError.
    """
    import yaml

    layers = [layer for layer in layers if plan.ratios[layer.name] > 0]
    patterns = {plan.nm[layer.name] for layer in layers} if plan.nm else {(0, 0)}
    if len(patterns) > 1:
        problem, fix = "llm-compressor has one N:M for all layers", "use --sparsity_type unstructured"
        raise UserError("export_llmcompressor", "with mixed N:M", problem, fix)
    ((n, m),) = patterns
    modifier = {
        "mask_structure": f"{m - n}:{m}",  # there N counts the zeros
        "sparsity": [round(plan.ratios[layer.name], 6) for layer in layers],
        "targets": [layer.name for layer in layers],
    }
    recipe = {"pruning_stage": {"pruning_modifiers": {LLM_COMPRESSOR[pruner]: modifier}}}
    return yaml.safe_dump(recipe, sort_keys=False)
