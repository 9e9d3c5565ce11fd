"""The metric cache: what goes in comes out, and what is another model's is refused."""

import json
import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_llama

import main
from lib.core import files
from lib.core.digests import fingerprint, same_weights
from lib.core.errors import UserError
from lib.models.layers import prunable_layers
from lib.models.load import load_skeleton
from lib.models.locate import locate
from lib.models.weights import Weights, weights_of
from lib.spectra import measure as metrics
from lib.spectra.measure import Settings, load_or_measure, measure, read_cache
from lib.spectra.spectrum import Farms, spectrum
from lib.spectra.tail import METRICS, WEIGHTWATCHER

MODEL = "tiny-llama"


def matrix(weights: Weights, index: int) -> torch.Tensor:
    """Return a layer's weight, to be changed in place."""
    return weights.model.get_submodule(weights.layers[index].name).weight.data


@pytest.fixture(params=METRICS)
def metric(request):
    return request.param


@pytest.fixture
def filled(tmp_path, tiny_weights):
    """Return a folder that holds the tiny model's alpha_mid."""
    load_or_measure(tmp_path / "cache", "alpha_mid", MODEL, tiny_weights)
    return tmp_path / "cache"


def refused(folder, tiny_weights, match, model=MODEL, metric="alpha_mid"):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match=match) as caught:
        load_or_measure(folder, metric, model, tiny_weights)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before  # nothing is changed behind the user's back


# -------------------------------------------------------------------------------------------------------- round trip


def test_values_are_those_of_the_matrices_by_name(metric, tiny_weights):
    found = measure(metric, MODEL, tiny_weights)
    assert (found.metric, found.model) == (metric, MODEL)
    assert found.values == pytest.approx(
        tiny_weights.map(lambda _, weight: METRICS[metric](spectrum(weight))), rel=1e-6
    )
    assert all(isinstance(value, float) for value in found.values.values())


def test_measured_once_and_read_back_the_same(metric, tiny_weights, tmp_path, monkeypatch):
    first = load_or_measure(tmp_path / "a" / "b", metric, MODEL, tiny_weights)  # the folder is made
    monkeypatch.setattr(metrics, "spectrum", None)  # computing again would call it
    monkeypatch.setitem(METRICS, metric, None)
    assert load_or_measure(tmp_path / "a" / "b", metric, MODEL, tiny_weights) == first
    assert read_cache(tmp_path / "a" / "b", metric, MODEL, tiny_weights.layers) == first


def test_file_is_as_published(metric, tiny_weights, tmp_path):
    found = load_or_measure(tmp_path, metric, MODEL, tiny_weights)
    values = np.load(tmp_path / f"{metric}.npy", allow_pickle=False)
    assert values.dtype == np.float64 and values.shape == (21,)
    # in the model's order: q k v o gate up down
    assert values.tolist() == [found.values[layer.name] for layer in tiny_weights.layers]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{metric}.json", f"{metric}.npy"]


def test_sidecar_says_whose_values_they_are(filled, tiny_weights):
    about = json.loads((filled / "alpha_mid.json").read_text())
    assert about["model"] == MODEL and about["metric"] == "alpha_mid"
    assert about["layers"] == [layer.name for layer in tiny_weights.layers]
    assert about["shapes"] == [list(layer.shape) for layer in tiny_weights.layers]
    assert about["versions"]["torch"] == torch.__version__ and {"transformers", "numpy"} <= set(about["versions"])


def test_cache_is_read_without_weights(filled, tiny_folder):
    skeleton = load_skeleton(locate(str(tiny_folder), "unused"))
    assert all(p.is_meta for p in skeleton.parameters())
    assert len(read_cache(filled, "alpha_mid", MODEL, prunable_layers(skeleton)).values) == 21


def test_nothing_there_is_none(tmp_path, tiny_weights):
    assert read_cache(tmp_path / "none", "alpha_mid", MODEL, tiny_weights.layers) is None
    assert not (tmp_path / "none").exists()


