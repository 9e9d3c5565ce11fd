"""Spectra and power-law fits against a plain loop, the published figures, and cases a pencil can check."""

import math
import time

import numpy as np
import pytest
import torch

from lib.esd import NoFit, Spectrum, alpha_mid, alpha_peak, fit_tail, peak_candidates, spectrum
from lib.metrics import METRICS


def spec_of(eigs) -> Spectrum:
    eigs = torch.as_tensor(eigs, dtype=torch.float32)
    return Spectrum(eigs, (len(eigs), len(eigs)))


# ------------------------------------------------------------------------- the definition, term by term in float32


def oracle_alpha(eigs: torch.Tensor, i: int) -> torch.Tensor:
    count = len(eigs) - i
    return 1 + count / (torch.log(eigs[i:]).sum() - count * torch.log(eigs[i]))


def oracle_distance(eigs: torch.Tensor, i: int) -> float:
    count = len(eigs) - i
    model = (eigs[i:] / eigs[i]) ** (1 - oracle_alpha(eigs, i))
    empirical = torch.arange(count).float() / count
    return (1 - model - empirical).abs().max().item()


def oracle_fit(eigs: torch.Tensor, candidates) -> tuple[int, float]:
    best = None
    for i in candidates:
        alpha = oracle_alpha(eigs, i).item()
        if alpha > 1 and math.isfinite(alpha):
            distance = oracle_distance(eigs, i)
            if best is None or distance < best[1]:
                best = i, distance, alpha
    return best[0], best[2]


def oracle_candidates(eigs: torch.Tensor) -> list[int]:
    logs = torch.log10(eigs)
    low, high = logs.min(), logs.max()
    counts = [0] * 100
    for value in logs:
        counts[min(int((value - low) * (100 / (high - low))), 99)] += 1
    peak = 10 ** (low.item() + counts.index(max(counts)) * (high - low).item() / 100)
    lower = math.log10(0.95 * peak)  # a logarithm against an eigenvalue, as published
    return [i for i in range(len(eigs) - 1) if eigs[i] >= lower and eigs[i] <= 1.5 * peak]


def random_spectra() -> list:
    draw = np.random.default_rng(0)
    cases = []
    for case in range(40):
        rows, columns = draw.integers(12, 260, 2)
        weight = draw.standard_t(draw.uniform(1.5, 12), size=(rows, columns)) * 10 ** draw.uniform(-2, 1)
        cases.append(pytest.param(np.linalg.svd(weight, compute_uv=False)[::-1] ** 2, id=f"student{case}-{min(rows, columns)}"))
    for case in range(40):
        size = int(draw.integers(5, 700))
        eigs = (1 - draw.random(size)) ** (-1 / draw.uniform(0.3, 6)) * 10 ** draw.uniform(-3, 2)
        cases.append(pytest.param(np.sort(eigs), id=f"pareto{case}-{size}"))
    return cases


