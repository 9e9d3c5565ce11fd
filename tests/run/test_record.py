"""Output files and run records: formats, atomic writing, what is left of a killed run, and refused folders."""

import json
import math
import os
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lib.core import files
from lib.core.errors import UserError
from lib.pruning.walk import LayerReport
from lib.run import record
from lib.run.record import Record


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_perplexity_file_is_as_published(tmp_path):
    text = record.perplexity_text("wanda", 0.50001234, 22.428142547607422)
    files.write_atomically(tmp_path / "new" / "perplexity_wanda_sparsity_0.5.txt", text)
    assert names(tmp_path / "new") == ["perplexity_wanda_sparsity_0.5.txt"]
    assert (tmp_path / "new" / "perplexity_wanda_sparsity_0.5.txt").read_text() == text
    assert text == "method\tactual_sparsity\tppl_test\nwanda\t0.5000\t22.4281\n"


def test_layers_file_has_a_row_per_matrix():
    rows = [LayerReport("a.q", (4, 8), 2.3456789, 0.25, 0.28125), LayerReport("a.k", (2, 8), None, 0.5, 0.5, (4, 8))]
    header, first, second = record.layers_text(rows).splitlines()
    assert header.split("\t") == ["name", "shape", "metric", "planned_ratio", "sparsity", "type"]
    name, shape, metric, ratio, sparsity, kind = first.split("\t")
    assert (kind, second.split("\t")[5]) == ("unstructured", "4:8")
    assert (name, shape, float(ratio), float(sparsity)) == ("a.q", "4x8", 0.25, 0.28125)
    assert float(metric) == pytest.approx(2.3456789, abs=1e-5)
    assert second.split("\t")[2] == ""


def test_run_file_says_where_the_numbers_come_from():
    read = json.loads(record.run_text({"perplexity": 3.5, "folder": Path("a")}))
    assert read["perplexity"] == 3.5 and {"torch", "transformers", "python"} <= set(read["versions"])
    assert {"git_commit", "device"} <= set(read)


def test_run_file_is_json_whatever_the_figures():
    text = record.run_text({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.5, None)})
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (read["a"], read["b"], read["d"]) == ("nan", ["inf", {"c": "-inf"}], [1.5, None])


