"""Generated documents: docs/flags.md from the declared flags, the README's results from measured figures."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # as when one of the scripts is run

from lib.cli.command import command, make_parser
from lib.cli.flags import Flags, flag
from lib.core.errors import UserError
from lib.core.files import save_figure, write_atomically
from lib.pruning.pruners import PRUNERS

ROOT = Path(__file__).resolve().parent.parent
FIRST = [
    "main.py", "image_classifiers/main.py", "lora_ft/finetune_lm.py", "lora_ft/evaluate_ppl.py", "lora_ft/merge.py"
]  # fmt: skip
RESULTS, PICTURE = "data/smollm2_results.json", "docs/perplexity.png"
LABELS = {"": "uniform", "ww": "by alpha", "price": "by price"}
DRAWN = {
    "wanda": ("Wanda, uniform", "s--C3"),
    "wanda_ww": ("Wanda, by alpha", "o-C1"),
    "sparsegpt": ("SparseGPT, uniform", "s--C4"),
    "sparsegpt_ww": ("SparseGPT, by alpha", "o-C0"),
    "alps_price": ("ALPS, by price", "D-C2"),
}
Figures = dict[str, dict[float, list[float]]]  # perplexities of all seeds by sparsity, by method

BEGINNING = """\
# Flags

Every flag of every command, as `--help` shows it. This file is generated: `python scripts/make_docs.py` writes it from
the declarations, and `.ci/run` fails if it is out of date. What the methods mean is in [methods.md](methods.md).

A wrong value, an unknown flag, a flag that would have no effect, or two flags that contradict each other end the
command with one line and exit status 2, before the model is loaded wherever that can be known. Flags about texts and
windows that a run does not read are warned about instead, since scripts pass them to every run.
"""


@dataclass(kw_only=True)
class Docs(Flags):
    _title: ClassVar[str] = "documents"
    _spelled: ClassVar[dict[str, str]] = {"compare": "check"}

    compare: bool = flag(False, "write nothing; exit with status 2 if what would be written is out of date")


PARSER = make_parser(Docs, "make_docs.py", __doc__)


def has_parser(program: Path) -> bool:
    """Return whether a command's parser is available without running it."""
    return bool(re.search(r"^(PARSER\b|def make_parser\()", program.read_text(encoding="utf-8"), re.M))


def parser_of(program: Path) -> argparse.ArgumentParser:
    """Return the argparse parser of a command for which ``has_parser`` holds."""
    module = import_module(".".join(program.relative_to(ROOT).with_suffix("").parts))
    return module.PARSER if hasattr(module, "PARSER") else module.make_parser()


def programs() -> list[Path]:
    """Return the documented commands: the experiment's first, then the scripts by name."""
    scripts = sorted(path for path in (ROOT / "scripts").rglob("*.py") if has_parser(path))
    return [*(ROOT / name for name in FIRST), *scripts]


def section(program: Path, known: dict[tuple, str]) -> str:
    """Return the section of a command: a table of flags for each group.

    Args:
        known: flags of main.py and their help; a script that shares them refers to main.py.
    """
    parser = parser_of(program)
    name = program.relative_to(ROOT).as_posix()
    lines = [f"## {name}", "", _plain(parser.description or "")]
    if parser.epilog and not parser.epilog.startswith("example:"):
        lines += ["", _plain(parser.epilog)]
    if parser.prog.endswith(".sh"):
        lines += ["", f"Run it as `bash {program.with_name(parser.prog).relative_to(ROOT)}`."]
    known = known if name.startswith("scripts/") else {}
    for group in parser._action_groups:
        rows = list(_rows(group, known))
        if rows:
            lines += ["", f"**{group.title}**", "", "| flag | default | |", "|---|---|---|", *rows]
    if any(_is_known(action, known) for action in parser._actions):
        lines += ["", "And the flags of [main.py](#mainpy)."]
    ignored = [a.option_strings[0] for a in parser._actions if a.help is a.default is argparse.SUPPRESS]
    if ignored:
        flags = ", ".join(f"`{option}`" for option in ignored)
        lines += ["", f"Flags of the published training script, accepted with a warning and without effect: {flags}."]
    return "\n".join(lines) + "\n"


def _is_known(action: argparse.Action, known: dict[tuple, str]) -> bool:
    hidden = action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction)
    return not hidden and known.get(tuple(action.option_strings)) == action.help


