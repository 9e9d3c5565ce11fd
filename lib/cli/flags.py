"""Flags as fields of dataclasses, and checks of their values."""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from lib.core.errors import UserError, check_name

log = logging.getLogger("main")

# The bounds of a number: how a flag declares them, how an error names them, and what they mean.
BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
# What a declaration may hold besides the default and the help.
_DECLARED = {
    "metavar": None, "choices": None, "least": None, "above": None, "most": None, "below": None, "only": None,
    "tolerated": None, "warns": False, "nargs": None, "const": None, "aliases": (), "positional": False, "title": None,
}  # fmt: skip


def flag(default: Any, help: str, **declared: Any) -> Any:
    """Declare a flag as a field of a dataclass of ``Flags``; its type says how it is read.

    Args:
        default: the value without the flag; ``MISSING`` makes the flag required.
        help: what it does, with its unit; ``{name}`` is another flag in its spelling, ``{choices}`` the list of them.
        only: traits (``Flags.traits``) of which one must hold for the flag to do anything: ``"alps | refit"``.
        tolerated: trait with which the flag is accepted though it does nothing: published command lines include it.
        warns: given without effect, it is warned about and not refused, since scripts pass it to every run.
        nargs: ``?`` lets a switch take true or false as well; ``const`` is the value of any other flag without one.
        positional: it is an argument without dashes.
        title: group in which ``--help`` shows it, if not its dataclass's.
    """
    if unknown := declared.keys() - _DECLARED:
        raise TypeError(f"no flag has {', '.join(unknown)}")
    return field(default=default, metadata=_DECLARED | declared | {"help": help})


@dataclass(kw_only=True)
class Flags:
    """Settings of a command: dataclasses of flags, combined by inheritance, each a group with a ``_title``.

    ``_without`` names inherited flags that the command leaves out, ``_ignored`` those of a published script that have
    no effect. ``_spelled`` maps fields to the published spelling of their flags where that differs. ``given`` names the
    fields set on the command line, and ``rest`` are its unknown arguments, an error unless the command ``_passes_on``.
    """

    _title: ClassVar[str] = ""
    _without: ClassVar[Sequence[str]] = ()
    _spelled: ClassVar[dict[str, str]] = {}
    _ignored: ClassVar[Sequence[str]] = ()
    _passes_on: ClassVar[bool] = False
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False, compare=False)
    rest: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    @classmethod
    def spelling(cls, name: str) -> str:
        """Return the flag of the field ``name`` without its dashes."""
        return cls._spelled.get(name, name)

    @classmethod
    @cache  # a sweep asks for them thousands of times
    def declared(cls) -> list[tuple[str, Field, Any]]:
        """Return (title of the group, field, type) of every flag, in the order of the groups."""
        by_name = {item.name: item for item in fields(cls) if item.name not in ("given", "rest", *cls._without)}
        hints, declared = get_type_hints(cls), []
        for group in filter(is_dataclass, cls.__mro__):
            for name in group.__dict__.get("__annotations__", {}):
                if name in by_name:
                    item = by_name.pop(name)
                    declared.append((item.metadata["title"] or group._title, item, hints[name]))
        return declared

    def flags(self) -> dict[str, Any]:
        """Return every flag's spelling and value, as stored in a run's record."""
        return {self.spelling(item.name): getattr(self, item.name) for _, item, _ in self.declared()}

    def paths(self) -> dict[str, Path]:
        """Return the words that were given as values, of which some may name a file or folder, by field."""
        values = {i.name: getattr(self, i.name) for _, i, _ in self.declared() if not i.metadata["choices"]}
        return {name: Path(value) for name, value in values.items() if value and isinstance(value, str)}

    def traits(self) -> set[str]:
        """Return what holds of the command: each flag that is on by its name; extended by the commands."""
        return {item.name for _, item, _ in self.declared() if getattr(self, item.name)}

    def situation(self) -> str:
        """Return in what situation an idle flag does nothing, for errors: ``with wanda``."""
        return "here"

    @classmethod
    def purpose(cls, item: Field) -> str:
        """Return what a flag is ``only`` for, in words: ``sparsegpt or alps or --refit``."""
        names = {name: f"--{cls.spelling(name)}" for name in cls.__dataclass_fields__}
        traits = item.metadata["only"].split(" | ")
        return " or ".join(names.get(trait, re.sub("^_", "the methods with _", trait)) for trait in traits)

    def idle(self) -> Iterator[Field]:
        """Yield the flags that were given and do nothing: none of the traits that they are ``only`` for holds."""
        traits = self.traits()
        for _, item, _ in self.declared():
            only, tolerated = item.metadata["only"], item.metadata["tolerated"]
            if item.name in self.given and only and not traits & {*only.split(" | "), tolerated}:
                yield item

    def check(self) -> None:
        """Refuse flags that do nothing; extended by the commands by contradictions between the flags."""
        for item in self.idle():
            if not item.metadata["warns"]:
                raise UserError(item.name, None, f"does nothing {self.situation()}", f"it is for {self.purpose(item)}")

    def warn_of_idle(self) -> None:
        """Warn of flags that do nothing and are not refused."""
        names = [f"--{self.spelling(item.name)}" for item in self.idle()]
        if names:
            log.warning("no effect in this run, which reads no such text: %s", ", ".join(names))


def check_values(settings: Flags) -> None:
    """Refuse a value, or one of a list, that its flag's declaration does not allow."""
    for _, item, _ in settings.declared():
        given, declared = getattr(settings, item.name), item.metadata
        # Such as an unset variable of the shell; a list may be empty, and says what that means.
        if given == "" and item.name in settings.given and "," not in (declared["metavar"] or ""):
            raise UserError(item.name, "''", "is empty", "give a value")
        limits = [(*BOUNDS[key], declared[key]) for key in BOUNDS if declared[key] is not None]
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if declared["choices"] and value is not None:
                check_name(item.name, value, declared["choices"])
            if isinstance(value, (int, float)) and not all(fits(value, bound) for _, fits, bound in limits):
                words = " and ".join(f"{word} {bound}" for word, _, bound in limits)
                raise UserError(item.name, value, f"must be {words}")
