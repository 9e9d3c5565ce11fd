"""Several processes: their parts make the whole, what they write is what one writes, and they end together."""

import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import matplotlib.backends.backend_agg  # noqa: F401  which each forked process would import by itself
import numpy as np
import pytest
import torch
from conftest import ROOT, fast, saved_tensors
from mixtures import tiny_mixture
from pretend_cuda import CUDA, CudaTensor, pretend_cuda
from test_journal import hashes

import main
from lib.calibration import hidden as calibration
from lib.core import processes
from lib.core.errors import UserError
from lib.models import memory, safetensors_io
from lib.pruning import walk
from lib.spectra import measure

pytestmark = pytest.mark.usefixtures("one_thread")  # runs are forked

LIMIT = 600  # seconds after which a process that waits for another in vain is ended


def as_one_of(monkeypatch, rank: int, count: int, device: str = "cpu") -> None:
    state = SimpleNamespace(process_index=rank, num_processes=count, device=torch.device(device))
    monkeypatch.setattr(processes, "_state", state)
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("RANK", str(rank))


def test_shares_are_the_whole_in_order(monkeypatch):
    for count, total in itertools.product([1, 2, 3, 5], [0, 1, 4, 7, 15]):
        shares = []
        for rank in range(count):
            as_one_of(monkeypatch, rank, count)
            shares.append([*range(total)][processes.share(total)])
        assert sum(shares, []) == [*range(total)] and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_work_is_balanced(monkeypatch):
    as_one_of(monkeypatch, 1, 2)
    # 6 to the first (6:0), 5 to the second (6:5), 4 to the second (6:9), 3 to the first (9:9), 1 to the first (10:9)
    assert processes.owners([3, 6, 1, 4, 5]) == [0, 0, 0, 1, 1] and processes.owners([1, 1, 1, 1]) == [0, 1, 0, 1]
    with processes.single_process():
        assert processes.owners([3, 6]) == [0, 0] and processes.share(7) == slice(0, 7)
        assert not processes.is_main(), "who writes files does not change"
        assert processes.on_main(lambda: "mine") == "mine" and processes.gathered(4) == [4]
    assert processes.share(7) == slice(3, 7)


def test_alone_nothing_happens_and_nothing_is_imported():
    code = """if True:
        import sys
        from lib.core import processes
        processes.join()
        assert (processes.count(), processes.rank(), processes.is_main(), processes.device()) == (1, 0, True, None)
        assert processes.share(9) == slice(0, 9) and processes.owners([2, 5]) == [0, 0]
        assert processes.sum_(3) == 3 and processes.gathered(3) == [3] and processes.on_main(lambda: 3) == 3
        processes.broadcast(None, 0), processes.leave()
        assert not {"torch", "accelerate"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_each_process_has_its_own_gpu_or_a_share_of_the_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 + torch.device(device).index, 200))
    monkeypatch.setattr(memory, "free_ram", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    as_one_of(monkeypatch, 5, 8, "cuda:1")
    assert processes.device() == torch.device("cuda:1") and memory.free_memory(30) == {1: 71}
    as_one_of(monkeypatch, 5, 8)
    assert memory.free_memory(0) == {"cpu": 250}


def test_an_incomplete_environment_is_refused(place, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main.main(place.split()) == 2
    err = capsys.readouterr().err
    assert "LOCAL_RANK is not set; start with accelerate launch or torchrun" in err and err.count("\n") == 1


def fork(flags: str, count: int, before: Callable[[int], object] = lambda rank: None) -> tuple[list[int], list[str]]:
    """Run main.py in ``count`` processes; return their exit statuses and what they say.

    ``before(rank)`` is called in each. A status below 0 is a signal. Like torch's launcher, this process holds the
    store in which they find each other; unlike it, it ends none of them.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost"}
    environment |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}

    def work(rank: int) -> None:
        signal.alarm(LIMIT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes ignore
        os.environ |= {name: str(value) for name, value in environment.items()}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        sys.stdout = sys.stderr = Path(f"said.{rank}").open("w", buffering=1)
        logging.getLogger().handlers.clear()  # pytest's: main.py then sets up its own
        accelerate.state.PartialState._reset_state()  # of a Trainer or a launcher in an earlier test
        before(rank)
        sys.exit(main.main(flags.split()))

    children = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(count)]
    for act in ("start", "join"):
        for child in children:
            getattr(child, act)()
    return [child.exitcode for child in children], [Path(f"said.{rank}").read_text() for rank in range(count)]


