"""The shape of the repository: what lies at the top, how fast commands answer, and that every command parses."""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, settings

import main

TOP = (
    "main.py lib scripts data lora_ft image_classifiers INSTALL.md README.md LICENSE requirements.txt tests docs .ci "
    "pyproject.toml .gitignore"
)

ROOMS = sorted((ROOT / "lib").rglob("*.py"))
COMMANDS = sorted(p for folder in ("", "lora_ft", "image_classifiers") for p in (ROOT / folder).glob("*.py"))
SLOW_TO_IMPORT = ["torch", "transformers", "accelerate", "datasets", "lm_eval", "weightwatcher", "timm", "peft"]


def tracked() -> list[str]:
    """Return the files that git keeps, and those that it would: neither ignored nor committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in out.split("\0") if name and (ROOT / name).exists()]


@pytest.mark.parametrize("program", ["main.py", "image_classifiers/main.py", "lora_ft/merge.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag"]], ids=str)
def test_help_and_a_wrong_flag_are_answered_before_torch_is_imported(program, flags):
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += f"finally: print([m for m in {SLOW_TO_IMPORT} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.returncode == (0 if flags == ["--help"] else 2), done.stderr


def longest_function(path: Path) -> tuple[int, str]:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return max(((n.end_lineno - n.lineno + 1, n.name) for n in functions), default=(0, ""))


@pytest.mark.parametrize("path", [*ROOMS, *COMMANDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_can_be_read_at_a_glance(path):
    # What ruff has no rule for. The rest of the style and the order of the rooms are in pyproject.toml.
    assert longest_function(path)[0] <= 50, longest_function(path)
    assert ".cuda(" not in path.read_text(), "the weight's own device, whatever it is"


def test_main_is_the_experiment_and_no_more():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 250
    scripts = (ROOT / "scripts").rglob("*.py")
    importers = {p.name for p in scripts if re.search(r"^(import|from) main\b", p.read_text(), re.M)}
    assert importers <= {"sweep.py", "demo.py", "compare_allocations.py"}


def test_the_top_level_holds_nothing_else():
    assert {name.split("/")[0] for name in tracked()} <= set(TOP.split())


def test_no_large_file_is_committed():
    assert {name: size for name in tracked() if (size := (ROOT / name).stat().st_size) > 300_000} == {}


# ------------------------------------------------------------------------------------------------------ the commands

SCRIPTS = [name for name in tracked() if name.endswith(".sh") or name.startswith(".ci/")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses(name):
    first = (ROOT / name).read_text().splitlines()[0]
    assert re.fullmatch(r"#!.*\b(ba)?sh|# .*", first), "says what runs it, or that it is sourced"
    done = subprocess.run(["bash", "-n", name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def commands_of(text: str) -> list[list[str]]:
    """Return the words of every ``python ...`` and ``bash ...`` command in the code blocks of a Markdown ``text``."""
    found = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|\||;)\s", line.strip().removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"\w+=\S*", words[0]):  # VARIABLE=value python ...
                    words.pop(0)
                if words and re.fullmatch(r"(\S*/)?(python\d?|bash|sh)", words[0]):
                    found.append(words)
    return found


def documents() -> dict[str, str]:
    return {
        name: (ROOT / name).read_text() for name in tracked() if name.endswith(".md") and not name.startswith("tests/")
    }


def check_command(words: list[str]) -> None:
    program, rest = words[1], words[2:]
    if program in ("-m", "-c"):
        assert program == "-c" or rest[0] in ("venv", "pip", "pytest"), words
        return
    assert program in tracked(), f"{' '.join(words)}: there is no {program}"
    if program == "main.py" and "--help" not in rest:
        settings(rest)
    elif program.endswith(".py") and program.count("/"):
        check_flags(ROOT / program, rest)


def parser_of(program: Path) -> argparse.ArgumentParser | None:
    """Return the argparse parser of a command, None of a program that has none to look at."""
    if str(ROOT / "scripts") not in sys.path:  # as when one of them is run
        sys.path.insert(0, str(ROOT / "scripts"))
    module = import_module(".".join(program.relative_to(ROOT).with_suffix("").parts))
    return module.PARSER if hasattr(module, "PARSER") else module.make_parser()


def has_parser(program: Path) -> bool:
    return bool(re.search(r"^(PARSER\b|def make_parser\()", program.read_text(), re.M))


def check_flags(program: Path, rest: list[str]) -> None:
    """Every flag that is given is one of the program's parser, or stands in the program as a string."""
    if has_parser(program):
        if "--help" not in rest:
            _, unknown = parser_of(program).parse_known_args(rest)
            if unknown and program.stem in ("sweep", "compare_allocations"):  # the rest is main.py's
                settings(unknown)
            elif unknown:
                parser_of(program).parse_args(rest)
        return
    known = {node.value for node in ast.walk(ast.parse(program.read_text())) if isinstance(node, ast.Constant)}
    given = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert given - {"--help"} <= known, (program, given - known)


