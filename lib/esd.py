"""A weight matrix becomes its spectrum (ESD: empirical spectral density), and the spectrum becomes a number."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

HISTOGRAM_BINS = 100  # of log10(eigenvalue), published
_FEW_POINTS, _MORE_POINTS = 16, 128  # of each candidate's tail, to bound its KS distance from below
_FLOAT32_SLACK = 2e-5  # float32 and float64 KS distances differ by less: 2e-6 at most was seen, up to N = 8192


class Spectrum(NamedTuple):
    """Ascending eigenvalues of W'W (``eigs``: [N] float32) and the shape of W.

    N = min(shape) of a matrix; of a convolution [out, in, kh, kw] kh * kw * min(out, in).
    """

    eigs: Tensor
    shape: tuple[int, ...]


class PowerLaw(NamedTuple):
    """A fitted tail: density ~ e^-alpha from ``eigs[index]`` on, ``distance`` its Kolmogorov-Smirnov distance."""

    alpha: float
    index: int
    distance: float


class NoFit(ValueError):
    """The spectrum admits no power-law fit; the message says why."""


def spectrum(weight: Tensor) -> Spectrum:
    """Return the spectrum of ``weight`` [out, in]: squared float32 singular values, ascending, none dropped.

    Computed on the weight's own device (paper, section 3.1: the ESD of the correlation matrix W'W). Of a convolution
    [out, in, kh, kw]: those of the matrices [out, in] at all kernel positions together, each matrix scaled by sqrt(1/2)
    (published).

    Raises:
        NoFit: the weight holds values that are not finite.
    """
    matrix = weight.detach().to(torch.float32)
    if not torch.isfinite(matrix).all():
        raise NoFit("the weight holds values that are not finite")
    if matrix.ndim == 4:
        matrix = matrix.permute(2, 3, 0, 1) * math.sqrt(0.5)  # [kh, kw, out, in]
    return Spectrum(torch.linalg.svdvals(matrix).square().flatten().sort().values, tuple(weight.shape))


def alpha_mid(spec: Spectrum) -> float:
    """Return the tail exponent of the upper half of the spectrum: the maximum-likelihood fit from index N // 2 on."""
    eigs = _fittable(spec)
    return _alpha_at(eigs, len(eigs) // 2)


def alpha_peak(spec: Spectrum) -> float:
    """Return the tail exponent, its lower end sought around the peak of the log-spectrum (paper, section 3.1)."""
    eigs = _fittable(spec)
    return fit_tail(eigs, peak_candidates(eigs)).alpha


def peak_candidates(eigs: Tensor) -> Tensor:
    """Return the indices [C] at which ``alpha_peak`` may start the tail.

    The window is e >= log10(0.95 * peak) and e <= 1.5 * peak. The published code compares a logarithm with an
    eigenvalue there; every published alpha depends on it, so it stays.
    """
    log10 = torch.log10(eigs)
    low, high = log10[0], log10[-1]
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise NoFit("eigenvalues of zero, or all alike, have no peak in the log-spectrum")
    # On the CPU: a few thousand values, and the bins are then the same on every device.
    counts = torch.histc(log10.cpu(), HISTOGRAM_BINS, min=low.item(), max=high.item())
    edges = torch.linspace(low.item(), high.item(), HISTOGRAM_BINS + 1)
    peak = 10 ** edges[torch.argmax(counts)]
    inside = (eigs[:-1] >= torch.log10(0.95 * peak).item()) & (eigs[:-1] <= (1.5 * peak).item())
    return inside.nonzero().flatten()


def fit_tail(eigs: Tensor, candidates: Tensor) -> PowerLaw:
    """Return the power law with the smallest KS distance among those that start at one of ``candidates``.

    For each start i, alpha(i) = 1 + (N-i) / (sum_{j>=i} ln e_j - (N-i) ln e_i) and
    D(i) = max_{j>=i} |1 - (e_j/e_i)^(1-alpha(i)) - (j-i)/(N-i)|; alpha must exceed 1, the first of equals wins.

    The index is the one that the plain float32 loop over all candidates finds, without that loop: a few points of
    each tail bound D from below; the candidates are then measured in full in the order of their bounds until no
    bound is left below the best; near-ties are settled by the plain float32 formula.

    Args:
        eigs: ascending eigenvalues [N], float32.
        candidates: ascending indices [C], each at most N - 2.

    Raises:
        NoFit: no candidate gives a finite exponent above 1.
    """
    logs = eigs.double().log()
    tail = torch.arange(len(eigs), 0, -1, device=eigs.device, dtype=torch.float64)  # N - i
    exponent = tail / (logs.flip(0).cumsum(0).flip(0) - tail * logs)  # alpha(i) - 1, [N]
    starts = candidates[(exponent[candidates] > 0) & torch.isfinite(exponent[candidates])]
    if not len(starts):
        raise NoFit("no candidate for the start of the tail gives a finite exponent above 1")

    every = torch.arange(len(eigs), device=eigs.device)

    def bound(count: int) -> Tensor:  # the largest distance at ``count`` points of each tail: at most D, [C]
        share = torch.linspace(0, 1, count, device=eigs.device, dtype=torch.float64)
        return _distance(logs, exponent, tail, starts, starts[:, None] + (share * (tail[starts, None] - 1)).long())

    def measured(batch: Tensor) -> Tensor:  # D itself, [B]
        return _distance(logs, exponent, tail, batch, every[None, int(batch.min()) :])

    step = 512 if eigs.is_cuda else 8  # few large kernels there, little wasted work here
    best = measured(starts[bound(_FEW_POINTS).topk(min(step, len(starts)), largest=False).indices]).min().item()
    for count in (_FEW_POINTS, _MORE_POINTS):
        bounds, order = bound(count).sort()
        starts = starts[order[bounds <= best + _FLOAT32_SLACK]]
    bounds = bounds[: len(starts)]
    distances = torch.full_like(bounds, math.inf)
    done = 0
    while done < len(starts) and bounds[done] <= best + _FLOAT32_SLACK:
        distances[done : done + step] = measured(starts[done : done + step])
        best = min(best, distances[done : done + step].min().item())
        done += step
    ties = starts[distances <= best + _FLOAT32_SLACK].sort().values.tolist()
    fits = [fit for fit in (_plain_fit(eigs, i) for i in ties) if fit.alpha > 1 and math.isfinite(fit.alpha)]
    if not fits:
        raise NoFit("no candidate for the start of the tail gives a finite exponent above 1")
    return min(fits, key=lambda fit: (fit.distance, fit.index))


def _distance(logs: Tensor, exponent: Tensor, tail: Tensor, starts: Tensor, points: Tensor) -> Tensor:
    """Return max_j |1 - (e_j/e_i)^(1-alpha_i) - (j-i)/(N-i)| for each start i [C] over its points j >= i of [C or 1, P]."""
    rank = points - starts[:, None]
    model = (logs[starts, None] - logs[points]).mul_(exponent[starts, None]).exp_()
    gap = (rank / tail[starts, None]).add_(model).sub_(1).abs_()
    return gap.masked_fill_(rank < 0, 0).amax(1)


def _plain_fit(eigs: Tensor, start: int) -> PowerLaw:
    """Return the fit from ``start`` on by the published float32 formula, operation by operation."""
    alpha = _alpha_at(eigs, start)
    count = len(eigs) - start
    model = (eigs[start:] / eigs[start]) ** (1 - alpha)
    rank = torch.arange(count, device=eigs.device, dtype=torch.float32)
    return PowerLaw(alpha, start, (1 - model - rank / count).abs().max().item())


def _alpha_at(eigs: Tensor, start: int) -> float:
    logs = eigs.log()
    count = float(len(eigs) - start)
    alpha = (1 + count / (logs[start:].sum() - count * logs[start])).item()
    if not math.isfinite(alpha):
        raise NoFit("the tail holds zeros or equal values only")
    return alpha


def _fittable(spec: Spectrum) -> Tensor:
    if len(spec.eigs) < 3:
        raise NoFit(f"{len(spec.eigs)} eigenvalues are too few")
    if not torch.isfinite(spec.eigs).all():
        raise NoFit("the spectrum holds values that are not finite")
    return spec.eigs
