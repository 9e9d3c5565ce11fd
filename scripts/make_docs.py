"""Generated documents: docs/flags.md from the declared flags, tables of results from measured figures."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # as when one of the scripts is run

import table

from lib.cli.command import command, make_parser, parse
from lib.cli.flags import Flags, flag
from lib.cli.settings import Experiment
from lib.core.errors import UserError
from lib.core.files import write_atomically
from lib.core.lazy import pandas
from scripts.speedup import benchmark

ROOT = Path(__file__).resolve().parent.parent
FIRST = [
    "main.py", "image_classifiers/main.py", "lora_ft/finetune_lm.py", "lora_ft/evaluate_ppl.py", "lora_ft/merge.py",
    "lora_ft/recover.py",
]  # fmt: skip
RESULTS, PICTURE = "data/smollm2_results.json", "docs/perplexity.png"
SPEED, SPEED_PICTURE = "data/smollm2_speedup.json", "docs/speedup.png"
BEGINNING = """\
# Flags

Every flag of every command, as `--help` shows it. This file is generated: `python scripts/make_docs.py` writes it from
the declarations, and `.ci/run` fails if it is out of date. What the methods mean is in [methods.md](methods.md).

A wrong value, an unknown flag, a flag that would have no effect, or two flags that contradict each other end the
command with one line and exit status 2, before the model is loaded wherever that can be known. `for X:` says for which
runs a flag has an effect: those with the pruner, method or flag X, or those that calibrate, search, prune or evaluate.
Flags about texts and windows that a run does not read are warned about instead, since scripts pass them to every run.
"""


@dataclass(kw_only=True)
class Docs(Flags):
    _title: ClassVar[str] = "documents"
    _spelled: ClassVar[dict[str, str]] = {"compare": "check"}

    compare: bool = flag(False, "write nothing; exit with status 2 if what would be written is out of date")


PARSER = make_parser(Docs, "make_docs.py", __doc__)


def has_parser(program: Path) -> bool:
    """Return whether a command's parser is available without running it."""
    return bool(re.search(r"^PARSER\b", program.read_text(encoding="utf-8"), re.M))


def parser_of(program: Path) -> argparse.ArgumentParser:
    """Return the argparse parser of a command for which ``has_parser`` holds."""
    return import_module(".".join(program.relative_to(ROOT).with_suffix("").parts)).PARSER


def programs() -> list[Path]:
    """Return the documented commands: the experiment's first, then the scripts by name."""
    scripts = sorted(path for path in (ROOT / "scripts").rglob("*.py") if has_parser(path))
    return [*(ROOT / name for name in FIRST), *scripts]


def section(program: Path, shared: dict[tuple, str]) -> str:
    """Return the section of a command: a table of flags for each group.

    Args:
        shared: flags of main.py and their help; a script that has them refers to main.py.
    """
    parser = parser_of(program)
    name = program.relative_to(ROOT).as_posix()
    lines = [f"## {name}", "", _plain(parser.description or "")]
    if parser.epilog and not parser.epilog.startswith("example:"):
        lines += ["", _plain(parser.epilog)]
    if parser.prog.endswith(".sh"):
        lines += ["", f"Run it as `bash {program.with_name(parser.prog).relative_to(ROOT)}`."]
    ignored = [a.option_strings[0] for a in parser._actions if a.help is a.default is argparse.SUPPRESS]
    refers = False
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
                continue
            if name.startswith("scripts/") and shared.get(tuple(action.option_strings)) == action.help:
                refers = True
            else:
                rows.append(_row(action))
        if rows:
            lines += ["", f"**{group.title}**", "", "| flag | default | |", "|---|---|---|", *rows]
    if refers:
        lines += ["", "And the flags of [main.py](#mainpy)."]
    if ignored:
        flags = ", ".join(f"`{option}`" for option in ignored)
        lines += ["", f"Flags of the published training script, accepted with a warning and without effect: {flags}."]
    return "\n".join(lines) + "\n"


