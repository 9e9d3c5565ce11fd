"""Output files and folders: refused in time, whole or not there, and unharmed by a process that is killed."""

import os
import signal
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lib.core import files
from lib.core.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- before work begins


def test_a_writable_folder_is_checked_without_a_trace(tmp_path):
    files.check_writable("save", tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "here").mkdir()
    files.check_writable("save", tmp_path / "here")
    assert names(tmp_path) == ["here"] and names(tmp_path / "here") == []


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused(where, tmp_path):
    (tmp_path / "file").write_text("a")
    with pytest.raises(UserError, match="--save .*cannot be written") as caught:
        files.check_writable("save", tmp_path / where)
    assert "\n" not in str(caught.value) and names(tmp_path) == ["file"]


def test_a_full_disk_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--save_model .*full, 1\d{15} GiB are needed and \d"):
        files.check_writable("save_model", tmp_path, need_bytes=2**80)


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (900, "900 bytes"), (1536, "1.5 KiB"), (300 * 2**20, "300 MiB"), (2**31, "2.0 GiB")],
)
def test_sizes_are_readable(size, words):
    assert files.readable(size) == words


# -------------------------------------------------------------------------------------------------------------- files


def test_a_written_file_replaces_the_old_one_and_can_be_read_by_others(tmp_path):
    os.umask(0o022)
    path = tmp_path / "new" / "figures.txt"
    files.write_atomically(path, "old")
    files.write_atomically(path, "new")
    assert path.read_text() == "new" and names(path.parent) == ["figures.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "figures.txt"
    files.write_atomically(path, "old")

    def full(_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"figures\.txt: cannot be written \(No space left on device\)"):
        files.write_atomically(path, "newer")
    assert path.read_text() == "old" and names(tmp_path) == ["figures.txt"]


def test_a_file_appears_once_it_is_durable(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((tmp_path / "figures.txt").exists()))
    files.write_atomically(tmp_path / "figures.txt", "new")
    assert seen == [False, True], "the file, and then its name in the folder"


# ------------------------------------------------------------------------------------------------------------ folders


def in_child(context: AbstractContextManager, work: Callable[..., object] = lambda _: None) -> int:
    """Return the number of a new process that does ``work`` inside a ``context`` and then waits there to be killed."""
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        with context as entered:
            work(entered)
            os.write(write, b"x")
            time.sleep(600)
    os.close(write)
    assert os.read(ready, 1) == b"x"
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_locked_folder_is_refused_until_its_process_has_ended(tmp_path):
    child = in_child(files.locked(tmp_path / "m"))
    try:
        with pytest.raises(UserError, match="--save .*m: another process is at work there"):
            files.locked(tmp_path / "m", "save").__enter__()
    finally:
        kill(child)
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
        child = os.fork()
        if child == 0:
            save()
            os._exit(0)
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it waits"
    assert os.waitpid(child, 0)[1] == 0
    assert names(tmp_path) == ["m"] and (target / "x").read_text() == "child"


def test_what_a_killed_save_left_is_removed_by_the_next_one(tmp_path):
    target = tmp_path / "wanda_0.5"
    kill(in_child(files.new_folder(target), lambda folder: (folder / "x").write_text("half")))
    assert ".wanda_0.5.new" in names(tmp_path)
    with files.new_folder(target) as folder:
        (folder / "y").write_text("whole")
    assert names(tmp_path) == ["wanda_0.5"] and names(target) == ["y"]


@pytest.mark.parametrize("again", ["fails", "succeeds"])
def test_a_kill_between_two_renames_loses_nothing(again, tmp_path):
    target, old = tmp_path / "m", tmp_path / ".m.old"
    old.mkdir()
    (old / "x").write_text("old")
    if again == "fails":
        with pytest.raises(KeyboardInterrupt), files.new_folder(target):
            raise KeyboardInterrupt
        assert (target / "x").read_text() == "old"
    else:
        with files.new_folder(target) as folder:
            (folder / "x").write_text("new")
        assert (target / "x").read_text() == "new"
    assert names(tmp_path) == ["m"]


def test_a_save_that_fails_leaves_the_old_folder_and_no_trace(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").write_text("old")
    with pytest.raises(UserError, match="No space left"), files.new_folder(tmp_path / "m") as folder:
        (folder / "x").write_text("new")
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "x").read_text() == "old"


@pytest.mark.parametrize("kind", ["a file", "a link", "a broken link"])
def test_a_folder_never_takes_the_place_of_something_else(kind, tmp_path):
    target = tmp_path / "m"
    (tmp_path / "there").mkdir()
    target.write_text("x") if kind == "a file" else target.symlink_to("there" if kind == "a link" else "nowhere")
    before = names(tmp_path)
    with pytest.raises(UserError, match="would be replaced; move it away"), files.new_folder(target):
        pytest.fail("the work begins")
    assert names(tmp_path) == before
