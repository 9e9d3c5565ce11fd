"""The demonstrations: what they show, and what ends them before their long work."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import demo
import image_demo
import sweep
from test_table import record


@pytest.fixture
def no_work(tmp_path, monkeypatch):
    """Change to an empty folder, where the demonstration fails the test if it begins."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "prune_all"):
        monkeypatch.setattr(image_demo, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


def test_image_demo_refuses_its_folder_before_it_trains(no_work, capsys):
    Path("a.txt").write_text("")
    assert image_demo.run(["--save", "a.txt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("image_demo.sh: error: --save a.txt: cannot be written")


def test_demo_shows_its_runs_and_what_the_saved_model_says(monkeypatch, tmp_path, tiny_folder, capsys):
    figures = {("dense", 0.0): 14.0, ("wanda", 0.7): 600.0, ("wanda_ww", 0.7): 450.0, ("sparsegpt", 0.7): 180.0}
    figures |= {("alps", 0.7): 90.0}
    paths = []
    for (method, target), perplexity in figures.items():
        paths.append(tmp_path / f"{method}.json")
        paths[-1].write_text(json.dumps(record(method, perplexity, target)))
    asked = []
    monkeypatch.setattr(sweep, "run_all", lambda todo, force: asked.append(todo) or paths)
    shutil.copytree(tiny_folder, tmp_path / "model" / "alps_0.7")
    assert demo.main(["--save", str(tmp_path), "--sparsity_ratio", "0.7"]) == 0
    assert [run.prune_method for run in asked[0]] == [None, "wanda", "sparsegpt", "wanda_ww", "sparsegpt_ww", "alps"]
    assert [run.save_model for run in asked[0]] == [None] * 5 + [str(tmp_path / "model")]
    out = capsys.readouterr().out
    assert f"{tmp_path}/model/alps_0.7, continues:\n" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flags", "says"), [(["--epsilon", "2"], "--epsilon 2.0"), (["--save", "f/x"], "--save f/x"),
                                             (["--sparsity_ratio", "1"], "--sparsity_ratio 1.0")])  # fmt: skip
def test_demo_refuses_in_one_line(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("")
    assert demo.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"demo.sh: error: {says}")
