"""Whole runs: main.py on a tiny model and on SmolLM2, and SmolLM2 against the published code's figures."""

import hashlib
import json
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, across, fast, on_cpu, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import main
from lib.allocation.formulas import ALLOCATIONS, heavy_tailed, uniform
from lib.calibration.hidden import enter_blocks
from lib.calibration.texts import evaluation_windows
from lib.cli.settings import METHODS
from lib.core.errors import UserError
from lib.evaluation import perplexity as perplexity_module
from lib.evaluation.perplexity import perplexity
from lib.models.layers import prunable_layers
from lib.models.weights import Weights, weights_of
from lib.pruning.plan import SparsityPlan
from lib.pruning.pruners import PRUNERS
from lib.pruning.walk import walk
from lib.run import pipeline
from lib.spectra.cache import Measurement
from lib.spectra.measure import measure
from lib.spectra.spectrum import spectrum
from lib.spectra.tail import METRICS

# ---------------------------------------------------------------------------------------- the published code's figures

# Rounding moves Wanda's masks from block to block and SparseGPT's more so: two independent implementations differ by
# this much. Magnitude knows nothing of the input, and its masks are exact; what remains is the loss's rounding.
TOLERANCE = {"dense": 1e-4, "magnitude": 1e-3, "wanda": 0.02, "sparsegpt": 0.08}


@pytest.fixture
def windows(golden):
    return {
        split: torch.from_numpy(golden("windows.npz")[split].astype(np.int64))
        for split in ("calibration", "evaluation")
    }


def zero_mask_hash(weight: torch.Tensor) -> str:
    return hashlib.sha256((weight == 0).to(torch.uint8).numpy().tobytes()).hexdigest()


def check_masks(weights: Weights, expected: dict, exact: float) -> None:
    """Hold the zeros to the published ones: by block within ``exact``, and to the bit where their hashes are known."""
    layers, zeros = weights.layers, weights.zeros()
    total = [sum(layer.size for layer in layers if layer.block == b) for b in range(30)]
    per_block = [sum(zeros[layer.name] for layer in layers if layer.block == b) / total[b] for b in range(30)]
    assert per_block == pytest.approx(expected["per_block_sparsity"], abs=exact)
    assert weights.sparsity() == pytest.approx(expected["sparsity"], abs=min(exact, 1e-3))
    hashes = expected.get("zero_mask_sha256", {})  # of the first six blocks
    for name, weight in weights.snapshot().items() if hashes else ():
        short = name.removeprefix("model.layers.")
        if short in hashes:
            assert zero_mask_hash(weight) == hashes[short], short


