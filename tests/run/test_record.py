"""Run records: what the files of a run hold, and what a stage costs."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from lib.core import cpu, files
from lib.pruning.walk import LayerReport
from lib.run import record
from lib.run.record import Record


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_perplexity_file_is_as_published():
    text = record.perplexity_text("wanda", 0.50001234, 22.428142547607422)
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


def test_stages_measure_seconds(tmp_path, monkeypatch):
    now = {"perf_counter": 10.0, "process_time": 4.0}
    for clock in now:
        monkeypatch.setattr(record.time, clock, lambda clock=clock: now[clock])
    run = Record(tmp_path, "x")
    with run.stage("wait"):
        now.update(perf_counter=12.5, process_time=4.25)
    assert (run.stages["wait"]["seconds"], run.stages["wait"]["cpu_seconds"]) == (2.5, 0.25)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux: a peak that can be reset")
def test_each_stage_has_its_own_peak_of_memory(tmp_path):
    run = Record(tmp_path, "x")
    with run.stage("wait"):
        pass
    with run.stage("fill"):
        block = b"x" * 200_000_000
    del block
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
    monkeypatch.setattr(cpu, "gpus", lambda: 2)
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


def test_an_earlier_run_is_read_or_is_none(tmp_path):
    assert record.read_run(tmp_path, "x") is None
    for damaged in ("{", "[1]", "null", '{"perplexity": "high"}'):
        (tmp_path / "run_x.json").write_text(damaged)
        assert record.read_run(tmp_path, "x") is None
    files.write_atomically(tmp_path / "run_x.json", record.run_text({"perplexity": 1.0}))
    assert record.read_run(tmp_path, "x")["perplexity"] == 1.0


def test_large_weights_are_known_without_reading_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.core.digests._LARGE", 10)
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