def test_an_infinite_perplexity_is_told_from_one_that_was_not_measured(tmp_path):
    def read(content: dict) -> float | None:
        (tmp_path / "run_x.json").write_text(record.run_text({"complete": True, "evaluation": None} | content))
        return record.read_run(tmp_path, "x")["perplexity"]

    text = {"evaluation": {"text": "c4"}}
    assert read({"perplexity": math.inf} | text) == math.inf and math.isnan(read({"perplexity": math.nan} | text))
    assert read({"perplexity": 2.5} | text) == 2.5 and read({"perplexity": None}) is None


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "figures.txt"
    files.write_atomically(path, "old")
    write = Path.write_text

    def half(self, text, *args, **kwargs):
        write(self, text[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UserError, match=r"figures\.txt.*No space left"):
        files.write_atomically(path, "newer")
    assert path.read_text() == "old" and names(tmp_path) == ["figures.txt"]


def test_a_written_file_replaces_the_old_one_and_can_be_read_by_others(tmp_path):
    os.umask(0o022)
    path = tmp_path / "figures.txt"
    files.write_atomically(path, "old")
    files.write_atomically(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["figures.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_prepare_leaves_no_trace(tmp_path):
    files.prepare("save", tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "here").mkdir()
    files.prepare("save", tmp_path / "here")
    assert names(tmp_path) == ["here"] and names(tmp_path / "here") == []


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere"])
def test_prepare_refuses_what_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("a")
    with pytest.raises(UserError, match="--save .*cannot be written") as caught:
        files.prepare("save", tmp_path / where)
    assert "\n" not in str(caught.value) and names(tmp_path) == ["file"]


def test_prepare_refuses_a_full_disk(tmp_path):
    with pytest.raises(UserError, match=r"--save_model .*full, 1\d{15} GiB are needed and \d"):
        files.prepare("save_model", tmp_path, need_bytes=2**80)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (900, "900 bytes"), (1536, "1.5 KiB"), (300 * 2**20, "300 MiB"), (2**31, "2.0 GiB")],
)
def test_sizes_are_readable(size, text):
    assert files.readable(size) == text


def test_stages_measure_seconds_and_memory(tmp_path):
    run = Record(tmp_path, "x")
    with run.stage("wait"):
        time.sleep(0.05)
    with run.stage("fill"):
        block = b"x" * 200_000_000
    del block
    assert 0.05 <= run.stages["wait"]["seconds"] < 5
    assert 0 <= run.stages["wait"]["cpu_seconds"] < 0.05, "waiting costs the processor nothing"
    # each stage has its own peak, where the system lets it be reset
    assert run.stages["fill"]["peak_rss_mb"] >= run.stages["wait"]["peak_rss_mb"] + 150
    with run.stage("after"):
        pass
    assert run.stages["after"]["peak_rss_mb"] <= run.stages["fill"]["peak_rss_mb"]


class Cuda:
    """Stands in for torch.cuda: two devices, not initialised at first; only ``used`` ones hold memory."""

    def __init__(self) -> None:
        self.used: list[int] = []
        self.asked: list[tuple[str, int]] = []

    def is_initialized(self) -> bool:
        return bool(self.used)

    def device_count(self) -> int:
        return 2

    def memory_reserved(self, device: int) -> int:
        return device in self.used

    def __getattr__(self, name: str):
        def call(device: int):
            if not self.used:
                raise RuntimeError("Invalid device argument: did you call init?")
            self.asked.append((name, device))
            return 3 * 2**20

        return call


def test_stages_ask_nothing_of_cuda_before_it_is_initialised(tmp_path, monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    run = Record(tmp_path, "x")
    with run.stage("prepare"):
        pass
    with run.stage("load"):
        cuda.used = [1]
    with run.stage("prune"):
        pass
    assert "peak_cuda_mb" not in run.stages["prepare"]
    assert run.stages["load"]["peak_cuda_mb"] == run.stages["prune"]["peak_cuda_mb"] == {"cuda:1": 3}
    assert {device for _, device in cuda.asked} == {1}  # the other one gets no context
    assert ("reset_peak_memory_stats", 1) in cuda.asked and ("synchronize", 1) in cuda.asked


def test_a_record_is_written_with_what_is_known(tmp_path):
    run = Record(tmp_path, "wanda_sparsity_0.5")
    run.rows = [LayerReport("a.q", (4, 8), None, 0.25, 0.28125)]
    run.content["sparsity"] = 0.28
    run.write()
    assert names(tmp_path) == ["layers_wanda_sparsity_0.5.tsv", "run_wanda_sparsity_0.5.json"]
    assert record.read_run(tmp_path, run.run)["complete"] is False
    run.files["perplexity.txt"] = "x"
    run.write(complete=True)
    assert record.read_run(tmp_path, run.run)["complete"] is True and "perplexity.txt" in names(tmp_path)


# ------------------------------------------------------------------------------------- folders of saved models


def no_such_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def left_behind(target: Path, owner: str) -> Path:
    folder = target.with_name(f".{target.name}-{owner}")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("half")
    return folder


def test_what_a_killed_save_left_is_removed_by_the_next_one_to_this_target(tmp_path, caplog):
    target, here, gone = tmp_path / "wanda_0.5", socket.gethostname(), no_such_process()
    dead = left_behind(target, f"{here}-{gone}")
    others = [
        left_behind(target, f"{here}-{os.getppid()}"),  # still at work
        left_behind(target, f"elsewhere-{gone}"),  # of a machine that shares the disk
        left_behind(tmp_path / "wanda_0.55", f"{here}-{gone}"),  # of another target
    ]
    with files.new_folder(target) as folder:
        (folder / "x").write_text("whole")
    assert not dead.exists() and str(dead) in caplog.text
    assert all(other.is_dir() for other in others)
    assert (target / "x").read_text() == "whole"


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    target = tmp_path / "m"
    old = left_behind(target, f"old-{socket.gethostname()}-{no_such_process()}")
    with pytest.raises(KeyboardInterrupt), files.new_folder(target):
        raise KeyboardInterrupt
    assert not old.exists() and (target / "model.safetensors").read_text() == "half"


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


def test_an_earlier_run_is_read_or_is_none(tmp_path):
    assert record.read_run(tmp_path, "x") is None
    for damaged in ("{", "[1]", "null", '{"perplexity": "high"}'):
        (tmp_path / "run_x.json").write_text(damaged)
        assert record.read_run(tmp_path, "x") is None
    files.write_atomically(tmp_path / "run_x.json", record.run_text({"perplexity": 1.0}))
    assert record.read_run(tmp_path, "x")["perplexity"] == 1.0


def test_large_weights_are_known_without_reading_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.run.record._READ_WHOLE", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 20)
    os.utime(path, ns=(0, 5))
    first = record.inputs_of({"model": str(tmp_path), "seed": 0, "plan": None, "calib_data": "c4"})
    assert first.keys() == {"model"}
    path.write_bytes(b"y" * 20)
    os.utime(path, ns=(0, 6))
    assert record.inputs_of({"model": str(tmp_path)}) != first
    os.utime(path, ns=(0, 5))
    assert record.inputs_of({"model": str(tmp_path)}) == first, "it is not read"