def test_published_masks_of_magnitude(smollm2, golden):
    weights = weights_of(smollm2)
    walk(weights, SparsityPlan(0.5, uniform(weights.layers, 0.5)), PRUNERS["magnitude"], None)
    check_masks(weights, golden("pruning.json")["magnitude_0.5"], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "method", "ratio", "nm"),
    [
        ("dense_0", "dense", 0.0, None),
        ("magnitude_0.5", "magnitude", 0.5, None),
        ("wanda_0.5", "wanda", 0.5, None),
        ("wanda_0.5_2of4", "wanda", 0.5, (2, 4)),
        ("sparsegpt_0.5", "sparsegpt", 0.5, None),
        ("sparsegpt_0.5_2of4", "sparsegpt", 0.5, (2, 4)),
        ("magnitude_ww_0.5_eps0.2", "magnitude_ww", 0.5, None),
        ("wanda_ww_0.7_eps0.2", "wanda_ww", 0.7, None),
        ("sparsegpt_ww_0.7_eps0.2", "sparsegpt_ww", 0.7, None),
    ],
)
def test_published_perplexity(key, method, ratio, nm, smollm2_source, windows, golden):
    expected, name = golden("pruning.json")[key], method.removesuffix("_ww")
    # Rounding grows from block to block, at 0.7 more than at 0.5. With weights changed in their last bit, SparseGPT's
    # figure at 0.7 is 8.5, 5.7, 6.5 and 1.7 % below the published one, and that of the published loop itself
    # (scripts/bench/plain.py, the same processor) 9.3, 3.9 and 1.3 %. The mean of four draws is held to it.
    ratios, found = published_ratios(method, ratio, weights_of(on_cpu(smollm2_source))), []
    for draw in range(4 if (name, ratio) == ("sparsegpt", 0.7) else 1):
        weights = weights_of(on_cpu(smollm2_source))
        change_last_bits(weights.model, draw)
        if method != "dense":
            inputs = enter_blocks(weights, windows["calibration"]) if PRUNERS[name].statistic else None
            walk(weights, SparsityPlan(ratio, ratios, nm), PRUNERS[name], inputs)
        # Where the sparsity is not by the published ratios to the last weight: ``_ww``, by two alphas that may jump.
        exact = 1e-9 if method in ("dense", "magnitude") else 2e-5 if not method.endswith("_ww") else 2e-2
        check_masks(weights, expected, exact)
        found.append(perplexity(weights.model, windows["evaluation"]))
    # Near-ties in a group of four, decided by the rounding of the processor, also change Wanda's figure with 2:4: it is
    # 1.5 % above the published one with AVX2 and 2.3 % with AVX-512, the same code and seed.
    within = 0.03 if name == "wanda" and (ratio == 0.7 or nm) else TOLERANCE[name]
    if method == "magnitude_ww":
        within = 0.02  # two of the 210 alphas jump with the SVD's rounding, and their blocks' ratios with them
    got = sum(found) / len(found)
    print(f"{key}: {found}, published {expected['perplexity']:.4f}, {got / expected['perplexity'] - 1:+.3%}")
    assert got == pytest.approx(expected["perplexity"], rel=within)


def published_ratios(method: str, ratio: float, weights: Weights) -> object:
    if not method.endswith("_ww"):
        return uniform(weights.layers, ratio)
    values = measure(Measurement("alpha_peak"), weights).values
    return heavy_tailed(weights.layers, ratio, values=values, epsilon=0.2, mapping_type="block_wise")


def change_last_bits(model: torch.nn.Module, seed: int) -> None:
    """Multiply every matrix in the blocks by 1 + 6e-8 z, about half of float32's last bit; seed 0 changes nothing."""
    if seed == 0:
        return
    draw = torch.Generator().manual_seed(seed)
    for p in model.model.layers.parameters():
        if p.ndim == 2:
            p.data.mul_(1 + 6e-8 * torch.randn(p.shape, generator=draw))


# ------------------------------------------------------------------------------------------------- main.py on SmolLM2


def table_of(path: Path) -> list[dict[str, str]]:
    header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.slow
