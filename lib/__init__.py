"""Errors that the user can fix, and the rooms of the experiment."""

import re
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can fix, in one line: what was given, what is true, what to type.

    ``field`` is the flag at fault by the name of its settings field, None where no flag is. The command that runs
    prints the flag in its own spelling (``lib.command``) without a traceback and exits with status 2. Other flags in
    the text are given as ``flag_name(field)``.
    """

    def __init__(self, field: str | None, text: str) -> None:
        super().__init__(text)
        self.field, self.text = field, text

    def spelled(self, spelling: Callable[[str], str]) -> str:
        """Return the whole line with every flag as ``--spelling(field)``."""
        text = re.sub("\0(\\w+)\0", lambda found: f"--{spelling(found[1])}", self.text)
        return text if self.field is None else f"--{spelling(self.field)} {text}"

    def __str__(self) -> str:
        return self.spelled(str)


def flag_name(field: str) -> str:
    """Return a mark in the text of a UserError that the command which runs replaces by its own flag for ``field``."""
    return f"\0{field}\0"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
