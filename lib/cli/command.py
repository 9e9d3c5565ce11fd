"""Command lines: flags declared as data and parsed before torch is imported, and one wrapper for every main()."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from typing import Any, NoReturn

from lib.cli.flags import Flags, check_values
from lib.core.errors import UserError, did_you_mean, is_out_of_memory
from lib.core.processes import is_main, started

log = logging.getLogger("main")


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            message += "." + did_you_mean(unknown[1].split("=")[0], self._option_string_actions)
        raise UserError(None, None, f"{message} (--help lists the flags)")


def make_parser(settings: type[Flags], prog: str, description: str, epilog: str | None = None) -> Parser:
    """Return the argparse parser of the flags that ``settings`` declares."""
    parser = Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
    groups: dict[str, Any] = {}
    for title, item, kind in settings.declared():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], settings, item, kind)
    for name in settings._ignored:
        parser.add_argument(f"--{name}", nargs="*", dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add(group, settings: type[Flags], item: Field, kind: Any) -> None:
    declared, default, choices = item.metadata, item.default, item.metadata["choices"]
    # Another flag in braces is shown in its spelling.
    help = re.sub(r"\{(?!choices)(\w+)\}", lambda name: f"--{settings.spelling(name[1])}", declared["help"])
    if choices:
        help = help if "{choices}" in help else f"{help} {{choices}}"
        help = help.replace("{choices}", f"{{{', '.join(choices)}}}")
    if declared["only"]:
        help = f"for {settings.purpose(item)}: {help}"
    if not any(default is none for none in (None, False, MISSING, ())):
        help += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    options: dict[str, Any] = {"help": help.replace("%", "%%"), "default": argparse.SUPPRESS}

    if declared["positional"]:
        group.add_argument(item.name, metavar=declared["metavar"], nargs=declared["nargs"], **options)
        return
    options |= {"dest": item.name, "required": default is MISSING and item.default_factory is MISSING}
    if kind is bool and default is False and not declared["nargs"]:
        options["action"] = "store_true"
    elif kind is bool:
        options |= {"type": true_or_false, "nargs": "?", "const": True, "metavar": "{true,false}"}
    else:
        number = next((number for number in (int, float) if number.__name__ in str(kind)), str)
        usual = "NAME" if choices else {int: "N", float: "X", str: None}[number]
        options |= {"metavar": declared["metavar"] or usual, "nargs": declared["nargs"], "const": declared["const"]}
        options["type"] = {"int | str": auto_or_int, "float | str": auto_or_float}.get(str(kind), number)
    group.add_argument(*(f"--{name}" for name in (settings.spelling(item.name), *declared["aliases"])), **options)


def true_or_false(word: str) -> bool:
    return bool(("false", "true").index(word.lower()))


def auto_or_int(word: str) -> int | str:
    return word if word == "auto" else int(word)


def auto_or_float(word: str) -> float | str:
    return word if word == "auto" else float(word)


def parse(settings: type[Flags], argv: Sequence[str] | None, parser: Parser) -> Flags:
    """Return the settings of the command line ``argv``, checked as far as possible without a model.

    An unknown flag, a value out of its range, or a contradiction is a UserError.
    """
    namespace, rest = parser.parse_known_args(argv)
    if rest and not settings._passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    values = vars(namespace)
    ignored = [name for name in settings._ignored if values.pop(name, None) is not None]
    if ignored:
        log.warning("flags of the published training script, which do nothing here: --%s", ", --".join(ignored))
    # A shell leaves the ~ of --save=~/results to the command.
    values = {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in values.items()}
    command_settings = settings(**values)
    command_settings.given, command_settings.rest = frozenset(values), tuple(rest)
    check_values(command_settings)
    command_settings.check()
    return command_settings


def command(
    settings: type[Flags],
    run: Callable[[Any], Any],
    argv: Sequence[str] | None,
    parser: Parser,
    resume: str = "the same command starts again",
    processes: bool = False,
    out_of_memory: str = "lower --nsamples or --seqlen, or use more GPUs",
) -> int:
    """Run a command line and return its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C.

    Args:
        run: does the work; its return value is the exit status if it is an int.
        resume: what to do after Ctrl-C, unless the KeyboardInterrupt has a message.
        processes: whether several processes may run it together (torchrun, accelerate launch).
        out_of_memory: what to do when a GPU runs out of memory.
    """
    quiet()
    prog = parser.prog
    try:
        if not processes and started() > 1:
            problem = f"{started()} processes were started (WORLD_SIZE), and {prog} runs as one, on all GPUs"
            raise UserError(None, None, problem, "start it with python")
        status = run(parse(settings, argv, parser))
    except UserError as error:
        named = {item.name for _, item, _ in settings.declared() if not item.metadata["positional"]}
        if error.field not in named and not settings._passes_on:
            error.field = None  # a value without a flag
        print(f"{prog}: error: {error.spelled(settings.spelling)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt as error:
        if is_main():
            print(f"\n{prog}: interrupted; {str(error) or resume}", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"{prog}: error: out of GPU memory ({str(error).splitlines()[0]}); {out_of_memory}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def quiet() -> None:
    """Silence third-party logging and progress bars; lib's own messages and warnings are shown, by one process."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    for name in ("lib", "main", "lora_ft", "image_classifiers"):
        logging.getLogger(name).setLevel(logging.INFO if is_main() else logging.ERROR)
    for name in ("huggingface_hub", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # These are read when the libraries are imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # bars of downloads and of loading would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