def test_main_on_smollm2(tmp_path, smollm2_source):
    save, kept, cache = tmp_path / "save", tmp_path / "kept", tmp_path / "cache"
    flags = "--model smollm2-135m --prune_method wanda_ww --sparsity_ratio 0.5 --epsilon 0.2 --calib_data wiki_leads "
    flags += f"--eval_data wiki_leads --seqlen 128 --nsamples 4 --eval_windows 8 --cache_dir {ROOT / 'llm_weights'} "
    flags += f"--save {save} --save_model {kept} --ww_metric_cache {cache}"
    assert main.main(flags.split()) == 0
    run = "wanda_ww_sparsity_0.5"
    assert sorted(p.name for p in save.iterdir()) == [f"layers_{run}.tsv", f"perplexity_{run}.txt", f"run_{run}.json"]
    record = json.loads((save / f"run_{run}.json").read_text())
    rows = table_of(save / f"layers_{run}.tsv")

    # The record.
    assert record["target_sparsity"] == 0.5 and record["sparsity"] == pytest.approx(0.5, abs=1 / 576)
    assert record["dense_zeros"] == pytest.approx(0.000315377, abs=1e-9)
    assert record["calibration"] == {"text": "wiki_leads", "windows": 4, "seqlen": 128}
    assert record["evaluation"] == {"text": "wiki_leads", "windows": 8, "seqlen": 128}
    assert set(record["flags"]) >= {a.dest for a in main.PARSER._actions} - {"help"}
    assert record["flags"]["seed"] == 0 and record["flags"]["epsilon"] == 0.2
    assert all(record["versions"][name] == version(name) for name in ("torch", "transformers"))
    assert record["model"]["name"] == "smollm2-135m" and record["model"]["dtype"] == "float32"
    assert {"prepare", "load", "measure", "allocate", "prune", "save", "evaluate"} <= set(record["stages"])
    assert all(stage["seconds"] >= 0 and stage["peak_rss_mb"] > 100 for stage in record["stages"].values())

    # The table of layers, and what was written to the folder.
    model = AutoModelForCausalLM.from_pretrained(kept / "wanda_ww_0.5", dtype=torch.float32)
    layers = prunable_layers(model)
    assert [r["name"] for r in rows] == [layer.name for layer in layers] and len(rows) == 210
    assert [r["shape"] for r in rows] == ["x".join(map(str, layer.shape)) for layer in layers]
    assert all(abs(float(r["planned_ratio"]) - float(r["sparsity"])) <= 1 / 576 for r in rows)

    # The metric and the plan behind it.
    dense = AutoModelForCausalLM.from_pretrained(smollm2_source.path, dtype=torch.float32)
    some = [dense.get_submodule(layer.name).weight for layer in layers[:21]]
    kept_values = np.load(cache / "alpha_peak.npy")
    # The same SVD, in one thread as there: but for the peak's bin, rounding is all that may differ.
    assert kept_values[:21] == pytest.approx([METRICS["alpha_peak"](spectrum(w)) for w in some], rel=1e-5)
    assert [float(r["metric"]) for r in rows] == pytest.approx(kept_values.tolist(), abs=1e-6)
    values = dict(zip([x.name for x in layers], kept_values, strict=True))
    plan = heavy_tailed(layers, 0.5, values=values, epsilon=0.2, mapping_type="block_wise")
    assert [float(r["planned_ratio"]) for r in rows] == pytest.approx(list(plan.values()), abs=1e-6)

    # The folder is a plain model that evaluates to the same perplexity.
    tokenizer = AutoTokenizer.from_pretrained(kept / "wanda_ww_0.5")
    windows = evaluation_windows("wiki_leads", tokenizer, 128, 8)
    assert perplexity(model.eval(), windows) == pytest.approx(record["perplexity"], rel=1e-6)
    assert record["perplexity"] > 1.05 * perplexity(dense.eval(), windows)


# -------------------------------------------------------------------------------------------- main.py on a tiny model