def _row(action: argparse.Action) -> str:
    several = " ..." if action.nargs in ("*", "+") else ""
    value = f" {action.metavar or action.dest.upper()}{several}" if action.nargs != 0 else ""
    names = ", ".join(f"`{option}{value}`" for option in action.option_strings) or f"`{value.strip()}`"
    explanation, default = re.fullmatch(r"(.*?)(?: \(default: ([^\s()]+)\))?", action.help, re.S).groups()
    if "default:" in explanation:  # several, or one that needs words: they stay in the explanation
        explanation, default = action.help, None
    required = action.required and default is None and action.nargs != "*"
    default = "required" if required else f"`{default}`" if default else ""
    return f"| {names} | {default} | {_plain(explanation)} |".replace("|  |", "| |")


def _plain(words: str) -> str:
    return " ".join(words.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


def flags_text() -> str:
    """Return the text of docs/flags.md."""
    main = parser_of(ROOT / "main.py")
    shared = {tuple(action.option_strings): action.help for action in main._actions if action.option_strings}
    every = programs()
    names = [path.relative_to(ROOT).as_posix() for path in every]
    contents = [f"- [{name}](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})" for name in names]
    return "\n".join([BEGINNING, *contents, "", *(section(program, shared) for program in every)])


def measured_runs(content: dict) -> pandas.DataFrame:
    """Return ``table.runs_of`` the runs in RESULTS, the dense model among them; ``content`` is that file's."""
    command = content["runs"][0]["command"].partition(" --prune_method")[0]
    dense = {"command": command, "method": "dense", "target_sparsity": 0, "perplexity": content["dense"], "stages": {}}
    rows = []
    for run in [*content["runs"], dense]:
        flags = parse(Experiment, run["command"].split()[2:], parser_of(ROOT / "main.py")).flags()
        evaluation = {"text": flags["eval_data"], "seqlen": flags["seqlen"], "windows": flags["eval_windows"]}
        model = {"name": content["model"], "parameters": 0}
        record = {"flags": flags, "model": model, "evaluation": evaluation, "device": content["device"]}
        rows.append(table.row_of({"git_commit": None, "finished": ""} | record | run))
    return table.runs_of(rows)


def with_results(name: str, lines: str) -> str:
    """Return the document ``name`` with the ``lines`` of a table of results between its marks."""
    pattern, document = r"(<!-- results[^>]*-->\n).*?(<!-- /results -->)", (ROOT / name).read_text(encoding="utf-8")
    if not re.search(pattern, document, re.S):
        raise UserError(None, name, "the marks <!-- results --> and <!-- /results --> are missing")
    return re.sub(pattern, lambda marks: f"{marks[1]}\n{lines}\n\n{marks[2]}", document, flags=re.S)


def run(docs: Docs) -> None:
    """Write the generated documents, or compare them; the plots are not compared."""
    content, speed = (json.loads((ROOT / name).read_text(encoding="utf-8")) for name in (RESULTS, SPEED))
    runs = measured_runs(content)
    by_sparsity = [table.formatted(table.by_sparsity(runs, costs), "markdown") for costs in (True, False)]
    documents = {
        "docs/flags.md": flags_text(),
        "docs/results.md": with_results("docs/results.md", by_sparsity[0]),
        "README.md": with_results("README.md", by_sparsity[1]),
        "docs/speedup.md": with_results("docs/speedup.md", benchmark.table(speed)),
    }
    for name, document in documents.items():
        path = ROOT / name
        if docs.compare and (not path.is_file() or path.read_text(encoding="utf-8") != document):
            raise UserError(None, name, "is out of date", "type: python scripts/make_docs.py")
        if not docs.compare:
            write_atomically(path, document)
    if not docs.compare:
        table.plot(ROOT / PICTURE, table.cells_of(runs).assign(model=content["caption"]))
        benchmark.plot(speed, ROOT / SPEED_PICTURE)
        print(f"written: {', '.join(documents)}, {PICTURE}, {SPEED_PICTURE}")


def main(argv: list[str] | None = None) -> int:
    return command(Docs, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