def check_against_oracle(eigs: torch.Tensor) -> None:
    every = range(len(eigs) - 1)
    index, alpha = oracle_fit(eigs, every)
    fit = fit_tail(eigs, torch.tensor(every))
    assert (fit.index, fit.alpha) == (index, pytest.approx(alpha, rel=1e-6))
    assert fit.distance == pytest.approx(oracle_distance(eigs, index), abs=1e-6)

    candidates = oracle_candidates(eigs)
    assert peak_candidates(eigs).tolist() == candidates
    index, alpha = oracle_fit(eigs, candidates)
    assert fit_tail(eigs, torch.tensor(candidates)).index == index
    assert alpha_peak(spec_of(eigs)) == pytest.approx(alpha, rel=1e-6)
    assert alpha_mid(spec_of(eigs)) == pytest.approx(oracle_alpha(eigs, len(eigs) // 2).item(), rel=1e-6)


@pytest.mark.parametrize("eigs", random_spectra())
def test_fit_chooses_as_the_loop_does(eigs):
    check_against_oracle(torch.tensor(eigs.copy(), dtype=torch.float32))


def test_fit_of_real_matrices(smollm2_layers):
    for layer in smollm2_layers[1][::23]:
        check_against_oracle(spectrum(layer.module.weight).eigs)


# ------------------------------------------------------------------------------------------- the published figures


def test_published_alphas_from_published_spectra(golden):
    spectra, alphas = golden("spectra.npz"), golden("alphas.json")
    for i, name in enumerate(alphas["names"]):
        spec = spec_of(spectra[name])
        every = torch.arange(len(spec.eigs) - 1)
        assert alpha_peak(spec) == pytest.approx(alphas["alpha_peak"][i], rel=1e-5), name
        assert alpha_mid(spec) == pytest.approx(alphas["alpha_mid"][i], rel=1e-5), name
        assert fit_tail(spec.eigs, every).alpha == pytest.approx(alphas["alpha_all_candidates"][i], rel=1e-5), name


def test_published_alphas_from_the_weights(golden, smollm2_layers):
    alphas = golden("alphas.json")
    jumped = []
    for i, layer in enumerate(smollm2_layers[1][: len(alphas["names"])]):
        assert layer.name == f"model.layers.{alphas['names'][i]}"
        spec = spectrum(layer.module.weight)
        assert alpha_mid(spec) == pytest.approx(alphas["alpha_mid"][i], rel=1e-5), layer.name
        if alpha_peak(spec) != pytest.approx(alphas["alpha_peak"][i], rel=1e-5):
            jumped.append(layer.name)
    assert len(jumped) <= 2, jumped  # two equally full bins, and the SVD's rounding decides between them


# -------------------------------------------------------------------------------------- what can be known beforehand


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


def test_spectrum_is_that_of_the_correlation_matrix():
    weight = torch.randn(20, 33, generator=torch.Generator().manual_seed(0))
    spec = spectrum(weight)
    exact = np.linalg.eigvalsh(weight.double().numpy() @ weight.double().numpy().T)
    assert spec.shape == (20, 33) and spec.eigs.dtype == torch.float32
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
    # The exponent is one of ratios e_j/e_i. Only the window of alpha_peak knows the scale (next two tests).
    weight = student()
    a, b = spectrum(weight), spectrum(weight * scale)
    assert alpha_mid(b) == pytest.approx(alpha_mid(a), rel=1e-4)  # rounding of the SVD's small values
    for i in range(0, 59, 7):
        assert fit_tail(b.eigs, torch.tensor([i])).alpha == pytest.approx(fit_tail(a.eigs, torch.tensor([i])).alpha, rel=1e-4)


def test_scale_leaves_alpha_peak_unchanged_below_one():
    # Once 0.95 * peak < 1 its logarithm is negative and bounds nothing: what is left is e <= 1.5 * peak, free of scale.
    eigs = spectrum(student()).eigs
    eigs = eigs / eigs.max()
    candidates = peak_candidates(eigs)
    assert candidates[0] == 0
    for scale in (2.0**-4, 2.0**-10):  # powers of two: exact in float32
        assert torch.equal(peak_candidates(eigs * scale), candidates)
        assert alpha_peak(spec_of(eigs * scale)) == pytest.approx(alpha_peak(spec_of(eigs)), rel=1e-5)


def test_scale_moves_the_window_of_alpha_peak():
    # The logarithm against an eigenvalue, which published values depend on: at another scale the window's lower end
    # is elsewhere in the spectrum. At a large scale log10(peak) is far below every eigenvalue and bounds nothing.
    eigs = torch.logspace(-1, 1, 50)
    eigs = torch.cat([eigs, torch.full((30,), 12.6)]).sort().values  # the fullest bin is the last one
    starts = [peak_candidates(eigs * scale)[0].item() for scale in (1e-4, 1.0, 1e6)]
    assert starts == [0, sum(e < math.log10(0.95 * 10 ** (math.log10(12.6) * 0.99 - 0.01)) for e in eigs.tolist()), 0]
    assert starts[1] > 10


BAD = {
    "zeros": [0.0] * 10,
    "a zero": [0.0] + list(range(1, 10)),
    "all alike": [2.0] * 10,
    "one": [1.0],
    "none": [],
    "nan": [1.0, 2.0, 3.0, math.nan],
    "inf": [1.0, 2.0, 3.0, math.inf],
}


@pytest.mark.parametrize("eigs", BAD.values(), ids=BAD)
def test_alpha_peak_refuses(eigs):
    with pytest.raises(NoFit):
        alpha_peak(spec_of(eigs))


@pytest.mark.parametrize("eigs", [v for k, v in BAD.items() if k != "a zero"], ids=[k for k in BAD if k != "a zero"])
def test_alpha_mid_refuses(eigs):
    with pytest.raises(NoFit):
        alpha_mid(spec_of(eigs))


def test_alpha_mid_needs_no_more_than_its_tail():
    # A zero below the middle is not in the tail: that matrix has a fit.
    assert alpha_mid(spec_of(BAD["a zero"])) == pytest.approx(oracle_alpha(torch.tensor(BAD["a zero"]).float(), 5).item())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_that_is_not_finite_is_refused(value):
    weight = torch.ones(4, 5)
    weight[1, 2] = value
    with pytest.raises(NoFit, match="not finite"):
        spectrum(weight)


# ---------------------------------------------------------------------------------------- every metric that is listed


@pytest.mark.parametrize("metric", METRICS)
def test_metric_is_a_number_and_the_same_twice(metric):
    value = METRICS[metric](spectrum(student()))
    assert isinstance(value, float) and math.isfinite(value)
    assert METRICS[metric](spectrum(student())) == value


@pytest.mark.parametrize("metric", ["alpha_peak", "alpha_mid"])
def test_exponent_of_a_transposed_matrix_is_the_same(metric):
    # W'W and WW' have the same eigenvalues but for zeros, and none of those is kept.
    weight = student()
    assert METRICS[metric](spectrum(weight.T.contiguous())) == pytest.approx(METRICS[metric](spectrum(weight)), rel=1e-4)


@pytest.mark.parametrize("metric", ["alpha_peak", "alpha_mid"])
def test_exponent_falls_as_the_tail_grows_heavier(metric):
    # Rows of a matrix with a power-law spectrum: heavier tails, smaller alpha (the paper's reading of it).
    q = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))[0]
    u = (torch.arange(80) + 0.5) / 80
    alphas = [METRICS[metric](spectrum(q * (1 - u) ** (-0.5 / (a - 1)))) for a in (2.0, 3.0, 4.5)]
    assert alphas == sorted(alphas) and alphas[0] < alphas[2] - 1


