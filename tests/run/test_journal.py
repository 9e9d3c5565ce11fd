"""Resume: a run that is killed at any point ends, on its second try, with the bits of an unbroken one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fast, settings
from test_streamed import hashes

import main
from lib.allocation import epsilon
from lib.calibration import hidden
from lib.core import files
from lib.core.digests import digest
from lib.core.progress import Progress
from lib.evaluation import perplexity
from lib.models import safetensors_io
from lib.pruning import walk
from lib.run.journal import Journal
from lib.spectra import measure
from lib.spectra.tail import METRICS

pytestmark = pytest.mark.usefixtures("one_thread")  # runs are forked

METHOD = "sparsegpt_ww"
RUN = f"{METHOD}_sparsity_0.6"


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_folder, tiny_text) -> str:
    """Return the flags of a run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "tiny-llama")
    shutil.copy(tiny_text, "text.txt")
    Path("other.txt").write_text(tiny_text.read_text()[2000:])
    flags = "--model tiny-llama --calib_data text.txt --eval_data other.txt --seqlen 32 --nsamples 5 --save save "
    return flags + f"--eval_windows 8 --prune_method {METHOD} --sparsity_ratio 0.6 --epsilon 0.2 --save_model kept"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_folder, tiny_text) -> tuple[dict[str, str], dict]:
    """Return the hashes and the record of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "other.txt").write_text(tiny_text.read_text()[2000:])
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {folder / 'other.txt'} --seqlen 32 "
    flags += f"--nsamples 5 --eval_windows 8 --save {folder / 'save'} --prune_method {METHOD} --sparsity_ratio 0.6 "
    flags += f"--epsilon 0.2 --save_model {folder / 'kept'} --ww_metric_cache {folder / 'cache'}"
    assert main.main(flags.split()) == 0
    return hashes(folder / "kept" / f"{METHOD}_0.6"), json.loads((folder / "save" / f"run_{RUN}.json").read_text())


def killed_run(flags: str, room, name: str, at: int = 1, marker: str = "", pause: float = 0.0) -> None:
    """Run main.py in a child that dies, as by kill -9, just before the ``at``-th call of ``room.name``.

    Args:
        marker: counts only calls whose arguments hold this text, or name an open file that does.
    """
    child = os.fork()
    if child == 0:
        real, calls = getattr(room, name), []

        def call(*args, **kwargs):
            names = [os.readlink(f"/proc/self/fd/{arg}") for arg in args if name == "fsync"]
            if marker in str([*args, *names]):
                calls.append(1)
                if len(calls) == at:
                    time.sleep(pause)
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(room, name, call)
        os._exit(main.main(flags.split()))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was not killed: nothing is tested"


POINTS = {
    "before anything": (hidden, "enter_blocks", 1),
    "in calibration": (hidden, "run_block", 7),
    "inside a solve": (walk, "_prune_layers", 6),
    "while a shard is written": (os, "fsync", 1, "model-block-00001"),
    "between shard and progress": (Progress, "add", 1, "'block', '1'"),
    "while progress is written": (os, "fsync", 3, "progress.jsonl"),
    "after a block": (walk, "_prune_block", 3),
    "while the model is completed": (safetensors_io, "write_index", 1),
    "before the manifest is written": (Journal, "finish", 1),
    "between manifest and progress": (Path, "unlink", 1, "progress.jsonl"),
    "before the folder is renamed": (files, "replace_folder", 1),
    "in evaluation": (perplexity, "perplexity_by_blocks", 1),
    "before the last record": (main.report, "show_run", 1),
}


def test_what_is_written_already_needs_no_more_space(place, unbroken, monkeypatch):
    killed_run(place, *POINTS["in evaluation"])
    assert (Path("kept") / f"{METHOD}_0.6").is_dir()
    monkeypatch.setattr(main.pipeline.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main.main([*place.split(), "--sparsity_ratio", "0.5"]) == 2, "another one does"
    assert main.main(place.split()) == 0 and hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]


def test_a_restart_needs_the_space_again(place, monkeypatch):
    flags = f"{place} --restart"  # both times, so that the flags are the same
    killed_run(flags, *POINTS["in evaluation"])
    monkeypatch.setattr(main.pipeline.files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main.main(flags.split()) == 2, "the whole one is there until the new one replaces it"


@pytest.mark.parametrize("stream_it", fast(["always", "never"], 1))
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_to_the_same_bits(point, stream_it, place, unbroken):
    flags = f"{place} --stream {stream_it}"
    killed_run(flags, *POINTS[point])
    assert main.main(flags.split()) == 0
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]
    record = json.loads(Path(f"save/run_{RUN}.json").read_text())
    assert record["complete"] is True
    assert (record["perplexity"], record["sparsity"]) == (unbroken[1]["perplexity"], unbroken[1]["sparsity"])
    assert [path.name for path in Path("kept").iterdir()] == [f"{METHOD}_0.6"]


def test_resume_after_repeated_kills(place, unbroken):
    for at in (2, 2, 1):  # the first two tries finish one block more each
        killed_run(place, walk, "_prune_block", at)
    assert main.main(place.split()) == 0
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]


@pytest.fixture
def pruned(monkeypatch) -> list[int]:
    """Return the blocks that are pruned from now on, except in a killed run."""
    blocks, real = [], walk._prune_block
    monkeypatch.setattr(walk, "_prune_block", lambda block, *rest: blocks.append(block.index) or real(block, *rest))
    return blocks


def test_finished_blocks_are_not_pruned_again(place, pruned, caplog):
    killed_run(place, walk, "_prune_block", 3)
    assert main.main(place.split()) == 0
    assert pruned == [2] and "resuming after block 1" in caplog.text


def test_a_run_that_was_complete_starts_again(place, pruned):
    assert main.main(place.split()) == main.main(place.split()) == 0
    assert pruned == [0, 1, 2, 0, 1, 2]


def test_restart_throws_the_journal_away(place, pruned, unbroken):
    killed_run(place, walk, "_prune_block", 3)
    assert main.main([*place.split(), "--restart"]) == 0 and pruned == [0, 1, 2]
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]


def only_line(capsys) -> str:
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("main.py: error: ")]
    return line


@pytest.mark.machine
@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("--nsamples 4", "--nsamples was 5 and is 4 now"),
        ("--epsilon 0.1", "--epsilon was 0.2 and is 0.1 now"),
        ("--seed 1", "--seed was 0 and is 1 now"),
        ("--statistics dense", "--statistics was pruned and is dense now"),
        ("--calib_dtype bfloat16", "--calib_dtype was None and is bfloat16 now"),
        ("--damping 0.02", "--damping was None and is 0.02 now"),
        ("--calib_data other.txt", "--calib_data was text.txt and is other.txt now"),
        ("--dtype bfloat16", "--dtype was auto and is bfloat16 now"),
    ],
)
def test_other_flags_are_refused_by_name(more, what, place, capsys):
    killed_run(place, walk, "_prune_block", 3)
    before = {path.name: path.read_bytes() for path in Path(f"kept/.{METHOD}_0.6.partial").glob("*.safetensors")}
    assert main.main([*place.split(), *more.split()]) == 2
    line = only_line(capsys)
    assert what in line and "--restart" in line
    assert before == {p.name: p.read_bytes() for p in Path(f"kept/.{METHOD}_0.6.partial").glob("*.safetensors")}


def test_another_calibration_text_of_the_same_name_is_refused(place, capsys):
    killed_run(place, walk, "_prune_block", 3)
    shutil.copy("other.txt", "text.txt")
    assert main.main(place.split()) == 2 and "its calibration windows were others" in only_line(capsys)


def change_weights() -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file("tiny-llama/model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1.02
    save_file(weights, "tiny-llama/model.safetensors", {"format": "pt"})


def test_other_dense_weights_of_the_same_name_are_refused(place, capsys):
    flags = place.replace(METHOD, "sparsegpt").replace("--epsilon 0.2 ", "")
    killed_run(flags, walk, "_prune_block", 3)
    change_weights()
    assert main.main(flags.split()) == 2
    assert "the dense weights were others (see model.layers.2.mlp.down_proj)" in only_line(capsys)


def test_what_does_not_change_the_weights_may_change(place, unbroken):
    killed_run(place, walk, "_prune_block", 3)
    assert main.main([*place.split(), "--eval_windows", "2", "--save", "elsewhere", "--stream", "always"]) == 0
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]


@pytest.mark.parametrize("how", ["cut off", "altered", "gone"])
def test_a_damaged_shard_is_made_again(how, place, unbroken, caplog):
    killed_run(place, walk, "_prune_block", 3)
    shard = Path(f"kept/.{METHOD}_0.6.partial/model-block-00001.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    {"cut off": lambda: shard.write_bytes(content[:-50]), "altered": lambda: shard.write_bytes(content),
     "gone": shard.unlink}[how]()  # fmt: skip
    assert main.main(place.split()) == 0
    assert "model-block-00001.safetensors is damaged" in caplog.text
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]


@pytest.mark.parametrize("damage", [(b'{"kind"', b'{"ki'), (b'"sha256"', b'"sha"')], ids=["a line", "an entry"])
def test_damaged_progress_is_one_line(damage, place, unbroken, capsys):
    killed_run(place, walk, "_prune_block", 3)
    path = Path(f"kept/.{METHOD}_0.6.partial/progress.jsonl")
    path.write_bytes(path.read_bytes().replace(*damage))
    assert main.main(place.split()) == 2
    line = only_line(capsys)
    assert f"{path}: is damaged (" in line and "to begin again" in line
    assert main.main([*place.split(), "--restart"]) == 0
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]


def test_a_damaged_manifest_is_one_line(place, capsys):
    killed_run(place, *POINTS["in evaluation"])
    Path(f"kept/{METHOD}_0.6/pruning.json").write_text("[]")
    assert main.main(place.split()) == 2
    assert "pruning.json: is damaged (" in (line := only_line(capsys)) and "add --restart" in line
    assert [path.name for path in Path("kept").iterdir()] == [f"{METHOD}_0.6"], "the model stays where it was"


def test_shards_of_no_finished_block_do_not_become_part_of_the_model(place, unbroken):
    killed_run(place, walk, "_prune_block", 3)
    folder = Path(f"kept/.{METHOD}_0.6.partial")
    shutil.copy(folder / "model-block-00000.safetensors", folder / "model-block-00007.safetensors")
    (folder / ".model-block-00002.safetensors.123.tmp").write_bytes(b"half")
    assert main.main(place.split()) == 0
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]
    assert not list(Path("kept", f"{METHOD}_0.6").glob(".*"))


def test_a_saved_folder_that_is_another_model_is_one_line(place, monkeypatch, capsys):
    monkeypatch.setattr(walk, "checkpoint_sparsity", lambda *_: 0.25)
    assert main.main(place.split()) == 2
    line = only_line(capsys)
    assert "holds a sparsity of 0.250000 as read back" in line and "delete the folder" in line


def test_another_process_at_work_is_not_disturbed(place, capsys):
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        journal = Journal(Path("kept") / f"{METHOD}_0.6")
        os.write(write, b"x" if journal else b"")
        time.sleep(600)
    os.read(ready, 1)
    try:
        assert main.main(place.split()) == 2
        assert "another process is at work there; wait for it, or give another folder" in only_line(capsys)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert main.main(place.split()) == 0, "the system releases what a killed process held"
    assert [path.name for path in Path("kept").iterdir()] == [f"{METHOD}_0.6"]


def test_a_model_that_is_replaced_is_not_left_behind(place, unbroken):
    other = place.replace("--epsilon 0.2", "--epsilon 0.1")
    assert main.main(other.split()) == 0
    before = hashes(Path("kept") / f"{METHOD}_0.6")
    killed_run(place, Path, "rename", 1, ".partial")
    assert [path.name for path in Path("kept").iterdir() if not path.name.startswith(".")] == []
    assert main.main([*place.split(), "--eval_windows", "100000"]) == 2, "and then something else is wrong"
    killed_run(place, hidden, "enter_blocks", 1)
    assert hashes(Path("kept") / f"{METHOD}_0.6") == before != unbroken[0], "the old one is back"
    assert main.main(place.split()) == 0
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]
    assert [path.name for path in Path("kept").iterdir()] == [f"{METHOD}_0.6"]


def test_a_refused_run_leaves_no_folder(place, capsys):
    assert main.main([*place.split(), "--eval_windows", "100000"]) == 2
    assert not Path("kept").exists()


def test_ctrl_c_says_that_the_same_command_resumes(place, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(walk, "_prune_block", interrupt)
    assert main.main(place.split()) == 130
    assert "with --save_model it resumes after the last finished block" in capsys.readouterr().err
    assert not list(Path("kept").glob("*.lock"))


def test_epsilon_auto_does_not_try_again_what_it_tried(place, monkeypatch):
    flags = place.replace("--epsilon 0.2", "--epsilon auto")
    killed_run(flags, epsilon, "perplexity_by_blocks", 3)
    tried = []
    real = epsilon.perplexity_by_blocks
    monkeypatch.setattr(epsilon, "perplexity_by_blocks", lambda *a: tried.append(1) or real(*a))
    assert main.main(flags.split()) == 0
    trials = json.loads(Path(f"save/run_{RUN}.json").read_text())["epsilon_search"]
    assert len(trials) > 3 and len(tried) == len(trials) - 2


@pytest.mark.machine
@pytest.mark.usefixtures("few_windows")
def test_prices_are_not_sought_again(place, monkeypatch):
    flags = place.replace(METHOD, "wanda_price").replace(" --epsilon 0.2", " --price_steps 2")
    run = "wanda_price_sparsity_0.6"
    assert main.main(flags.replace("--save save", "--save unbroken").replace("kept", "whole").split()) == 0
    killed_run(flags, walk, "_prune_block", 2)
    monkeypatch.setattr(main.pipeline.price, "search", lambda *_: pytest.fail("the search is made again"))
    assert main.main(flags.split()) == 0
    assert hashes(Path("kept/wanda_price_0.6")) == hashes(Path("whole/wanda_price_0.6"))
    resumed, whole = (json.loads(Path(folder, f"run_{run}.json").read_text()) for folder in ("save", "unbroken"))
    assert resumed["price_search"] == whole["price_search"] and resumed["perplexity"] == whole["perplexity"]


@pytest.mark.machine
@pytest.mark.usefixtures("few_windows")
def test_prices_of_other_weights_are_not_taken(place, monkeypatch):
    flags = place.replace(METHOD, "wanda_price").replace(" --epsilon 0.2", " --price_steps 1")
    killed_run(flags, Journal, "begin", 1)  # they are noted, and no block is finished
    sought = []
    real = main.pipeline.price.search
    monkeypatch.setattr(main.pipeline.price, "search", lambda *a: sought.append(1) or real(*a))
    change_weights()
    assert main.main(flags.split()) == 0 and sought == [1]


def test_metrics_resume_by_matrix(place, monkeypatch):
    flags = f"{place} --ww_metric alpha_mid"
    killed_run(flags, measure, "spectrum", 15, pause=1)  # by then the others are on disk
    (partial,) = Path("data/tiny-llama").glob(".alpha_mid*")
    kept = len(partial.read_text().splitlines())
    measured = []
    real = measure.spectrum
    monkeypatch.setattr(measure, "spectrum", lambda *a: measured.append(1) or real(*a))
    assert main.main(flags.split()) == 0
    assert len(measured) == 21 - kept and kept >= 14
    names = sorted(path.name for path in Path("data/tiny-llama").iterdir())
    assert names == ["alpha_mid.json", "alpha_mid.npy"]


def test_metrics_of_other_weights_do_not_resume(place, monkeypatch, tiny_weights):
    assert "alpha_mid" in METRICS
    killed_run(f"{place} --ww_metric alpha_mid", measure, "spectrum", 15, pause=1)
    (partial,) = Path("data/tiny-llama").glob(".alpha_mid*")
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    assert lines
    tiny_weights.model.get_submodule(lines[0]["key"]).weight.data.mul_(1.01)
    measured = []
    real = measure.spectrum
    monkeypatch.setattr(measure, "spectrum", lambda *a: measured.append(1) or real(*a))
    measure.load_or_measure(Path("data/tiny-llama"), "alpha_mid", "tiny-llama", tiny_weights)
    assert len(measured) == 21 - len(lines) + 1


@pytest.mark.slow
def test_kill_9_at_random_moments(place, unbroken):
    command = [sys.executable, str(ROOT / "main.py"), *place.split(), "--ww_metric_cache", "cache"]
    for seconds in (3.0, 4.0, 4.5, 5.0, 5.5, 6.0):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        child.kill()
        child.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]


def test_identity_holds_every_flag_that_changes_the_weights():
    made = settings("--model m --prune_method sparsegpt --sparsity_ratio 0.5")
    free = {"model", "cache_dir", "ww_metric_cache", "metrics_only", "save_plan", "export_llmcompressor", "eval_data",
            "eval_windows", "eval_wikitext", "eval_zero_shot", "tasks", "num_fewshot", "limit", "eval_batch_size",
            "include_path", "save", "save_model", "packed", "stream", "hidden_states", "restart"}  # fmt: skip
    assert set(made.identity()) == set(made.flags()) - free
    assert isinstance(digest(torch.zeros(2)), str) and digest([1]) != digest([2])


def test_with_dense_statistics_finished_blocks_pass_on_what_they_did_when_they_were_dense(place):
    flags = f"{place} --statistics dense --eval_wikitext false"
    assert main.main(flags.replace("--save_model kept", "--save_model whole").split()) == 0
    killed_run(flags, walk, "_prune_block", 3)
    assert main.main(flags.split()) == 0
    assert hashes(Path("kept") / f"{METHOD}_0.6") == hashes(Path("whole") / f"{METHOD}_0.6")


def test_a_whole_model_whose_run_is_not_resumed_stays_where_it_was(place, unbroken, monkeypatch, capsys):
    killed_run(place, perplexity, "perplexity_by_blocks", 1)
    with monkeypatch.context() as patched:
        versions = main.pipeline.provenance()["versions"] | {"torch": "1.0"}
        patched.setattr(main.pipeline, "provenance", lambda: {"versions": versions})
        assert main.main(place.split()) == 2 and "torch was" in only_line(capsys)
    assert hashes(Path("kept") / f"{METHOD}_0.6") == unbroken[0]
    assert [path.name for path in Path("kept").iterdir()] == [f"{METHOD}_0.6"]
