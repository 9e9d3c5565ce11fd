"""Progress file: what was finished is read back to the bit, whatever moment the writing process was killed at."""

import math
import os
from pathlib import Path

import pytest

from lib.core.errors import UserError
from lib.core.files import Progress


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "progress.jsonl"


def test_finished_things_are_read_back_and_the_later_of_two_lines_counts(path):
    written = Progress(path)
    written.add("block", "3", {"rows": [1, None]})
    for value in (2, 0.1 + 0.2):
        written.add("value", "q_proj", value)
    written.add("value", "k_proj", math.inf)
    for progress in (written, Progress(path)):
        assert (progress.get("value", "q_proj"), progress.get("value", "k_proj")) == (0.1 + 0.2, math.inf)
        assert progress.get("block", "3") == {"rows": [1, None]}
        assert progress.get("block", "4") is None and progress.get("trial", "3") is None
    assert len(path.read_text().splitlines()) == 4


def test_a_line_cut_anywhere_is_not_finished_and_replaced(path):
    progress = Progress(path)
    progress.add("value", "a", 1.5)
    first = path.read_bytes()
    progress.add("value", "b", "é")
    whole = path.read_bytes()
    for size in range(len(first), len(whole)):
        path.write_bytes(whole[:size])
        resumed = Progress(path)
        assert resumed.get("value", "a") == 1.5 and resumed.get("value", "b") is None
        resumed.add("value", "b", "é")
        assert path.read_bytes() == whole


def test_every_line_is_durable_before_the_work_goes_on(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes().count(b"\n")))
    progress = Progress(path)
    progress.add("value", "a", 1)
    progress.add("value", "b", 2)
    assert synced == [1, 1, 2], "the first line with its folder"


@pytest.mark.parametrize("line", [b"\xff", b"{", b'{"kind": "a"}'])
def test_a_damaged_file_is_one_line(line, path):
    path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"progress\.jsonl: is damaged \(.+\)$"):
        Progress(path)


def test_a_full_disk_is_one_line_and_earlier_lines_stay(path, monkeypatch):
    def full(_) -> None:
        raise OSError(28, "No space left on device")

    progress = Progress(path)
    progress.add("value", "a", 1)
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"l: cannot be written \(No space left on"):
        patched.setattr(os, "fsync", full)
        progress.add("value", "b", 2)
    progress.add("value", "c", 3)
    assert [Progress(path).get("value", name) for name in "abc"] == [1, None, 3]
