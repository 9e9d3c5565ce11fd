"""Registries: names are checked against the available ones, and errors list the choices."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from lib.core.errors import UserError


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
