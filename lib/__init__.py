"""The parts of the experiment; here is what every room may use, the error that a user can mend."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what was given, what is true, what to type.

    Row 5 (``main.py`` and the other commands) prints it without a traceback and exits with status 2.
    """
