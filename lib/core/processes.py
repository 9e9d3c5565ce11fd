"""Processes that share the work of a run: their ranks, shares of the work and communication.

They are started by ``accelerate launch`` or ``torchrun``. Until a command calls ``join``, and in a single-process run,
everything here behaves as if this were the only process, and imports nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lib.core import cpu
from lib.core.errors import UserError, first_line, flag_name, is_out_of_memory
from lib.core.lazy import accelerate, torch

_state = None  # accelerate's PartialState, once this process has joined the others
_single = False  # whether this process works for itself for now


def started() -> int:
    """Return how many processes the launcher started, whether or not they share the work."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_on_machine() -> int:
    """Return how many processes share this machine's memory, including while this one works for itself."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", started()))


def is_main() -> bool:
    """Return whether this process prints, logs and writes files: the first one that the launcher started."""
    return started() == 1 or int(os.environ.get("RANK", 0)) == 0


def join() -> None:
    """Share the work from now on with the other started processes, if any; a UserError says why that cannot be."""
    global _state
    if started() == 1:
        return
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        problem = f"WORLD_SIZE is {started()} and {min(missing)} is not set"
        raise UserError(None, None, problem, "start with accelerate launch or torchrun")
    gpus = cpu.gpus()
    if gpus and processes_on_machine() > gpus:
        problem = f"{processes_on_machine()} processes were started on a machine with {gpus} GPUs"
        raise UserError(None, None, problem, "start one per GPU")

    try:
        # They wait for each other, for example while one saves, for up to a week; a crash is noticed immediately.
        _state = accelerate.PartialState(cpu=not gpus, timeout=timedelta(weeks=1))
    except RuntimeError as error:
        problem = f"the {started()} processes cannot reach each other ({first_line(error)})"
        raise UserError(None, None, problem) from error


def leave() -> None:
    """Stop sharing, after the work has succeeded."""
    global _state
    if _state is not None:
        _state.destroy_process_group()
        _state = None


@contextmanager
def single_process() -> Iterator[None]:
    """Run the body of the with statement as if this were the only process."""
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


def count() -> int:
    """Return the number of processes that share the work."""
    return 1 if _state is None or _single else _state.num_processes


def rank() -> int:
    """Return the rank of this process, from 0."""
    return 0 if _state is None or _single else _state.process_index


def device() -> torch.device | None:
    """Return this process's own GPU, or None if it has none or may use all of them."""
    return None if _state is None or _state.device.type == "cpu" else _state.device


def share(total: int) -> slice:
    """Return which of ``total`` items belong to this process: as many as the others', give or take one."""
    return slice(total * rank() // count(), total * (rank() + 1) // count())


def owners(costs: Sequence[float]) -> list[int]:
    """Return the rank that does each piece of work: most expensive first, each to the least loaded rank."""
    loads, owner = [0.0] * count(), [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[index] = min(range(count()), key=loads.__getitem__)
        loads[owner[index]] += costs[index]
    return owner


def _together(operate: Callable[..., object], *arguments: object) -> None:
    """Carry out a collective operation; it fails if another process has ended, which is then a UserError."""
    try:
        operate(*arguments)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = re.sub(r"^\[[^]]*\] *", "", first_line(error)).partition(". ")[0]  # gloo begins with its source file
        problem = f"another of the {started()} processes has ended ({reason})"
        fix = f"the same command starts again, and with {flag_name('save_model')} it resumes after the last block"
        raise UserError(None, None, problem, fix) from error


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum the processes' tensors, all of one shape, in place and return the sum."""
    if count() > 1:
        _together(torch.distributed.all_reduce, tensor)
    return tensor


def broadcast(tensor: torch.Tensor, owner: int) -> None:
    """Replace the values of ``tensor`` by those in the process ``owner``."""
    if count() > 1:
        data = tensor.contiguous()  # and sent as bytes, since not every backend knows all dtypes
        _together(torch.distributed.broadcast, data.view(-1).view(torch.uint8), owner)
        tensor.copy_(data)


def gathered(value: Any) -> list:
    """Return the ``value`` of each process, in rank order; it must not contain GPU tensors."""
    values = [value] * count()
    if count() > 1:
        _together(torch.distributed.all_gather_object, values, value)
    return values


def on_main(work: Callable[[], Any]) -> Any:
    """Return the result of ``work`` in the main process, the only one that runs it; its UserError is raised in all."""
    if count() == 1:
        return work()
    result = refusal = None
    if is_main():
        try:
            result = work()
        except UserError as error:
            refusal = error
    result, refusal = gathered((result, refusal))[0]
    if refusal is not None:
        raise refusal
    return result
