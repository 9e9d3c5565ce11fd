"""Run records: what the files of a run hold, and what a stage costs."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from lib.core import cpu
from lib.pruning.walk import LayerReport
from lib.run import record
from lib.run.record import Record


def test_layers_file_has_a_row_per_matrix():
    rows = [LayerReport("a.q", (4, 8), 2.3456789, 0.25, 0.28125), LayerReport("a.k", (2, 8), None, 0.5, 0.5, (4, 8))]
    assert [line.split("\t") for line in record.layers_text(rows).splitlines()] == [
        ["name", "shape", "metric", "planned_ratio", "sparsity", "type"],
        ["a.q", "4x8", "2.345679", "0.250000", "0.281250", "unstructured"],
        ["a.k", "2x8", "", "0.500000", "0.500000", "4:8"],
    ]


def test_run_file_is_json_with_provenance_whatever_the_figures():
    text = record.run_text({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1.5, None), "folder": Path("a")})
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (read["a"], read["b"], read["d"]) == ("nan", ["inf", {"c": "-inf"}], [1.5, None])
    assert {"torch", "transformers", "python"} <= set(read["versions"]) and {"git_commit", "device"} <= set(read)


@pytest.mark.parametrize("perplexity", [math.inf, math.nan, 2.5, None])
def test_a_perplexity_is_read_back(perplexity, tmp_path):
    assert record.read_run(tmp_path, "x") is None
    for damaged in ("{", '{"perplexity": "high"}'):
        (tmp_path / "run_x.json").write_text(damaged)
        assert record.read_run(tmp_path, "x") is None
    (tmp_path / "run_x.json").write_text(record.run_text({"perplexity": perplexity}))
    assert str(record.read_run(tmp_path, "x")["perplexity"]) == str(perplexity), "not measured is not infinite"


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
    for name, size in (("wait", 0), ("fill", 200_000_000), ("after", 0)):
        with run.stage(name):
            block = b"x" * size
        del block
    peaks = {name: stage["peak_rss_mb"] for name, stage in run.stages.items()}
    assert peaks["fill"] >= peaks["wait"] + 150 and peaks["after"] <= peaks["fill"]


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
        assert self.used, "not initialised"
        return lambda device: self.asked.append((name, device)) or 3 * 2**20


def test_stages_ask_nothing_of_cuda_before_it_is_initialised(tmp_path, monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(cpu, "gpus", lambda: 2)
    run = Record(tmp_path, "x")
    for name in ("prepare", "load", "prune"):
        with run.stage(name):
            cuda.used = [] if name == "prepare" else [1]
    assert "peak_cuda_mb" not in run.stages["prepare"]
    assert run.stages["load"]["peak_cuda_mb"] == run.stages["prune"]["peak_cuda_mb"] == {"cuda:1": 3}
    assert {device for _, device in cuda.asked} == {1}  # the other one gets no context
    assert {"reset_peak_memory_stats", "synchronize"} <= {name for name, _ in cuda.asked}


def test_large_weights_are_identified_without_reading_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.core.digests._LARGE", 10)
    states = []
    for content, changed_at in ((b"x", 5), (b"y", 6), (b"y", 5)):
        (tmp_path / "model.safetensors").write_bytes(content * 20)
        os.utime(tmp_path / "model.safetensors", ns=(0, changed_at))
        states.append(record.inputs_of({"model": str(tmp_path), "seed": 0, "plan": None, "calib_data": "c4"}))
    assert states[0].keys() == {"model"} and states[0] != states[1]
    assert states[0] == states[2], "it is not read"
