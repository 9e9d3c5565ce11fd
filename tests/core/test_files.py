"""Output files and folders: refused in time, whole or not there, and unharmed by a process that is killed."""

import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from lib.core import files
from lib.core.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_checked_without_a_trace(tmp_path):
    (tmp_path / "file").write_text("a")
    for folder in (tmp_path, tmp_path / "a" / "b"):
        files.check_writable("save", folder)
    for folder in ("file", "file/below", "/proc/nowhere"):
        with pytest.raises(UserError, match="--save .*cannot be written"):
            files.check_writable("save", tmp_path / folder)
    with pytest.raises(UserError, match=r"--save_model .*full, 1\.0YiB are needed and \d"):
        files.check_writable("save_model", tmp_path, need_bytes=2**80)
    assert names(tmp_path) == ["file"]


def full(*_) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_by_a_durable_one_or_stays(tmp_path, monkeypatch):
    os.umask(0o022)
    path, seen = tmp_path / "new" / "figures.txt", []
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: seen.append(path.exists()))
        files.write_atomically(path, "old")
    assert seen == [False, True], "the file, and then its name in the folder"
    files.write_atomically(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644, "others can read it"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"figures\.txt: cannot be written \(No space left on device\)"):
        files.write_atomically(path, "newer")
    assert path.read_text() == "new" and names(path.parent) == ["figures.txt"]


FORK = multiprocessing.get_context("fork")


def killed(context: AbstractContextManager, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Let a new process enter ``context``, and write a file x to the folder, if it is one; kill it there."""
    entered = FORK.Event()

    def enter() -> None:
        with context as folder:
            if folder:
                (folder / "x").write_text("half")
            entered.set()
            time.sleep(600)

    child = FORK.Process(target=enter)
    child.start()
    assert entered.wait(60)
    try:
        meanwhile()
    finally:
        child.kill()
        child.join()


def test_a_locked_folder_is_refused_until_its_process_has_ended(tmp_path):
    def is_refused() -> None:
        with pytest.raises(UserError, match="--save .*m: another process is at work there"):
            files.locked(tmp_path / "m", "save").__enter__()

    killed(files.locked(tmp_path / "m"), is_refused)
    with files.locked(tmp_path / "m", "save"):
        assert names(tmp_path) == [".m.lock"]
    assert names(tmp_path) == []


def test_of_two_processes_that_save_at_once_the_second_waits(tmp_path):
    target = tmp_path / "m"

    def save() -> None:
        with files.new_folder(target) as folder:
            (folder / "x").write_text("child")

    with files.new_folder(target) as folder:
        (folder / "x").write_text("parent")
        child = FORK.Process(target=save)
        child.start()
        child.join(0.2)
        assert child.is_alive(), "it waits"
    child.join()
    assert names(tmp_path) == ["m"] and (target / "x").read_text() == "child"


def test_what_a_killed_save_left_is_removed_by_the_next_one(tmp_path):
    target = tmp_path / "wanda_0.5"
    killed(files.new_folder(target))
    assert ".wanda_0.5.new" in names(tmp_path)
    with files.new_folder(target) as folder:
        (folder / "y").write_text("whole")
    assert names(tmp_path) == ["wanda_0.5"] and names(target) == ["y"]


@pytest.mark.parametrize("again", ["fails", "succeeds"])
@pytest.mark.parametrize("old", ["m", ".m.old"])  # which a kill between the two renames leaves
def test_a_folder_is_replaced_as_a_whole(old, again, tmp_path):
    (tmp_path / old).mkdir()
    (tmp_path / old / "x").write_text("old")
    with suppress(UserError), files.new_folder(tmp_path / "m") as folder:
        (folder / "x").write_text("new")
        if again == "fails":
            full()
    assert (tmp_path / "m" / "x").read_text() == ("old" if again == "fails" else "new")
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("kind", ["a file", "a link", "a broken link"])
def test_a_folder_never_takes_the_place_of_something_else(kind, tmp_path):
    target = tmp_path / "m"
    (tmp_path / "there").mkdir()
    target.write_text("x") if kind == "a file" else target.symlink_to("there" if kind == "a link" else "nowhere")
    before = names(tmp_path)
    with pytest.raises(UserError, match="would be replaced; move it away"), files.new_folder(target):
        pytest.fail("the work begins")
    assert names(tmp_path) == before
