"""The demonstrations: what they show, and what ends them before their long work."""

import json
import shutil

import demo
import image_demo
import pytest
import sweep
from conftest import error_line
from test_table import record


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


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        (demo.main, "--epsilon 2", "demo.sh: error: --epsilon 2.0"),
        (demo.main, "--save f/x", "demo.sh: error: --save f/x"),
        (image_demo.run, "--save f", "image_demo.sh: error: --save f: cannot be written"),
    ],
)
def test_demonstrations_refuse_in_one_line(command, flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("")
    assert error_line(capsys, command(flags.split())).startswith(says)
