"""Errors that the user can fix, and names that are checked against the available ones."""

import re
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix, in one line ``--field value: problem; fix``, of which only the problem is needed.

    ``field`` is the settings field of the flag at fault. The running command prints the flag in its own spelling
    (``lib.cli.command``) and exits with status 2. Other flags in the line are written as ``flag_name(field)``.
    """

    def __init__(self, field: str | None, value: object, problem: str, fix: str | None = None) -> None:
        super().__init__(field, value, problem, fix)  # from which another process makes it again
        self.field = field
        self.message = (f"{value}: " if value is not None else "") + problem + (f"; {fix}" if fix else "")

    def spelled(self, spelling: Callable[[str], str]) -> str:
        """Return the whole line with every flag as ``--spelling(field)``."""
        line = re.sub("\0(\\w+)\0", lambda flag: f"--{spelling(flag[1])}", self.message)
        return line if self.field is None else f"--{spelling(self.field)} {line}"

    def __str__(self) -> str:
        return self.spelled(str)


def flag_name(field: str) -> str:
    """Return a placeholder for a UserError's text that the running command replaces by its own flag for ``field``."""
    return f"\0{field}\0"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU is full: the allocator's error, or the driver's (of a context or of pinned memory)."""
    return type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of ``names``, or an empty string if none is close."""
    by_lower = {choice.lower(): choice for choice in names}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def check_name(field: str, name: str, names: Collection[str]) -> str:
    """Return ``name`` if it is one of ``names``; else the UserError quotes the closest one and all choices."""
    if name not in names:
        raise UserError(field, name, f"invalid choice.{did_you_mean(name, names)} Choose from: {', '.join(names)}")
    return name
