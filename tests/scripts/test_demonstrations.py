"""The image demonstration: what ends it before its long work."""

import image_demo
from conftest import error_line


def test_demonstration_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("")
    says = "image_demo.sh: error: --save f: cannot be written"
    assert error_line(capsys, image_demo.run(["--save", "f"])).startswith(says)