def test_each_metric_has_its_own_file(filled, tiny_weights):
    assert read_cache(filled, "alpha_peak", MODEL, tiny_weights.layers) is None
    load_or_measure(filled, "alpha_peak", MODEL, tiny_weights)
    assert len(list(filled.iterdir())) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("back", [False, True], ids=["loaded as it is", "loaded as float32"])
def test_half_precision_of_the_same_weights_is_the_same_model(filled, dtype, back, monkeypatch):
    monkeypatch.setattr(metrics, "measure", None)  # computing again would call it
    model = tiny_llama().to(dtype)
    assert len(load_or_measure(filled, "alpha_mid", MODEL, weights_of(model.float() if back else model)).values) == 21


def test_a_cache_of_an_older_version_is_measured_again(filled, tiny_weights, caplog):
    about = json.loads((filled / "alpha_mid.json").read_text())
    del about["fingerprints"]
    (filled / "alpha_mid.json").write_text(json.dumps(about))
    values = np.load(filled / "alpha_mid.npy")
    np.save(filled / "alpha_mid.npy", values + 1)
    found = load_or_measure(filled, "alpha_mid", MODEL, tiny_weights)
    assert list(found.values.values()) == values.tolist() == np.load(filled / "alpha_mid.npy").tolist()
    assert "measured again" in caplog.text
    assert "fingerprints" in json.loads((filled / "alpha_mid.json").read_text())


# -------------------------------------------------------------------------------------------------------- fingerprints


