"""Resume: a run that is killed at any point ends, on its second try, with the bits of an unbroken one."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, error_line, fast, settings
from safetensors.torch import load_file, save_file
from test_streamed import hashes

import main
from lib.allocation import epsilon
from lib.calibration import hidden
from lib.cli.settings import RecoveryFlags
from lib.core import files
from lib.core.files import Progress
from lib.evaluation import perplexity
from lib.models import safetensors_io
from lib.pruning import walk
from lib.run.journal import Journal
from lib.spectra import measure
from lib.spectra.tail import METRICS

pytestmark = pytest.mark.usefixtures("one_thread")  # runs are forked

METHOD = "sparsegpt_ww"
RUN = f"{METHOD}_sparsity_0.6"
WW = f"{METHOD} --epsilon 0.2 --ww_metric_cache cache"
FLAGS = (
    "--model tiny-llama --calib_data text.txt --eval_data other.txt --seqlen 32 --nsamples 5 --eval_windows 8 "
    f"--prune_method {WW} --sparsity_ratio 0.6 --save save --save_model kept"
)
KEPT = Path("kept", f"{METHOD}_0.6")
PARTIAL = Path("kept", f".{METHOD}_0.6.partial")


def killed_run(flags: str, room, name: str, at: int = 1, marker: str = "", pause: float = 0.0) -> None:
    """Run main.py in a child that dies, as by kill -9, just before the ``at``-th call of ``room.name``.

    Args:
        marker: counts only calls whose arguments hold this text, or name an open file that does.
    """

    def run_and_die() -> None:
        real, calls = getattr(room, name), []

        def call(*args, **kwargs):
            names = [os.readlink(f"/proc/self/fd/{arg}") for arg in args if name == "fsync"]
            if marker in str([*args, *names]):
                calls.append(1)
                if len(calls) == at:
                    time.sleep(pause)
                    signal.raise_signal(signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(room, name, call)
        main.main(flags.split())

    child = multiprocessing.get_context("fork").Process(target=run_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, "it was not killed: nothing is tested"


POINTS = {
    "before anything": (hidden, "enter_blocks", 1),
    "in calibration": (hidden, "run_block", 7),
    "inside a solve": (walk, "_prune_layers", 6),
    "while a shard is written": (os, "fsync", 1, "model-block-00001"),
    "between shard and progress": (Progress, "add", 1, "'block', '1'"),
    "while progress is written": (os, "fsync", 3, "progress.jsonl"),
    "after a block": (walk, "_prune_block", 3),
    "while the model is completed": (safetensors_io, "write_index", 1),
    "before the model is finished": (Journal, "finish", 1),
    "before the folder is renamed": (files, "replace_folder", 1),
    "after the folder is renamed": (files, "sync_folder", 1, "('kept')"),
    "in evaluation": (perplexity, "perplexity_by_blocks", 1),
    "before the last record": (main.report, "show_run", 1),
}


@pytest.fixture(scope="module")
def stops(run_inputs, tmp_path_factory):
    """Return a function of a point: the folder of a run that was killed there; "" is a whole run, None no run yet."""

    @cache
    def stop(point: str | None) -> Path:
        folder = tmp_path_factory.mktemp("stop") / "run"
        shutil.copytree(run_inputs, folder)
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            if point:
                killed_run(FLAGS, *POINTS[point])
            elif point == "":
                assert run() == 0
        return folder

    return stop


@pytest.fixture
def stopped(stops, tmp_path, monkeypatch):
    """Return a function that goes to a copy of the folder of a run that was killed at a point."""

    def go(point: str | None) -> None:
        shutil.copytree(stops(point), tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)

    return go


@pytest.fixture
def place(stopped) -> str:
    """Return the flags of a run in a folder of its own, to which the test goes."""
    stopped(None)
    return FLAGS


@pytest.fixture(scope="module")
def unbroken(stops) -> dict[str, str]:
    """Return the hashes of what a run saves that was not disturbed."""
    return hashes(stops("") / KEPT)


@pytest.fixture
def calls(monkeypatch):
    """Return a function of ``room`` and ``name``: the arguments of each call of it from now on, not in a killed run."""

    def noted(room, name: str) -> list[tuple]:
        real, seen = getattr(room, name), []
        monkeypatch.setattr(room, name, lambda *args: seen.append(args) or real(*args))
        return seen

    return noted


def run(*more: str, flags: str = FLAGS) -> int:
    return main.main([*flags.split(), *more])


def in_kept() -> list[str]:
    return sorted(path.name for path in Path("kept").iterdir())


def read_record(folder: Path = Path()) -> dict:
    return json.loads((folder / "save" / f"run_{RUN}.json").read_text())


@pytest.mark.parametrize("stream_it", fast(["never", "always"], 1))
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_to_the_same_bits(point, stream_it, place, unbroken, stops):
    flags = f"{place} --stream {stream_it}"
    killed_run(flags, *POINTS[point])
    assert run(flags=flags) == 0
    assert hashes(KEPT) == unbroken and in_kept() == [KEPT.name]
    record, whole = read_record(), read_record(stops(""))
    assert record["complete"] is True
    assert (record["perplexity"], record["sparsity"]) == (whole["perplexity"], whole["sparsity"])


def test_resume_after_repeated_kills(place, unbroken):
    for at in (2, 2, 1):  # the first two tries finish one block more each
        killed_run(place, walk, "_prune_block", at)
    assert run() == 0 and hashes(KEPT) == unbroken


@pytest.mark.slow
def test_kill_9_at_random_moments(place, unbroken):
    command = [sys.executable, str(ROOT / "main.py"), *place.split()]
    for seconds in (3.0, 4.0, 4.5, 5.0, 5.5, 6.0):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        child.kill()
        child.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hashes(KEPT) == unbroken


BLOCKS = {("after a block", ""): [2], ("after a block", "--restart"): [0, 1, 2], ("", ""): [0, 1, 2]}


@pytest.mark.parametrize(("point", "more"), BLOCKS)
def test_finished_blocks_of_an_unfinished_run_are_not_pruned_again(point, more, stopped, unbroken, calls, caplog):
    stopped(point)
    pruned = calls(walk, "_prune_block")
    assert run(*more.split()) == 0 and hashes(KEPT) == unbroken
    assert [block.index for block, *_ in pruned] == BLOCKS[point, more]
    assert ("resuming after block 1" in caplog.text) == (len(pruned) == 1)


@pytest.mark.parametrize("more", ["", " --restart"])  # which is then among both runs' flags
def test_what_is_written_already_needs_no_more_space_but_for_a_restart(more, place, unbroken, monkeypatch):
    flags = place + more
    killed_run(flags, *POINTS["in evaluation"])
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run("--sparsity_ratio", "0.5", flags=flags) == 2, "another one needs it"
    assert run(flags=flags) == (2 if more else 0) and hashes(KEPT) == unbroken


def test_a_model_that_is_replaced_is_not_left_behind(stopped, unbroken):
    stopped("")
    other = FLAGS.replace("--epsilon 0.2", "--epsilon 0.1")
    killed_run(other, Path, "rename", 1, ".partial")
    assert [name for name in in_kept() if not name.startswith(".")] == []
    assert run("--eval_windows", "100000", flags=other) == 2, "and then something else is wrong"
    killed_run(other, hidden, "enter_blocks", 1)
    assert hashes(KEPT) == unbroken, "the old one is back"
    assert run(flags=other) == 0
    assert hashes(KEPT) != unbroken and in_kept() == [KEPT.name]


def test_with_dense_statistics_finished_blocks_pass_on_what_they_did_when_they_were_dense(place):
    flags = f"{place} --statistics dense --eval_wikitext false"
    assert run(flags=flags.replace("kept", "whole")) == 0
    killed_run(flags, *POINTS["after a block"])
    assert run(flags=flags) == 0
    assert hashes(KEPT) == hashes(Path("whole", KEPT.name))


REFUSED = {
    "--nsamples 4": "--nsamples was 5 and is 4 now",
    "--epsilon 0.1": "--epsilon was 0.2 and is 0.1 now",
    "--calib_dtype bfloat16": "--calib_dtype was None and is bfloat16 now",
    "--calib_data other.txt": "--calib_data was text.txt and is other.txt now",
    "": "its calibration windows were others",  # in a file of the same name
}


@pytest.mark.machine
@pytest.mark.parametrize("more", REFUSED)
def test_another_run_is_refused_in_words(more, stopped, capsys):
    stopped("after a block")
    if not more:
        shutil.copy("other.txt", "text.txt")
    before = {path: path.read_bytes() for path in PARTIAL.glob("*.safetensors")}
    line = error_line(capsys, run(*more.split()))
    assert REFUSED[more] in line and "--restart" in line
    assert before == {path: path.read_bytes() for path in PARTIAL.glob("*.safetensors")}


def change_weights(layer: str = "model.layers.2.mlp.down_proj") -> None:
    weights = load_file("tiny-llama/model.safetensors")
    weights[f"{layer}.weight"] *= 1.02
    save_file(weights, "tiny-llama/model.safetensors", {"format": "pt"})


def test_other_dense_weights_of_the_same_name_are_refused(place, capsys):
    flags = place.replace(WW, "sparsegpt")
    killed_run(flags, *POINTS["after a block"])
    change_weights()
    says = error_line(capsys, run(flags=flags))
    assert "the dense weights were others (see model.layers.2.mlp.down_proj)" in says


@pytest.mark.parametrize("point", ["after a block", "in evaluation"])
def test_what_does_not_change_the_weights_may_change(point, stopped, unbroken, calls):
    stopped(point)
    pruned = calls(walk, "_prune_block")
    assert run("--eval_windows", "2", "--save", "elsewhere", "--stream", "always") == 0
    assert hashes(KEPT) == unbroken and not (KEPT / "progress.jsonl").exists(), "nothing is left to resume"
    assert len(pruned) < 3, "what is finished is not pruned again"


@pytest.mark.parametrize("changed", [None, "threads", "kernel"])
def test_a_run_that_resumes_with_other_bits_says_so(changed, stopped, monkeypatch, caplog):
    stopped("after a block")
    if changed == "threads":
        monkeypatch.setattr(main.pipeline.torch, "get_num_threads", lambda: 1000)
    if changed == "kernel":
        monkeypatch.setattr(main.pipeline, "_kernel", lambda: "elsewhere")
    assert run() == 0
    now = {"threads": "1000", "kernel": "elsewhere"}
    for kind, value in now.items():
        said = f"and is {value} now: later blocks are rounded otherwise"
        assert (said in caplog.text) == (f"{kind} was" in caplog.text) == (changed == kind)


def test_identity_holds_every_flag_that_changes_the_weights():
    made = settings("--model m --prune_method sparsegpt --sparsity_ratio 0.5")
    free = {"model", "cache_dir", "ww_metric_cache", "metrics_only", "save_plan", "save_calib", "export_llmcompressor",
            "eval_data", "eval_windows", "eval_wikitext", "eval_zero_shot", "tasks", "num_fewshot", "limit",
            "eval_batch_size", "include_path", "save", "save_model", "packed", "stream", "hidden_states",
            "restart"}  # fmt: skip
    trained = set(RecoveryFlags.__annotations__) - {"_title"}
    assert set(made.task().identity) == set(made.flags()) - free - trained
    assert set(made.identity(RecoveryFlags)) == trained | {"seed", "dtype"}


@pytest.mark.parametrize("how", ["altered", "gone", "another"])
def test_a_shard_that_is_not_a_finished_block_is_no_part_of_the_model(how, stopped, unbroken, caplog):
    stopped("after a block")
    shard, another = PARTIAL / "model-block-00001.safetensors", PARTIAL / "model-block-00007.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    if how == "another":
        another.write_bytes(content)
        (PARTIAL / ".model-block-00002.safetensors.123.tmp").write_bytes(b"half")
    else:
        shard.write_bytes(content) if how == "altered" else shard.unlink()
    assert run() == 0 and hashes(KEPT) == unbroken and not [*KEPT.glob(".*")]
    assert (f"{shard.name} is damaged" in caplog.text) == (how != "another")


@pytest.mark.parametrize(("point", "folder"), [("after a block", PARTIAL), ("in evaluation", KEPT)])
def test_damaged_progress_is_one_line(point, folder, stopped, unbroken, capsys):
    stopped(point)
    path = folder / "progress.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"kind"', b'{"ki'))
    line = error_line(capsys, run())
    assert "progress.jsonl: is damaged (" in line and "add --restart to begin again" in line
    assert in_kept() == [folder.name], "it stays where it was"
    assert run("--restart") == 0 and hashes(KEPT) == unbroken


def test_a_whole_model_whose_run_is_not_resumed_stays_where_it_was(stopped, unbroken, monkeypatch, capsys):
    stopped("in evaluation")
    versions = main.pipeline.provenance()["versions"] | {"torch": "1.0"}
    monkeypatch.setattr(main.pipeline, "provenance", lambda: {"versions": versions})
    assert "torch was" in error_line(capsys, run())
    assert hashes(KEPT) == unbroken and in_kept() == [KEPT.name]


def test_a_saved_folder_that_is_another_model_is_one_line(place, monkeypatch, capsys):
    monkeypatch.setattr(walk, "checkpoint_sparsity", lambda *_: 0.25)
    line = error_line(capsys, run())
    assert "holds a sparsity of 0.250000 as read back" in line and "delete the folder" in line


def test_another_process_at_work_is_not_disturbed(stopped, capsys):
    stopped("after a block")
    with files.locked(PARTIAL):
        says = error_line(capsys, run())
        assert "another process is at work there; wait for it, or give another folder" in says
        assert PARTIAL.name in in_kept()


def test_a_refused_run_leaves_no_folder(place):
    assert run("--eval_windows", "100000") == 2 and not Path("kept").exists()


def test_epsilon_auto_does_not_try_again_what_it_tried(place, calls):
    flags = place.replace("--epsilon 0.2", "--epsilon auto")
    killed_run(flags, epsilon, "perplexity_by_blocks", 3)
    tried = calls(epsilon, "perplexity_by_blocks")
    assert run(flags=flags) == 0
    trials = read_record()["epsilon_search"]
    assert len(trials) > 3 and len(tried) == len(trials) - 2


@pytest.mark.machine
@pytest.mark.usefixtures("few_windows")
def test_prices_are_not_sought_again_but_those_of_other_weights(place, calls):
    flags = place.replace(WW, "wanda_price --price_steps 2")
    assert run(flags=flags.replace("--save save", "--save unbroken").replace("kept", "whole")) == 0
    killed_run(flags, *POINTS["after a block"])
    sought = calls(main.pipeline.price, "search")
    assert run(flags=flags) == 0 and sought == []
    assert hashes(Path("kept/wanda_price_0.6")) == hashes(Path("whole/wanda_price_0.6"))
    paths = (Path(folder, "run_wanda_price_sparsity_0.6.json") for folder in ("save", "unbroken"))
    resumed, whole = (json.loads(path.read_text()) for path in paths)
    assert resumed["price_search"] == whole["price_search"] and resumed["perplexity"] == whole["perplexity"]

    killed_run(flags, Journal, "begin", 1)  # they are noted, and no block is finished
    change_weights()
    assert run(flags=flags) == 0 and len(sought) == 1


def test_metrics_resume_by_matrix_but_not_those_of_other_weights(place, calls):
    assert "alpha_mid" in METRICS
    killed_run(f"{place} --ww_metric alpha_mid", measure, "spectrum", 15, pause=1)  # by then the others are on disk
    (partial,) = Path("cache").glob(".alpha_mid*")
    finished = [json.loads(line)["key"] for line in partial.read_text().splitlines()]
    change_weights(finished[0])
    measured = calls(measure, "spectrum")
    assert run("--ww_metric", "alpha_mid") == 0
    assert len(measured) == 21 - len(finished) + 1 and len(finished) >= 14
    assert sorted(path.name for path in Path("cache").iterdir()) == ["alpha_mid.json", "alpha_mid.npy"]
