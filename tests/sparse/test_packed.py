"""Packed models through the commands: what main.py --packed writes, resumes and refuses, and what runs on it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import error_line, fast
from safetensors.torch import load_file, save_file
from test_journal import POINTS, killed_run
from test_streamed import hashes

import main
from lib import sparse
from lib.core.errors import UserError
from lib.sparse import packed
from scripts import generate
from scripts.speedup import pack

pytestmark = pytest.mark.usefixtures("one_thread")  # runs are forked

METHOD = "wanda_ww"
RUN = f"{METHOD}_sparsity_0.7"


def flags_of(folder: Path, tiny_folder: Path, text: Path) -> list[str]:
    """Return the flags of a run that prunes the tiny LLaMA and saves it under ``folder``."""
    flags = f"--model {tiny_folder} --calib_data {text} --eval_data {text} --seqlen 32 --nsamples 5 --eval_windows 8 "
    flags += f"--prune_method {METHOD} --sparsity_ratio 0.7 --epsilon 0.2 --ww_metric_cache {folder / 'cache'} "
    return (flags + f"--save {folder / 'save'} --save_model {folder / 'out'}").split()


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_folder, tiny_text) -> tuple[Path, Path]:
    """Return the folders of the same model as main.py writes it, plain and --packed; to be read only."""
    made = []
    for more in ([], ["--packed"]):
        folder = tmp_path_factory.mktemp("packed" if more else "plain")
        assert main.main([*flags_of(folder, tiny_folder, tiny_text), *more]) == 0
        made.append(folder / "out" / f"{METHOD}_0.7")
    return tuple(made)


@pytest.fixture
def copied(both, tmp_path) -> Path:
    return Path(shutil.copytree(both[1], tmp_path / "copied"))


def measured(model: Path, save: Path, text: Path, *more: str) -> dict:
    flags = f"--model {model} --eval_data {text} --seqlen 32 --eval_windows 8 --save {save}"
    assert main.main([*flags.split(), *more]) == 0
    return json.loads((save / "run_dense_sparsity_0.0.json").read_text())


def test_packed_folder_is_the_plain_one_in_less_space(both, tmp_path):
    plain, packed = both
    assert sparse.is_packed(packed) and not list(packed.parent.glob(".*"))
    assert pack.main([str(packed), "--unpack", "--save", str(tmp_path / "back")]) == 0
    assert hashes(tmp_path / "back") == hashes(plain)
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in both]
    assert sizes[1] < 0.9 * sizes[0]  # the embedding and the head, which stay dense, are most of so small a model


@pytest.mark.machine
def test_main_measures_a_packed_model(both, tmp_path, tiny_text):
    plain, packed = both
    expected = measured(plain, tmp_path / "plain", tiny_text, "--dtype", "bfloat16")
    packed_run = measured(packed, tmp_path / "packed", tiny_text)
    # The same weights in bfloat16: activations are rounded to 8 bits at other places (dense: after every product of
    # more than 8 tokens alike, so that windows of 32 hardly differ).
    assert packed_run["perplexity"] == pytest.approx(expected["perplexity"], rel=2e-3)
    exact = measured(plain, tmp_path / "exact", tiny_text, "--dtype", "float32")
    assert packed_run["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-2)  # 2^-8 a weight and an activation
    record = json.loads((packed.parents[1] / "save" / f"run_{RUN}.json").read_text())
    assert packed_run["sparsity"] == expected["sparsity"] == record["sparsity"]
    assert packed_run["model"]["dtype"] == "bfloat16"
    # The run that pruned measured the model before it was packed, in float32.
    assert record["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-5)


@pytest.mark.machine
@pytest.mark.parametrize("compares", fast([False, True], 1))  # in processes that it starts
def test_generate_runs_on_what_main_wrote(compares, both, capsys):
    plain, packed = map(str, both)
    compare = ["--threads", "1", "--compare", plain] if compares else []
    assert generate.main([packed, "Ab de", "--tokens", "4", *compare]) == 0
    out = capsys.readouterr().out.strip()
    figures = r"\d+\.\d tokens/s, prompt \d+\.\d tokens/s, -?\d+ MB resident"
    assert out.startswith("Ab de") and len(re.findall(figures, out)) == (3 if compares else 1)
    assert out.endswith("medians of 5 turns, 1 threads") == compares


@pytest.mark.parametrize("point", fast(["before the folder is renamed", "in evaluation"], 1))
def test_a_killed_run_resumes_to_the_same_packed_folder(point, both, tmp_path, tiny_folder, tiny_text):
    flags = [*flags_of(tmp_path, tiny_folder, tiny_text), "--packed"]
    killed_run(" ".join(flags), *POINTS[point])
    assert main.main(flags) == 0
    assert hashes(tmp_path / "out" / f"{METHOD}_0.7") == hashes(both[1])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{METHOD}_0.7"]


def test_a_packed_folder_that_was_altered_is_not_resumed(tmp_path, tiny_folder, tiny_text, capsys):
    flags = [*flags_of(tmp_path, tiny_folder, tiny_text), "--packed"]
    killed_run(" ".join(flags), *POINTS["in evaluation"])
    path = sorted((tmp_path / "out" / f"{METHOD}_0.7").glob("*.packed.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])
    capsys.readouterr()
    says = error_line(capsys, main.main(flags))
    assert "cannot be read as a packed model" in says and "add --restart to begin again" in says
    assert main.main([*flags, "--restart"]) == 0


# What main.py is asked for beside the packed model, and what it says.
REFUSED = {
    "pruned again": ("--prune_method magnitude --sparsity_ratio 0.5", "is packed, which is for running it; unpack it"),
    "streamed": ("--stream always", "is packed, which is for running it; unpack it first: python scripts/speedup/pack"),
    "dtype": ("--dtype float32", "float32: {} is packed and runs in bfloat16; leave --dtype out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_with_a_packed_model(case, both, tmp_path, monkeypatch, tiny_text, capsys):
    monkeypatch.chdir(tmp_path)
    more, says = REFUSED[case]
    flags = f"--model {both[1]} --eval_data {tiny_text} --calib_data {tiny_text} --seqlen 32 {more}"
    assert says.format(both[1]) in error_line(capsys, main.main(flags.split()))
    assert list(tmp_path.iterdir()) == []


def test_main_writes_int8_and_says_so_and_cannot_take_it_back(both, tmp_path, tiny_folder, tiny_text, capsys):
    flags = [*flags_of(tmp_path, tiny_folder, tiny_text), "--packed", "int8"]
    killed_run(" ".join(flags), *POINTS["in evaluation"])
    folder = tmp_path / "out" / f"{METHOD}_0.7"
    assert sparse.holds_int8(folder)
    capsys.readouterr()
    says = error_line(capsys, main.main(flags))
    assert "its values are int8, from which the pruned weights do not come back; add --restart to begin again" in says
    assert sparse.holds_int8(folder), "it is left as it was"
    assert main.main([*flags, "--restart"]) == 0
    assert "its values are int8" in (folder / "README.md").read_text()
    exact = measured(both[1], tmp_path / "exact", tiny_text)
    # 7 bits and a sign of the largest weight of 64.
    assert measured(folder, tmp_path / "int8", tiny_text)["perplexity"] == pytest.approx(exact["perplexity"], rel=0.02)
    assert "--packed int4" in error_line(capsys, main.main([*flags[:-1], "int4"]))


def test_packed_is_refused_without_a_folder_and_for_a_streamed_model(tmp_path, tiny_folder, tiny_text, capsys):
    flags = [*flags_of(tmp_path, tiny_folder, tiny_text), "--packed"]
    assert "--packed" in error_line(capsys, main.main([*flags, "--stream", "always"]))
    at = flags.index("--save_model")
    assert "--save_model" in error_line(capsys, main.main(flags[:at] + flags[at + 2 :]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tensors", ["5", "[" * 10**5], ids=["a number", "deep"])
def test_a_header_that_says_something_else_is_one_line(tensors, copied):
    path = sorted(copied.glob("*.packed.safetensors"))[0]
    header = f'{{"version": {packed.VERSION}, "metadata": {{}}, "tensors": {tensors}}}'
    save_file(load_file(path), path, {packed.KEY: header})
    with pytest.raises(UserError, match="cannot be read as a packed model") as caught:
        sparse.load_packed(copied)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_two_packed_files_hold_is_refused(copied):
    shutil.copy(sorted(copied.glob("*.packed.safetensors"))[0], copied / "older.packed.safetensors")
    with pytest.raises(UserError, match="is in another file of the folder, too"):
        sparse.load_packed(copied)


SPOILED = {
    "model-block-00000.packed.safetensors": "cannot be read as a packed model",
    "generation_config.json": "generation_config.json: cannot be used (",
}


@pytest.mark.machine
@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folder_ends_every_command_in_one_line(name, copied, tmp_path, monkeypatch, tiny_text, capsys):
    monkeypatch.chdir(tmp_path)
    os.truncate(copied / name, (copied / name).stat().st_size // 2)
    says = SPOILED[name]
    flags = f"--model copied --eval_data {tiny_text} --seqlen 32 --save save".split()
    assert says in error_line(capsys, main.main(flags))
    assert says in error_line(capsys, generate.main(["copied", "Ab de"]))
    if name.endswith(".safetensors"):  # unpacking reads which files are there, and not what they are for
        assert says in error_line(capsys, pack.main(["copied", "--unpack", "--save", "back"]))
        assert not list(Path().glob("*back*"))
    assert not list(tmp_path.rglob("*.json.tmp")) and torch.get_default_dtype() == torch.float32
