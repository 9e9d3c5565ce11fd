"""The image demonstration: what is wrong ends it before its long work."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import image_demo


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
