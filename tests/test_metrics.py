"""The metric cache: what goes in comes out, and what is another model's is refused."""

import json
import logging
import math
import os

import numpy as np
import pytest
import torch
from conftest import tiny_llama

from lib import UserError, metrics
from lib.esd import Farms, spectrum
from lib.metrics import METRICS, WEIGHTWATCHER, Settings, load_or_measure, measure, read_cache
from lib.models import find_blocks, load_skeleton, locate, prunable_layers

MODEL = "tiny-llama"


@pytest.fixture
def parts(tiny_model):
    """Return the tiny model's layers and blocks."""
    return prunable_layers(tiny_model), find_blocks(tiny_model)[1]


@pytest.fixture(params=METRICS)
def metric(request):
    return request.param


@pytest.fixture
def filled(tmp_path, parts):
    """Return a folder that holds the tiny model's alpha_mid."""
    load_or_measure(tmp_path / "cache", "alpha_mid", MODEL, *parts)
    return tmp_path / "cache"


def refused(folder, parts, match, model=MODEL, metric="alpha_mid"):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match=match) as caught:
        load_or_measure(folder, metric, model, *parts)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before  # nothing is mended behind the user's back


# -------------------------------------------------------------------------------------------------------- round trip


def test_values_are_those_of_the_matrices_by_name(metric, parts):
    found = measure(metric, MODEL, *parts)
    assert (found.metric, found.model) == (metric, MODEL)
    assert found.values == pytest.approx(
        {x.name: METRICS[metric](spectrum(x.module.weight)) for x in parts[0]}, rel=1e-6
    )
    assert all(isinstance(value, float) for value in found.values.values())


def test_measured_once_and_read_back_the_same(metric, parts, tmp_path, monkeypatch):
    first = load_or_measure(tmp_path / "a" / "b", metric, MODEL, *parts)  # the folder is made
    monkeypatch.setattr(metrics, "spectrum", None)  # computing again would call it
    monkeypatch.setitem(METRICS, metric, None)
    assert load_or_measure(tmp_path / "a" / "b", metric, MODEL, *parts) == first
    assert read_cache(tmp_path / "a" / "b", metric, MODEL, parts[0]) == first


def test_file_is_as_published(metric, parts, tmp_path):
    found = load_or_measure(tmp_path, metric, MODEL, *parts)
    values = np.load(tmp_path / f"{metric}.npy", allow_pickle=False)
    assert values.dtype == np.float64 and values.shape == (21,)
    assert values.tolist() == [found.values[layer.name] for layer in parts[0]]  # model order: q k v o gate up down
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{metric}.json", f"{metric}.npy"]


def test_sidecar_says_whose_values_they_are(filled, parts):
    about = json.loads((filled / "alpha_mid.json").read_text())
    assert about["model"] == MODEL and about["metric"] == "alpha_mid" and about["dtype"] == "float32"
    assert about["layers"] == [layer.name for layer in parts[0]]
    assert about["shapes"] == [list(layer.module.weight.shape) for layer in parts[0]]
    assert about["versions"]["torch"] == torch.__version__ and {"transformers", "numpy"} <= set(about["versions"])


def test_cache_is_read_without_weights(filled, tiny_folder):
    skeleton = load_skeleton(locate(str(tiny_folder), "unused"))
    layers = prunable_layers(skeleton)
    assert all(layer.module.weight.is_meta for layer in layers)
    assert len(read_cache(filled, "alpha_mid", MODEL, layers).values) == 21


def test_nothing_there_is_none(tmp_path, parts):
    assert read_cache(tmp_path / "none", "alpha_mid", MODEL, parts[0]) is None
    assert not (tmp_path / "none").exists()


def test_each_metric_has_its_own_file(filled, parts):
    assert read_cache(filled, "alpha_peak", MODEL, parts[0]) is None
    load_or_measure(filled, "alpha_peak", MODEL, *parts)
    assert len(list(filled.iterdir())) == 4


def test_half_precision_of_the_same_weights_is_the_same_model(filled):
    model = tiny_llama().half()
    assert read_cache(filled, "alpha_mid", MODEL, prunable_layers(model)) is not None


# ------------------------------------------------------------------------------------------------ the published files


def test_bare_published_file_is_accepted_with_a_warning(tmp_path, parts, caplog):
    values = np.linspace(2, 5, 21)
    np.save(tmp_path / "alpha_peak.npy", values)
    with caplog.at_level(logging.WARNING):
        found = load_or_measure(tmp_path, "alpha_peak", MODEL, *parts)
    assert list(found.values.values()) == values.tolist()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "cannot be checked" in caplog.records[0].getMessage() and "alpha_peak.npy" in caplog.records[0].getMessage()
    assert [p.name for p in tmp_path.iterdir()] == [
        "alpha_peak.npy"
    ]  # it is not given a sidecar that it did not come with


