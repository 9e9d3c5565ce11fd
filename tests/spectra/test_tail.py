"""Spectra and power-law fits against a plain loop, the published figures, and cases a pencil can check."""

import logging
import math

import numpy as np
import oracles
import pytest
import torch
from conftest import fast

from lib.spectra.spectrum import DRIVERS, Farms, NoFit, Spectrum, farms_windows, spectrum
from lib.spectra.tail import METRICS, alpha_mid, alpha_peak, fit_tail, peak_candidates


def spec_of(eigs) -> Spectrum:
    eigs = torch.as_tensor(eigs, dtype=torch.float32)
    return Spectrum(eigs, (len(eigs), len(eigs)))


def random_spectra() -> list:
    """Return spectra of random matrices and values drawn from two laws, in turn; the first has equal values."""
    draw = np.random.default_rng(0)
    cases = [pytest.param([1.0] * 5 + [2.0] * 5 + [4.0] * 5 + [8.0] * 2, id="ties")]
    for case in range(40):
        rows, columns = draw.integers(12, 260, 2)
        weight = draw.standard_t(draw.uniform(1.5, 12), size=(rows, columns)) * 10 ** draw.uniform(-2, 1)
        size = int(draw.integers(5, 700))
        eigs = {
            "matrix": np.linalg.svd(weight, compute_uv=False) ** 2,
            "pareto": (1 - draw.random(size)) ** (-1 / draw.uniform(0.3, 6)) * 10 ** draw.uniform(-3, 2),
            "student": draw.standard_t(1 + case % 5, size) ** 2 + 1e-12,
        }
        cases += [pytest.param(np.sort(values), id=f"{kind}{case}-{len(values)}") for kind, values in eigs.items()]
    return cases


def check_against_oracle(eigs: torch.Tensor) -> None:
    every = range(len(eigs) - 1)
    index, alpha = oracles.best_fit(eigs, every)
    fit = fit_tail(eigs, torch.tensor(every))
    assert (fit.index, fit.alpha) == (index, alpha)
    assert fit.distance == pytest.approx(oracles.tail_fit(eigs, eigs.log(), index)[1], abs=1e-6)
    assert alpha_mid(spec_of(eigs)) == oracles.tail_fit(eigs, eigs.log(), len(eigs) // 2)[0]

    candidates = oracles.peak_candidates(eigs)
    assert peak_candidates(eigs).tolist() == candidates
    index, alpha = oracles.best_fit(eigs, candidates)
    assert fit_tail(eigs, torch.tensor(candidates)).index == index
    assert alpha_peak(spec_of(eigs)) == alpha


@pytest.mark.parametrize("eigs", fast(random_spectra(), 34))
def test_fit_chooses_as_the_loop_does(eigs):
    check_against_oracle(torch.tensor(eigs, dtype=torch.float32))


@pytest.mark.parametrize("place", fast(range(0, 105, 8), 3))
def test_fit_of_real_matrices_chooses_as_the_loop_does(place, golden):
    spectra = golden("spectra.npz")
    check_against_oracle(torch.tensor(spectra[spectra.files[place]]))


def test_published_alphas_from_published_spectra(golden):
    spectra, alphas = golden("spectra.npz"), golden("alphas.json")
    for i, name in enumerate(alphas["names"]):
        spec = spec_of(spectra[name])
        every = torch.arange(len(spec.eigs) - 1)
        assert alpha_peak(spec) == pytest.approx(alphas["alpha_peak"][i], rel=1e-5), name
        assert alpha_mid(spec) == pytest.approx(alphas["alpha_mid"][i], rel=1e-5), name
        assert fit_tail(spec.eigs, every).alpha == pytest.approx(alphas["alpha_all_candidates"][i], rel=1e-5), name


@pytest.mark.parametrize("matrices", fast([14, 105], 1))
def test_published_alphas_from_the_weights(matrices, golden, smollm2_weights):
    alphas = golden("alphas.json")
    jumped = []
    for i, name in enumerate(alphas["names"][:matrices]):
        spec = spectrum(smollm2_weights.model.get_submodule(f"model.layers.{name}").weight)
        assert alpha_mid(spec) == pytest.approx(alphas["alpha_mid"][i], rel=1e-5), name
        if alpha_peak(spec) != pytest.approx(alphas["alpha_peak"][i], rel=1e-5):
            jumped.append(name)
    assert len(jumped) <= 2, jumped  # two equally full bins, and the SVD's rounding decides between them


def test_pencil():
    # Eigenvalues 1 2 4 8, ln 2 = L. From 0: 1 + 4/(6L), from 1: 1 + 1/L, from 2: 1 + 2/L. KS from 0: j = 1 decides,
    # 1 - 2^(-4/(6L)) - 1/4; from 1: j = 2, 1 - 1/e - 1/3; from 2: j = 3, 1 - 1/e^2 - 1/2.
    eigs, ln2 = torch.tensor([1.0, 2.0, 4.0, 8.0]), math.log(2)
    assert alpha_mid(spec_of(eigs)) == pytest.approx(1 + 2 / ln2, rel=1e-6)
    fit = fit_tail(eigs, torch.tensor([0, 1, 2]))
    assert (fit.index, fit.alpha) == (0, pytest.approx(1 + 4 / (6 * ln2), rel=1e-6))
    assert fit.distance == pytest.approx(1 - math.exp(-2 / 3) - 1 / 4, abs=1e-6)
    assert fit_tail(eigs, torch.tensor([1])).distance == pytest.approx(1 - 1 / math.e - 1 / 3, abs=1e-6)
    assert fit_tail(eigs, torch.tensor([2])).distance == pytest.approx(1 - 1 / math.e**2 - 1 / 2, abs=1e-6)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
def test_spectrum_is_that_of_the_correlation_matrix(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spec, wide = spectrum(weight), weight.double().numpy()
    exact = np.linalg.eigvalsh(wide @ wide.T)[-20:]  # the others are zeros
    assert spec.shape == shape and spec.eigs.dtype == torch.float32
    np.testing.assert_allclose(spec.eigs.numpy(), exact, rtol=2e-5)  # float32: some 1e-7 of the largest value
    assert torch.equal(spec.eigs, spec.eigs.sort().values)


def test_no_eigenvalue_is_dropped():
    spec = spectrum(torch.diag(torch.tensor([3.0, 0.0, 1e-6, 2.0])))
    assert spec.eigs.tolist() == pytest.approx([0, 1e-12, 4, 9], rel=1e-5, abs=1e-16)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_measured_in_float32(half):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).to(half)
    assert torch.equal(spectrum(weight).eigs, spectrum(weight.float()).eigs)


@pytest.mark.parametrize("exponent", [2.0, 2.5, 3.5, 5.0])
def test_power_law_gives_its_exponent_back(exponent):
    # Density ~ e^-a above 1, drawn through the inverse of its distribution. The estimate from n values scatters by
    # (a - 1)/sqrt(n); 4 of that, and alpha_peak may choose among some hundred starts of the tail.
    draw = torch.rand(4000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    eigs = ((1 - draw) ** (-1 / (exponent - 1))).sort().values.float()
    assert alpha_mid(spec_of(eigs)) == pytest.approx(exponent, abs=4 * (exponent - 1) / math.sqrt(2000))
    fit = fit_tail(eigs, peak_candidates(eigs))
    assert fit.alpha == pytest.approx(exponent, abs=4 * (exponent - 1) / math.sqrt(len(eigs) - fit.index))


def student(rows: int = 60, columns: int = 90) -> torch.Tensor:
    draw = np.random.default_rng(7)
    return torch.tensor(draw.standard_t(3, (rows, columns)), dtype=torch.float32)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 7.0, 1e3])