def test_fit_is_twenty_times_faster_than_the_loop(golden):
    # A real spectrum, stretched to 4096 values. The loop's time is that of a sample of its candidates, scaled up.
    logs = np.log(golden("spectra.npz")["5.mlp.up_proj"])
    eigs = torch.tensor(np.exp(np.interp(np.linspace(0, len(logs) - 1, 4096), np.arange(len(logs)), logs))).float()
    sample = range(0, 4095, 65)
    loop, fast = [], []
    for _ in range(3):
        start = time.perf_counter()
        oracle_fit(eigs, sample)
        loop.append((time.perf_counter() - start) * 4095 / len(sample))
        start = time.perf_counter()
        fit_tail(eigs, torch.arange(4095))
        fast.append(time.perf_counter() - start)
    assert min(loop) > 20 * min(fast), (min(loop), min(fast))  # over 100 times when nothing else runs


@pytest.mark.gpu
def test_fit_on_cuda_is_that_on_the_cpu():
    weight = student(300, 500)
    here, there = spectrum(weight), spectrum(weight.cuda())
    assert there.eigs.is_cuda
    torch.testing.assert_close(there.eigs.cpu(), here.eigs, rtol=1e-3, atol=1e-5)
    moved = Spectrum(here.eigs.cuda(), here.shape)  # the very same spectrum
    assert alpha_peak(moved) == pytest.approx(alpha_peak(here), rel=1e-5)
    assert alpha_mid(moved) == pytest.approx(alpha_mid(here), rel=1e-5)