@pytest.fixture
def place(tmp_path, monkeypatch, run_inputs) -> str:
    """Return the flags of a run in a folder of its own, of windows that two processes cannot share evenly."""
    monkeypatch.chdir(tmp_path)
    for path in run_inputs.iterdir():
        Path(path.name).symlink_to(path)
    return "--model tiny-llama --calib_data text.txt --eval_data other.txt --eval_windows 9 --seqlen 32 --nsamples 7"


def outcome(place: str, flags: str, count: int, before=lambda rank: None) -> tuple[dict, dict, list[str]]:
    """Return a run's record, its saved weights, and what its processes said."""
    folder = Path(f"by-{count}")
    flags = f"{place} {flags} --sparsity_ratio 0.6 --save {folder} --save_model {folder / 'kept'}"
    statuses, said = fork(flags, count, before)
    assert statuses == [0] * count, said
    (record,) = map(json.loads, (path.read_text() for path in folder.glob("run_*.json")))
    return record, saved_tensors(Path(record["saved_model"])), said


def before_calls(room, name: str, act: Callable[..., object], only: int | None = None) -> Callable[[int], None]:
    """Return what makes each process, or the rank ``only``, ``act(number, *arguments)`` before a call of a function."""

    def before(rank: int) -> None:
        real, numbers = getattr(room, name), itertools.count(1)
        if only in (None, rank):
            setattr(room, name, lambda *args, **kwargs: (act(next(numbers), *args), real(*args, **kwargs))[1])

    return before


def noting(room, name: str, note: Callable[..., str]) -> Callable[[int], None]:
    """Return what makes each process note its calls of ``room.name`` in a file of its own."""

    def before(rank: int) -> None:
        file = Path(f"{name}.{rank}").open("w", buffering=1)
        before_calls(room, name, lambda _, *args: file.write(note(*args) + "\n"))(rank)

    return before


def noted(name: str, count: int = 2) -> list[list[str]]:
    return [Path(f"{name}.{rank}").read_text().split() for rank in range(count)]


