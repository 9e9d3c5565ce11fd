"""Machines that the tests pretend to run on: fixed answers of lib/core/cpu.py and of lib/models/memory.py."""

from collections.abc import Callable
from typing import NamedTuple

from lib.core import cpu
from lib.models import memory

REAL_PROCESSOR, REAL_FREE_RAM = cpu.processor, memory.free_ram
# What is compiled must also run here: of these instructions, those that this CPU really has.
_RUN = cpu.instructions() & {"avx2", "bmi2", "fma", "f16c", "popcnt"}


class Machine(NamedTuple):
    """The answers of one machine: the CPU's instructions, its cores and the bytes of memory that are free.

    GPUs are not among them: conftest hides those that are there, and pretend_cuda.py pretends one.
    """

    instructions: frozenset[str] = frozenset(_RUN)
    cores: int = 2
    ram: int = 2**36


MACHINES = {
    "plain": Machine(),
    "bfloat16": Machine(frozenset(_RUN | {"amxbf16", "bf16"})),  # which choose no other kernel
    "many_cores": Machine(cores=192),
    "little_memory": Machine(ram=3 * 2**30),  # SmolLM2 fits, and little beside it
}


def pretend(name: str, replace: Callable = setattr) -> None:
    """Let the program believe that it runs on the machine ``name``; ``replace``: setattr, or a monkeypatch's."""
    machine = MACHINES[name]
    words = " ".join(sorted(machine.instructions))
    fields = {"vendor_id": "Pretended", "model name": name, "flags": words, "Features": words}
    replace(cpu, "processor", lambda: fields)
    replace(cpu, "usable", lambda: list(range(machine.cores)))
    replace(cpu, "physical_cores", lambda: machine.cores)
    replace(memory, "free_ram", lambda: machine.ram)
