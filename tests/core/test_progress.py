"""Progress file: what was finished is read back to the bit, whatever moment the writing process was killed at."""

import math
import os
from pathlib import Path

import pytest

from lib.core.errors import UserError
from lib.core.progress import Progress


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "progress.jsonl"


def test_finished_things_are_read_back(path):
    written = Progress(path)
    written.add("value", "model.layers.0.q_proj", 0.1 + 0.2)
    written.add("block", "3", {"rows": [1, None]})
    written.add("value", "model.layers.0.k_proj", math.inf)
    for progress in (written, Progress(path)):
        assert progress.items("value") == {"model.layers.0.q_proj": 0.1 + 0.2, "model.layers.0.k_proj": math.inf}
        assert progress.get("block", "3") == {"rows": [1, None]} and progress.items("trial") == {}
        assert progress.get("block", "4") is None and progress.get("trial", "3", "none") == "none"


def test_the_later_of_two_lines_counts(path):
    for value in (1, 2):
        Progress(path).add("value", "a", value)
    assert Progress(path).items("value") == {"a": 2} and len(path.read_text().splitlines()) == 2


def test_a_line_cut_anywhere_is_not_finished_and_replaced(path):
    progress = Progress(path)
    progress.add("value", "a", 1.5)
    first = path.read_bytes()
    progress.add("value", "b", "é")
    whole = path.read_bytes()
    for size in range(len(first), len(whole)):
        path.write_bytes(whole[:size])
        resumed = Progress(path)
        assert resumed.items("value") == {"a": 1.5}
        resumed.add("value", "b", "é")
        assert path.read_bytes() == whole


def test_every_line_is_durable_before_the_work_goes_on(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes().count(b"\n")))
    progress = Progress(path)
    progress.add("value", "a", 1)
    progress.add("value", "b", 2)
    assert synced == [1, 1, 2], "the first line with its folder"


@pytest.mark.parametrize("line", [b"\xff", b"{", b"[]", b"3", b'{"kind": "a"}', b'{"kind": 1, "key": [], "value": 1}'])
def test_a_damaged_file_is_one_line(line, path):
    path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"progress\.jsonl: is damaged \(.+\); delete it to begin again"):
        Progress(path)


def test_a_full_disk_is_one_line_and_earlier_lines_stay(path, monkeypatch):
    progress = Progress(path)
    progress.add("value", "a", 1)

    def full(_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"progress\.jsonl: cannot be written \(No space left on device\)"):
            progress.add("value", "b", 2)
    progress.add("value", "c", 3)
    assert Progress(path).items("value") == progress.items("value") == {"a": 1, "c": 3}