@pytest.mark.parametrize("count", [20, 22, 0, 42])
def test_bare_file_of_another_length_is_refused(tmp_path, parts, count):
    np.save(tmp_path / "alpha_peak.npy", np.ones(count))
    refused(tmp_path, parts, rf"alpha_peak\.npy.*{count}.*{MODEL}.*21", metric="alpha_peak")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_another_models_cache_is_refused_by_name(filled, parts):
    refused(filled, parts, r"tiny-llama.*other-llama|other-llama.*tiny-llama", model="other-llama")


def test_other_weights_of_the_same_name_and_shapes_are_refused(filled):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1.01
    refused(filled, (prunable_layers(model), find_blocks(model)[1]), r"layers\.1\.mlp\.up_proj")


def edit(folder, **changes):
    path = folder / "alpha_mid.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_shapes_are_refused(filled, parts):
    shapes = [list(layer.module.weight.shape) for layer in parts[0]]
    shapes[4] = [64, 32]
    edit(filled, shapes=shapes)
    refused(filled, parts, r"gate_proj.*\[64, 32\].*\[48, 32\]")


def test_other_layer_names_are_refused(filled, parts):
    edit(filled, layers=[f"decoder.{layer.name}" for layer in parts[0]])
    refused(filled, parts, "names")


def test_another_metrics_values_are_refused(filled, parts):
    for suffix in ("npy", "json"):
        os.rename(filled / f"alpha_mid.{suffix}", filled / f"alpha_peak.{suffix}")
    refused(filled, parts, "alpha_mid", metric="alpha_peak")


def test_sidecar_of_a_longer_model_is_refused(filled, parts):
    names = [layer.name for layer in parts[0]]
    edit(filled, layers=names + ["model.layers.3.self_attn.q_proj"])
    refused(filled, parts, "alpha_mid")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null", '{"model": "tiny-llama"}', '"text"'])
def test_damaged_sidecar_is_refused(filled, parts, content):
    (filled / "alpha_mid.json").write_text(content)
    refused(filled, parts, "alpha_mid")


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY"])
def test_damaged_file_is_refused(filled, parts, content):
    (filled / "alpha_mid.npy").write_bytes(content)
    refused(filled, parts, r"alpha_mid\.npy")


def test_cut_off_file_is_refused(filled, parts):
    content = (filled / "alpha_mid.npy").read_bytes()
    (filled / "alpha_mid.npy").write_bytes(content[:-9])
    refused(filled, parts, r"alpha_mid\.npy")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(filled, parts, value):
    values = np.load(filled / "alpha_mid.npy")
    values[3] = value
    np.save(filled / "alpha_mid.npy", values)
    refused(filled, parts, "not finite")


@pytest.mark.parametrize("array", [np.ones((3, 7)), np.array(["a"] * 21), np.array([{}] * 21, dtype=object)], ids=str)
def test_array_of_another_kind_is_refused(tmp_path, parts, array):
    np.save(tmp_path / "alpha_mid.npy", array, allow_pickle=True)
    refused(tmp_path, parts, r"alpha_mid\.npy")


def test_spectrum_without_a_fit_names_the_layer_and_leaves_no_file(tmp_path, parts):
    parts[0][10].module.weight.data.zero_()
    for metric in ("alpha_peak", "alpha_mid"):
        with pytest.raises(UserError, match=parts[0][10].name):
            load_or_measure(tmp_path / "cache", metric, MODEL, *parts)
    assert not (tmp_path / "cache").exists()


def test_weights_that_are_not_finite_name_the_layer(metric, tmp_path, parts):
    parts[0][10].module.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=parts[0][10].name):
        load_or_measure(tmp_path / "cache", metric, MODEL, *parts)
    assert not (tmp_path / "cache").exists()


