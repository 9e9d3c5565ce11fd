"""The documents: links lead somewhere, commands parse, flags and methods are all there, and the README is short."""

import json
import re
import shlex

import pytest
from conftest import ROOT, settings
from test_layout import tracked

from lib.allocation.formulas import ALLOCATIONS
from lib.calibration.texts import DATASETS
from lib.models.layers import SUPPORTED
from lib.pruning.pruners import PRUNERS
from lib.spectra.tail import METRICS, WEIGHTWATCHER
from scripts import make_docs

DOCUMENTS = sorted(name for name in tracked() if name.endswith(".md") and not name.startswith("tests/"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a Markdown text."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken_links(name: str, text: str) -> list[str]:
    """Return the links of the document ``name`` into the repository that lead nowhere."""
    found = []
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(text)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):  # an address outside
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_resolve(name):
    assert broken_links(name, read(name)) == []


def test_a_broken_link_and_a_broken_anchor_are_found():
    text = "# Some title!\n[a](nowhere.md) [b](README.md#nothing) [c](#some-title) [d](https://x.y) `[e](f)`\n"
    assert broken_links("INSTALL.md", text) == ["nowhere.md", "README.md#nothing", "#some-title"]  # c: of INSTALL.md
    assert anchors(text) == {"some-title"}


def test_readme_is_one_sitting():
    text = read("README.md")
    assert len(text.splitlines()) <= 150 and max(map(len, text.splitlines())) <= 120
    places = [
        text.index(part)
        for part in ("](docs/perplexity.png)", "scripts/demo.sh", "from_pretrained", "## Which method", "## Results",
                     "## Large models", "## Recovery, images", "## How the code", "## Citation")
    ]  # fmt: skip
    assert places == sorted(places)


def test_readme_names_the_families_that_were_tried():
    flat = " ".join(read("README.md").split())
    assert not [family for family in SUPPORTED.split(", ") if family not in flat]


def test_readme_names_every_room():
    rooms = {path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")}
    table = read("README.md").partition("## How the code")[2]
    assert "core" in rooms and not {room for room in rooms if f"`{room}`" not in table}


def test_generated_documents_are_current():
    assert make_docs.main(["--check"]) == 0, "type: python scripts/make_docs.py"


def test_check_of_the_reference_notices_a_change(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    for name in (make_docs.RESULTS, make_docs.SPEED, "README.md", "docs/results.md", "docs/speedup.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(read(name), encoding="utf-8")
    monkeypatch.setattr(make_docs, "flags_text", lambda: "new\n")
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    assert make_docs.main(["--check"]) == 2 and not (tmp_path / "docs" / "flags.md").exists()
    assert "docs/flags.md: is out of date" in capsys.readouterr().err
    assert make_docs.main([]) == 0 and make_docs.main(["--check"]) == 0
    for name in (make_docs.PICTURE, make_docs.SPEED_PICTURE):
        assert (tmp_path / name).stat().st_size > 1000


def test_every_flag_of_the_main_commands_is_in_the_reference():
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", read("docs/flags.md"), flags=re.M | re.S))
    for name in make_docs.FIRST:
        flags = {flag for flag in make_docs.parser_of(ROOT / name)._option_string_actions if flag.startswith("--")}
        assert not {flag for flag in flags - {"--help"} if not re.search(rf"`{flag}\b", sections[name])}, name


@pytest.mark.parametrize(
    ("registry", "written"),
    [
        (PRUNERS, "### {}\n"),
        ({name: None for name in ALLOCATIONS if name}, "**`_{}`**"),
        (METRICS | WEIGHTWATCHER, "`{}`"),
    ],
    ids=["pruners", "allocations", "metrics"],
)
def test_every_entry_is_explained_in_methods(registry, written):
    text = read("docs/methods.md")
    assert not [name for name in registry if written.format(name) not in text]


def test_every_text_is_named():
    assert not [name for name in DATASETS if f"`{name}`" not in read("CONTRIBUTING.md") + read("docs/evaluation.md")]


# -------------------------------------------------------------------------------------------------------- commands


def commands_of(text: str) -> list[list[str]]:
    """Return the words of every ``python``, ``bash`` or ``accelerate launch`` command in a Markdown text's code."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S):
        shell = "" if language in ("python", "bibtex") else block
        for line in shell.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|\||;)\s", line.strip().removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"\w+=\S*", words[0]):  # VARIABLE=value python ...
                    words.pop(0)
                if words[:2] == ["accelerate", "launch"]:  # its own flags come first
                    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
                    words = ["python", *words[program:]]
                if words and re.fullmatch(r"(\S*/)?(python\d?|bash|sh)", words[0]):
                    found.append(words)
    return found


def check_command(words: list[str]) -> None:
    """Parse a command with its program's own parser.

    Raises:
        UserError, SystemExit, AssertionError: no such program, or it does not take these flags.
    """
    program, rest = words[1], words[2:]
    if program in ("-m", "-c"):
        assert program == "-c" or rest[0] in ("venv", "pip", "pytest"), words
        return
    assert program in tracked(), f"{program}: not in the repository"
    path = ROOT / program
    if not program.endswith(".py") or "--help" in rest:
        return
    if program == "main.py":
        settings(rest)
    elif make_docs.has_parser(path):
        _, unknown = make_docs.parser_of(path).parse_known_args(rest)
        if unknown and path.stem == "sweep":  # the rest is main.py's
            settings(unknown)
        elif unknown and path.stem == "finetune_lm":  # the rest is the Trainer's, whose parser has no fast import
            from lora_ft.training import TrainerParser

            TrainerParser(make_docs.parser_of(path)).parse_args(unknown)
        elif unknown:
            make_docs.parser_of(path).parse_args(rest)
    else:  # its flags are declared where it runs
        flags = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert not {flag for flag in flags if f'"{flag}"' not in path.read_text(encoding="utf-8")}, words


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_in_the_documents_parses(name, monkeypatch):
    # A local text in an example need not exist.
    monkeypatch.setattr("lib.calibration.texts.check_text", lambda *_: None)
    monkeypatch.setattr("lib.pruning.plan.read_plan", lambda _: {"target": 0.7, "layers": {}})  # nor a plan
    for words in commands_of(read(name)):
        try:
            check_command(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{name}: {' '.join(words)}: {error}")


WRONG = ["main.py --model m --prune_method wanda_ww", "scripts/sweep.py --model m --no_such_flag", "scripts/none.py"]


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_in_a_document_is_noticed(command):
    with pytest.raises((Exception, SystemExit)):
        check_command(["python", *command.split()])


def test_python_in_the_readme_runs_as_far_as_its_command(monkeypatch):
    import main

    (block,) = re.findall(r"^```python\n(.*?)^```", read("README.md"), flags=re.M | re.S)
    asked = []
    monkeypatch.setattr(main, "main", asked.append)
    exec(block.split("\n\n")[0], {})
    assert asked and settings(asked[0]).save_model == "out"
    assert f"{asked[0][-1]}/{settings(asked[0]).task().folder}" in block  # what is loaded is what was saved


# ------------------------------------------------------------------------------------------------- measured results


def test_results_name_the_command_and_the_commits_that_made_them():
    measured, page = json.loads(read(make_docs.RESULTS)), read("docs/results.md")
    assert measured["command"].replace(" ", "") in page.replace("\\\n", "").replace(" ", "")
    assert all(run["git_commit"][:12] in page for run in measured["runs"]) and f"dense {measured['dense']:.2f}" in page
    for run in measured["runs"]:
        made = settings(run["command"].split()[2:])
        method = f"{made.prune_method}_recovered" if made.recover else made.prune_method
        assert (method, made.sparsity_ratio) == (run["method"], run["target_sparsity"])
