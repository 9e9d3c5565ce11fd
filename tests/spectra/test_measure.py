"""Measurement: the values of the matrices by name, on the CPU's cores, by weightwatcher, and what is warned about."""

import itertools
import logging
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.core.errors import UserError
from lib.models import memory
from lib.models.weights import Weights
from lib.spectra import measure as measuring
from lib.spectra.cache import Measurement
from lib.spectra.measure import load_or_measure, measure
from lib.spectra.spectrum import spectrum
from lib.spectra.tail import METRICS, WEIGHTWATCHER


def matrix(weights: Weights, index: int) -> torch.Tensor:
    """Return a layer's weight, to be changed in place."""
    return weights.model.get_submodule(weights.layers[index].name).weight.data


@pytest.mark.parametrize("metric", METRICS)
def test_values_are_those_of_the_matrices_by_name(metric, tiny_weights):
    measured = measure(Measurement(metric), tiny_weights)
    expected = tiny_weights.map(lambda _, weight: METRICS[metric](spectrum(weight)))
    assert measured.values == pytest.approx(expected, rel=1e-6) and list(measured.values) == list(expected)
    assert all(isinstance(value, float) for value in measured.values.values())
    assert measured.fingerprints == tiny_weights.fingerprints()


def test_bits_do_not_depend_on_the_number_of_cores(smollm2_weights):
    block = first_block(smollm2_weights, layers=2)
    before, measured = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        measured.append(measure(Measurement("alpha"), block))
        assert torch.get_num_threads() == threads, "as it was"
    torch.set_num_threads(before)
    assert measured[0] == measured[1]


def first_block(weights: Weights, layers: int) -> Weights:
    """Return the first layers of a model's first block."""
    return Weights(weights.model, weights.modules[:1], weights.layers[:layers])


@pytest.mark.parametrize("little_memory", [False, True])
def test_matrices_at_work_are_as_many_as_cores_and_memory_allow(little_memory, threads, tiny_weights, monkeypatch):
    counts, at_work, lock = [], [], threading.Lock()
    most = 1 if little_memory else threads
    largest = max(layer.size for layer in tiny_weights.layers)
    monkeypatch.setattr(memory, "free_ram", lambda: 2 * (2 * 12 * largest - little_memory))

    def counted(weight: torch.Tensor, *more):
        with lock:
            at_work.append(weight)
            counts.append((len(at_work), torch.get_num_threads()))
        result = spectrum(weight, *more)
        with lock:
            at_work.pop()
        return result

    monkeypatch.setattr(measuring, "spectrum", counted)
    measure(Measurement("alpha_mid"), tiny_weights)
    assert len(counts) == 21 and all(count <= most and linear_algebra == 1 for count, linear_algebra in counts)


@pytest.mark.parametrize(("seconds", "driver", "announced"), [(30, "exact", 1), (0.1, "exact", 0), (30, "fast", 0)])
def test_a_long_measurement_is_announced(seconds, driver, announced, one_thread, tiny_weights, monkeypatch, caplog):
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with caplog.at_level(logging.INFO):
        measure(Measurement("alpha_mid", driver=driver), tiny_weights)
    first, *others = (layer.size * min(layer.shape) for layer in tiny_weights.layers)
    message = f"take about {30 / first * sum(others) / 60:.0f} more minutes on 1 of the CPU's cores; --esd_driver fast"
    assert [message in record.getMessage() for record in caplog.records] == [True] * announced


def test_a_fallback_of_the_fast_driver_names_the_layer(tiny_weights, caplog):
    matrix(tiny_weights, 3)[1] = matrix(tiny_weights, 3)[0]
    measure(Measurement("spectral_norm", driver="fast"), tiny_weights)
    (record,) = caplog.records
    assert tiny_weights.layers[3].name in record.getMessage() and "ill-conditioned" in record.getMessage()


class Watcher:
    """Stands in for weightwatcher: a table of the model's one matrix, without a row if that is ``skipped``."""

    skipped = torch.empty(0)
    calls: list = []

    def __init__(self, model):
        (self.linear,) = model

    def analyze(self, **switches):
        import pandas

        self.calls.append((switches, np.random.random()))
        number = self.linear.weight.sum().abs().item()
        table = pandas.DataFrame({"mp_softrank": [number], "rand_distance": [number / 1000]})
        return table[:0] if torch.equal(self.linear.weight, self.skipped) else table


@pytest.fixture
def watcher(monkeypatch):
    monkeypatch.setattr(Watcher, "skipped", Watcher.skipped)
    monkeypatch.setattr(Watcher, "calls", [])
    monkeypatch.setitem(sys.modules, "weightwatcher", SimpleNamespace(WeightWatcher=Watcher))
    return Watcher


@pytest.mark.parametrize(
    ("metric", "switch", "scale"), [("mp_softrank", "mp_fit", 1), ("random_distance", "randomize", 1000)]
)
def test_weightwatcher_measures_each_matrix(metric, switch, scale, watcher, tiny_weights):
    measured = measure(Measurement(metric, seed=5), tiny_weights)
    expected = [matrix(tiny_weights, index).sum().abs().item() for index in range(21)]
    assert [x * scale for x in measured.values.values()] == pytest.approx(expected)
    assert all(switches == {switch: True} for switches, _ in watcher.calls)
    assert {draw for _, draw in watcher.calls} == {np.random.RandomState(5).random()}  # seeded for each matrix


@pytest.mark.parametrize("metric", WEIGHTWATCHER)
def test_a_layer_that_weightwatcher_skips_is_named(metric, watcher, tiny_weights):
    watcher.skipped = matrix(tiny_weights, 3)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.o_proj.*skipped"):
        measure(Measurement(metric), tiny_weights)


def test_the_seed_belongs_to_random_distance(watcher, tmp_path, tiny_weights):
    load_or_measure(Measurement("random_distance", tmp_path, seed=1), "tiny", tiny_weights)
    with pytest.raises(UserError, match="seed"):
        load_or_measure(Measurement("random_distance", tmp_path, seed=2), "tiny", tiny_weights)


@pytest.mark.slow
@pytest.mark.parametrize("metric", WEIGHTWATCHER)
def test_metrics_that_go_through_weightwatcher_repeat_themselves(metric, smollm2_weights):
    block = first_block(smollm2_weights, layers=2)
    first, again = (measure(Measurement(metric), block) for _ in range(2))
    assert first == again and all(0 < value < 1 for value in first.values.values())
