"""Plan files with the sparsity of each layer, and llm-compressor recipes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lib.core.errors import UserError
from lib.core.files import write_atomically
from lib.models.layers import Layer

_BUDGET = 1e-3  # by which a plan's own target may miss the ratios' mean: mixed N:M does

# llm-compressor's modifier for each of our pruners; its magnitude modifier takes one sparsity for all layers.
LLM_COMPRESSOR = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}


class SparsityPlan(NamedTuple("SparsityPlan", [("target", float), ("ratios", dict), ("nm", dict | None)])):
    """Plan of what to remove: ``ratios`` by layer name, and the ``target`` that they average to, weighted by size.

    With ``nm``, {layer name: (N, M)} or one (N, M) for all, N of every M columns are kept and each ratio is 1 - N/M.
    """

    def __new__(cls, target: float, ratios: dict[str, float], nm: dict | tuple[int, int] | None = None):
        if isinstance(nm, tuple):
            nm = dict.fromkeys(ratios, nm)
        for name, ratio in ratios.items():
            if not 0 <= ratio <= 1:  # a NaN fails too
                raise ValueError(f"{name}: a ratio of {ratio} is outside [0, 1]")
        if nm is not None and nm.keys() != ratios.keys():
            raise ValueError("N:M must be given for every layer that has a ratio")
        return super().__new__(cls, target, ratios, nm)


def save_plan(path: Path, plan: SparsityPlan, model: str, layers: Sequence[Layer], made_by: dict) -> None:
    """Write ``plan`` as JSON: its model, what made it, and each layer's ratio (and N:M) and shape by name."""
    rows = {}
    for layer in layers:
        rows[layer.name] = {"ratio": plan.ratios[layer.name], "shape": list(layer.shape)}
        if plan.nm is not None:
            rows[layer.name]["nm"] = list(plan.nm[layer.name])
    content = {"model": model, "target": plan.target, "made_by": made_by, "layers": rows}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def load_plan(path: Path, model: str, layers: Sequence[Layer]) -> SparsityPlan:
    """Return the plan in ``path``, which must match ``layers`` of ``model``.

    Raises:
        UserError: the file cannot be read, is a plan for another model or other layers, or misses its own target.
    """
    content = read_plan(path)
    target, rows = content["target"], content["layers"]
    if content["model"] != model:
        raise UserError("plan", f"{path}: is a plan for the model {content['model']}, not for {model}")
    names = {layer.name for layer in layers}
    for what, odd in (
        ("lacks the layer", names - rows.keys()),
        ("has a layer that is not in the model,", rows.keys() - names),
    ):
        if odd:
            text = f"{path}: {what} {sorted(odd)[0]} ({len(odd)} in all); make the plan again with --save_plan"
            raise UserError("plan", text)
    for layer in layers:
        if rows[layer.name]["shape"] != list(layer.shape):
            raise UserError("plan", f"{path}: {layer.name} has another shape there, {rows[layer.name]['shape']}")
    has_nm = {"nm" in row for row in rows.values()}
    try:
        nm = {layer.name: tuple(rows[layer.name]["nm"]) for layer in layers} if True in has_nm else None
        if nm and any(type(n) is not int or type(m) is not int for n, m in nm.values()):
            raise ValueError("N and M must be whole numbers")
        if nm and any(not 0 < n <= m or abs(rows[name]["ratio"] - (1 - n / m)) > 1e-9 for name, (n, m) in nm.items()):
            raise ValueError("an N:M and its ratio contradict each other")
        plan = SparsityPlan(target, {layer.name: float(rows[layer.name]["ratio"]) for layer in layers}, nm)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("plan", f"{path}: is not a sparsity plan ({error})") from error
    for layer in layers if nm else ():
        if layer.shape[1] % nm[layer.name][1]:
            raise UserError("plan", f"{path}: {layer.name} has {layer.shape[1]} columns, which "
                            f"{nm[layer.name][1]} does not divide")  # fmt: skip
    total = sum(layer.size for layer in layers)
    mean = sum(plan.ratios[layer.name] * layer.size for layer in layers) / total
    if abs(mean - target) > _BUDGET:
        raise UserError("plan", f"{path}: its ratios add up to {mean:.4f} and its target is {target}; fix one of them")
    return plan


def read_plan(path: Path) -> dict:
    """Return the content of a plan's file: ``model``, ``target`` in (0, 1), ``layers``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["layers"].values():
            row["ratio"], row["shape"]
        if not (isinstance(content["model"], str) and 0 < content["target"] < 1 and content["layers"]):
            raise ValueError("its model, target or layers are not what they should be")
    except OSError as error:
        raise UserError("plan", f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("plan", f"{path}: is not a sparsity plan ({type(error).__name__}: {error})") from error
    return content


def llm_compressor_recipe(plan: SparsityPlan, layers: Sequence[Layer], pruner: str) -> str:
    """Return an llm-compressor recipe (YAML) for this plan: a sparsity for each target, in model order.

    Layers of ratio 0 are left out: llm-compressor's SparseGPT would remove a weight or two from each.

    Raises:
        UserError: llm-compressor cannot express the plan.
    """
    if pruner not in LLM_COMPRESSOR:
        takes = f"llm-compressor takes layer-wise sparsity with {' and '.join(LLM_COMPRESSOR)} only"
        raise UserError("export_llmcompressor", f"with {pruner}: {takes}")
    layers = [layer for layer in layers if plan.ratios[layer.name] > 0]
    patterns = {plan.nm[layer.name] for layer in layers} if plan.nm else {None}
    if len(patterns) > 1:
        fix = "use --sparsity_type unstructured"
        raise UserError("export_llmcompressor", f"with mixed N:M: llm-compressor has one N:M for all layers; {fix}")
    pattern = patterns.pop()
    structure = "0:0" if pattern is None else f"{pattern[1] - pattern[0]}:{pattern[1]}"  # there N counts the zeros
    lines = [
        "pruning_stage:",
        "  pruning_modifiers:",
        f"    {LLM_COMPRESSOR[pruner]}:",
        f'      mask_structure: "{structure}"',
    ]
    lines += ["      sparsity:"] + [f"        - {plan.ratios[layer.name]:.6f}" for layer in layers]
    lines += ["      targets:"] + [f"        - {layer.name}" for layer in layers]
    return "\n".join(lines) + "\n"
