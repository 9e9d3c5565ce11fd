"""Flags as fields of dataclasses, and checks of their values."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from lib.core.errors import UserError
from lib.core.files import in_repository
from lib.core.names import check_name

log = logging.getLogger("main")

PLACES = {"DIR": "a folder", "FILE": "a file"}  # metavars of flags that name one


def flag(default: Any, help: str, **about) -> Any:
    """Declare a flag as a field of a dataclass of ``Flags``.

    Args:
        default: the value without the flag; ``MISSING`` makes the flag required.
        help: what it does, with its unit.
        about: ``metavar``; ``choices`` (a sequence of names); ``least``, ``above``, ``most``, ``below`` (its range);
            ``needs`` (the field without which it does nothing); ``only`` (the allocation that it applies to);
            ``prunes`` (it does nothing unless something is pruned); ``convert`` (from text, where the type is not
            enough); ``nargs`` (``?`` lets a switch take true or false as well); ``const`` (the value of a flag with
            ``nargs="?"`` given without one); ``aliases``; ``positional``; ``in_repository`` (the default is a path
            there, regardless of where the command is started).
    """
    if about.get("in_repository"):
        help = f"{help} (default: the repository's {default})"
        return field(default_factory=partial(in_repository, default), metadata={"help": help, **about})
    return field(default=default, metadata={"help": help, **about})


@dataclass(kw_only=True)
class Flags:
    """Settings of a command: dataclasses of flags, combined by inheritance, each a group with a ``_title``.

    ``_spelled`` maps fields to the published spelling of their flags where that differs; ``given`` names the fields
    set on the command line.
    """

    _title: ClassVar[str] = ""
    _spelled: ClassVar[dict[str, str]] = {}
    _ignored: ClassVar[Sequence[str]] = ()  # flags of a published script that are understood and have no effect
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)

    @classmethod
    def spelling(cls, name: str) -> str:
        """Return the flag of the field ``name`` without its dashes."""
        return cls._spelled.get(name, name)

    @classmethod
    def declared(cls) -> Iterator[tuple[str, Field, Any]]:
        """Yield (title of the group, field, type) of every flag, in the order of the groups."""
        by_name = {item.name: item for item in fields(cls) if item.name != "given"}
        hints = get_type_hints(cls)
        for group in cls.__mro__:
            if is_dataclass(group):
                for name in group.__dict__.get("__annotations__", {}):
                    if name in by_name:
                        item = by_name.pop(name)
                        yield item.metadata.get("title", group._title), item, hints[name]

    def flags(self) -> dict[str, Any]:
        """Return every flag's spelling and value, as stored in a run's record."""
        return {self.spelling(item.name): getattr(self, item.name) for _, item, _ in self.declared()}

    def paths(self) -> dict[str, Path]:
        """Return the files and folders that the flags name, by field; a name that is no path is not among them."""
        found = {}
        for _, item, _ in self.declared():
            value, what = getattr(self, item.name), item.metadata.get("metavar")
            if value and isinstance(value, str):
                if what in PLACES or (what in (None, "TEXT") and os.path.exists(value)):
                    found[item.name] = Path(value)
        return found

    def check(self) -> None:
        """Refuse contradictions between the flags; extended by the commands.

        Raises:
            UserError: naming the flag.
        """


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def number_or_auto(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def check_values(settings: Flags) -> None:
    """Refuse a value that its flag's declaration does not allow, and a flag given without the one that it needs."""
    for _, item, _ in settings.declared():
        value, about = getattr(settings, item.name), item.metadata
        if value == "" and item.name in settings.given:
            _check_empty(item)
        if about.get("choices") and value is not None:
            for name in value if isinstance(value, (list, tuple)) else [value]:
                check_name(item.name, name, about["choices"])
        check_range(item.name, value, about)
        needed = about.get("needs")
        if needed and item.name in settings.given and not getattr(settings, needed):
            spelling = settings.spelling(needed)
            raise UserError(item.name, f"without --{spelling} does nothing; add --{spelling}")


def _check_empty(item: Field) -> None:
    """Refuse an empty text, such as an unset variable of the shell; a list may be empty, and says what that means."""
    what = item.metadata.get("metavar") or ""
    if "," not in what and "" not in item.metadata.get("choices", ()):
        required = item.default is MISSING and item.default_factory is MISSING
        fix = f"give {PLACES.get(what, 'a value')}" + ("" if required else " or leave it out")
        raise UserError(item.name, f"'': is empty; {fix}")


def check_range(name: str, value: Any, about: Any) -> None:
    """Refuse a number, or one of a list, outside the bounds ``about`` the flag ``name``; see ``flag``."""
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        least, above, most, below = (about.get(key) for key in ("least", "above", "most", "below"))
        fits = (
            (least is None or number >= least)
            and (above is None or above < number < math.inf)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
        if not fits:
            raise UserError(name, f"{number}: must be {_range(least, above, most, below)}")


def _range(least: Any, above: Any, most: Any, below: Any) -> str:
    if least is not None and most is not None:
        return f"between {least} and {most}"
    parts = (("at least", least), ("above", above), ("at most", most), ("below", below))
    return " and ".join(f"{word} {bound}" for word, bound in parts if bound is not None)
