"""Errors that the user can fix, and the rooms of the experiment."""


class UserError(Exception):
    """An error that the user can fix, in one line: what was given, what is true, what to type.

    ``field`` is the flag at fault by the name of its settings field, None where no flag is. The command that runs
    prints the flag in its own spelling (``lib.command``) without a traceback and exits with status 2.
    """

    def __init__(self, field: str | None, text: str) -> None:
        super().__init__(text if field is None else f"--{field} {text}")
        self.field, self.text = field, text


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