def different(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Return the fraction of the pruned layers' weights that are zero in one of two models only."""
    names = [name for name in one if name.endswith("_proj.weight")]
    assert one.keys() == two.keys() and len(names) == 21
    return sum(((one[n] == 0) != (two[n] == 0)).sum().item() for n in names) / sum(one[n].numel() for n in names)


def test_metrics_and_magnitude_are_the_same_to_the_bit(place):
    spectra = noting(measure, "_value", lambda how, progress, name, *_: name)
    flags = "--prune_method magnitude_ww --epsilon 0.2 --ww_metric_cache "
    one = outcome(place, flags + "cache-1", 1)
    two = outcome(place, flags + "cache-2", 2, spectra)
    values = [np.load(f"cache-{n}/alpha_peak.npy") for n in (1, 2)]
    assert values[0].tobytes() == values[1].tobytes() and len(values[0]) == 21
    assert Path("cache-1/alpha_peak.json").read_text() == Path("cache-2/alpha_peak.json").read_text()
    assert sorted(os.listdir("cache-2")) == ["alpha_peak.json", "alpha_peak.npy"]
    measured = noted("_value")
    assert sorted(measured[0] + measured[1]) == sorted(set(measured[0] + measured[1])) and min(map(len, measured)) >= 9
    assert hashes(Path(one[0]["saved_model"])) == hashes(Path(two[0]["saved_model"]))
    assert (one[0]["perplexity"], one[0]["processes"]) == (two[0]["perplexity"], 1) and two[0]["processes"] == 2
    assert sorted(os.listdir("by-1")) == sorted(os.listdir("by-2"))
    tables = [Path(f"by-{n}/layers_magnitude_ww_sparsity_0.6.tsv").read_text() for n in (1, 2)]
    assert tables[0] == tables[1]
    assert "perplexity" in two[2][0] and two[2][1] == "", "the first speaks"


WANDA = ["wanda_owl", "wanda_owl --stream always --hidden_states disk", "wanda_lamp --statistics dense",
         "wanda_ww --epsilon auto", "wanda_price --price_steps 2"]  # fmt: skip


@pytest.mark.parametrize("more", fast(WANDA, 2))
def test_wanda_masks_are_the_same_but_for_the_order_of_sums(more, place):
    passes = noting(calibration, "run_block", lambda *_: "pass")
    one, two = outcome(place, f"--prune_method {more}", 1), outcome(place, f"--prune_method {more}", 2, passes)
    assert different(one[1], two[1]) <= 1e-4
    assert two[0]["epsilon_search"] == one[0]["epsilon_search"], "each trial is one process's"
    assert two[0]["sparsity"] == one[0]["sparsity"]
    assert two[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-3)
    if "owl" in more:  # 3 blocks: scored, seen twice but for the last, and when streamed evaluated, 4 + 5 windows
        evaluated = (12, 15) if "stream" in more else (0, 0)
        assert [len(x) for x in noted("run_block")] == [3 * 8 + evaluated[0], 4 * 8 + evaluated[1]]


@pytest.mark.parametrize("pruner", fast(["sparsegpt", "alps"], 1))
def test_layers_are_solved_by_owners(pruner, place):
    solves = noting(walk, "_prune_layers", lambda block, names, *_: ",".join(names))
    statistics = noting(walk, "_cost", lambda block, names, value: f"{value.double().abs().mean().item():.9g}")
    before = lambda rank: (solves(rank), statistics(rank))  # noqa: E731
    one = outcome(place, f"--prune_method {pruner}", 1, before)
    alone = [float(x) for x in noted("_cost", 1)[0]]
    two = outcome(place, f"--prune_method {pruner}", 2, before)
    for values in noted("_cost"):  # of all windows, added up in float64; one entry in 1e8 may round to another float32
        assert [float(x) for x in values] == pytest.approx(alone, rel=1e-7) and len(values) == 12
    assert two[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-3)
    assert different(one[1], two[1]) <= 1e-4  # measured: 0
    solved = noted("_prune_layers")
    assert len(solved[0] + solved[1]) == len(set(solved[0] + solved[1])) == 12 and min(map(len, solved)) >= 3


def test_experts_are_shared(place, tiny_tokenizer):
    tiny_mixture("gpt-oss").save_pretrained("tiny-mixture")  # whose matrices are views that are not contiguous
    tiny_tokenizer.save_pretrained("tiny-mixture")
    runs, tables = [], []
    for count in (1, 2):
        flags = "--model tiny-mixture --prune_method sparsegpt --drop_experts 0.25"
        runs.append(outcome(place, flags, count))
        lines = Path(f"by-{count}/layers_sparsegpt_sparsity_0.6_drop0.25.tsv").read_text().splitlines()
        tables.append([(line.split("\t")[0], line.split("\t")[-1]) for line in lines])
    assert tables[0] == tables[1] and tables[0][0] == ("name", "tokens")  # those of all windows
    (one, weights, _), (two, others, _) = runs
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    pruned = [name for name in weights if "proj" in name and "bias" not in name]
    assert max(((weights[x] == 0) != (others[x] == 0)).float().mean() for x in pruned) <= 1e-3  # measured: 0


RECOVERED = ["--recover 600", "--recover 800 --by block --stream always", "--recover 600 --train low_rank"]


@pytest.mark.parametrize("more", fast(RECOVERED, 2))
def test_recovery_is_the_same_but_for_the_order_of_sums(more, place, machine):
    machine("plain")  # in float32: bfloat16's products of one window and of two round to other numbers
    flags = f"--prune_method magnitude --batch 3 {more} "  # one window of a step, and two
    one, two = outcome(place, flags, 1), outcome(place, flags, 2)
    losses = [record["recovery"]["losses"] for record in (one[0], two[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) >= 6
    for key in ("held_before", "held_after", "perplexity_before"):
        assert one[0]["recovery"][key] == pytest.approx(two[0]["recovery"][key], rel=1e-3), key
    assert different(one[1], two[1]) == 0 and two[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-3)


forever = ExitStack()


def on_pretend_cuda(rank: int) -> None:
    """Let a process have a pretend CUDA device, and refuse to reduce or send what is not on it, as NCCL does."""
    forever.enter_context(pretend_cuda())

    def on_device(real: Callable, tensor: torch.Tensor, *rest) -> None:
        assert isinstance(tensor, CudaTensor), "no backend type associated with device type cpu"
        real(tensor.held, *rest)

    for name in ("all_reduce", "broadcast"):
        setattr(torch.distributed, name, partial(on_device, getattr(torch.distributed, name)))

    def join() -> None:
        torch.distributed.init_process_group("gloo")
        about = {"device": CUDA, "destroy_process_group": torch.distributed.destroy_process_group}
        processes._state = SimpleNamespace(num_processes=2, process_index=rank, **about)

    processes.join = join


@pytest.mark.parametrize("more", fast(["sparsegpt_owl --stream always", "wanda --recover 600 --batch 3"], 1))
def test_on_pretend_gpus(more, place):
    flags = f"--prune_method {more} --dtype float32 --nsamples 3 --eval_windows 3"
    one, two = outcome(place, flags, 1), outcome(place, flags, 2, on_pretend_cuda)
    assert two[0]["stages"]["prune"]["peak_cuda_mb"] is not None
    assert different(one[1], two[1]) <= 1e-3
    assert two[0]["perplexity"] == pytest.approx(one[0]["perplexity"], rel=1e-2)


@pytest.mark.slow
def test_zero_shot_questions_are_shared_by_lm_eval(place):
    import lm_eval.models.huggingface  # noqa: F401  before the processes part, since it takes seconds

    flags = f"{place} --eval_zero_shot --tasks capital_cities --include_path {ROOT / 'data/tasks'} --limit 9"
    records = []
    for count in (1, 2):
        statuses, said = fork(f"{flags} --save by-{count}", count)
        assert statuses == [0] * count, said
        records.append(json.loads(Path(f"by-{count}/run_dense_sparsity_0.0.json").read_text()))
    figures = [(r["perplexity"], r["zero_shot"]["means"], r["zero_shot"]["lm_eval"]["results"]) for r in records]
    assert figures[0] == figures[1] and figures[1][1] != {} and records[1]["complete"] is True


def test_where_one_lacks_room_all_stream(place):
    def little_room(rank: int) -> None:
        if rank == 1:
            memory.free_memory = lambda reserve: {"cpu": 0}

    flags = "--prune_method wanda"
    two = outcome(place, flags, 2, little_room)
    assert "block by block" in two[2][0] and different(outcome(place, flags, 1)[1], two[1]) <= 1e-4
    statuses, said = fork(f"{place} {flags} --sparsity_ratio 0.5 --stream never", 2, little_room)
    assert statuses == [2, 2] and set(lines(said)) == {"--stream never: each of the 2 processes holds the whole model"}


def lines(said: list[str]) -> list[str]:
    """Return the errors that the processes told of, up to the first comma."""
    assert "Traceback" not in "".join(said), said
    return re.findall("^main.py: error: ([^,\n]*)", "\n".join(said), re.M)


def refuse() -> None:
    raise UserError(None, "layer 3", "something is wrong with it")


kill = partial(signal.raise_signal, signal.SIGKILL)
interrupt = partial(signal.raise_signal, signal.SIGINT)


def at(number: int, act: Callable[[], object]) -> Callable[..., object]:
    """Return what acts before the call of a number only, counted from 1."""
    return lambda call, *_: act() if call == number else None


METHOD = "--prune_method sparsegpt_ww --epsilon 0.2 --sparsity_ratio 0.6"


@pytest.fixture
def unbroken(place, tmp_path_factory) -> dict[str, str]:
    """Return the hashes of what an undisturbed run of two processes saves, which the first test that asks makes."""
    folder = tmp_path_factory.getbasetemp() / "unbroken"
    if not folder.exists():
        assert fork(f"{place} {METHOD} --save_model {folder} --ww_metric_cache other --save other", 2)[0] == [0, 0]
    return hashes(folder / "sparsegpt_ww_0.6")


POINTS = [(1, measure, "_value", 3), (0, walk, "_prune_layers", 4), (1, walk, "_report", 2)]


@pytest.mark.parametrize(("rank", "room", "name", "call"), POINTS)
def test_one_that_dies_ends_all_and_the_run_resumes(rank, room, name, call, place, unbroken):
    statuses, said = fork(f"{place} {METHOD} --save_model broken", 2, before_calls(room, name, at(call, kill), rank))
    assert (statuses[rank], statuses[1 - rank]) == (-signal.SIGKILL, 2)
    (line,) = lines(said)
    assert line.startswith("another of the 2 processes has ended (")
    if name == "_report":  # the first block is whole
        status, said = fork(f"{place} {METHOD} --save_model broken", 1)
        assert status == [2] and "processes was 2 and is 1 now; add --restart" in said[0]
        statuses, said = fork(f"{place} {METHOD} --save_model broken --damping 0.02", 2)
        assert statuses == [2, 2] and "--damping was None and is 0.02 now" in said[0]
    how = "always" if room is walk else "never"
    statuses, said = fork(f"{place} {METHOD} --save_model broken --stream {how}", 2)
    assert statuses == [0, 0], said
    assert ("resuming after block" in said[0]) == (room is walk)
    assert hashes(Path("broken/sparsegpt_ww_0.6")) == unbroken
    assert [path.name for path in Path("broken").iterdir()] == ["sparsegpt_ww_0.6"]


def test_an_error_of_all_is_one_line_of_each(place):
    statuses, said = fork(f"{place} --prune_method wanda --sparsity_ratio 0.5 --nsamples 1", 2)
    line = "--nsamples 1: is too few to share; give one for each of 2 processes"
    assert statuses == [2, 2] and lines(said) == [line] * 2


def test_where_the_first_cannot_write_all_measure_on(place):
    full = before_calls(safetensors_io, "write_shard", at(2, refuse), 0)
    statuses, said = fork(f"{place} --prune_method wanda --sparsity_ratio 0.5 --save_model kept", 2, full)
    assert statuses == [2, 2] and set(lines(said)) == {"layer 3: something is wrong with it"}
    record = json.loads(Path("results/run_wanda_sparsity_0.5.json").read_text())
    assert record["perplexity"] > 1 and record["complete"] is False and record["saved_model"] is None


@pytest.mark.parametrize(("rank", "act", "status"), [(0, refuse, 2), (1, refuse, 2), (0, interrupt, 130)])
def test_what_one_finds_ends_all_with_its_line(rank, act, status, place):
    statuses, said = fork(f"{place} {METHOD}", 2, before_calls(walk, "_prune_layers", at(2, act), rank))
    assert statuses[rank] == status and statuses[1 - rank] == 2
    if act is refuse:
        assert lines([said[rank]]) == ["layer 3: something is wrong with it"]
    else:
        assert not lines([said[0]]) and "main.py: interrupted; the same command starts again" in said[0]
    assert "another of the 2 processes has ended (" in said[1 - rank]


@pytest.mark.slow
def test_under_a_launcher(place):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done, refused = (
        subprocess.run([*launcher, ROOT / "main.py", *flags.split()], capture_output=True, text=True, timeout=LIMIT)
        for flags in (
            f"{place} --prune_method magnitude --sparsity_ratio 0.5 --save_model kept",
            f"{place} --prune_method magnitud --sparsity_ratio 0.5",
        )
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1 and "rror" not in done.stderr
    assert Path("kept/magnitude_0.5/model.safetensors.index.json").is_file()
    assert refused.returncode != 0 and "main.py: error: --prune_method magnitud: invalid choice" in refused.stderr
