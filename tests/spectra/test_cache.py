"""The metric cache: what goes in comes out, and what is another model's is refused."""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import tiny_llama

import main
from lib.core import files
from lib.core.errors import UserError
from lib.models.weights import weights_of
from lib.spectra import measure
from lib.spectra.cache import Measurement, MetricCache
from lib.spectra.measure import load_or_measure
from lib.spectra.spectrum import Farms
from lib.spectra.tail import METRICS

MODEL = "tiny-llama"
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def filled(tmp_path, tiny_weights):
    """Return a folder that holds the tiny model's alpha_mid."""
    load_or_measure(Measurement("alpha_mid", tmp_path / "cache"), MODEL, tiny_weights)
    return tmp_path / "cache"


def edit(folder, **changes):
    path = folder / "alpha_mid.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, weights, match, model=MODEL, metric="alpha_mid"):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=match) as caught:
        load_or_measure(Measurement(metric, folder), model, weights)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_values_are_measured_once_and_stored_with_a_sidecar(tiny_weights, tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"  # which is made
    first = load_or_measure(Measurement("alpha_mid", folder), MODEL, tiny_weights)
    values = np.load(folder / "alpha_mid.npy", allow_pickle=False)
    assert values.dtype == np.float64 and values.shape == (21,)
    # in the model's order: q k v o gate up down
    assert values.tolist() == [first.values[layer.name] for layer in tiny_weights.layers]
    assert sorted(path.name for path in folder.iterdir()) == ["alpha_mid.json", "alpha_mid.npy"]
    monkeypatch.setattr(measure, "measure", None)
    assert load_or_measure(Measurement("alpha_mid", folder), MODEL, tiny_weights) == first
    stored = json.loads((folder / "alpha_mid.json").read_text())
    assert (stored["model"], stored["metric"]) == (MODEL, "alpha_mid")
    assert stored["layers"] == [[layer.name, list(layer.shape)] for layer in tiny_weights.layers]
    assert stored["fingerprints"] == tiny_weights.fingerprints()
    assert stored["versions"]["torch"] == torch.__version__ and {"transformers", "numpy"} <= set(stored["versions"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("back", [False, True], ids=["loaded as it is", "loaded as float32"])
def test_half_precision_of_the_same_weights_is_the_same_model(filled, dtype, back, monkeypatch):
    monkeypatch.setattr(measure, "measure", None)
    model = tiny_llama().to(dtype)
    weights = weights_of(model.float() if back else model)
    assert len(load_or_measure(Measurement("alpha_mid", filled), MODEL, weights).values) == 21


@pytest.mark.parametrize("settings", [{"driver": "fast"}, {"farms": Farms(16, 1.0, 3)}])
def test_settings_have_a_cache_of_their_own(settings, filled, tiny_weights):
    published = load_or_measure(Measurement("alpha_mid", filled), MODEL, tiny_weights)
    measured = load_or_measure(Measurement("alpha_mid", filled, **settings), MODEL, tiny_weights)
    assert load_or_measure(Measurement("alpha_mid", filled, **settings), MODEL, tiny_weights) == measured != published
    assert load_or_measure(Measurement("alpha_mid", filled), MODEL, tiny_weights) == published
    how = Measurement("alpha_mid", filled, **settings)
    assert json.loads((filled / f"{how.stem}.json").read_text())["settings"] == how.settings


def test_a_complete_cache_may_be_on_a_disk_that_cannot_be_written(tiny_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --eval_data {tiny_text} --seqlen 32 --eval_windows 1 --ww_metric alpha_mid".split()
    flags += "--ww_metric_cache cache --prune_method magnitude_ww --sparsity_ratio 0.5".split()
    assert main.main(flags) == 0
    asked = []
    monkeypatch.setattr(files, "check_writable", lambda field, *_: asked.append(field))
    assert main.main(flags) == 0 and asked == ["save"]


def test_values_of_something_else_are_refused(filled, tiny_weights):
    refused(filled, tiny_weights, "model tiny-llama, not other-llama", model="other-llama")

    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1.01
    refused(filled, weights_of(model), r"other weights of the same name.*layers\.1\.mlp\.up_proj")

    for suffix in ("npy", "json"):
        os.rename(filled / f"alpha_mid.{suffix}", filled / f"alpha_peak.{suffix}")
    refused(filled, tiny_weights, "metric alpha_mid, not alpha_peak", metric="alpha_peak")


def test_a_sidecar_of_other_layers_or_settings_is_refused(filled, tiny_weights):
    layers = json.loads((filled / "alpha_mid.json").read_text())["layers"]
    edit(filled, layers=[[f"decoder.{name}", shape] for name, shape in layers])
    refused(filled, tiny_weights, f"decoder.{NAME}.*not.*'{NAME}")
    edit(filled, layers=[[name, [64, 32] if "gate" in name else shape] for name, shape in layers])
    refused(filled, tiny_weights, r"0\.mlp\.gate_proj', \[64, 32\].*not.*\[48, 32\]")
    edit(filled, layers=[*layers, ["model.layers.3.self_attn.q_proj", [32, 32]]])
    refused(filled, tiny_weights, r"layers\.3.*not None")
    edit(filled, layers=layers, settings={"driver": "fast", "farms": None})
    refused(filled, tiny_weights, "'fast'.*not.*'exact'")


@pytest.mark.parametrize("content", ["{", '{"fingerprints": {}}'])
def test_damaged_sidecar_is_refused_before_the_weights_are_loaded(filled, tiny_weights, content):
    (filled / "alpha_mid.json").write_text(content)
    with pytest.raises(UserError, match=r"alpha_mid\.json: is damaged \(.*\); .*delete"):
        MetricCache(Measurement("alpha_mid", filled), MODEL, tiny_weights.layers).read()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.ones(20), r"shape \[20\].*tiny-llama has 21 matrices"),
        (np.ones((3, 7)), r"shape \[3, 7\].*21"),
        (np.array(["a"] * 21), "is damaged"),
        (b"\x93NUMPY\x01", "is damaged"),
        (np.full(21, math.nan), "not finite"),
    ],
)
def test_values_that_cannot_be_the_models_are_refused(values, match, tmp_path, tiny_weights):
    path = tmp_path / "alpha_peak.npy"
    path.write_bytes(values) if isinstance(values, bytes) else np.save(path, values)
    refused(tmp_path, tiny_weights, rf"alpha_peak\.npy.*{match}", metric="alpha_peak")


@pytest.mark.parametrize(("metric", "value"), [("alpha_peak", 0.0), *((metric, math.nan) for metric in METRICS)])
def test_a_matrix_that_has_no_value_is_named_and_the_others_are_kept(metric, value, tmp_path, tiny_weights):
    name = tiny_weights.layers[10].name
    tiny_weights.model.get_submodule(name).weight.data.fill_(value)
    with pytest.raises(UserError, match=name):
        load_or_measure(Measurement(metric, tmp_path), MODEL, tiny_weights)
    (left,) = tmp_path.iterdir()
    assert left.name == f".{metric}.0.jsonl" and len(left.read_text().splitlines()) >= 8