def _rows(group, known: dict[tuple, str]) -> Iterator[str]:
    for action in group._group_actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction) or _is_known(action, known):
            continue
        several = " ..." if action.nargs in ("*", "+") else ""
        value = f" {action.metavar or action.dest.upper()}{several}" if action.nargs != 0 else ""
        names = ", ".join(f"`{option}{value}`" for option in action.option_strings) or f"`{value.strip()}`"
        whole = action.help.replace(" (default: %(default)s)", "")  # as argparse writes it
        text, default = re.fullmatch(r"(.*?)(?: \(default: ([^\s()]+)\))?", whole, re.S).groups()
        if "default:" in text:  # several, or one that needs words: they stay in the text
            text, default = whole, None
        elif default is None and action.default not in (None, False, argparse.SUPPRESS):
            values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
            default = " ".join(map(str, values))
        if action.choices and "{" not in text:  # of an argparse parser; Flags write them into the help
            text = f"{text} {{{', '.join(action.choices)}}}"
        if default is not None and default.startswith(str(ROOT)):
            default = Path(default).relative_to(ROOT).as_posix()
        required = action.required and default is None and action.nargs != "*"
        default = "required" if required else f"`{default}`" if default else ""
        yield f"| {names} | {default} | {_plain(text)} |".replace("|  |", "| |")


def _plain(text: str) -> str:
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


def flags_text() -> str:
    """Return the text of docs/flags.md."""
    main = parser_of(ROOT / "main.py")
    known = {tuple(action.option_strings): action.help for action in main._actions if action.option_strings}
    every = programs()
    names = [path.relative_to(ROOT).as_posix() for path in every]
    contents = [f"- [{name}](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})" for name in names]
    return "\n".join([BEGINNING, *contents, "", *(section(program, known) for program in every)])


# ------------------------------------------------------------------------------------------------- measured results


def figures(content: dict) -> Figures:
    """Return the perplexities of all seeds by method and sparsity; ``content`` is that of RESULTS."""
    found: Figures = {}
    for record in content["runs"]:
        found.setdefault(record["method"], {}).setdefault(record["target_sparsity"], []).append(record["perplexity"])
    return found


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean:.{1 if mean < 100 else 0}f}{spread}"


def results_table(content: dict) -> str:
    """Return the README's table: mean and standard deviation over the calibration seeds."""
    found = figures(content)
    sparsities = sorted({sparsity for row in found.values() for sparsity in row if sparsity})
    lines = [
        "| pruner | allocation | " + " | ".join(f"{sparsity:g}" for sparsity in sparsities) + " |",
        "|---|---|" + "---:|" * len(sparsities),
    ]
    for pruner in PRUNERS:
        for suffix, label in LABELS.items():
            row = found.get(f"{pruner}_{suffix}".rstrip("_"))
            if row:
                cells = " | ".join(_cell(row.get(sparsity, [])) for sparsity in sparsities)
                lines.append(f"| {pruner} | {label} | {cells} |")
    return "\n".join(lines)


def readme_text(text: str, content: dict) -> str:
    """Return the README with the results table between its marks."""
    pattern = r"(<!-- results[^>]*-->\n).*?(<!-- /results -->)"
    if not re.search(pattern, text, re.S):
        raise UserError(None, "README.md: the marks <!-- results --> and <!-- /results --> are missing")
    return re.sub(pattern, lambda found: f"{found[1]}\n{results_table(content)}\n\n{found[2]}", text, flags=re.S)


def draw(content: dict, path: Path) -> None:
    """Write the README's plot: perplexity over sparsity, mean over seeds, one line for each of DRAWN."""
    from matplotlib.figure import Figure

    found = figures(content)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, (label, style) in DRAWN.items():
        points = sorted((sparsity, statistics.mean(values)) for sparsity, values in found.get(method, {}).items())
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(content["dense"], color="black", linewidth=0.8, linestyle=":", label="dense")
    axes.set(yscale="log", xlabel="weights removed", ylabel="perplexity (lower is better)")
    sparsities = sorted({sparsity for row in found.values() for sparsity in row if sparsity})
    axes.set_xticks(sparsities, [f"{sparsity:.0%}" for sparsity in sparsities])
    low, high = axes.get_ylim()
    ticks = [tick for tick in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= tick <= high]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_minor_formatter("")
    axes.set_title(content["caption"], fontsize="medium")
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize="small")
    save_figure(figure, path, dpi=120)


# ------------------------------------------------------------------------------------------------------------- all


def run(docs: Docs) -> None:
    """Write the generated documents, or compare them; the plot is not compared."""
    content = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, text in {"docs/flags.md": flags_text(), "README.md": readme_text(readme, content)}.items():
        path = ROOT / name
        if docs.compare and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise UserError(None, f"{name} is out of date; type: python scripts/make_docs.py")
        if not docs.compare:
            write_atomically(path, text)
    if not docs.compare:
        draw(content, ROOT / PICTURE)
        print(f"written: docs/flags.md, the table in README.md, {PICTURE}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status: 0, or 2 if the reference is out of date."""
    return command(Docs, run, argv, PARSER)


if __name__ == "__main__":
    sys.exit(main())