@pytest.fixture
def tiny_run(tmp_path, monkeypatch, tiny_folder, tiny_text, capsys):
    """Return a function of more flags: it runs main.py on the tiny model and returns the record."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, seqlen: int = 32) -> dict:
        for path in Path("save").glob("*"):
            path.unlink()
        flags = ["--model", str(tiny_folder), "--calib_data", str(tiny_text), "--eval_data", str(tiny_text)]
        flags += ["--seqlen", str(seqlen), "--nsamples", "5", "--save", "save"]
        flags += ["--eval_windows", "8", *text.split()]
        assert main.main(flags) == 0, capsys.readouterr().err
        (path,) = Path("save").glob("run_*.json")
        return json.loads(path.read_text())

    return run


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return weights_of(model).snapshot()


@pytest.fixture(scope="module")
def method_run(tmp_path_factory, tiny_folder, tiny_text, other_text):
    """Return a function of a method: the folder and the record of its run at 0.5 on the tiny model."""
    folder = tmp_path_factory.mktemp("methods")
    flags = f"--model {tiny_folder} --calib_data {tiny_text} --eval_data {other_text} --seqlen 32 --nsamples 3 "
    flags += f"--eval_windows 2 --sparsity_ratio 0.5 --save {folder / 'save'} --save_model {folder / 'kept'} "

    @cache
    def run(method: str) -> tuple[Path, dict]:
        more = {"ww": f"--ww_metric_cache {folder / 'cache'}", "price": "--price_steps 2"}
        own = f"{flags} --prune_method {method} {more.get(method.partition('_')[2], '')}"
        assert main.main(own.split()) == 0
        return folder, json.loads((folder / "save" / f"run_{method}_sparsity_0.5.json").read_text())

    return run


@pytest.mark.usefixtures("few_windows")
@pytest.mark.parametrize(("pruner", "suffix"), across(PRUNERS, ALLOCATIONS))
def test_every_method_meets_its_target(pruner, suffix, method_run):
    method = f"{pruner}_{suffix}".removesuffix("_")
    folder, record = method_run(method)
    # Rows of 32 columns: int() takes up to one column of each from an uneven ratio.
    assert record["sparsity"] == pytest.approx(0.5, abs=1 / 32) and record["target_sparsity"] == 0.5
    weights = saved_weights(folder / "kept" / f"{method}_0.5")
    total = sum(w.numel() for w in weights.values())
    assert sum((w == 0).sum().item() for w in weights.values()) / total == record["sparsity"]
    rows = table_of(folder / "save" / f"layers_{method}_sparsity_0.5.tsv")
    assert {r["name"]: float(r["sparsity"]) for r in rows} == pytest.approx(
        {name: (w == 0).double().mean().item() for name, w in weights.items()}, abs=1e-6
    )
    assert all((r["metric"] == "") == (ALLOCATIONS[suffix].wants is None) for r in rows)
    block_wise = {"ww": 3, "owl": 3, "dlp": 3, "atp": 3, "": 1}  # ratios: one per block
    assert len({r["planned_ratio"] for r in rows}) == block_wise.get(suffix, len({r["planned_ratio"] for r in rows}))
    assert record["perplexity"] > 1


def test_method_names_are_the_published_ones():
    published = {"magnitude", "wanda", "sparsegpt", "magnitude_ww", "wanda_ww", "sparsegpt_ww"}
    assert published <= set(METHODS) == {f"{p}_{a}" if a else p for a in ALLOCATIONS for p in PRUNERS}


@pytest.mark.usefixtures("few_windows")
def test_methods_do_different_things(method_run, tiny_run, other_text, request):
    # A mistyped branch would leave one method's result equal to another's, or to the dense one.
    methods = METHODS if request.config.getoption("--slow") else [*PRUNERS, *(f"wanda_{a}" for a in ALLOCATIONS if a)]
    found = {method: method_run(method)[1]["perplexity"] for method in methods}
    found["dense"] = tiny_run(f"--eval_data {other_text} --eval_windows 2")["perplexity"]
    assert len(set(found.values())) == len(found), found


def test_a_run_repeats_itself_and_the_seed_matters(tiny_run):
    flags = "--prune_method sparsegpt_ww --sparsity_ratio 0.6"
    first, again, other = tiny_run(flags), tiny_run(flags), tiny_run(flags + " --seed 1")
    assert first["perplexity"] == again["perplexity"] != other["perplexity"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mapping", ["block_wise", "layer_wise"])
def test_every_metric_and_mapping_steers_the_plan(metric, mapping, tiny_weights):
    flags = "--model m --prune_method magnitude_ww --sparsity_ratio 0.5 --epsilon 0.2"
    asked = settings(f"{flags} --ww_metric {metric} --mapping_type {mapping}")
    values = measure(Measurement(metric), tiny_weights).values
    planned = pipeline.make_plan(asked.task(), tiny_weights.layers, values).ratios
    assert len(set(planned.values())) == (3 if mapping == "block_wise" else 21)
    if mapping == "layer_wise":  # the more of the metric, the more is pruned
        assert sorted(values, key=values.get) == sorted(planned, key=planned.get)


def test_the_metric_is_cached_under_the_models_name_and_read_the_second_time(tiny_run, tiny_folder, monkeypatch):
    flags = "--prune_method magnitude_ww --sparsity_ratio 0.5 --ww_metric entropy --mapping_type layer_wise"
    first = tiny_run(flags)
    assert Path("data", tiny_folder.name, "entropy.npy").is_file()
    monkeypatch.setattr("lib.spectra.measure.spectrum", None)
    assert tiny_run(flags)["perplexity"] == first["perplexity"]
    assert len({r["planned_ratio"] for r in table_of(Path("save/layers_magnitude_ww_sparsity_0.5.tsv"))}) == 21


def test_a_published_cache_is_used_with_one_warning(tiny_run, caplog):
    Path("published").mkdir()
    np.save("published/alpha_peak.npy", np.repeat([2.0, 3.0, 4.0], 7))
    tiny_run("--prune_method magnitude_ww --sparsity_ratio 0.5 --epsilon 0.2 --ww_metric_cache published")
    planned = [float(r["planned_ratio"]) for r in table_of(Path("save/layers_magnitude_ww_sparsity_0.5.tsv"))]
    assert planned == pytest.approx([0.4] * 7 + [0.5] * 7 + [0.6] * 7, abs=1e-6)
    assert caplog.text.count("cannot be checked") == 1


GROUPS = [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("3:16", 0.8125)]


# Every pruner with one pattern; all patterns with --slow.
@pytest.mark.parametrize(
    ("method", "pattern", "target"),
    fast([(p, *GROUPS[(i + k) % 4]) for k in range(4) for i, p in enumerate(PRUNERS)], len(PRUNERS)),
)
def test_groups_are_obeyed(method, pattern, target, tiny_run):
    keep, group = map(int, pattern.split(":"))
    record = tiny_run(f"--prune_method {method} --sparsity_type {pattern} --save_model kept")
    assert record["sparsity"] == record["target_sparsity"] == target
    for name, weight in saved_weights(Path("kept") / f"{method}_{target}").items():
        assert ((weight != 0).view(len(weight), -1, group).sum(2) == keep).all(), name


def test_nm_and_the_ratio_that_it_implies_are_the_same_run():
    flags = "--model m --prune_method wanda --sparsity_type 3:16"
    asked = [settings(flags), settings(f"{flags} --sparsity_ratio 0.8125")]
    described = [(task.method, task.pruner, task.target, task.nm) for task in (each.task() for each in asked)]
    assert described == 2 * [("wanda", PRUNERS["wanda"], 0.8125, (3, 16))]


def test_the_variant_is_another_method(tiny_run):
    plain = tiny_run("--prune_method wanda --sparsity_ratio 0.5")
    variant = tiny_run("--prune_method wanda --sparsity_ratio 0.5 --use_variant")
    assert variant["sparsity"] == pytest.approx(0.5, abs=0.001) and variant["perplexity"] != plain["perplexity"]
    ww = tiny_run("--prune_method wanda_ww --sparsity_ratio 0.5 --use_variant --epsilon 0.2")
    assert ww["sparsity"] == pytest.approx(0.5, abs=0.001)


def test_dense_run(tiny_run):
    record = tiny_run("")
    assert record["sparsity"] == record["dense_zeros"] == 0 and record["target_sparsity"] == 0
    names = sorted(p.name for p in Path("save").iterdir())
    assert names == ["perplexity_dense_sparsity_0.0.txt", "run_dense_sparsity_0.0.json"]
    (row,) = table_of(Path("save/perplexity_dense_sparsity_0.0.txt"))
    assert row["method"] == "dense" and row["actual_sparsity"] == "0.0000"


def test_seqlen_is_capped_at_the_context_with_a_warning(tiny_run, caplog):
    record = tiny_run("--prune_method wanda --sparsity_ratio 0.5", seqlen=2048)
    assert record["calibration"]["seqlen"] == record["evaluation"]["seqlen"] == 128
    assert [r.levelname for r in caplog.records if "2048" in r.getMessage() and "128" in r.getMessage()] == ["WARNING"]


# ------------------------------------------------------------------------------------------- nothing may be lost


@pytest.mark.parametrize(
    ("error", "keep"),
    [
        (UserError(None, None, "no"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (KeyboardInterrupt(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failing_evaluation_leaves_the_model_and_the_layers(error, keep, tiny_run, monkeypatch, capsys, caplog):
    def fail(*_):
        raise error

    monkeypatch.setattr(perplexity_module, "perplexity_by_blocks", fail)
    with pytest.raises(AssertionError):  # of the exit status
        tiny_run(f"--prune_method wanda --sparsity_ratio 0.5{' --save_model kept' if keep else ''}")
    names = sorted(p.name for p in Path("save").iterdir())
    assert names == ["layers_wanda_sparsity_0.5.tsv", "run_wanda_sparsity_0.5.json"]
    record = json.loads(Path("save", names[1]).read_text())
    assert record["complete"] is False and record["perplexity"] is None and record["sparsity"] == 0.5
    assert len(table_of(Path("save", names[0]))) == 21
    assert "figures so far: save/" in caplog.text
    saved = "the pruned model is saved in kept/wanda_0.5; the same command resumes"
    assert (saved in caplog.text) == keep == Path("kept/wanda_0.5").is_dir()


def test_a_sparsity_that_misses_the_target_triggers_a_warning(tiny_run, caplog):
    # Wanda removes a whole number of weights per row: 19 of 32 columns at 0.6, and 16 at 0.5.
    for ratio in (0.5, 0.6):
        tiny_run(f"--prune_method wanda --sparsity_ratio {ratio}")
        assert ("misses the target of 0.6" in caplog.text) == ("misses" in caplog.text) == (ratio == 0.6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_saved_model(dtype, tiny_run):
    record = tiny_run(f"--prune_method sparsegpt --sparsity_ratio 0.5 --dtype {dtype} --save_model kept")
    assert record["model"]["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained("kept/sparsegpt_0.5", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_checkpoint_of_more_bits_than_its_config_says_is_measured_as_it_is_saved(stream, tiny_run, tiny_folder):
    path = Path(shutil.copytree(tiny_folder, "wide")) / "config.json"  # its tensors are float32
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    flags = f"--model wide --stream {stream}"
    pruned = tiny_run(f"{flags} --prune_method wanda --sparsity_ratio 0.5 --save_model kept")
    again = tiny_run(f"--model kept/wanda_0.5 --stream {stream}")
    assert again["perplexity"] == pruned["perplexity"]


def test_a_saved_model_can_be_evaluated_and_is_replaced_whole(tiny_run):
    flags = "--prune_method wanda --sparsity_ratio 0.5 --save_model kept"
    pruned = tiny_run(flags)
    Path("kept/wanda_0.5/stale").write_text("from an earlier run")
    tiny_run(flags)
    assert not Path("kept/wanda_0.5/stale").exists() and [p.name for p in Path("kept").iterdir()] == ["wanda_0.5"]
    again = tiny_run("--model kept/wanda_0.5")
    assert again["perplexity"] == pruned["perplexity"] and again["dense_zeros"] == pruned["sparsity"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_cuda_in_float16(method, tiny_run, other_text):
    more = f" --eval_data {other_text} --price_steps 2" if method.endswith("_price") else ""
    record = tiny_run(f"--prune_method {method} --sparsity_ratio 0.5 --save_model kept{more}")
    assert record["model"]["dtype"] == "float16" and record["sparsity"] == pytest.approx(0.5, abs=1 / 32)
