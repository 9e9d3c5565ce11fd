"""Flags as fields of dataclasses, and checks of their values."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from lib.core import files
from lib.core.errors import UserError
from lib.core.names import check_name

log = logging.getLogger("main")

# Metavars of flags that name a place, and what they name.
PLACES = {"DIR": "a folder", "FILE": "a file"}


def flag(  # noqa: PLR0913  each is a word of a declaration
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    only: str | None = None,
    tolerated: str | None = None,
    warns: bool = False,
    convert: Any = None,
    nargs: str | None = None,
    const: Any = None,
    aliases: Sequence[str] = (),
    positional: bool = False,
    in_repository: bool = False,
    title: str | None = None,
) -> Any:
    """Declare a flag as a field of a dataclass of ``Flags``.

    Args:
        default: the value without the flag; ``MISSING`` makes the flag required.
        help: what it does, with its unit; ``{name}`` is another flag in its spelling, ``{choices}`` the list of them.
        least, above, most, below: its range.
        only: traits (``Flags.traits``) of which one must hold for the flag to do anything: ``"alps | refit"``.
        tolerated: trait with which the flag is accepted though it does nothing: published command lines include it.
        warns: given without effect, it is warned about and not refused, since scripts pass it to every run.
        convert: function that reads the value, where the type is not enough.
        nargs: ``?`` lets a switch take true or false as well.
        const: value of a flag with ``nargs="?"`` that is given without one.
        aliases: further spellings.
        positional: it is an argument without dashes.
        in_repository: the default is a path in the repository, regardless of where the command is started.
        title: group in which ``--help`` shows it, if not its dataclass's.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if in_repository:
        metadata["help"] = f"{help} (default: the repository's {default})"
        return field(default_factory=partial(files.in_repository, default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Flags:
    """Settings of a command: dataclasses of flags, combined by inheritance, each a group with a ``_title``.

    ``_without`` names inherited flags that the command leaves out. ``_spelled`` maps fields to the published spelling
    of their flags where that differs; ``given`` names the fields set on the command line.
    """

    _title: ClassVar[str] = ""
    _without: ClassVar[Sequence[str]] = ()
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
        by_name = {item.name: item for item in fields(cls) if item.name not in ("given", *cls._without)}
        hints = get_type_hints(cls)
        for group in cls.__mro__:
            if is_dataclass(group):
                for name in group.__dict__.get("__annotations__", {}):
                    if name in by_name:
                        item = by_name.pop(name)
                        yield item.metadata["title"] or group._title, item, hints[name]

    def flags(self) -> dict[str, Any]:
        """Return every flag's spelling and value, as stored in a run's record."""
        return {self.spelling(item.name): getattr(self, item.name) for _, item, _ in self.declared()}

    def paths(self) -> dict[str, Path]:
        """Return the files and folders that the flags name, by field; a name that is no path is not among them."""
        paths = {}
        for _, item, _ in self.declared():
            value, metavar = getattr(self, item.name), item.metadata["metavar"]
            if value and isinstance(value, str):
                if metavar in PLACES or (metavar in (None, "TEXT") and os.path.exists(value)):
                    paths[item.name] = Path(value)
        return paths

    def traits(self) -> set[str]:
        """Return what holds of the command: each flag that is on by its name; extended by the commands."""
        return {item.name for _, item, _ in self.declared() if getattr(self, item.name)}

    def situation(self) -> str:
        """Return in what situation an idle flag does nothing, for errors: ``with --prune_method wanda``."""
        return ""

    def warn_of_idle(self) -> None:
        """Warn of flags that do nothing and are not refused: scripts pass them to every run."""
        names = [f"--{self.spelling(item.name)}" for item in self.idle() if item.metadata["warns"]]
        if names:
            log.warning("no effect in this run, which reads no such text: %s", ", ".join(names))

    @classmethod
    def purpose(cls, item: Field) -> str:
        """Return what a flag is ``only`` for, in words: ``sparsegpt, alps or --refit``."""
        flags = {other.name: f"--{cls.spelling(other.name)}" for _, other, _ in cls.declared()}
        traits = item.metadata["only"].split(" | ")
        words = [f"the methods with {trait}" if trait[0] == "_" else flags.get(trait, trait) for trait in traits]
        return ", ".join(words[:-1]) + (" or " if words[1:] else "") + words[-1]

    def idle(self) -> Iterator[Field]:
        """Yield the flags that were given and do nothing: none of the traits that they are ``only`` for holds."""
        traits = self.traits()
        for _, item, _ in self.declared():
            only, tolerated = item.metadata["only"], item.metadata["tolerated"]
            if item.name in self.given and only and not traits & {*only.split(" | "), tolerated}:
                yield item

    def check(self) -> None:
        """Refuse flags that do nothing; extended by the commands by contradictions between the flags.

        Raises:
            UserError: naming the flag.
        """
        for item in self.idle():
            purpose = self.purpose(item)
            if purpose.startswith("--"):
                raise UserError(item.name, None, f"does nothing without {purpose}", f"add {purpose}")
            if not item.metadata["warns"]:
                raise UserError(item.name, None, f"does nothing {self.situation()}", f"it is for {purpose}")


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
    """Refuse a value that its flag's declaration does not allow."""
    for _, item, _ in settings.declared():
        value, choices = getattr(settings, item.name), item.metadata["choices"]
        if value == "" and item.name in settings.given:
            _check_empty(item)
        if choices and value is not None:
            for name in value if isinstance(value, (list, tuple)) else [value]:
                check_name(item.name, name, choices)
        check_range(item.name, value, item.metadata)


def _check_empty(item: Field) -> None:
    """Refuse an empty text, such as an unset variable of the shell; a list may be empty, and says what that means."""
    metavar = item.metadata["metavar"] or ""
    if "," not in metavar and "" not in (item.metadata["choices"] or ()):
        required = item.default is MISSING and item.default_factory is MISSING
        fix = f"give {PLACES.get(metavar, 'a value')}" + ("" if required else " or leave it out")
        raise UserError(item.name, "''", "is empty", fix)


def check_range(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Refuse a number, or one of a list, outside the ``bounds`` of the flag ``name``; see ``flag``."""
    least, above, most, below = (bounds.get(key) for key in ("least", "above", "most", "below"))
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        fits = (
            (least is None or number >= least)
            and (above is None or above < number < math.inf)
            and (most is None or number <= most)
            and (below is None or number < below)
        )
        if not fits:
            words = (("at least", least), ("above", above), ("at most", most), ("below", below))
            limits = " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)
            if least is not None and most is not None:
                limits = f"between {least} and {most}"
            raise UserError(name, number, f"must be {limits}")
