"""Commands: flags declared as data, and the one wrapper that answers errors, Ctrl-C and a GPU that is full."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import ROOT, settings

from lib.cli.command import command, make_parser, parse
from lib.cli.flags import Flags, flag
from lib.core.errors import UserError
from lib.models.locate import locate


@dataclass(kw_only=True)
class Fruit(Flags):
    _title: ClassVar[str] = "fruit"
    name: str = flag(MISSING, "of the fruit")
    weight: float = flag(0.5, "in kg", least=0, below=2, metavar="W")
    count: int | None = flag(None, "a count", least=1)
    colour: str = flag("red", "one of {choices}", choices=("red", "green"))
    basket: str | None = flag(None, "where it lies", metavar="DIR")
    tags: str = flag("", "labels", metavar="A,B")


@dataclass(kw_only=True)
class Juice(Flags):
    _title: ClassVar[str] = "juice"
    press: bool = flag(False, "press it")
    pulp: bool = flag(True, "keep the pulp")
    litres: float | str = flag(1.0, "how much", above=0, most=9, only="press")


@dataclass(kw_only=True)
class Order(Fruit, Juice):
    _spelled: ClassVar[dict[str, str]] = {"weight": "Weight"}
    _ignored: ClassVar = ("lr", "epochs")

    def check(self) -> None:
        super().check()
        if self.colour == "green" and self.press:
            raise UserError("press", "with green fruit", "too sour")


PARSER = make_parser(Order, "order.py", "Orders.")


def order(*flags: str) -> Order:
    return parse(Order, ["--name", "plum", *flags], PARSER)


def test_values_defaults_and_what_was_given():
    made = order("--Weight", "1.5", "--press", "--litres", "auto", "--pulp", "False")
    assert (made.name, made.weight, made.count) == ("plum", 1.5, None)
    assert (made.press, made.litres, made.pulp) == (True, "auto", False)
    assert made.given == {"name", "weight", "press", "litres", "pulp"}
    assert made.flags() == {
        "name": "plum", "Weight": 1.5, "count": None, "colour": "red", "basket": None, "tags": "", "press": True,
        "pulp": False, "litres": "auto",
    }  # fmt: skip
    assert order().given == {"name"} and order("--pulp").pulp is True


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("--Weight 2", "--Weight 2.0: must be at least 0 and below 2"),
        ("--Weight nan", "--Weight nan: must be at least 0 and below 2"),
        ("--count 0", "--count 0: must be at least 1"),
        ("--colour gren", "--colour gren: invalid choice. Did you mean 'green'? Choose from: red, green"),
        ("--litres 3", "--litres does nothing here; it is for --press"),
        ("--press --litres 0", "--litres 0.0: must be above 0 and at most 9"),
        ("--press --litres inf", "--litres inf: must be above 0 and at most 9"),
        ("--basket=", "--basket '': is empty; give a value"),
        ("--colour=", "--colour '': is empty; give a value"),
        ("--press --colour green", "--press with green fruit: too sour"),
        ("--weight 1", "unrecognized arguments: --weight 1. Did you mean '--Weight'? (--help lists the flags)"),
        ("--pulp maybe", "argument --pulp: invalid true_or_false value: 'maybe' (--help lists the flags)"),
        ("--press --litres all", "argument --litres: invalid auto_or_float value: 'all' (--help lists the flags)"),
    ],
)
def test_a_wrong_command_line_is_one_line_in_the_commands_own_spelling(typed, line, capsys):
    status = command(Order, lambda _: pytest.fail("it runs"), ["--name", "plum", *typed.split()], PARSER)
    assert status == 2 and capsys.readouterr().err == f"order.py: error: {line}\n"


def test_an_empty_list_is_for_the_command_to_judge():
    assert order("--tags", "").tags == "" and "tags" in order("--tags", "").given


@pytest.mark.parametrize("typed", [["--basket=~/fruit"], ["--basket", "~/fruit"]])
def test_a_tilde_that_the_shell_left_is_the_home_folder(typed, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert order(*typed).basket == f"{tmp_path}/fruit"
    assert order("--basket", "a/~b").basket == "a/~b" and order("--name", "owner/plum~1").name == "owner/plum~1"


def test_help_shows_groups_choices_and_defaults():
    text = " ".join(PARSER.format_help().split())
    assert "fruit:" in text and "juice:" in text and "one of {red, green} (default: red)" in text
    assert "--Weight W in kg (default: 0.5)" in text and "--lr" not in text and "press it (default" not in text


def run_raising(error: BaseException, **more) -> int:
    def run(_):
        raise error

    return command(Order, run, ["--name", "fig"], PARSER, **more)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("weight", 3, "too heavy"), 2, "order.py: error: --Weight 3: too heavy\n"),
        (UserError(None, None, "no fruit"), 2, "order.py: error: no fruit\n"),
        (KeyboardInterrupt(), 130, "\norder.py: interrupted; the same command resumes\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore."), 2,
         "order.py: error: out of GPU memory (CUDA out of memory. Tried 2 GiB.); eat less\n"),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), 2,  # of pinned memory, or of a context
         "order.py: error: out of GPU memory (CUDA error: out of memory); eat less\n"),
    ],
    ids=["field", "no field", "Ctrl-C", "out of memory", "the driver's"],
)  # fmt: skip
def test_every_way_to_end_is_one_line(error, status, line, capsys):
    assert run_raising(error, resume="the same command resumes", out_of_memory="eat less") == status
    assert capsys.readouterr().err == line


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_raising(ZeroDivisionError())


def test_an_int_is_the_status_and_anything_else_is_success():
    for value, status in ((1, 1), (None, 0), ({"a": 1}, 0)):
        assert command(Order, lambda _, value=value: value, ["--name", "fig"], PARSER) == status


@pytest.mark.parametrize("processes", [True, False])
def test_several_processes_are_refused_unless_they_share_the_work(processes, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    ran = []
    status = command(Order, ran.append, ["--name", "fig"], PARSER, processes=processes)
    err = capsys.readouterr().err
    assert (status, len(ran)) == ((0, 1) if processes else (2, 0))
    assert processes or (err.count("\n") == 1 and "4 processes" in err and "WORLD_SIZE" in err)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_defaults_in_the_repository_are_there_wherever_a_command_is_started(elsewhere, tmp_path, monkeypatch):
    monkeypatch.undo()  # the tests' own folder for metrics
    monkeypatch.chdir(tmp_path if elsewhere else ROOT)
    made = settings("--model m")
    place = ROOT if elsewhere else Path()
    assert Path(locate("owner/name", made.cache_dir).cache_dir) == place / "llm_weights"
    assert made.measurement("m").folder == place / "data" / "m"
    assert made.save == "results"  # the current folder's
    typed = settings("--model m --cache_dir llm_weights").cache_dir
    assert locate("owner/name", typed).cache_dir == "llm_weights", "the current folder's, too"


def test_flags_of_a_published_script_are_ignored_with_a_warning(caplog):
    made = order("--lr", "3", "--epochs")
    assert made == order() and made.given == {"name"}
    assert "which do nothing here: --" in caplog.text and "lr" in caplog.text and "epochs" in caplog.text
