"""What is read out of /proc/cpuinfo, and what follows from it."""

import os
import platform
from pathlib import Path

import pytest
import torch
from machines import MACHINES, REAL_PROCESSOR

from lib.core import cpu
from lib.models import memory
from lib.sparse import kernel

AVX512 = "avx2 bmi2 fma f16c popcnt avx512f avx512bw avx512vl avx512_vbmi2 avx512_vnni avx512_bf16"
CPUS = {  # architecture, maker and flags -> what is multiplied, and the kernel's levels
    "ten years old": ("x86_64", "GenuineIntel", "avx2 bmi2 fma f16c popcnt", [], ["avx2"]),
    "AVX only": ("x86_64", "GenuineIntel", "avx sse4_2 popcnt", [], []),
    "Intel with AMX": (
        "x86_64", "GenuineIntel", f"{AVX512} avx512_fp16 amx_tile amx_bf16", [torch.bfloat16, torch.float16],
        ["amx", "avx512", "avx512bf16", "avx2"],
    ),
    "AMD with bfloat16": ("x86_64", "AuthenticAMD", AVX512, [torch.bfloat16], ["avx512bf16", "avx512", "avx2"]),
    "ARM": ("aarch64", None, "fp asimd", [], ["neon"]),
    "ARM with bfloat16": ("aarch64", None, "fp asimd bf16", [torch.bfloat16], ["neon"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CPUS)
def test_what_a_cpu_can_do_is_read_from_proc(name, monkeypatch):
    architecture, maker, flags, kinds, levels = CPUS[name]
    head = f"vendor_id\t: {maker}\nmodel name\t: Some CPU\nflags\t\t: " if maker else "Features\t: "
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\n{head}{flags}\n\nprocessor\t: 1\n\n")
    monkeypatch.setattr(cpu, "processor", REAL_PROCESSOR.__wrapped__)
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    assert [dtype for dtype in (torch.bfloat16, torch.float16) if cpu.multiplies(dtype)] == kinds
    assert kernel.levels() == levels
    assert not maker or cpu.model_name() == "Some CPU"


def test_without_proc_a_cpu_has_a_name_and_no_more(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr(cpu, "processor", REAL_PROCESSOR.__wrapped__)
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    assert cpu.instructions() == set() and kernel.levels() == [] and cpu.model_name()


@pytest.mark.machine
@pytest.mark.parametrize("name", [None, "bfloat16", "plain"])
def test_tests_run_on_the_machine_that_is_asked_for(name, machine):
    if name:  # for one test
        machine(name)
    asked = MACHINES[name or os.environ.get("TEST_MACHINE", "plain")]
    assert cpu.multiplies(torch.bfloat16) is ("bf16" in asked.instructions)
    assert len(cpu.usable()) == cpu.physical_cores() == asked.cores and memory.free_ram() == asked.ram
    assert cpu.gpus() == 0 and memory.freest() == torch.device("cpu")