def low_rank_update(weight: torch.Tensor, rank: int, share: float, seed: int) -> torch.Tensor:
    """Return ``weight`` with a random update of a rank whose norm is a share of its own."""
    draw = torch.Generator().manual_seed(seed)
    update = torch.randn(weight.shape[0], rank, generator=draw) @ torch.randn(rank, weight.shape[1], generator=draw)
    return weight + update * (share * weight.norm() / update.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_small_update_of_any_matrix_is_seen(smollm2_weights, dtype):
    for index, (name, weight) in enumerate(smollm2_weights.snapshot().items()):
        own = fingerprint(weight)
        assert same_weights(own, fingerprint(weight.to(dtype))), name
        assert not same_weights(own, fingerprint(low_rank_update(weight, 8, 0.02, index).to(dtype))), name


def test_fingerprint_knows_scale_sign_and_place():
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    own = fingerprint(weight)
    assert same_weights(own, own) and same_weights(fingerprint(torch.zeros(4, 4)), fingerprint(torch.zeros(4, 4)))
    for other in (weight * 1.001, -weight, weight.flip(0), weight.flip(1), torch.zeros(30, 40), weight * 1e-6):
        assert not same_weights(own, fingerprint(other))


def test_fingerprint_of_a_merged_adapter_in_a_folder_of_the_same_name(smollm2_weights, tmp_path):
    """alpha_peak of such a matrix can move by units, which the mean of |W| did not see."""
    from lib.core.digests import first_difference

    before = metrics.fingerprints(smollm2_weights)
    name = smollm2_weights.layers[100].name
    weight = smollm2_weights.snapshot()[name]
    changed = low_rank_update(weight, 8, 0.02, 1)
    assert abs(changed.abs().mean() / weight.abs().mean() - 1) < 1e-3
    assert first_difference(before, before | {name: fingerprint(changed)}) == name
    assert first_difference(before, before) is None
    assert first_difference({}, before) == smollm2_weights.layers[0].name


# ------------------------------------------------------------------------------------------------ the published files


def test_bare_published_file_is_accepted_with_a_warning(tmp_path, tiny_weights, caplog):
    values = np.linspace(2, 5, 21)
    np.save(tmp_path / "alpha_peak.npy", values)
    with caplog.at_level(logging.WARNING):
        found = load_or_measure(tmp_path, "alpha_peak", MODEL, tiny_weights)
    assert list(found.values.values()) == values.tolist()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "cannot be checked" in caplog.records[0].getMessage() and "alpha_peak.npy" in caplog.records[0].getMessage()
    assert [p.name for p in tmp_path.iterdir()] == [
        "alpha_peak.npy"
    ]  # it is not given a sidecar that it did not come with


@pytest.mark.parametrize("count", [20, 22, 0, 42])
def test_bare_file_of_another_length_is_refused(tmp_path, tiny_weights, count):
    np.save(tmp_path / "alpha_peak.npy", np.ones(count))
    refused(tmp_path, tiny_weights, rf"alpha_peak\.npy.*{count}.*{MODEL}.*21", metric="alpha_peak")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_another_models_cache_is_refused_by_name(filled, tiny_weights):
    refused(filled, tiny_weights, r"tiny-llama.*other-llama|other-llama.*tiny-llama", model="other-llama")


def test_other_weights_of_the_same_name_and_shapes_are_refused(filled):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data *= 1.01
    refused(filled, weights_of(model), r"layers\.1\.mlp\.up_proj")


def edit(folder, **changes):
    path = folder / "alpha_mid.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_shapes_are_refused(filled, tiny_weights):
    shapes = [list(layer.shape) for layer in tiny_weights.layers]
    shapes[4] = [64, 32]
    edit(filled, shapes=shapes)
    refused(filled, tiny_weights, r"gate_proj.*\[64, 32\].*\[48, 32\]")


def test_other_layer_names_are_refused(filled, tiny_weights):
    edit(filled, layers=[f"decoder.{layer.name}" for layer in tiny_weights.layers])
    refused(filled, tiny_weights, "names")


def test_another_metrics_values_are_refused(filled, tiny_weights):
    for suffix in ("npy", "json"):
        os.rename(filled / f"alpha_mid.{suffix}", filled / f"alpha_peak.{suffix}")
    refused(filled, tiny_weights, "alpha_mid", metric="alpha_peak")


def test_sidecar_of_a_longer_model_is_refused(filled, tiny_weights):
    names = [layer.name for layer in tiny_weights.layers]
    edit(filled, layers=names + ["model.layers.3.self_attn.q_proj"])
    refused(filled, tiny_weights, "alpha_mid")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null", '{"model": "tiny-llama"}', '"text"'])
def test_damaged_sidecar_is_refused(filled, tiny_weights, content):
    (filled / "alpha_mid.json").write_text(content)
    refused(filled, tiny_weights, "alpha_mid")


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": [[32, 32]]},
        {"shapes": 3},
        {"layers": []},
    ],
)
def test_a_sidecar_with_damaged_parts_is_refused_before_the_weights(filled, tiny_weights, changes):
    edit(filled, **changes)
    with pytest.raises(UserError, match=r"alpha_mid\.json: is not the sidecar") as caught:
        read_cache(filled, "alpha_mid", MODEL, tiny_weights.layers)
    assert "\n" not in str(caught.value)


def test_values_of_an_interrupted_measurement_are_taken_where_they_are_whole(tmp_path, tiny_weights):
    layer = tiny_weights.layers[0].name
    mark = fingerprint(matrix(tiny_weights, 0))
    rows = [{"layer": layer, "value": 2.5, "fingerprint": mark}, [1]]
    rows += [{"layer": "c", "value": math.nan, "fingerprint": mark}]
    lines = [json.dumps(row).encode() for row in rows]
    (tmp_path / "begun").write_bytes(b"\xff\xfe\x80\n" + b"\n".join(lines) + b'\n{"layer": "\xe4')
    begun = metrics.Begun(tmp_path / "begun")
    assert list(begun.known) == [layer] and begun.value(layer, matrix(tiny_weights, 0)) == 2.5


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY", b"PK\3\4", b"PK\3\4" + bytes(99)])
def test_damaged_file_is_refused(filled, tiny_weights, content):
    (filled / "alpha_mid.npy").write_bytes(content)
    refused(filled, tiny_weights, r"alpha_mid\.npy")


