"""The image demonstration and the benchmark of streaming: what is wrong ends them before their long work."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import bench_scale
import image_demo


@pytest.fixture
def no_work(tmp_path, monkeypatch):
    """Change to an empty folder, where the demonstration and the benchmark fail the test if they begin."""
    monkeypatch.chdir(tmp_path)
    for module, name in ((bench_scale, "make_checkpoint"), (image_demo, "train"), (image_demo, "prune_all")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--methods wandaa", "--methods wandaa: invalid choice. Did you mean 'wanda'?"),
        ("--methods wanda,foo", "--methods foo: invalid choice"),
        ("--ways sometimes", "--ways sometimes: invalid choice"),
        ("--ways ,", "--ways ',': names nothing"),
        ("--methods wanda_price", "--methods wanda_price: a streamed model has no prices; give --ways never"),
        ("--save file/below", "--save file/below: cannot be written"),
        ("--work file", "--work file: cannot be written"),
    ],
)
def test_benchmark_refuses_before_it_makes_a_checkpoint(flags, says, no_work, capsys):
    Path("file").write_text("")
    assert bench_scale.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench_scale.py: error: {says}") and [path.name for path in Path().iterdir()] == ["file"]


def test_a_benchmark_with_a_failed_run_says_so_in_its_status(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_scale, "make_checkpoint", lambda _: tmp_path)
    figures = {"peak_rss_mb": 1, "peak_cuda_mb": None, "seconds": 1.0, "seconds_per_block": 1.0, "perplexity": 2.0}

    for fails, status in (({"wanda"}, 1), (set(), 0)):

        def measure(settings, folder, method: str, way: str, fails=fails) -> dict:
            return {"method": method, "stream": way} | ({"failed": 2} if method in fails else figures)

        monkeypatch.setattr(bench_scale, "measure", measure)
        assert bench_scale.main(["--methods", "magnitude, wanda,wanda", "--ways", "never"]) == status
        rows = json.loads(Path("results/bench_scale/scale.json").read_text())["rows"]
        assert [row["method"] for row in rows] == ["magnitude", "wanda"]


def test_image_demo_refuses_its_folder_before_it_trains(no_work, capsys):
    Path("a.txt").write_text("")
    assert image_demo.run(["--save", "a.txt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("image_demo.sh: error: --save a.txt: cannot be written")
