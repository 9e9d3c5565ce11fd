"""Memory: free bytes of GPUs and CPU, and what a model needs of them, from shapes alone."""

from __future__ import annotations

import gc
import math
import resource
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lib.core import cpu, processes
from lib.core.lazy import torch
from lib.models.experts import active_share
from lib.models.layers import Layer, find_blocks, prunable_layers
from lib.models.weights import Block, Weights

# Tokens whose logits are in memory at a time in a search for prices.
LOGIT_TOKENS = 256
# Bytes of float32 Hessians of a block's experts for which room is left: a pass over more of them at a time saves time.
EXPERT_HESSIANS = 8 * 2**30
# Fraction of the free memory that they may fill.
_FILLED = 0.7
# Bytes for a GPU's context, the libraries' workspaces and the allocator's gaps.
_OVERHEAD = 2**30
# The largest vocabularies' files, where they cannot be looked at before the download.
_TOKENIZER_BYTES = 2**25


def free_bytes(gpu: torch.device | int) -> int:
    """Return the GPU memory that is free, including memory that torch holds for no tensor."""
    return torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)


def free_ram() -> int:
    """Return the bytes that this process can have without swapping, or that a container, a job or ``ulimit`` allows."""
    import psutil

    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    room = [] if addresses == resource.RLIM_INFINITY else [addresses - psutil.Process().memory_info().vms]
    return max(0, min([psutil.virtual_memory().available, *group_rooms(), *room]))