def test_folder_that_cannot_be_written_is_one_line(tmp_path, parts):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        load_or_measure(tmp_path / "file" / "cache", "alpha_mid", MODEL, *parts)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_no_half_file(tmp_path, parts, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left"):
        load_or_measure(tmp_path, "alpha_mid", MODEL, *parts)
    assert not (tmp_path / "alpha_mid.npy").exists()


# ---------------------------------------------------------------------------------------------- other ways to measure


@pytest.mark.parametrize(
    "settings", [Settings("fast"), Settings("exact", Farms(16, 1.0, 3)), Settings("fast", Farms(8, 1.5, 2))]
)
def test_settings_have_a_cache_of_their_own(settings, tmp_path, parts):
    layers, blocks = parts
    published = load_or_measure(tmp_path, "alpha_mid", MODEL, layers, blocks)
    found = load_or_measure(tmp_path, "alpha_mid", MODEL, layers, blocks, settings)
    assert settings.stem("alpha_mid") != "alpha_mid" and (tmp_path / f"{settings.stem('alpha_mid')}.npy").is_file()
    assert read_cache(tmp_path, "alpha_mid", MODEL, layers, settings) == found != published
    assert read_cache(tmp_path, "alpha_mid", MODEL, layers) == published
    said = json.loads((tmp_path / f"{settings.stem('alpha_mid')}.json").read_text())["settings"]
    assert said == settings.about("alpha_mid")


def test_another_settings_cache_under_this_name_is_refused(filled, parts):
    edit(filled, settings={"driver": "fast", "farms": None})
    refused(filled, parts, "fast")


def test_a_pruned_checkpoint_is_noticed(parts, caplog):
    layers, blocks = parts
    measure("alpha_mid", MODEL, layers, blocks)
    assert not caplog.records
    for layer in layers[:7]:
        weight = layer.module.weight.data
        weight[weight.abs() < weight.abs().median()] = 0
    measure("alpha_mid", MODEL, layers, blocks)
    assert "describes the pruning" in caplog.text


def test_a_fallback_of_the_fast_driver_names_the_layer(parts, caplog):
    layers, blocks = parts
    layers[3].module.weight.data[1] = layers[3].module.weight.data[0]
    measure("spectral_norm", MODEL, layers, blocks, Settings("fast"))
    assert [r for r in caplog.records if layers[3].name in r.getMessage() and "ill-conditioned" in r.getMessage()]


# ---------------------------------------------------------------------------------------------------- weightwatcher


class Watcher:
    """Stands in for weightwatcher: returns a table whose rows are in another order, without those in ``skip``."""

    skip: tuple = ()
    calls: list = []

    def __init__(self, model):
        self.model = model

    def analyze(self, **switches):
        import pandas

        self.calls.append((switches, np.random.random()))
        rows = [(name, module.weight.shape[0] + i / 100) for i, (name, module) in enumerate(self.model.items())]
        rows = [row for row in reversed(rows) if row[0].rpartition("/")[2] not in self.skip]
        columns = {"mp_softrank": [x for _, x in rows], "rand_distance": [x / 1000 for _, x in rows]}
        return pandas.DataFrame({"longname": [name for name, _ in rows]} | columns)


@pytest.fixture
def watcher(monkeypatch):
    import weightwatcher

    monkeypatch.setattr(Watcher, "skip", ())
    monkeypatch.setattr(Watcher, "calls", [])
    monkeypatch.setattr(weightwatcher, "WeightWatcher", Watcher)
    return Watcher


@pytest.mark.parametrize(
    ("metric", "switch", "scale"), [("mp_softrank", "mp_fit", 1), ("random_distance", "randomize", 1000)]
)
def test_weightwatcher_is_matched_by_name(metric, switch, scale, watcher, parts):
    layers, blocks = parts
    found = measure(metric, MODEL, layers, blocks, Settings(seed=5))
    expected = [layer.module.weight.shape[0] + i % 7 / 100 for i, layer in enumerate(layers)]
    assert [x * scale for x in found.values.values()] == pytest.approx(expected)
    assert all(switches == {switch: True} for switches, _ in watcher.calls)
    assert {draw for _, draw in watcher.calls} == {np.random.RandomState(5).random()}  # seeded for each block


@pytest.mark.parametrize("metric", WEIGHTWATCHER)
def test_a_layer_that_weightwatcher_skips_is_named(metric, watcher, parts):
    watcher.skip = ("o_proj",)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.o_proj.*skipped"):
        measure(metric, MODEL, *parts)


def test_the_seed_belongs_to_random_distance(watcher, tmp_path, parts):
    load_or_measure(tmp_path, "random_distance", MODEL, *parts, Settings(seed=1))
    with pytest.raises(UserError, match="seed"):
        load_or_measure(tmp_path, "random_distance", MODEL, *parts, Settings(seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("metric", WEIGHTWATCHER)
def test_metrics_that_go_through_weightwatcher_repeat_themselves(metric, smollm2_layers):
    blocks, layers = smollm2_layers
    first, again = (measure(metric, MODEL, layers[:2], blocks) for _ in range(2))
    assert first == again and all(0 < value < 1 for value in first.values.values())
