"""Rehearsal for CUDA: what the pretend device refuses, and whole runs on it, compared with the same runs on the CPU."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, across, fast, saved_tensors, tiny_llama, tiny_sentences
from peft import LoraConfig, get_peft_model
from PIL import Image
from pretend_cuda import FREE, CudaTensor, DeviceMix, pretend_cuda
from safetensors.torch import load_file
from test_image_models import TINY
from torch import nn
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

sys.path.insert(0, str(ROOT / "scripts"))
import compare_allocations
import esd_report
import sweep

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
    "sum": lambda here, there: there + here,
    "product": lambda here, there: here @ there.T,
    "in place": lambda here, there: there.add_(here),
    "in place on the CPU": lambda here, there: here.mul_(there),
    "comparison": lambda here, there: torch.equal(there, here),
    "where": lambda here, there: torch.where(here > 0, there, 0),
    "stack": lambda here, there: torch.stack([there, here]),
    "out": lambda here, there: torch.mul(there, 2, out=here),
    "mask": lambda here, there: there.masked_fill(here > 0, 0),
    "linear": lambda here, there: nn.functional.linear(there, here),
    "values at indices": lambda here, there: there.__setitem__(there > 0, here[here > 0]),
    "gather": lambda here, there: there.gather(1, (here > 0).long()),
    "indices of the device into a CPU tensor": lambda here, there: here[(there > 9).long()],
}
# As they are made without a thought of the device.
CARELESS = {
    "from_numpy": lambda there: there * torch.from_numpy(np.ones(4, np.float32)),
    "arange": lambda there: there[0] - torch.arange(4),
    "tensor": lambda there: torch.searchsorted(there[0], torch.tensor([1.0])),
    "randn": lambda there: torch.stack([there, torch.randn(3, 4)]),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
def test_devices_do_not_mix(operation, cuda):
    with pytest.raises(DeviceMix, match="Expected all tensors to be on the same device, but aten.*cuda:0"):
        operation(numbers(3, 4), numbers(3, 4).to("cuda"))
    for device in ("cpu", "cuda"):  # nothing else is wrong with it
        operation(numbers(3, 4).to(device), numbers(3, 4).to(device))


@pytest.mark.parametrize("operation", CARELESS.values(), ids=CARELESS)
def test_what_forgets_the_device_is_found(operation, cuda):
    operation(numbers(3, 4))
    with pytest.raises(DeviceMix):
        operation(numbers(3, 4).to("cuda"))


def test_numbers_and_indices_may_come_from_the_cpu(cuda):
    here, there = numbers(3, 4), numbers(3, 4).to("cuda")
    index, mask = torch.tensor([2, 0]), here > 0
    for got, expected in [
        (there * torch.tensor(2.0), here * 2),
        (there + np.float32(1), here + 1),
        (there[index], here[index]),
        (there[:, index], here[:, index]),
        (there[mask], here[mask]),
    ]:
        assert got.device == there.device and torch.equal(got.cpu(), expected)
    there[index] = 7.0
    there[1] = here[0]  # a copy
    assert torch.equal(there.cpu(), torch.stack([torch.full((4,), 7.0), here[0], torch.full((4,), 7.0)]))


def test_numpy_reads_no_tensor_of_the_device(cuda):
    there = numbers(3).to("cuda")
    for read in (there.numpy, lambda: np.asarray(there), lambda: np.sqrt(there), lambda: np.array([there, there])):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read()
    assert there.cpu().numpy().tolist() == there.tolist() == numbers(3).tolist()


def test_nothing_is_asked_of_the_driver_before_it_is_initialised(cuda):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    torch.cuda.empty_cache()
    assert torch.cuda.max_memory_allocated(0) == 0  # these two see to it themselves
    with pytest.raises(RuntimeError, match="did you call init"):
        torch.cuda.reset_peak_memory_stats(0)
    assert not torch.cuda.is_initialized() and not cuda.initialized
    torch.zeros(1, device="cuda")
    assert torch.cuda.is_initialized()
    torch.cuda.reset_peak_memory_stats(0)
    with pretend_cuda():  # a new program
        assert not torch.cuda.is_initialized()
        torch.cuda.synchronize()
        assert torch.cuda.is_initialized()


def test_moves_are_copies_and_staying_is_not(cuda):
    here = numbers(3, 4)
    there = here.to("cuda", non_blocking=True)
    assert there.device == torch.device("cuda:0") and there.is_cuda and not there.is_cpu and not here.is_cuda
    assert there.type() == "torch.cuda.FloatTensor" and there.dtype == torch.float32
    back = there.cpu()
    here[0] = there[1] = 0  # neither is seen by the others
    assert torch.equal(back, numbers(3, 4))
    assert there.to("cuda") is there.cuda() is there.float() is there.to(there) is there
    assert there.to("cuda", copy=True) is not there
    assert back.to(there.half()).dtype == torch.float16 and back.to(there.half()).is_cuda
    assert type(there.to("cpu", torch.bfloat16)) is torch.Tensor and there.to(back).device.type == "cpu"
    assert back.pin_memory().to("cuda", non_blocking=True).is_cuda
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        there.pin_memory()
    assert here.copy_(there) is here and torch.equal(here, there.cpu()) and type(here) is torch.Tensor
    assert there.copy_(back) is there and torch.equal(there.cpu(), back)


FACTORIES = {
    "zeros": lambda **where: torch.zeros(2, **where),
    "tensor": lambda **where: torch.tensor([1.0, 2.0], **where),
    "as_tensor": lambda **where: torch.as_tensor([1.0, 2.0], **where),
    "arange": lambda **where: torch.arange(2, **where),
    "linspace": lambda **where: torch.linspace(0, 1, 2, **where),
    "eye": lambda **where: torch.eye(2, **where),
    "randn": lambda **where: torch.randn(2, **where),
    "empty": lambda **where: torch.empty(2, **where),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_new_tensors_are_where_they_were_asked_for(make, cuda):
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 0)):
        assert type(made := make(device=device)) is CudaTensor and made.device == torch.device("cuda:0")
    # transformers stands in for torch.linspace while it loads: what torch has by then listed as factories may lack it.
    torch.utils._device._device_constructors.cache_clear()
    with torch.device("cuda"):
        assert make().is_cuda
    assert type(make()) is torch.Tensor and make(device="meta").is_meta
    like = make(device="cuda")
    assert like.new_zeros(3).is_cuda and torch.ones_like(like).is_cuda and like.new_tensor([1]).is_cuda
    assert type(torch.zeros_like(like, device="cpu")) is torch.Tensor


def test_a_generator_of_the_cpu_draws_nothing_on_the_device(cuda):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())


def test_modules_move_with_their_tied_weights(cuda):
    model = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    model["two"].weight = model["one"].weight
    names = list(model.state_dict())
    weight, before = model["one"].weight, model["one"].weight.detach().clone()
    assert model.to("cuda").half() is model
    assert model["two"].weight is model["one"].weight is weight and isinstance(weight, nn.Parameter)
    assert all(tensor.is_cuda for tensor in model.state_dict().values()) and list(model.state_dict()) == names
    assert weight.dtype == torch.float16 and torch.equal(weight.cpu(), before.half())
    with pytest.raises(DeviceMix):
        model["one"](torch.ones(1, 4).half())
    twin = copy.deepcopy(model)
    twin["one"].weight.data.zero_()
    assert torch.equal(weight.cpu(), before.half()) and not twin["two"].weight.cpu().any()
    weight.data = torch.ones(4, 4, device="cuda", dtype=torch.float16)
    weight.data += 1
    assert model["two"](torch.ones(1, 4, device="cuda").half() * 0 + 1).cpu().dtype == torch.float16
    assert weight.cpu().unique().tolist() == [2]
    assert type(model.cpu()["one"].weight) is nn.Parameter


def test_gradients_are_on_the_device(cuda):
    weight = nn.Parameter(numbers(3, 4).to("cuda"))
    (weight.square() * 0.5).sum().backward()
    assert weight.grad.is_cuda and torch.equal(weight.grad.cpu(), numbers(3, 4))


def test_shapes_that_change_in_place_are_refused_rather_than_wrong(cuda):
    with pytest.raises(NotImplementedError, match="changes a shape in place"):
        numbers(3, 4).to("cuda").t_()


# ------------------------------------------------------------------------------------------------------ whole runs


def parse(path: Path) -> list[dict[str, str]]:
    header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture
def runs(tmp_path, monkeypatch, tiny_folder, tiny_text, other_text, capsys):
    """Return a function of flags: the record and the layers of a run of main.py on the tiny model in ``place``."""

    def run(flags: str, place: str, model: Path = tiny_folder) -> tuple[dict, list[dict]]:
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        evaluated = other_text if "_price" in flags else tiny_text  # a search must not see what it is measured on
        words = ["--model", str(model), "--calib_data", str(tiny_text), "--eval_data", str(evaluated), "--save", "save"]
        words += ["--seqlen", "24", "--nsamples", "3", "--eval_windows", "2", *flags.split()]
        assert main.main(words) == 0, capsys.readouterr().err
        record = [json.loads(path.read_text()) for path in Path("save").glob("run_*.json")]
        layers = [row for path in Path("save").glob("layers_*.tsv") for row in parse(path)]
        return record[0] if record else {}, layers

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
        assert (there["perplexity"] is None) == (here["perplexity"] is None)
        if here["perplexity"] is not None:
            assert there["perplexity"] == pytest.approx(here["perplexity"], rel=NEAR["perplexity"])
        assert there["sparsity"] == pytest.approx(here["sparsity"], abs=NEAR["sparsity"])
        for one, other in zip(layers, expected, strict=True):
            for column in ("planned_ratio", "sparsity"):
                assert float(one[column]) == pytest.approx(float(other[column]), abs=NEAR[column]), one["name"]
        return there

    return both


@pytest.mark.usefixtures("few_windows")
@pytest.mark.parametrize(("pruner", "suffix"), across(PRUNERS, ALLOCATIONS))
def test_every_method(pruner, suffix, rehearse):
    # every step, and every iteration, does the same
    few = "--price_steps 2 " * (suffix == "price") + "--pruner_iterations 3 --refit 2" * (pruner == "alps")
    rehearse(f"--prune_method {pruner}{suffix and '_'}{suffix} --sparsity_ratio 0.5 {few}")


OTHER_RUNS = {
    "dense": "",
    "float32": "--prune_method sparsegpt --sparsity_ratio 0.5 --dtype float32",
    "2:4 magnitude": "--prune_method magnitude --sparsity_type 2:4",
    "2:4 wanda": "--prune_method wanda --sparsity_type 2:4",
    "2:4 sparsegpt": "--prune_method sparsegpt --sparsity_type 2:4",
    "mixed N:M": "--prune_method sparsegpt_ww --sparsity_type 4:8",
    "variant": "--prune_method wanda --sparsity_ratio 0.5 --use_variant",
    "layer-wise": "--prune_method wanda_ww --sparsity_ratio 0.5 --mapping_type layer_wise",
    "FARMS": "--prune_method magnitude_ww --sparsity_ratio 0.5 --farms --farms_rows 12 --farms_steps 3",
    "no evaluation": "--prune_method wanda --sparsity_ratio 0.5 --eval_wikitext false",
    "refit": "--prune_method magnitude --sparsity_ratio 0.5 --refit 3 --damping 0.2",
    "refit of Wanda": "--prune_method wanda --sparsity_type 2:4 --refit 3",
    "more iterations": "--prune_method alps --sparsity_ratio 0.5 --pruner_iterations 20 --refit 0",
    "dense statistics": "--prune_method wanda --sparsity_ratio 0.5 --statistics dense",
    "bfloat16 passes, float32": "--prune_method sparsegpt --sparsity_ratio 0.5 --calib_dtype bfloat16 --dtype float32",
    "hidden states on the CPU": "--prune_method sparsegpt --sparsity_ratio 0.5 --hidden_states cpu",
    "hidden states on disk": "--prune_method wanda_owl --sparsity_ratio 0.5 --hidden_states disk",
    "streamed": "--prune_method sparsegpt_ww --sparsity_ratio 0.5 --stream always --save_model kept",
    "streamed 2:4": "--prune_method alps --sparsity_type 2:4 --stream always --save_model kept",
    "streamed, dense": "--stream always",
    "refreshed prices": "--prune_method wanda_price --sparsity_ratio 0.5 --price_start er --price_refresh 1",
    "epsilon auto": "--prune_method wanda_ww --sparsity_ratio 0.9 --epsilon auto --eval_wikitext false",
}


@pytest.mark.usefixtures("few_windows")
@pytest.mark.parametrize("flags", fast(OTHER_RUNS.values(), len(OTHER_RUNS) - 2), ids=OTHER_RUNS)
def test_other_runs(flags, rehearse, runs):
    if "float32" not in flags:
        rehearse(flags)
        return
    with pretend_cuda():
        there, _ = runs(flags, "there")
    assert there["model"]["dtype"] == "float32" and there["device"] == ["pretend"]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric(metric, runs):
    with pretend_cuda() as cuda:
        runs(f"--metrics_only --ww_metric {metric} --ww_metric_cache ../there", "work")
    assert cuda.operations > 20
    runs(f"--metrics_only --ww_metric {metric} --ww_metric_cache ../here --dtype float16", "work")
    assert Path(f"../there/{metric}.npy").read_bytes() == Path(f"../here/{metric}.npy").read_bytes(), "both LAPACK's"


@pytest.mark.parametrize("flags", ["", "--stream always", "--farms --farms_rows 12 --farms_steps 2"])
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


@pytest.fixture(scope="module")
def one_block(tmp_path_factory, tiny_tokenizer) -> Path:
    """Return the folder of a model of one block, for what takes long."""
    folder = tmp_path_factory.mktemp("models") / "one-block"
    model = tiny_llama()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("metric", WEIGHTWATCHER)
@pytest.mark.slow
def test_metrics_of_weightwatcher(metric, runs, one_block):
    with pretend_cuda() as cuda:
        runs(f"--metrics_only --ww_metric {metric} --ww_metric_cache cache", "work", model=one_block)
    values = np.load(f"cache/{metric}.npy")
    assert cuda.operations and values.shape == (7,) and np.isfinite(values).all()


def test_a_saved_model_and_plan_can_be_used_again(runs, tmp_path):
    plan, kept = tmp_path / "plan.json", tmp_path / "kept"
    with pretend_cuda():
        first, layers = runs(
            f"--prune_method wanda_ww --sparsity_ratio 0.5 --save_plan {plan} --save_model {kept}", "first"
        )
        again, _ = runs(f"--prune_method wanda --plan {plan}", "planned")
        saved, _ = runs("", "saved", model=kept / "wanda_ww_0.5")
    assert again["perplexity"] == first["perplexity"] == saved["perplexity"]
    weights = saved_tensors(kept / "wanda_ww_0.5")
    assert all(type(weight) is torch.Tensor and weight.dtype == torch.float16 for weight in weights.values())
    for row in layers:
        zeros = (weights[f"{row['name']}.weight"] == 0).double().mean().item()
        assert float(row["sparsity"]) == pytest.approx(zeros, abs=1e-6)


TIGHT = 80_000  # bytes: room for two blocks of three


def test_a_tight_device_leaves_a_block_on_the_cpu(tiny_folder):
    with pretend_cuda(TIGHT):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16, device_map="auto")
    places = {name: model.hf_device_map[f"model.layers.{name}"] for name in range(3)}
    assert places == {0: 0, 1: 0, 2: "cpu"}


def test_a_device_that_is_too_small_for_anything_is_an_error(tiny_folder, tiny_text, capsys):
    with pretend_cuda(TIGHT):  # the work alone is reckoned to take a gigabyte
        assert main.main(["--model", str(tiny_folder), "--eval_data", str(tiny_text), "--seqlen", "32"]) == 2
    assert "no GPU has room for a part of it beside the work" in capsys.readouterr().err


@pytest.fixture
def no_room_is_kept(monkeypatch):
    """Let the weights take all of the device: what is kept for the work is a gigabyte and more."""
    monkeypatch.setattr("lib.models.memory.working_set", lambda *_: 0)


@pytest.mark.parametrize("method", fast(["wanda_owl", "sparsegpt_er", "magnitude_global", "wanda_ww"], 2))
def test_runs_with_a_block_on_the_cpu(method, rehearse, tmp_path, no_room_is_kept):
    # With so many samples there is no room for their hidden states on the device either.
    flags = f"--prune_method {method} --sparsity_ratio 0.5 --nsamples 20 --save_model {tmp_path}/kept"
    rehearse(flags, free=TIGHT)


@pytest.mark.parametrize("method", fast(["sparsegpt_owl", "wanda"], 1))
def test_runs_whose_hidden_states_are_kept_on_the_cpu(method, rehearse, caplog, no_room_is_kept):
    # All of the model fits (85 kB), so that no hook of accelerate moves what enters a block; a quarter of what is free
    # is less than 30 * 24 * 32 float16 numbers.
    with caplog.at_level("INFO", logger="lib"):
        rehearse(f"--prune_method {method} --sparsity_ratio 0.5 --nsamples 30", free=150_000)
    assert "kept in the memory of the CPU" in caplog.text


def test_zero_shot(rehearse):
    tasks = f"--eval_zero_shot --include_path {ROOT}/data/tasks --tasks capital_cities --limit 2 --eval_batch_size 4"
    record = rehearse(f"--eval_wikitext false {tasks}")
    assert 0 <= record["zero_shot"]["means"]["acc"] <= 1


@pytest.fixture
def words(tiny_folder, tiny_text) -> list[str]:
    """Return flags of main.py for the scripts that hand them on."""
    texts = ["--calib_data", str(tiny_text), "--eval_data", str(tiny_text), "--eval_windows", "2"]
    return ["--model", str(tiny_folder), *texts, "--seqlen", "24", "--nsamples", "3"]


def test_sweep(cuda, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = "dense,wanda,sparsegpt_ww"
    assert sweep.main([*words, "--methods", methods, "--sparsities", "0.5,0.6", "--save", "out"]) == 0
    records = [json.loads(path.read_text()) for path in Path("out").rglob("run_*.json")]
    assert len(records) == 5 and all(record["device"] == ["pretend"] for record in records)


def test_comparison_of_allocations(cuda, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--pruner", "wanda", "--allocations", ",ww,owl", "--sparsities", "0.5", "--epsilons", "0.2"]
    assert compare_allocations.main([*words, *flags, "--save", "out"]) == 0
    assert Path("out/allocations.md").read_text().count("\n| wanda ") == 3


def test_esd_report(cuda, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert esd_report.main(["--model", str(tiny_folder), "--save", "report"]) == 0
    assert cuda.operations and Path("report/spectra.png").is_file()


# ------------------------------------------------------------------------------------------ LoRA, image classifiers


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tiny_tokenizer) -> Path:
    """Return a folder with a pruned model and an adapter that changes what it says."""
    folder = tmp_path_factory.mktemp("adapted")
    model = tiny_llama()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data[weight.data.abs() < weight.data.abs().median()] = 0
    model.save_pretrained(folder / "pruned")
    tiny_tokenizer.save_pretrained(folder / "pruned")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    (folder / "text.txt").write_text(tiny_sentences(20, seed=2))
    return folder


def test_lora_is_evaluated_and_merged(adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(adapted / "pruned"), "--dataset", str(adapted / "text.txt"), "--ctx_length", "24"]
    flags += ["--eval_windows", "2"]
    adapter = ["--lora_weights", str(adapted / "adapter")]
    with pretend_cuda() as cuda:
        assert evaluate_ppl.main([*flags, "--result_dir", "alone"]) == 0
        assert evaluate_ppl.main([*flags, *adapter, "--result_dir", "beside"]) == 0
        assert merge.main([*flags, *adapter, "--save", "merged"]) == 0
        assert cuda.operations > 300
    assert evaluate_ppl.main([*flags, *adapter, "--dtype", "float16", "--result_dir", "here"]) == 0
    alone, beside, here = (
        json.loads(Path(name, "perplexity.json").read_text())["perplexity"] for name in ("alone", "beside", "here")
    )
    assert alone != beside == pytest.approx(here, rel=NEAR["perplexity"])
    weights, before = (load_file(f"{folder}/model.safetensors") for folder in ("merged", adapted / "pruned"))
    for name in before:
        if "proj" in name:
            assert (weights[name] == 0).sum() == pytest.approx((before[name] == 0).sum(), abs=3), name
            assert not weights[name][before[name] == 0].any()


IMAGE_RUNS = {
    "dense": "",
    "vit": "--prune_metric wanda_ww --sparsity 0.5",
    "vit sparsegpt": "--prune_metric sparsegpt_owl --sparsity 0.5 --propagate pruned",
    "vit, hidden states on the CPU": "--prune_metric wanda --sparsity 0.5 --hidden_device cpu",
    "vit in half precision": "--prune_metric magnitude --sparsity 0.5 --use_amp",
    "convnext": "--prune_metric wanda_ww --sparsity 0.5",
    "vit, by price": "--prune_metric wanda_price --sparsity 0.5 --price_steps 2 --nsamples 24 --published_calibration",
    "convnext_1x1": "--prune_metric sparsegpt_dlp --sparsity 0.5",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder of noise in two classes, twenty images each."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for name in ("one", "two"):
        (root / name).mkdir()
        for i in range(20):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("case", fast(IMAGE_RUNS, 4))
def test_image_classifiers(case, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = case.split()[0].strip(",")
    model = TINY["vit" if name == "dense" else name]()
    model.reset_classifier(2)
    save_image_model(model, 8, tmp_path / "model")
    flags = f"--model model --data_set image_folder --data_path {images} --eval_data_path {images} --nsamples 10"
    flags += f" --batch_size 4 --num_workers 0 {IMAGE_RUNS[case]}"

    def cache(folder: str) -> list[str]:  # refused where nothing is measured
        return ["--metric_cache", folder] if "_ww" in flags else []

    with pretend_cuda() as cuda:
        assert image_main.main([*flags.split(), "--save_dir", "there", *cache("one")]) == 0
        assert cuda.operations > 100
    plain = flags.replace("--use_amp", "")  # which casts nothing on the pretend device
    assert image_main.main([*plain.split(), "--save_dir", "here", *cache("two")]) == 0
    (there,), (here,) = (
        [json.loads(path.read_text()) for path in Path(folder).glob("run_*.json")] for folder in ("there", "here")
    )
    assert there["device"] == ["pretend"] and there["accuracy"] == here["accuracy"]
    assert there["sparsity"] == pytest.approx(here["sparsity"], abs=1e-3)