def test_scale_leaves_alpha_mid_and_each_fit_unchanged(scale):
    # The exponent is one of ratios e_j/e_i. Only the window of alpha_peak knows the scale, as published.
    weight = student()
    a, b = spectrum(weight), spectrum(weight * scale)
    assert alpha_mid(b) == pytest.approx(alpha_mid(a), rel=1e-4)  # rounding of the SVD's small values
    for i in range(0, 59, 7):
        scaled, plain = (fit_tail(spec.eigs, torch.tensor([i])).alpha for spec in (b, a))
        assert scaled == pytest.approx(plain, rel=1e-4)


BAD = {
    "zeros": [0.0] * 10,
    "a zero": [0.0] + list(range(1, 10)),
    "all alike": [2.0] * 10,
    "one": [1.0],
    "none": [],
    "nan": [1.0, 2.0, 3.0, math.nan],
    "inf": [1.0, 2.0, 3.0, math.inf],
}


@pytest.mark.parametrize("metric", [alpha_peak, alpha_mid])
@pytest.mark.parametrize("case", BAD)
def test_a_spectrum_without_a_tail_is_refused(metric, case):
    if (metric, case) != (alpha_mid, "a zero"):  # which is not in that tail
        with pytest.raises(NoFit):
            metric(spec_of(BAD[case]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_that_is_not_finite_is_refused(value):
    weight = torch.ones(4, 5)
    weight[1, 2] = value
    with pytest.raises(NoFit, match="not finite"):
        spectrum(weight)


@pytest.mark.gpu
def test_spectrum_of_weights_on_cuda():
    weight = student(300, 500)
    assert torch.equal(spectrum(weight.cuda()).eigs, spectrum(weight).eigs), "LAPACK's, wherever the weight is"
    torch.testing.assert_close(spectrum(weight.cuda(), "fast").eigs, spectrum(weight, "fast").eigs, rtol=1e-6, atol=0)


WATCHED = [metric for metric in METRICS if metric not in ("alpha_peak", "alpha_mid")]


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 13, 29])
def test_metrics_are_weightwatchers(block, smollm2_weights):
    from weightwatcher import WeightWatcher

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    module = smollm2_weights.modules[block]
    table = WeightWatcher(model=module).analyze()
    assert len(table) == 7
    for _, row in table.iterrows():
        for driver in DRIVERS:
            spec = spectrum(module.get_submodule(row["longname"]).weight, driver)
            for metric in WATCHED:  # weightwatcher takes float64 singular values, those of the exact driver are float32
                assert METRICS[metric](spec) == pytest.approx(row[metric], rel=1e-3), (row["longname"], metric)