def test_readme_is_there_and_shows_the_two_commands():
    commands = commands_of((ROOT / "README.md").read_text())
    assert ["bash", "scripts/demo.sh"] in commands and any(words[1:2] == ["scripts/test.sh"] for words in commands)
    assert any(words[1] == "main.py" for words in commands)


def test_every_command_in_the_documents_parses(monkeypatch, tmp_path):
    # A local text in an example need not be there.
    monkeypatch.setattr("lib.data.check_text", lambda *_: None)
    for name, text in documents().items():
        for words in commands_of(text):
            try:
                check_command(words)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{name}: {' '.join(words)}: {error}")


def test_every_command_in_the_scripts_parses():
    # Commands of the programs in scripts, as far as their flags go: values may be variables.
    programs = [path for path in COMMANDS if has_parser(path)]
    known = {str(path.relative_to(ROOT)): set(parser_of(path)._option_string_actions) for path in programs}
    for name in SCRIPTS:
        for line in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
            words = [] if line.lstrip().startswith("#") else line.split()
            for program in known.keys() & set(words):
                rest = words[words.index(program) + 1 :]
                flags = {word.split("=")[0] for word in rest if word.startswith("--")}
                assert flags <= known[program], (name, flags - known[program])


def test_every_flag_is_in_the_readme():
    flags = {flag for flag in main.PARSER._option_string_actions if flag.startswith("--")} - {"--help"}
    assert not {flag for flag in flags if flag not in (ROOT / "README.md").read_text()}


def test_help_explains_every_flag_in_groups(capsys):
    parser = main.PARSER
    assert all(action.help for action in parser._actions)
    text = parser.format_help()
    for group in ("model", "data", "pruning", "allocation", "evaluation", "output"):
        assert re.search(rf"^{group}\b.*:$", text, flags=re.M), group


PUBLISHED_DEFAULTS = {
    "seed": 0,
    "nsamples": 128,
    "sparsity_ratio": 0,
    "sparsity_type": "unstructured",
    "cache_dir": "llm_weights",
    "use_variant": False,
    "ww_metric": "alpha_peak",
    "epsilon": 0.3,
    "mapping_type": "block_wise",
    "eval_zero_shot": False,
    # fixed or new
    "save": "results",
    "eval_wikitext": True,
    "dtype": "auto",
    "seqlen": 2048,
    "calib_data": "c4",
    "eval_data": "wikitext2",
    "eval_windows": None,
    "tasks": "boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa",
    "num_fewshot": 0,
    "limit": None,
    "eval_batch_size": "auto",
    "include_path": None,
}


def test_defaults_are_the_published_ones():
    args = settings("--model m")
    assert {name: getattr(args, name) for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


def test_published_command_is_understood():
    command = (
        "--model meta-llama/Llama-2-7b-hf --cache_dir llm_weights/ --prune_method wanda_ww --sparsity_ratio 0.7 "
        "--save results/ --ww_metric alpha_peak --ww_metric_cache ./data/llama2-7b-hf/ --epsilon 0.3"
    )
    task = settings(command).task()
    assert (task.method, task.target, task.nm) == ("wanda_ww", 0.7, None)


@pytest.mark.parametrize(("given", "value"), [([], True), (["true"], True), (["False"], False)])
def test_eval_wikitext_takes_true_and_false(given, value):
    flags = ["--eval_wikitext", *given] if given else []
    assert settings(["--model", "m", *flags]).eval_wikitext is value


def test_a_requirements_file_is_installed_once_whatever_its_folder(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "env.sh").write_text((ROOT / "scripts" / "env.sh").read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> pip.log\n')
    python.chmod(0o755)
    for name in ("requirements.txt", "scripts/requirements.txt"):
        (tmp_path / name).write_text(f"# {name}\n")
    lines = "source scripts/env.sh; need requirements.txt; need scripts/requirements.txt --no-deps"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_BIN"}
    for _ in range(2):
        subprocess.run(["bash", "-c", lines], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len((tmp_path / "pip.log").read_text().splitlines()) == 2
    (tmp_path / "requirements.txt").write_text("# changed\n")
    subprocess.run(["bash", "-c", lines], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len((tmp_path / "pip.log").read_text().splitlines()) == 3
