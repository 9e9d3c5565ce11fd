"""What a run leaves behind: formats, atomic writing, and the folders that are refused."""

import json
import os
import stat
import time
from pathlib import Path

import pytest

from lib import UserError, results
from lib.results import LayerReport, Stages


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_perplexity_file_is_as_published(tmp_path):
    text = results.perplexity_text("wanda", 0.50001234, 22.428142547607422)
    results.write_atomically(tmp_path / "new" / "perplexity_wanda_sparsity_0.5.txt", text)
    assert names(tmp_path / "new") == ["perplexity_wanda_sparsity_0.5.txt"]
    assert (tmp_path / "new" / "perplexity_wanda_sparsity_0.5.txt").read_text() == text
    assert text == "method\tactual_sparsity\tppl_test\nwanda\t0.5000\t22.4281\n"


def test_layers_file_has_a_row_per_matrix():
    rows = [LayerReport("a.q", (4, 8), 2.3456789, 0.25, 0.28125), LayerReport("a.k", (2, 8), None, 0.5, 0.5, (4, 8))]
    header, first, second = results.layers_text(rows).splitlines()
    assert header.split("\t") == ["name", "shape", "metric", "planned_ratio", "sparsity", "type"]
    name, shape, metric, ratio, sparsity, kind = first.split("\t")
    assert (kind, second.split("\t")[5]) == ("unstructured", "4:8")
    assert (name, shape, float(ratio), float(sparsity)) == ("a.q", "4x8", 0.25, 0.28125)
    assert float(metric) == pytest.approx(2.3456789, abs=1e-5)
    assert second.split("\t")[2] == ""


def test_run_file_says_where_the_numbers_come_from():
    record = json.loads(results.run_text({"perplexity": 3.5, "folder": Path("a")}))
    assert record["perplexity"] == 3.5 and {"torch", "transformers", "python"} <= set(record["versions"])
    assert {"git_commit", "device"} <= set(record)


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "figures.txt"
    results.write_atomically(path, "old")
    write = Path.write_text

    def half(self, text, *args, **kwargs):
        write(self, text[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UserError, match=r"figures\.txt.*No space left"):
        results.write_atomically(path, "newer")
    assert path.read_text() == "old" and names(tmp_path) == ["figures.txt"]


def test_a_written_file_replaces_the_old_one_and_can_be_read_by_others(tmp_path):
    os.umask(0o022)
    path = tmp_path / "figures.txt"
    results.write_atomically(path, "old")
    results.write_atomically(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["figures.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_prepare_leaves_no_trace(tmp_path):
    results.prepare("--save", tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "here").mkdir()
    results.prepare("--save", tmp_path / "here")
    assert names(tmp_path) == ["here"] and names(tmp_path / "here") == []


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere"])
def test_prepare_refuses_what_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("a")
    with pytest.raises(UserError, match="--save .*cannot be written") as caught:
        results.prepare("--save", tmp_path / where)
    assert "\n" not in str(caught.value) and names(tmp_path) == ["file"]


def test_prepare_refuses_a_full_disk(tmp_path):
    with pytest.raises(UserError, match="--save_model .*full"):
        results.prepare("--save_model", tmp_path, need_bytes=2**80)


def test_stages_measure_seconds_and_memory():
    stages = Stages()
    with stages.stage("wait"):
        time.sleep(0.05)
    with stages.stage("fill"):
        block = b"x" * 200_000_000
    del block
    assert 0.05 <= stages.table["wait"]["seconds"] < 5
    # each stage has its own peak, where the system lets it be reset
    assert stages.table["fill"]["peak_rss_mb"] >= stages.table["wait"]["peak_rss_mb"] + 150
    with stages.stage("after"):
        pass
    assert stages.table["after"]["peak_rss_mb"] <= stages.table["fill"]["peak_rss_mb"]


def test_an_earlier_run_is_read_or_is_none(tmp_path):
    assert results.read_run(tmp_path, "x") is None
    (tmp_path / "run_x.json").write_text("{")
    assert results.read_run(tmp_path, "x") is None
    results.write_atomically(tmp_path / "run_x.json", results.run_text({"perplexity": 1.0}))
    assert results.read_run(tmp_path, "x")["perplexity"] == 1.0