def test_cut_off_file_is_refused(filled, tiny_weights):
    content = (filled / "alpha_mid.npy").read_bytes()
    (filled / "alpha_mid.npy").write_bytes(content[:-9])
    refused(filled, tiny_weights, r"alpha_mid\.npy")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(filled, tiny_weights, value):
    values = np.load(filled / "alpha_mid.npy")
    values[3] = value
    np.save(filled / "alpha_mid.npy", values)
    refused(filled, tiny_weights, "not finite")


@pytest.mark.parametrize("array", [np.ones((3, 7)), np.array(["a"] * 21), np.array([{}] * 21, dtype=object)], ids=str)
def test_array_of_another_kind_is_refused(tmp_path, tiny_weights, array):
    np.save(tmp_path / "alpha_mid.npy", array, allow_pickle=True)
    refused(tmp_path, tiny_weights, r"alpha_mid\.npy")


def test_spectrum_without_a_fit_names_the_layer_and_leaves_no_file(tmp_path, tiny_weights):
    matrix(tiny_weights, 10).zero_()
    for metric in ("alpha_peak", "alpha_mid"):
        with pytest.raises(UserError, match=tiny_weights.layers[10].name):
            load_or_measure(tmp_path / "cache", metric, MODEL, tiny_weights)
    assert not [*(tmp_path / "cache").glob("*.npy"), *(tmp_path / "cache").glob("*.json")]  # the other values are kept


def test_weights_that_are_not_finite_name_the_layer(metric, tmp_path, tiny_weights):
    matrix(tiny_weights, 10)[0, 0] = math.nan
    with pytest.raises(UserError, match=tiny_weights.layers[10].name):
        load_or_measure(tmp_path / "cache", metric, MODEL, tiny_weights)
    assert not [*(tmp_path / "cache").glob("*.npy"), *(tmp_path / "cache").glob("*.json")]


