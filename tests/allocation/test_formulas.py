"""The map from metric to ratio and its cap against slow loops, the published ratios, and what must always hold."""

import math
import random

import pytest

from lib.allocation.formulas import ALLOCATIONS, MAPPINGS, heavy_tailed
from lib.models.layers import Layer
from lib.pruning.plan import SparsityPlan
from lib.spectra.spectrum import spectrum
from lib.spectra.tail import alpha_mid

EXACT = 1e-9


def layers_of(shapes: list[list[tuple[int, int]]]) -> list[Layer]:
    """Return layers of the given shapes, block by block, without weights."""
    return [Layer(f"blocks.{b}.m{i}", b, shape) for b, block in enumerate(shapes) for i, shape in enumerate(block)]


def llama_like(blocks: int, width: int = 4096, inner: int = 11008, kv: int = 4096) -> list[Layer]:
    attention = [(width, width), (kv, width), (kv, width), (width, width)]
    return layers_of([[*attention, (inner, width), (inner, width), (width, inner)]] * blocks)


def values_of(layers, seed: int) -> dict[str, float]:
    draw = random.Random(seed)
    return {layer.name: draw.uniform(1.2, 9) for layer in layers}


def uneven(seed: int) -> list[Layer]:
    draw = random.Random(seed)
    size = lambda: (draw.randint(1, 60), draw.randint(1, 60))  # noqa: E731
    layers = layers_of([[size() for _ in range(draw.randint(1, 5))] for _ in range(draw.randint(2, 9))])
    return [layer._replace(expert=draw.choice(("", "", "experts.0", "experts.1"))) for layer in layers]


def budget_of(layers, ratios) -> float:
    return math.fsum(x.size * ratios[x.name] for x in layers) / sum(x.size for x in layers)


def oracle(layers, target, values, epsilon, mapping) -> dict[str, float]:
    if mapping != "layer_wise":
        metric = {}
        for layer in layers:
            mates = [x for x in layers if x.block == layer.block]
            mates = [x for x in mates if mapping == "block_wise" or x.expert == layer.expert]
            metric[layer.name] = sum(values[x.name] for x in mates) / len(mates)
    else:
        metric = values
    low, high = min(metric[x.name] for x in layers), max(metric[x.name] for x in layers)
    shape = {x.name: 1 - epsilon + 2 * epsilon * (metric[x.name] - low) / (high - low) for x in layers}
    return capped_oracle(shape, layers, target)


def capped_oracle(shape: dict[str, float], layers, target) -> dict[str, float]:
    """Return min(1, c * shape), c by bisection on the budget: what is cut at 1 goes to the others in proportion."""

    def removed(c: float) -> float:
        return budget_of(layers, {name: min(1.0, c * value) for name, value in shape.items()})

    left, right = 0.0, 1.0
    while removed(right) < target:
        right *= 2
    for _ in range(200):
        middle = (left + right) / 2
        left, right = (middle, right) if removed(middle) < target else (left, middle)
    return {x.name: min(1.0, right * shape[x.name]) for x in layers}


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize(
    ("target", "epsilon"), [(0.1, 0.0), (0.5, 0.2), (0.7, 0.3), (0.8, 0.9), (0.95, 0.5), (0.6, 0.999)]
)
@pytest.mark.parametrize("seed", range(4))
def test_ratios_are_those_of_the_definition(seed, target, epsilon, mapping):
    layers = uneven(seed) if seed else llama_like(32)
    values = values_of(layers, seed)
    ratios = heavy_tailed(layers, target, values=values, epsilon=epsilon, mapping_type=mapping)
    assert ratios == pytest.approx(oracle(layers, target, values, epsilon, mapping), abs=EXACT)


def test_pencil():
    # Two blocks of 100 weights, metric 2 and 4: shapes 0.8 and 1.2, scaled by 0.5.
    layers = layers_of([[(10, 10)], [(10, 10)]])
    values = {"blocks.0.m0": 2.0, "blocks.1.m0": 4.0}
    for mapping in MAPPINGS:
        ratios = heavy_tailed(layers, 0.5, values=values, epsilon=0.2, mapping_type=mapping)
        assert list(ratios.values()) == pytest.approx([0.4, 0.6])
    # 300 weights in the second: its ratio r and the first's 2/3 r with 100 * 2/3 r + 300 r = 200.
    layers = layers_of([[(10, 10)], [(10, 30)]])
    ratios = heavy_tailed(layers, 0.5, values=values, epsilon=0.2, mapping_type="block_wise")
    assert list(ratios.values()) == pytest.approx([200 / 366.6666667 * 2 / 3, 200 / 366.6666667])


def test_cap_by_pencil():
    # Three equal blocks, x = 0, 0.5, 1, epsilon 1: shapes 0, 1, 2; target 0.6: 0, 0.6, 1.2 -> 0, 0.8, 1.
    layers = layers_of([[(4, 4)], [(4, 4)], [(4, 4)]])
    values = dict(zip((x.name for x in layers), [1.0, 2.0, 3.0], strict=True))
    ratios = heavy_tailed(layers, 0.6, values=values, epsilon=1.0, mapping_type="layer_wise")
    assert list(ratios.values()) == pytest.approx([0, 0.8, 1], abs=EXACT)