def group_rooms(own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Return the bytes that each control group around this process still allows, where one has a limit.

    Those of its cached files do not count as used: the kernel gives them up (as in MemAvailable).
    """
    rooms = []
    for line in own.read_text().splitlines() if own.is_file() else ():  # elsewhere than on Linux it is missing
        # "4:memory:/job/step" for version 1, and "0::/job/step" for version 2.
        _, kinds, path = line.split(":", 2)
        folder, limit, usage, total = groups, "memory.max", "memory.current", ""
        if "memory" in kinds.split(","):
            folder, limit, usage, total = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        # Inside a container, what lies there may be the group itself: the folder is among these parents.
        group = folder / path.lstrip("/")
        for parent in (group, *group.parents):
            with suppress(OSError, ValueError):  # without the files, or "max"
                stat = dict(line.split() for line in (parent / "memory.stat").read_text().splitlines())
                cached = sum(int(stat.get(f"{total}{age}_file", 0)) for age in ("active", "inactive"))
                rooms.append(int((parent / limit).read_text()) - int((parent / usage).read_text()) + cached)
    return rooms


def freest() -> torch.device:
    """Return the GPU with the most free memory, or the CPU where there is none."""
    gpus = range(cpu.gpus())
    return torch.device("cuda", max(gpus, key=free_bytes)) if gpus else torch.device("cpu")


def free_memory(reserve: int) -> dict[int | str, int]:
    """Return how many bytes of weights each GPU and the CPU may hold; of several processes, each its GPU or share.

    ``reserve`` bytes are left for the work on each GPU, or on the CPU where there is none.
    """
    gc.collect()  # a model that was spread holds itself by accelerate's hooks, and would still fill the GPUs
    if gpu := processes.device():
        return {gpu.index: max(0, free_bytes(gpu) - reserve)}
    gpus = {i: max(0, free_bytes(i) - reserve) for i in range(cpu.gpus())}
    return gpus | {"cpu": max(0, free_ram() // processes.processes_on_machine() - (0 if gpus else reserve))}


def place_of(device: torch.device) -> int | str:
    """Return by which key ``free_memory`` has a device: the GPU's index, or ``cpu``."""
    return "cpu" if device.type == "cpu" else device.index or 0


def working_set(
    skeleton: torch.nn.Module, dtype: torch.dtype, hessians: bool, windows: int, seqlen: int, copies: float = 4
) -> int:
    """Return the bytes that a GPU, or the CPU, needs besides the weights that it holds: at most, from shapes alone.

    They are the largest block (one stored on the CPU is lent to the GPU), embedding and head, ``copies`` float32
    matrices of the largest weight's size (``Pruner.copies``), the hidden states of ``windows`` windows of ``seqlen``
    tokens, and the activations and logits of one. With ``hessians`` there is a float32 Hessian for each layer of a
    block, and two more of the largest to factorise it; of a mixture's experts as many as EXPERT_HESSIANS hold.
    """
    vocabulary, width = skeleton.get_input_embeddings().weight.shape
    weights = statistics = activations = 0
    share = active_share(skeleton)
    for block, layers in zip(find_blocks(skeleton)[1], _by_block(prunable_layers(skeleton)), strict=True):
        weights = max(weights, sum(p.numel() for p in block.parameters()))
        scores = math.ceil(copies * max(layer.size for layer in layers))
        held = sum(layer.shape[1] ** 2 for layer in layers if not layer.expert)
        of_experts = [layer.shape[1] ** 2 for layer in layers if layer.expert]
        held += min(sum(of_experts), EXPERT_HESSIANS // 4) + max(of_experts, default=0)  # and that of all tokens
        largest = max(layer.shape[1] ** 2 for layer in layers)
        statistics = max(statistics, scores + (held + 2 * largest if hessians else 0))
        outputs = math.ceil(sum(layer.shape[0] * (share if layer.expert else 1) for layer in layers))
        activations = max(activations, outputs + 4 * width)
    half = dtype.itemsize
    weights += 2 * vocabulary * width
    passing = seqlen * (windows * width + activations + vocabulary)
    return half * (weights + passing) + 4 * statistics + _OVERHEAD


def hessian_groups(block: Block) -> list[list[str]]:
    """Return the names of a block's layers in groups whose Hessians fit into free memory, the same in all processes.

    All layers that belong to no expert are in the last group, and the matrices of an expert in one.
    """
    gpu = block.device.type == "cuda"
    free = free_bytes(block.device) if gpu else free_ram() // processes.processes_on_machine()
    columns = {name: linear.weight.shape[1] for name, linear in block.linears.items()}
    # One is factorised beside those that wait, among which is that of all tokens.
    room = min(processes.gathered(free)) * _FILLED - 5 * 4 * max(columns.values()) ** 2
    by_expert = defaultdict(list)
    for name, linear in block.linears.items():
        by_expert[name.rpartition(".")[0] if hasattr(linear, "place") else ""].append(name)
    outside, groups, used = by_expert.pop("", []), [[]], 0
    for names in by_expert.values():
        # Gate and up share an input, and so a Hessian.
        needed = (4 if gpu else 8) * sum({name.endswith("down_proj"): columns[name] ** 2 for name in names}.values())
        if used and used + needed > room:
            groups, used = [*groups, []], 0
        groups[-1] += names
        used += needed
    groups[-1] += outside
    return groups


def _weight_bytes(skeleton: torch.nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize


def fits_in_memory(skeleton: torch.nn.Module, dtype: torch.dtype, reserve: int, copied: Sequence[Layer] = ()) -> bool:
    """Return whether the weights fit in ``free_memory``, beside a copy of the layers ``copied`` in the CPU's memory."""
    free, copy = free_memory(reserve), dtype.itemsize * sum(layer.size for layer in copied)
    beside = copy if "cpu" in free else 0  # else the CPU's memory holds nothing but the copy
    ram = free.get("cpu", free_ram() // processes.processes_on_machine())
    return copy <= ram and _weight_bytes(skeleton, dtype) + beside <= sum(free.values())


def saved_bytes(skeleton: torch.nn.Module, path: str, dtype: torch.dtype) -> int:
    """Return the size in bytes of the folder that ``save_llm`` writes: weights, and the other files of ``path``."""
    if not Path(path).is_dir():
        return _weight_bytes(skeleton, dtype) + _TOKENIZER_BYTES
    kinds = (".safetensors", ".bin", ".gguf", ".pth", ".pt")
    files = [file for file in Path(path).iterdir() if file.is_file() and file.suffix not in kinds]
    return _weight_bytes(skeleton, dtype) + sum(file.stat().st_size for file in files)


def rank_bytes(layers: Sequence[Layer], whole: bool = False) -> int:
    """Return the memory of the ranks of ``layers``, within rows or within the ``whole`` matrix."""
    return sum(layer.size * (2 if (layer.size if whole else layer.shape[1]) <= 2**15 else 4) for layer in layers)


def activation_bytes(layers: Sequence[Layer], dtype: torch.dtype, tokens: int, share: float = 1.0) -> int:
    """Return at most the bytes of copies of ``layers`` and of activations; a token meets this ``share`` of experts."""
    widths = math.ceil(sum(sum(layer.shape) * (share if layer.expert else 1) for layer in layers))
    return dtype.itemsize * (sum(layer.size for layer in layers) + 3 * tokens * widths)


def price_working_set(
    model: torch.nn.Module, layers: Sequence[Layer], dtype: torch.dtype, tokens: int, step: int, windows: int
) -> int:
    """Return the bytes that a search for prices needs beside the weights and ranks: an upper bound, from shapes alone.

    They are a block's pruned copies and its activations for the ``step`` windows of a step, of ``tokens`` each, one
    matrix's sort, what enters each block, the hidden states of all ``windows``, for calibration and held out, and the
    logits of some tokens with their gradients.
    """
    vocabulary, width = model.get_input_embeddings().weight.shape
    blocks = _by_block(layers)
    largest = max(activation_bytes(block, dtype, step * tokens, active_share(model)) for block in blocks)
    hidden = dtype.itemsize * (step * len(blocks) + 3 * windows) * tokens * width
    # Scores, their order (int64) and its temporaries; a gradient later takes their place.
    sort = 24 * max(layer.size for layer in layers)
    return largest + hidden + sort + 6 * 4 * LOGIT_TOKENS * vocabulary


def gradient_bytes(
    weights: Weights, stored: Mapping[str, int], tokens: int, step: int, windows: int, dtype: torch.dtype | None
) -> dict[int | str, tuple[int, int]]:
    """Return what a walk that takes gradients needs on each GPU (by its index) that holds blocks, or on the ``cpu``.

    It is what it needs at least, and what keeping all activations needs besides. ``stored`` are the bytes that are kept
    for each layer, by name, and ``dtype`` is that of the products, None for the model's; the others are those of
    ``price_working_set``.
    """
    model, needs = weights.model, {}
    work = price_working_set(model, weights.layers, model.dtype, tokens, step, windows)
    for block, layers in zip(weights.visit(), _by_block(weights.layers), strict=True):
        least, more = needs.get(place_of(block.device), (work, 0))
        least += sum(stored[layer.name] for layer in layers)
        more += activation_bytes(layers, dtype or model.dtype, step * tokens, active_share(model))
        needs[place_of(block.device)] = (least, more)
    return needs


def trained_bytes(layers: Sequence[Layer], left: float, options: NamedTuple) -> int:
    """Return the bytes of master copy and Adam's moments of ``layers``, of whose weights the fraction ``left`` is left.

    ``options`` are ``lib.recovery.distill.RecoveryOptions``.
    """
    each = 12 if options.states == "float32" else 6.1  # with eight bits, 256 numbers share two scales of four bytes
    survivors = sum(math.ceil(layer.size * left) for layer in layers)
    if options.train == "low_rank":
        return math.ceil(options.rank * sum(sum(layer.shape) for layer in layers) * each) + 4 * survivors
    return math.ceil(survivors * each) if options.train == "surviving" else 0


def trained_block_bytes(
    model: torch.nn.Module, layers: Sequence[Layer], stored: Mapping[str, int], dtype: torch.dtype, tokens: int
) -> int:
    """Return what training one block at a time needs at most: a block and its dense one, states, activations.

    ``stored`` are the bytes that are kept for each layer, by name, and ``tokens`` those of a step.
    """
    return max(
        2 * dtype.itemsize * sum(layer.size for layer in block)
        + sum(stored[layer.name] for layer in block)
        + activation_bytes(block, dtype, tokens, active_share(model))
        for block in _by_block(layers)
    )


def _by_block(layers: Sequence[Layer]) -> list[list[Layer]]:
    return [[layer for layer in layers if layer.block == i] for i in range(layers[-1].block + 1)]
