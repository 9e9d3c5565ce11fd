"""Processes that share the work of a run: their ranks, shares of the work and communication.

They are started by ``accelerate launch`` or ``torchrun``. Until a command calls ``join``, and in a single-process run,
everything here behaves as if this were the only process, and imports nothing.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from lib.core import cpu
from lib.core.errors import UserError, first_line, flag_name
from lib.core.lazy import torch

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor

T = TypeVar("T")

_WAIT = timedelta(weeks=1)  # of some for others, who may be saving or searching; one that dies is noticed at once
_PATIENCE = 3.0  # seconds in which a launcher ends the others once one process has ended
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_state: PartialState | None = None  # accelerate's process group, once this process has joined it
_apart = False  # whether this process works for itself for now


# ------------------------------------------------------------------------------------------------------- who is there


def started() -> int:
    """Return how many processes the launcher started, whether or not they share the work."""
    return _number("WORLD_SIZE", 1)


def speaks() -> bool:
    """Return whether this process prints and logs."""
    try:
        return _number("RANK", 0) == 0
    except UserError:  # which ``join`` reports
        return True


def _number(name: str, default: int) -> int:
    """Return the whole number that a launcher put into the environment."""
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        problem = f"{name} is {value!r} in the environment, which is not a whole number"
        raise UserError(None, None, problem, "unset it, or start with accelerate launch or torchrun") from None


def join() -> None:
    """Share the work from now on with the other started processes, if any.

    Raises:
        UserError: the environment was not set by a launcher, there are fewer GPUs than processes, or the processes
            cannot reach each other.
    """
    global _state
    if started() == 1:
        return
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        problem = f"WORLD_SIZE is {started()} and {missing[0]} is not set"
        raise UserError(None, None, problem, "start with accelerate launch or torchrun")
    numbers = {name: _number(name, 0) for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")}
    gpus = cpu.gpus()
    if gpus and _beside() > gpus:
        problem = f"{_beside()} processes were started on a machine with {gpus} GPUs"
        raise UserError(None, None, problem, "start one per GPU")
    if gpus:
        torch.cuda.set_device(numbers["LOCAL_RANK"])
    from accelerate import PartialState

    try:
        _state = PartialState(cpu=not gpus, timeout=_WAIT)
    except RuntimeError as error:
        problem = f"the {started()} processes cannot reach each other ({first_line(error)})"
        raise UserError(None, None, problem) from error
    if not speaks() and sys.stderr.isatty():
        sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)


class _NoTerminal(io.TextIOWrapper):
    """Standard error of a process that shows no progress bars."""

    def isatty(self) -> bool:
        return False


def leave() -> None:
    """Stop sharing, after the work has succeeded."""
    global _state
    if _state is not None:
        _state.destroy_process_group()
        _state = None


@contextmanager
def apart() -> Iterator[None]:
    """Run the body of the with statement as if this were the only process."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def count() -> int:
    """Return the number of processes that share the work."""
    return 1 if _state is None or _apart else _state.num_processes


def rank() -> int:
    """Return the rank of this process, from 0."""
    return 0 if _state is None or _apart else _state.process_index


def first() -> bool:
    """Return whether this process writes files; true for each of several processes that do not share the work."""
    return _state is None or _state.process_index == 0


def beside() -> int:
    """Return how many processes share this machine's memory, including while this one works apart."""
    return 1 if _state is None else _beside()


def _beside() -> int:
    return _number("LOCAL_WORLD_SIZE", started())


def device() -> torch.device | None:
    """Return this process's own GPU, or None if it has none or may use all of them."""
    return None if _state is None or _state.device.type == "cpu" else _state.device


# ---------------------------------------------------------------------------------------------------- whose is what


def share(total: int) -> slice:
    """Return which of ``total`` items belong to this process: as many as the others', give or take one."""
    return slice(total * rank() // count(), total * (rank() + 1) // count())


def owners(costs: Sequence[float]) -> list[int]:
    """Return the rank that does each piece of work: most expensive first, each to the least loaded rank."""
    loads = [0.0] * count()
    result = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = min(range(len(loads)), key=loads.__getitem__)
        result[index] = owner
        loads[owner] += costs[index]
    return result


# ------------------------------------------------------------------------------------------- what is told to others


def sum_(tensor: Tensor) -> Tensor:
    """Sum the processes' tensors, all of one shape, in place and return the sum."""
    if count() > 1:
        with _collective():
            torch.distributed.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor, owner: int) -> None:
    """Replace the values of ``tensor`` by those in the process ``owner``."""
    if count() == 1:
        return
    data = tensor.contiguous()
    with _collective():
        torch.distributed.broadcast(data.view(-1).view(torch.uint8), owner)  # bytes: not every backend knows all dtypes
    if data is not tensor:
        tensor.copy_(data)


def gathered(value: T) -> list[T]:
    """Return the ``value`` of each process, in rank order; it must not contain GPU tensors."""
    if count() == 1:
        return [value]
    values: list = [None] * count()
    with _collective():
        torch.distributed.all_gather_object(values, value)
    return values


def joined(tensor: Tensor) -> Tensor:
    """Return the processes' tensors concatenated: the parts given by ``share`` become the whole."""
    if count() == 1:
        return tensor
    return torch.cat(gathered(tensor.cpu())).to(tensor.device)


def by_first(work: Callable[[], T]) -> T:
    """Return the result of ``work`` in the first process, the only one that runs it; its UserError is raised in all."""
    if count() == 1:
        return work()
    outcome: list = [None, None]
    if first():
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = (error.field, error.text)
    with _collective():
        torch.distributed.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise UserError(outcome[1][0], None, outcome[1][1])
    return outcome[0]


# ------------------------------------------------------------------------------------------------- how it may end


@contextmanager
def _collective() -> Iterator[None]:
    """Turn the failure of a collective operation, caused by another process's end, into one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _lost(error)


def _lost(error: RuntimeError) -> NoReturn:
    reason = re.sub(r"^\[[^]]*\] *", "", first_line(error)).partition(". ")[0]  # gloo begins with its source file
    problem = f"another of the {started()} processes has ended ({reason})"
    fix = f"the same command starts again, and with {flag_name('save_model')} it resumes after the last block"
    raise UserError(None, None, problem, fix) from error


def tells() -> bool:
    """Return whether this process reports the error that ends it; an error already reported is not repeated.

    Processes that end because another one has ended come after it.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized() and started() > 1:
        try:
            return distributed.distributed_c10d._get_default_store().add("told", 1) == 1
        except RuntimeError:  # the store went with the process that held it
            return True
    if not speaks():  # the first process is likely to have found the same: then the launcher ends this one
        time.sleep(_PATIENCE)
    return True