# Relative, of an alpha_mid that is measured on weights: what a float32 SVD's rounding does to it on different CPUs.
ALPHA_ROUNDING = 1e-5


@pytest.mark.slow
def test_published_ratios(golden, smollm2_weights):
    layers = smollm2_weights.layers
    values = smollm2_weights.map(lambda _, weight: alpha_mid(spectrum(weight)))
    largest, spread = max(values.values()), max(values.values()) - min(values.values())
    for key, expected in golden("ratios.json").items():
        metric, mapping, target, epsilon = key.split("/")
        assert metric == "alpha_mid"
        e = float(epsilon[1:])
        ratios = heavy_tailed(layers, float(target[1:]), values=values, epsilon=e, mapping_type=mapping)
        expected = [r for r in expected for _ in range(7)] if mapping == "block_wise" else expected
        if max(expected) > 1:  # published before any cap; the capped ones are in proportion to them
            expected = capped_oracle(dict(zip(ratios, expected, strict=True)), layers, float(target[1:])).values()
        # ratio = c (1 - e + 2 e x), x = (alpha - min) / spread: three alphas with errors, over the smallest factor
        rounding = 2 * e * 3 * ALPHA_ROUNDING * largest / spread / (1 - e)
        assert list(ratios.values()) == pytest.approx(list(expected), rel=rounding), key


# Every allocation, with every mapping if it reads one.
CASES = [
    (name, mapping)
    for name, how in ALLOCATIONS.items()
    for mapping in (MAPPINGS if "mapping_type" in how.flags else ["block_wise"])
]


def flags_of(allocation: str, width: float, mapping: str) -> dict:
    flags = {"epsilon": width, "mapping_type": mapping}
    return {name: flags.get(name, width / 4) for name in ALLOCATIONS[allocation].flags}


@pytest.mark.parametrize(("allocation", "mapping"), CASES)
@pytest.mark.parametrize("seed", range(6))
def test_budget_is_met_and_no_ratio_is_outside(allocation, mapping, seed):
    layers = uneven(seed)
    draw = random.Random(100 + seed)
    for _ in range(20):
        target, epsilon = draw.uniform(0.01, 0.99), draw.uniform(0, 0.99)
        values = {x.name: draw.lognormvariate(1, 1) for x in layers}
        if allocation == "er_plus":  # the last block stays dense: there is a most that can be removed
            target *= sum(x.size for x in layers if x.block < layers[-1].block) / sum(x.size for x in layers)
        ratios = ALLOCATIONS[allocation].share(layers, target, values, **flags_of(allocation, epsilon, mapping))
        assert set(ratios) == {x.name for x in layers}
        assert all(0 <= r <= 1 for r in ratios.values())
        assert budget_of(layers, ratios) == pytest.approx(target, abs=EXACT)
        SparsityPlan(target, ratios)


@pytest.mark.parametrize(
    ("allocation", "mapping"), [case for case in CASES if case[0] in ("", "ww", "owl", "dlp", "lamp", "global")]
)
def test_equal_metrics_give_the_target_to_all_at_any_width(allocation, mapping, caplog):
    layers = llama_like(5)
    flags = flags_of(allocation, 0.98, mapping)
    ratios = ALLOCATIONS[allocation].share(layers, 0.7, {x.name: 3.3 for x in layers}, **flags)
    assert list(ratios.values()) == pytest.approx([0.7] * len(layers), abs=1e-12) and not caplog.records


@pytest.mark.parametrize(
    ("name", "flag", "wide", "mapping"),
    [("ww", "epsilon", 0.98, {"mapping_type": mapping}) for mapping in MAPPINGS]
    + [("owl", "owl_lambda", 0.4, {}), ("dlp", "dlp_alpha", 0.4, {}), ("atp", "atp_beta", 0.15, {})],
)
@pytest.mark.parametrize("target", [0.1, 0.8])
def test_width_of_the_warning_is_the_largest_without_a_cap(name, flag, wide, mapping, target, caplog):
    def warns(width: float) -> bool:
        caplog.clear()
        ALLOCATIONS[name].share(layers, target, values, **{flag: width}, **mapping)
        assert len(caplog.records) <= 1
        return bool(caplog.records)

    warnings = 0
    for seed in range(20):
        layers = uneven(seed)
        values = values_of(layers, seed)
        if warns(wide):
            warnings += 1
            largest = float(caplog.records[0].getMessage().split()[-1])
            assert not warns(largest), "the user types what the line says: rounding up would bring the cap back"
            assert warns(largest + 2e-4)
    assert warnings > 5 or (name, target) == ("ww", 0.1)  # where almost no width needs a cap


@pytest.mark.parametrize("ratio", [-1e-9, 1 + 1e-9, math.nan, math.inf, 7])
def test_plan_refuses_a_ratio_outside(ratio):
    with pytest.raises(ValueError, match=r"blocks\.3"):
        SparsityPlan(0.5, {"blocks.1": 0.5, "blocks.3": ratio})
