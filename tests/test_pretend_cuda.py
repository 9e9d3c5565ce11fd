"""Rehearsal for CUDA: what the pretend device refuses, and whole runs on it, compared with the same runs on the CPU."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fast, saved_tensors, tiny_llama, tiny_sentences
from mixtures import tiny_mixture
from peft import LoraConfig, get_peft_model
from PIL import Image
from pretend_cuda import FREE, DeviceMix, pretend_cuda
from test_image_models import TINY
from transformers import AutoModelForCausalLM

import main
from image_classifiers import main as image_main
from image_classifiers.models import save_classifier as save_image_model
from lib.allocation.formulas import ALLOCATIONS
from lib.calibration import statistics
from lib.pruning.pruners import PRUNERS
from lib.spectra.spectrum import DRIVERS
from lib.spectra.tail import METRICS, WEIGHTWATCHER
from lora_ft import evaluate_ppl, merge

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real CUDA device here")


@pytest.fixture
def cuda():
    """Let the test have the pretend device; yields its state."""
    with pretend_cuda() as state:
        yield state


# ------------------------------------------------------------------------------------ what CUDA refuses, and allows


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


MIXED = {
    "product": lambda here, there: here @ there.T,
    "in place": lambda here, there: there.add_(here),
    "stack": lambda here, there: torch.stack([there, here]),
    "values at indices": lambda here, there: there.__setitem__(there > 0, here[here > 0]),
    "indices of the device into a CPU tensor": lambda here, there: here[(there > 9).long()],
    "tensor made without a device": lambda _, there: there[0] - torch.arange(4),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_devices_do_not_mix(operation, cuda):
    with pytest.raises(DeviceMix, match="Expected all tensors to be on the same device, but aten.*cuda:0"):
        operation(numbers(3, 4), numbers(3, 4).to("cuda"))
    operation(numbers(3, 4), numbers(3, 4))  # nothing else is wrong with it


def test_what_only_the_cpu_does_is_refused(cuda):
    there = numbers(3, 4).to("cuda")
    for read in (there.numpy, lambda: np.asarray(there), lambda: np.sqrt(there), lambda: np.array([there, there])):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read()
    assert there.cpu().numpy().tolist() == there.tolist() == numbers(3, 4).tolist()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        there.pin_memory()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(NotImplementedError, match="changes a shape in place"):  # rather than wrong
        there.t_()


def test_nothing_is_asked_of_the_driver_before_it_is_initialised(cuda):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.cuda.max_memory_allocated(0) == 0
    with pytest.raises(RuntimeError, match="did you call init"):
        torch.cuda.reset_peak_memory_stats(0)
    assert not torch.cuda.is_initialized() and not cuda.initialized
    torch.zeros(1, device="cuda")
    assert torch.cuda.is_initialized()
    torch.cuda.reset_peak_memory_stats(0)
    with pretend_cuda():  # a new program
        assert not torch.cuda.is_initialized()


def test_moves_are_copies_and_staying_is_not(cuda):
    here = numbers(3, 4)
    there = here.to("cuda", non_blocking=True)
    assert there.device == torch.device("cuda:0") and there.is_cuda and not there.is_cpu and not here.is_cuda
    back = there.cpu()
    here[0] = there[1] = 0  # neither is seen by the others
    assert torch.equal(back, numbers(3, 4))
    assert there.to("cuda") is there.cuda() is there.float() is there.to(there) is there
    assert there.to("cuda", copy=True) is not there
    assert here.copy_(there) is here and torch.equal(here, there.cpu()) and type(here) is torch.Tensor
    assert there.copy_(back) is there and torch.equal(there.cpu(), back)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)])
def test_new_tensors_are_where_they_were_asked_for(device, cuda):
    made = torch.randn([2, 3], device=device)
    assert made.is_cuda and made.new_zeros(3).is_cuda and torch.ones_like(made).is_cuda
    assert type(torch.randn([2, 3])) is type(torch.zeros_like(made, device="cpu")) is torch.Tensor


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def runs(tmp_path, monkeypatch, tiny_folder, tiny_text, other_text, capsys):
    """Return a function of flags: the record and the layers of a run of main.py on the tiny model in ``place``."""

    def run(flags: str, place: str, model: Path = tiny_folder) -> tuple[dict, list[dict]]:
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        sees = "_price" in flags or "recover" in flags  # what it is measured on, which is refused
        evaluated = other_text if sees else tiny_text
        words = ["--model", str(model), "--calib_data", str(tiny_text), "--eval_data", str(evaluated), "--save", "save"]
        words += ["--seqlen", "24", "--nsamples", "3", "--eval_windows", "2", *flags.split()]
        assert main.main(words) == 0, capsys.readouterr().err
        record = [json.loads(path.read_text()) for path in Path("save").glob("run_*.json")]
        tables = [csv.DictReader(path.open(), delimiter="\t") for path in Path("save").glob("layers_*.tsv")]
        return record[0] if record else {}, [row for table in tables for row in table]

    return run


# On both devices the same kernels compute from the same numbers; only where a tensor lies in memory differs, which may
# turn the last bit of a product. Then a weight may fall on the other side of its threshold: one of the 512 of the
# smallest matrix is 0.002 of its sparsity, and hardly anything of the perplexity.
NEAR = {"perplexity": 1e-4, "sparsity": 2e-3, "planned_ratio": 2e-6}


@pytest.fixture
def rehearse(runs, monkeypatch):
    """Return a function of flags: it runs them on the pretend device and on the CPU, and compares."""
    monkeypatch.setattr(statistics, "HESSIANS", statistics.GPU_HESSIANS)  # added up as a GPU does

    def both(flags: str, free: int = FREE, **more) -> dict:
        with pretend_cuda(free) as cuda:
            there, layers = runs(flags, "there", **more)
        assert cuda.operations > 300, "hardly anything ran on the device"
        here, expected = runs(f"--dtype float16 {flags}", "here", **more)  # the device's own default
        assert there["device"] == ["pretend"] != here["device"]
        assert there["model"]["dtype"] == here["model"]["dtype"] == "float16"
        nearly = here["perplexity"] and pytest.approx(here["perplexity"], rel=NEAR["perplexity"])
        assert there["perplexity"] == nearly  # None if it is not measured
        assert there["sparsity"] == pytest.approx(here["sparsity"], abs=NEAR["sparsity"])
        for row, wanted in zip(layers, expected, strict=True):
            for column in ("planned_ratio", "sparsity"):
                assert float(row[column]) == pytest.approx(float(wanted[column]), abs=NEAR[column]), row["name"]
        return there

    return both


EACH_ONCE = [*((pruner, "") for pruner in PRUNERS), *(("wanda", suffix) for suffix in ALLOCATIONS if suffix)]
COMBINATIONS = [(p, s) for p in PRUNERS for s in ALLOCATIONS if (p, s) not in EACH_ONCE]


@pytest.mark.usefixtures("few_windows")
@pytest.mark.parametrize(("pruner", "suffix"), fast([*EACH_ONCE, *COMBINATIONS], len(EACH_ONCE)))
def test_every_method(pruner, suffix, rehearse):
    # every step, and every iteration, does the same
    few = "--price_steps 2 " * (suffix == "price") + "--pruner_iterations 3 --refit 2" * (pruner == "alps")
    rehearse(f"--prune_method {pruner}{suffix and '_'}{suffix} --sparsity_ratio 0.5 {few}")


# Runs that make tensors in ways of their own.
OTHER_RUNS = {
    "mixed N:M": "--prune_method sparsegpt_ww --sparsity_type 4:8",
    "variant": "--prune_method wanda --sparsity_ratio 0.5 --use_variant",
    "recovery": "--prune_method wanda --sparsity_ratio 0.5 --recover 200 --states 8bit --hidden_states cpu",
    "recovery by block": "--prune_method magnitude --sparsity_type 2:4 --recover 400 --by block --train low_rank "
    "--stream always --save_model kept",
    "FARMS": "--prune_method magnitude_ww --sparsity_ratio 0.5 --farms --farms_rows 12 --farms_steps 3",
    "refit": "--prune_method magnitude --sparsity_type 2:4 --refit 3 --damping 0.2",
    "dense statistics": "--prune_method wanda --sparsity_ratio 0.5 --statistics dense --eval_wikitext false",
    "hidden states on the CPU": "--prune_method sparsegpt --sparsity_ratio 0.5 --hidden_states cpu",
    "streamed": "--prune_method sparsegpt_ww --sparsity_ratio 0.5 --stream always --save_model kept",
    "streamed, dense": "--stream always",
    "epsilon auto": "--prune_method magnitude_ww --sparsity_ratio 0.9 --epsilon auto --eval_wikitext false",
}


@pytest.mark.usefixtures("few_windows")
@pytest.mark.parametrize("flags", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_other_runs(flags, rehearse):
    rehearse(flags)


OF_MIXTURES = [  # not evaluated: transformers' own product of all experts asks for a real device
    "--prune_method sparsegpt_ww --sparsity_ratio 0.5 --mapping_type expert_wise --eval_wikitext false",
    "--prune_method wanda --sparsity_ratio 0.5 --drop_experts 0.25 --stream always --save_model kept"
    " --eval_wikitext false",
    "--prune_method alps --sparsity_ratio 0.5 --statistics dense --expert_weighting router --eval_wikitext false",
]


@pytest.mark.parametrize("flags", fast(OF_MIXTURES, 2))
def test_mixtures(flags, rehearse, tmp_path, tiny_tokenizer):
    tiny_mixture("qwen2-moe").save_pretrained(tmp_path / "tiny-mixture")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny-mixture")
    rehearse(flags, model=tmp_path / "tiny-mixture")


def test_bfloat16_passes(runs):  # on the CPU they round otherwise
    with pretend_cuda():
        there, _ = runs("--prune_method sparsegpt --sparsity_ratio 0.5 --calib_dtype bfloat16 --dtype float32", "there")
    assert there["model"]["dtype"] == "float32" and there["device"] == ["pretend"]


@pytest.mark.parametrize("metric", fast([*METRICS, *WEIGHTWATCHER], 2))
def test_every_metric(metric, runs):
    if metric in WEIGHTWATCHER:
        import weightwatcher  # noqa: F401  (it asks for a GPU when it is imported)
    with pretend_cuda() as cuda:
        runs(f"--metrics_only --ww_metric {metric} --ww_metric_cache ../there", "work")
    assert cuda.operations > 20
    runs(f"--metrics_only --ww_metric {metric} --ww_metric_cache ../here --dtype float16", "work")
    assert Path(f"../there/{metric}.npy").read_bytes() == Path(f"../here/{metric}.npy").read_bytes(), "both LAPACK's"


@pytest.mark.parametrize("flags", fast(["--farms --farms_rows 12 --farms_steps 2", "", "--stream always"], 1))
def test_fast_spectra_are_computed_on_the_device(flags, runs, monkeypatch):
    devices, fast_driver = [], DRIVERS["fast"]
    monkeypatch.setitem(DRIVERS, "fast", lambda m: devices.append(m.device.type) or fast_driver(m))
    flags = f"--metrics_only --esd_driver fast --ww_metric alpha {flags}"
    with pretend_cuda():
        runs(f"{flags} --ww_metric_cache ../there", "work")
    assert devices == ["cuda"] * len(devices) and len(devices) >= 21
    runs(f"{flags} --ww_metric_cache ../here --dtype float16", "work")
    (there,), (here,) = (Path(folder).glob("*.npy") for folder in ("../there", "../here"))
    np.testing.assert_allclose(np.load(there), np.load(here), rtol=1e-5)


TIGHT = 80_000  # bytes: room for two blocks of three


def test_a_tight_device(tiny_folder, tiny_text, capsys):
    with pretend_cuda(TIGHT):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16, device_map="auto")
        assert [model.hf_device_map[f"model.layers.{name}"] for name in range(3)] == [0, 0, "cpu"]
        # The work alone is reckoned to take a gigabyte.
        assert main.main(["--model", str(tiny_folder), "--eval_data", str(tiny_text), "--seqlen", "32"]) == 2
    assert "no GPU has room for a part of it beside the work" in capsys.readouterr().err


@pytest.fixture
def no_room_is_kept(monkeypatch):
    """Let the weights take all of the device: what is kept for the work is a gigabyte and more."""
    monkeypatch.setattr("lib.models.memory.working_set", lambda *_: 0)


@pytest.mark.parametrize("method", fast(["sparsegpt_owl", "magnitude_global", "wanda_ww"], 1))
def test_runs_with_a_block_on_the_cpu(method, rehearse, tmp_path, no_room_is_kept):
    # With so many samples there is no room for their hidden states on the device either.
    flags = f"--prune_method {method} --sparsity_ratio 0.5 --nsamples 20 --save_model {tmp_path}/kept"
    rehearse(flags, free=TIGHT)


def test_runs_whose_hidden_states_are_kept_on_the_cpu(rehearse, caplog, no_room_is_kept):
    # All of the model fits (85 kB), so that no hook of accelerate moves what enters a block; a quarter of what is free
    # is less than 30 * 24 * 32 float16 numbers.
    with caplog.at_level("INFO", logger="lib"):
        rehearse("--prune_method wanda --sparsity_ratio 0.5 --nsamples 30", free=150_000)
    assert "are kept in the CPU's memory: the GPU has little room" in caplog.text


@pytest.mark.usefixtures("few_tasks")
def test_zero_shot(rehearse):
    tasks = f"--eval_zero_shot --include_path {ROOT}/data/tasks --tasks capital_cities --limit 2 --eval_batch_size 4"
    record = rehearse(f"--eval_wikitext false {tasks}")
    assert 0 <= record["zero_shot"]["means"]["acc"] <= 1


# ------------------------------------------------------------------------------------------ LoRA, image classifiers


def test_lora_is_evaluated_and_merged(tmp_path, monkeypatch, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data[weight.data.abs() < weight.data.abs().median()] = 0
    model.save_pretrained("pruned")
    tiny_tokenizer.save_pretrained("pruned")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained("adapter")
    Path("text.txt").write_text(tiny_sentences(20, seed=2))
    flags = "--model pruned --dataset text.txt --ctx_length 24 --eval_windows 2".split()
    adapter = ["--lora_weights", "adapter"]
    with pretend_cuda() as cuda:
        assert evaluate_ppl.main([*flags, "--result_dir", "alone"]) == 0
        assert evaluate_ppl.main([*flags, *adapter, "--result_dir", "beside"]) == 0
        assert merge.main([*flags, *adapter, "--save", "merged"]) == 0
        assert cuda.operations > 300
    assert evaluate_ppl.main([*flags, *adapter, "--dtype", "float16", "--result_dir", "here"]) == 0
    records = [json.loads(Path(name, "perplexity.json").read_text()) for name in ("alone", "beside", "here")]
    alone, beside, here = (record["perplexity"] for record in records)
    assert alone != beside == pytest.approx(here, rel=NEAR["perplexity"])
    weights, before = (saved_tensors(tmp_path / folder) for folder in ("merged", "pruned"))
    for name in before:
        if "proj" in name:
            assert (weights[name] == 0).sum() == pytest.approx((before[name] == 0).sum(), abs=3), name
            assert not weights[name][before[name] == 0].any()


IMAGE_RUNS = {
    "vit, propagated": "--prune_metric sparsegpt_owl --sparsity 0.5 --propagate pruned",
    "vit, by price": "--prune_metric wanda_price --sparsity 0.5 --price_steps 2 --nsamples 24 --published_calibration",
    "convnext_1x1": "--prune_metric sparsegpt_dlp --sparsity 0.5",
    "convnext": "--prune_metric wanda_ww --sparsity 0.5 --hidden_device cpu",
    "vit, in half precision": "--prune_metric magnitude --sparsity 0.5 --use_amp",
}


@pytest.mark.parametrize("case", fast(IMAGE_RUNS, 3))
def test_image_classifiers(case, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for name in ("one", "two"):  # noise in two classes
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "images" / name / f"{i}.png")
    model = TINY[case.split(",")[0]]()
    model.reset_classifier(2)
    save_image_model(model, 8, tmp_path / "model")
    flags = "--model ../model --data_set image_folder --data_path ../images --eval_data_path ../images --nsamples 10"
    flags += f" --batch_size 4 --num_workers 0 --save_dir save {IMAGE_RUNS[case]}"

    def run(place: str, flags: str) -> dict:
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)  # each with a metric cache of its own
        assert image_main.main(flags.split()) == 0
        (path,) = Path("save").glob("run_*.json")
        return json.loads(path.read_text())

    with pretend_cuda() as cuda:
        there = run("there", flags)
        assert cuda.operations > 100
    here = run("here", flags.replace("--use_amp", ""))  # which casts nothing on the pretend device
    assert there["device"] == ["pretend"] and there["accuracy"] == here["accuracy"]
    assert there["sparsity"] == pytest.approx(here["sparsity"], abs=1e-3)
