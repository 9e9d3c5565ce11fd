"""CPU: its instruction sets and cores, and the number of GPUs beside it. Nothing else asks the machine for them."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

from lib.core.lazy import torch

ARM = ("aarch64", "arm64")  # as platform.machine() calls it on Linux and on macOS
# Without one of these instructions, torch takes five times as long for a product of matrices as in float32.
_PRODUCTS = {"bfloat16": {"avx512bf16", "amxbf16", "bf16"}, "float16": {"avx512fp16", "amxfp16"}}


@cache
def processor() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty if that is missing (not Linux)."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}


def model_name() -> str:
    """Return what the maker calls the CPU, or its architecture where that is not known."""
    return processor().get("model name") or platform.processor() or platform.machine()


def instructions() -> set[str]:
    """Return the CPU's instruction sets, spelled as a compiler's -m flags; every ARM CPU has "neon"."""
    flags = processor().get("flags") or processor().get("Features", "")
    return {flag.replace("_", "") for flag in flags.split()} | ({"neon"} if platform.machine() in ARM else set())


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether the CPU has instructions for products of many tokens in ``dtype``, bfloat16 or float16."""
    return not _PRODUCTS[str(dtype).removeprefix("torch.")].isdisjoint(instructions())


def usable() -> list[int]:
    """Return the numbers of the logical cores that this process may use; on macOS, which does not say, of all."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def physical_cores() -> int:
    """Return the number of cores that this process may use, counting hardware threads of one core once."""
    siblings = set()
    for core in usable():
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(core))
    return len(siblings)


def gpus() -> int:
    """Return the number of GPUs that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