def test_folder_that_cannot_be_written_is_one_line(tmp_path, tiny_weights):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        load_or_measure(tmp_path / "file" / "cache", "alpha_mid", MODEL, tiny_weights)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_no_half_file(tmp_path, tiny_weights, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left"):
        load_or_measure(tmp_path, "alpha_mid", MODEL, tiny_weights)
    assert not (tmp_path / "alpha_mid.npy").exists()


def test_a_complete_cache_may_be_on_a_disk_that_cannot_be_written(
    tiny_folder, tiny_text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {tiny_folder} --eval_data {tiny_text} --seqlen 32 --eval_windows 1 --ww_metric alpha_mid".split()
    flags += "--ww_metric_cache cache --prune_method magnitude_ww --sparsity_ratio 0.5".split()
    assert main.main(flags) == 0
    prepare = files.check_writable

    def read_only(field: str, folder, *more) -> None:
        if str(folder) == "cache":
            raise UserError(field, "cache: cannot be written (Read-only file system)")
        prepare(field, folder, *more)

    monkeypatch.setattr(files, "check_writable", read_only)
    assert main.main(flags) == 0
    about = json.loads((tmp_path / "cache" / "alpha_mid.json").read_text())
    (tmp_path / "cache" / "alpha_mid.json").write_text(json.dumps(about | {"fingerprints": None}))
    capsys.readouterr()
    assert main.main(flags) == 2 and "--ww_metric_cache cache: cannot be written" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- other ways to measure


@pytest.mark.parametrize(
    "settings", [Settings("fast"), Settings("exact", Farms(16, 1.0, 3)), Settings("fast", Farms(8, 1.5, 2))]
)
def test_settings_have_a_cache_of_their_own(settings, tmp_path, tiny_weights):
    published = load_or_measure(tmp_path, "alpha_mid", MODEL, tiny_weights)
    found = load_or_measure(tmp_path, "alpha_mid", MODEL, tiny_weights, settings)
    assert settings.stem("alpha_mid") != "alpha_mid" and (tmp_path / f"{settings.stem('alpha_mid')}.npy").is_file()
    assert read_cache(tmp_path, "alpha_mid", MODEL, tiny_weights.layers, settings) == found != published
    assert read_cache(tmp_path, "alpha_mid", MODEL, tiny_weights.layers) == published
    said = json.loads((tmp_path / f"{settings.stem('alpha_mid')}.json").read_text())["settings"]
    assert said == settings.described("alpha_mid")


def test_another_settings_cache_under_this_name_is_refused(filled, tiny_weights):
    edit(filled, settings={"driver": "fast", "farms": None})
    refused(filled, tiny_weights, "fast")


def test_a_pruned_checkpoint_is_noticed(tiny_weights, caplog):
    measure("alpha_mid", MODEL, tiny_weights)
    assert not caplog.records
    for index in range(7):
        weight = matrix(tiny_weights, index)
        weight[weight.abs() < weight.abs().median()] = 0
    measure("alpha_mid", MODEL, tiny_weights)
    assert "describes the pruning" in caplog.text


def test_a_fallback_of_the_fast_driver_names_the_layer(tiny_weights, caplog):
    matrix(tiny_weights, 3)[1] = matrix(tiny_weights, 3)[0]
    measure("spectral_norm", MODEL, tiny_weights, Settings("fast"))
    name = tiny_weights.layers[3].name
    assert [r for r in caplog.records if name in r.getMessage() and "ill-conditioned" in r.getMessage()]


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
def test_weightwatcher_is_matched_by_name(metric, switch, scale, watcher, tiny_weights):
    found = measure(metric, MODEL, tiny_weights, Settings(seed=5))
    expected = [layer.shape[0] + i % 7 / 100 for i, layer in enumerate(tiny_weights.layers)]
    assert [x * scale for x in found.values.values()] == pytest.approx(expected)
    assert all(switches == {switch: True} for switches, _ in watcher.calls)
    assert {draw for _, draw in watcher.calls} == {np.random.RandomState(5).random()}  # seeded for each block


@pytest.mark.parametrize("metric", WEIGHTWATCHER)
def test_a_layer_that_weightwatcher_skips_is_named(metric, watcher, tiny_weights):
    watcher.skip = ("o_proj",)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.o_proj.*skipped"):
        measure(metric, MODEL, tiny_weights)


def test_the_seed_belongs_to_random_distance(watcher, tmp_path, tiny_weights):
    load_or_measure(tmp_path, "random_distance", MODEL, tiny_weights, Settings(seed=1))
    with pytest.raises(UserError, match="seed"):
        load_or_measure(tmp_path, "random_distance", MODEL, tiny_weights, Settings(seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("metric", WEIGHTWATCHER)
def test_metrics_that_go_through_weightwatcher_repeat_themselves(metric, smollm2_weights):
    names = [layer.name for layer in smollm2_weights.layers[:2]]
    linears = [{name: smollm2_weights.model.get_submodule(name) for name in names}]
    part = Weights(smollm2_weights.model, smollm2_weights.modules[:1], smollm2_weights.layers[:2], linears)
    first, again = (measure(metric, MODEL, part) for _ in range(2))
    assert first == again and all(0 < value < 1 for value in first.values.values())


# -------------------------------------------------------------------------------------------------- a GPU or the cores


class OnGpu:
    """A weight that says that it is on a GPU, and notes that it is copied."""

    device = torch.device("cuda")

    def __init__(self, shape: tuple[int, int] = (4, 2)) -> None:
        self.shape = shape

    def numel(self) -> int:
        return math.prod(self.shape)

    def cpu(self) -> str:
        return "cpu"


@pytest.mark.parametrize(
    ("core", "cores", "driver", "taken"),
    [
        (11.0, 4, "exact", "gpu gpu cpu cpu cpu"),  # 4 cores: 2.75 s a matrix instead of 3
        (13.0, 4, "exact", "gpu gpu cpu gpu gpu"),
        (11.0, 3, "exact", "gpu gpu gpu gpu gpu"),  # too few to try
        (1.0, 4, "fast", "gpu gpu gpu gpu gpu"),
    ],
)
def test_exact_spectra_go_to_the_cpu_where_its_cores_are_faster(core, cores, driver, taken, monkeypatch, caplog):
    # The first matrix takes long for another reason; the third has 8 times the work of the second.
    clock = iter([0.0, 50.0, 100.0, 103.0, 200.0, 200.0 + 8 * core])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    weights = [OnGpu(), OnGpu(), OnGpu((8, 4)), OnGpu(), OnGpu()]
    with ThreadPoolExecutor(4) as workers, caplog.at_level("INFO"):
        race = metrics.Race(workers, cores, Settings(driver, Farms(2, 1.0, 2)), metrics.InFlight())
        found = [race.submit(lambda weight: "cpu" if weight == "cpu" else "gpu", weight) for weight in weights]
        assert [future.result() for future in found] == taken.split()
    told = [record.getMessage() for record in caplog.records]
    if "cpu" in taken:
        where = taken.split()[-1].upper()
        text = f"an exact SVD takes {core / 3:.1f} times as long on one of 4 cores as on the GPU"
        assert told == [f"{text}: computed on the {where}"]
    else:
        assert not told


class Streams:
    """Stand-ins for what InFlight takes from torch.cuda; ``notes`` tells what each thread did."""

    def __init__(self, monkeypatch, free: int) -> None:
        self.notes: dict[int, list[str]] = {}
        event = SimpleNamespace(name="copied")
        current = SimpleNamespace(record_event=lambda: event)
        stream = SimpleNamespace(wait_event=lambda event: self.note(f"waits until {event.name}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.note("new stream") or stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(metrics, "free_bytes", lambda _: free)

    def note(self, text: str) -> None:
        self.notes.setdefault(threading.get_ident(), []).append(text)


def test_several_matrices_are_in_flight_on_a_gpu(monkeypatch):
    streams, together = Streams(monkeypatch, 2**30), threading.Barrier(3, timeout=60)

    def value(_: OnGpu) -> float:
        together.wait()  # all three, or none
        streams.note("computes")
        return 1.0

    with metrics.InFlight() as in_flight:
        race = metrics.Race(None, 1, Settings("fast"), in_flight)
        found = [race.submit(value, OnGpu()) for _ in range(6)]
        assert [future.result() for future in found] == [1.0] * 6
    assert threading.get_ident() not in streams.notes
    assert len(streams.notes) == 3
    for notes in streams.notes.values():
        assert notes == ["new stream", *["waits until copied", "computes"] * 2]


@pytest.mark.parametrize(("shape", "least"), [((8, 4), 8 * (3 * 32 + 4 * 16)), ((4, 4, 3, 3), 8 * 7 * 144)])
def test_one_matrix_at_a_time_where_memory_is_short(shape, least, monkeypatch):
    for free, own in ((6 * least, False), (6 * least - 1, True)):  # three of them in half of what is free
        Streams(monkeypatch, free)
        with metrics.InFlight() as in_flight:
            found = in_flight.submit(lambda _: threading.get_ident(), OnGpu(shape)).result()
        assert (found == threading.get_ident()) == own


def test_a_failure_in_flight_is_raised(monkeypatch):
    Streams(monkeypatch, 2**30)
    with metrics.InFlight() as in_flight, pytest.raises(UserError, match="no fit"):
        in_flight.submit(lambda _: (_ for _ in ()).throw(UserError(None, "no fit")), OnGpu()).result()