def test_metrics_by_pencil():
    spec = spec_of([1.0, 1.0, 2.0, 4.0])
    assert METRICS["spectral_norm"](spec) == 4 and METRICS["norm"](spec) == 8 and METRICS["stable_rank"](spec) == 2
    assert METRICS["log_spectral_norm"](spec) == pytest.approx(math.log10(4))
    assert METRICS["log_norm"](spec) == pytest.approx(math.log10(8))
    # Shares 1/8 1/8 1/4 1/2: 3/8 + 3/8 + 1/2 + 1/2 bits of 2.
    assert METRICS["entropy"](spec) == pytest.approx(1.75 / 2)
    assert METRICS["entropy"](spec_of([3.0, 3.0, 3.0])) == pytest.approx(1)
    alpha = METRICS["alpha"](spec)
    assert METRICS["alpha_weighted"](spec) == pytest.approx(alpha * math.log10(4))
    assert METRICS["log_alpha_norm"](spec) == pytest.approx(math.log10(2 + 2**alpha + 4**alpha))


@pytest.mark.parametrize("metric", ["spectral_norm", "norm", "stable_rank", "entropy", "log_norm"])
def test_norms_of_nothing_are_refused(metric):
    with pytest.raises(NoFit):
        METRICS[metric](spec_of([0.0, 0.0, 0.0]))


@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30)])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4])
def test_fast_driver_is_closer_to_the_truth(shape, condition):
    generator = torch.Generator().manual_seed(7)
    rank = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator, dtype=torch.float64))[0]
    svals = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    weight = (left * svals @ right.T).float()
    truth = torch.linalg.svdvals(weight.double()).square().flip(0)
    fast, exact = spectrum(weight, "fast"), spectrum(weight)
    assert not fast.fell_back and fast.eigs.dtype == torch.float32 and (fast.eigs.diff() >= 0).all()
    # Rounding to float32, and what cancels in W'W: 2 sqrt(N) eps of the largest eigenvalue.
    noise = 2 * math.sqrt(rank) * 2.3e-16 * condition**2 + 6e-8
    assert ((fast.eigs.double() - truth).abs() / truth).max() < noise
    assert (fast.eigs.double() - truth).abs().max() <= (exact.eigs.double() - truth).abs().max() + 1e-7


@pytest.mark.parametrize("shape", [(40, 40), (30, 90)])
def test_fast_driver_gives_way_where_float64_does_not_suffice(shape):
    weight = student(*shape)
    weight[1] = weight[0] * (1 + 1e-7)  # all but singular: its Gram matrix has an eigenvalue of rounding errors
    fast = spectrum(weight, "fast")
    truth = torch.linalg.svdvals(weight.double()).square().flip(0)
    assert fast.fell_back
    assert torch.allclose(fast.eigs.double()[1:], truth[1:], rtol=1e-6)
    assert (fast.eigs >= 0).all()


def test_farms_windows_by_pencil():
    assert farms_windows((100, 60), Farms(50, 1.0, 4)) == ((50, 50), [0, 16, 32, 48], [0, 3, 6, 9])
    assert farms_windows((100, 60), Farms(2000, 1.0, 3)) == ((60, 60), [0, 20, 40], [0])  # cut to the shorter side
    assert farms_windows((100, 60), Farms(20, 0.5, 2)) == ((20, 10), [0, 80], [0, 50])
    assert farms_windows((12, 12), Farms(10, 1.0, 6)) == ((10, 10), [0, 1, 2], [0, 1, 2])  # room for three places only
    assert farms_windows((12, 12), Farms(10, 1.0, 1)) == ((10, 10), [0], [0])
    with pytest.raises(NoFit, match="30x45.*32x40"):
        farms_windows((32, 40), Farms(30, 1.5, 3))


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("shape", "farms"), [((70, 50), Farms(30, 1.0, 3)), ((40, 90), Farms(25, 2.0, 4)), ((33, 33), Farms(11, 0.7, 5))]
)
def test_farms_spectrum_is_the_union_of_the_windows(shape, farms, driver, monkeypatch):
    weight = student(*shape)
    height, width = farms.rows, int(farms.rows * farms.ratio)
    eigenvalues = []
    for i in range(farms.steps):
        for j in range(farms.steps):
            y = i * max(1, (shape[0] - height) // (farms.steps - 1))
            x = j * max(1, (shape[1] - width) // (farms.steps - 1))
            eigenvalues += torch.linalg.svdvals(weight[y : y + height, x : x + width].double()).square().tolist()
    expected = torch.tensor(sorted(eigenvalues))
    eigs = spectrum(weight, driver, farms).eigs
    assert torch.allclose(eigs, expected, rtol=1e-3, atol=1e-6 * expected[-1].item())
    monkeypatch.setattr("lib.spectra.spectrum._BATCH_ENTRIES", 1)  # one window at a time
    assert torch.allclose(spectrum(weight, driver, farms).eigs, eigs, rtol=1e-5)
