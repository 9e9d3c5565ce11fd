"""A name becomes the entry of a dict, or an error that says which names there are."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from lib import UserError

Entry = TypeVar("Entry")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of ``names``, or an empty string if none is close."""
    names = list(names)
    by_lower = {n.lower(): n for n in names}
    close = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def check_name(flag: str, name: str, names: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``names``.

    Raises:
        UserError: it is not; the message quotes the flag, the name, the closest one and all of them.
    """
    names = list(names)
    if name not in names:
        raise UserError(f"{flag} {name}: no such choice.{did_you_mean(name, names)} Choose from: {', '.join(names)}")
    return name


def find(flag: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """Return ``entries[name]``; a name that is not there is a UserError as in ``check_name``."""
    return entries[check_name(flag, name, entries)]
