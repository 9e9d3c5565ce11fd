"""Tails of spectra: power-law fits and the other metrics of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lib.core.lazy import torch
from lib.spectra.spectrum import NoFit, Spectrum

# Bins of the histogram of log10(eigenvalue), as published.
HISTOGRAM_BINS = 100
# Points of each candidate's tail at which its KS distance is bounded from below.
_POINTS = 8
# Candidates that are measured in full at a time; more would mostly be wasted work.
_BATCH = 4
# Float32 and float64 KS distances differ by less: 2e-6 at most was seen, up to N = 8192.
_FLOAT32_SLACK = 2e-5


class PowerLaw(NamedTuple):
    """A fitted tail: density ~ e^-alpha from ``eigs[index]`` on, ``distance`` its Kolmogorov-Smirnov distance."""

    alpha: float
    index: int
    distance: float


def alpha_mid(spec: Spectrum) -> float:
    """Return the tail exponent of the upper half of the spectrum: the maximum-likelihood fit from index N // 2 on."""
    eigs = _finite(spec, 3)
    return _alpha_at(eigs, len(eigs) // 2)


def alpha_peak(spec: Spectrum) -> float:
    """Return the tail exponent, the tail's start searched around the log-spectrum's peak (paper, section 3.1)."""
    eigs = _finite(spec, 3)
    return fit_tail(eigs, peak_candidates(eigs)).alpha


def alpha(spec: Spectrum) -> float:
    """Return the tail exponent, the tail's start searched among all eigenvalues but the last (weightwatcher)."""
    eigs = _finite(spec, 3)
    return fit_tail(eigs, torch.arange(len(eigs) - 1)).alpha


def entropy(spec: Spectrum) -> float:
    """Return the Shannon entropy of the eigenvalues' shares of their sum, divided by the log of the matrix's rank."""
    eigs = _positive(spec)
    svals = eigs.sqrt()
    rank = int((svals > svals[-1] * max(spec.shape) * torch.finfo(svals.dtype).eps).sum())
    if rank < 2:
        raise NoFit("a matrix of rank one has no entropy")
    share = eigs / eigs.sum()
    return -torch.special.xlogy(share, share).sum().item() / math.log(rank)


def log_alpha_norm(spec: Spectrum) -> float:
    """Return log10 of the sum of the eigenvalues to the power of alpha."""
    logs = _positive(spec).log()
    return torch.logsumexp(alpha(spec) * logs, 0).item() / math.log(10)  # the powers themselves may overflow


def _positive(spec: Spectrum) -> torch.Tensor:
    """Return the eigenvalues in float64; at least one must be above zero."""
    eigs = _finite(spec, 1).double()
    if eigs[-1] <= 0:
        raise NoFit("the matrix is zero")
    return eigs


def peak_candidates(eigs: torch.Tensor) -> torch.Tensor:
    """Return the indices [C] at which ``alpha_peak`` may start the tail: log10(0.95 * peak) <= e <= 1.5 * peak.

    The published code thus compares a logarithm with an eigenvalue; every published alpha depends on it.
    """
    log10 = torch.log10(eigs)
    low, high = log10[0], log10[-1]
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise NoFit("eigenvalues of zero, or all alike, have no peak in the log-spectrum")
    counts = torch.histc(log10, HISTOGRAM_BINS, min=low.item(), max=high.item())
    edges = torch.linspace(low.item(), high.item(), HISTOGRAM_BINS + 1)
    peak = 10 ** edges[torch.argmax(counts)]
    inside = (eigs[:-1] >= torch.log10(0.95 * peak).item()) & (eigs[:-1] <= (1.5 * peak).item())
    return inside.nonzero().flatten()


def fit_tail(eigs: torch.Tensor, candidates: torch.Tensor) -> PowerLaw:
    """Return the power law with the smallest KS distance among those that start at one of ``candidates``.

    For each start i, alpha(i) = 1 + (N-i) / (sum_{j>=i} ln e_j - (N-i) ln e_i) and
    D(i) = max_{j>=i} |1 - (e_j/e_i)^(1-alpha(i)) - (j-i)/(N-i)|; alpha must exceed 1, or it is NoFit; the first of
    equals wins. ``eigs`` [N] and ``candidates`` [C], each at most N - 2, ascend.

    The index equals that of the plain float32 loop over all candidates, without running it: a few points of each tail
    bound D from below; candidates are then measured in full in the order of their bounds until no remaining bound is
    below the best; near-ties are settled by the plain float32 formula.
    """
    logs = eigs.double().log()
    tail = torch.arange(len(eigs), 0, -1, dtype=torch.float64)  # N - i
    exponent = tail / (logs.flip(0).cumsum(0).flip(0) - tail * logs)  # alpha(i) - 1, [N]
    starts = candidates[(exponent[candidates] > 0) & torch.isfinite(exponent[candidates])]

    def gaps(starts: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Return |1 - (e_j/e_i)^(1-alpha_i) - (j-i)/(N-i)| for starts i [C] at points j [C or 1, P]; 0 for j < i."""
        rank = points - starts[:, None]
        model = (logs[starts, None] - logs[points]).mul_(exponent[starts, None]).exp_()
        gap = (rank / tail[starts, None]).add_(model).sub_(1).abs_()
        return gap.masked_fill_(rank < 0, 0)

    every = torch.arange(len(eigs))
    share = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
    points = starts[:, None] + (share * (tail[starts, None] - 1)).long()  # [C, P]
    bounds = gaps(starts, points).amax(1)  # of D from below, [C]

    best, near = math.inf, []
    while len(starts):
        first = bounds.topk(min(_BATCH, len(starts)), largest=False).indices
        measured = starts[first]
        distances, worst = gaps(measured, every[None, int(measured.min()) :]).max(1)
        near += zip(distances.tolist(), measured.tolist(), strict=True)
        best = min(best, distances.min().item())
        bounds[first] = math.inf
        left = bounds <= best + _FLOAT32_SLACK
        starts, bounds = starts[left], bounds[left]

        # Where a tail is farthest from its law, its neighbours are far from theirs: the next bounds are tight.
        points = (worst + measured.min()).unique()[None]
        bounds = torch.maximum(bounds, gaps(starts, points).amax(1))
        left = bounds <= best + _FLOAT32_SLACK
        starts, bounds = starts[left], bounds[left]

    ties = sorted(start for distance, start in near if distance <= best + _FLOAT32_SLACK)
    fits = [fit for fit in (_plain_fit(eigs, i) for i in ties) if fit.alpha > 1 and math.isfinite(fit.alpha)]
    if not fits:
        raise NoFit("no candidate for the start of the tail gives a finite exponent above 1")
    return min(fits, key=lambda fit: (fit.distance, fit.index))


def _plain_fit(eigs: torch.Tensor, start: int) -> PowerLaw:
    """Return the fit from ``start`` on by the published float32 formula, operation by operation."""
    alpha = _alpha_at(eigs, start)
    count = len(eigs) - start
    model = (eigs[start:] / eigs[start]) ** (1 - alpha)
    rank = torch.arange(count, dtype=torch.float32)
    return PowerLaw(alpha, start, (1 - model - rank / count).abs().max().item())


def _alpha_at(eigs: torch.Tensor, start: int) -> float:
    logs = eigs.log()
    count = float(len(eigs) - start)
    alpha = (1 + count / (logs[start:].sum() - count * logs[start])).item()
    if not math.isfinite(alpha):
        raise NoFit("the tail holds zeros or equal values only")
    return alpha


def _finite(spec: Spectrum, least: int) -> torch.Tensor:
    if len(spec.eigs) < least:
        raise NoFit(f"{len(spec.eigs)} eigenvalues are too few")
    if not torch.isfinite(spec.eigs).all():
        raise NoFit("the spectrum holds values that are not finite")
    return spec.eigs


# A layer's number from its spectrum; a new metric is one function and one line. All are mapped the same way, a larger
# number to a higher sparsity, as published. For alpha, the stable rank and the entropy that is the theory's direction
# (larger: less heavy-tailed, less well trained); for the norms it is the published choice. The norms are squared, as
# weightwatcher defines them: the largest eigenvalue is the spectral norm, and the sum of all is the Frobenius norm.
METRICS: dict[str, Callable[[Spectrum], float]] = {
    "alpha_peak": alpha_peak,
    "alpha_mid": alpha_mid,
    "alpha": alpha,
    "alpha_weighted": lambda spec: alpha(spec) * math.log10(_positive(spec)[-1]),
    "log_alpha_norm": log_alpha_norm,
    "spectral_norm": lambda spec: _positive(spec)[-1].item(),
    "log_spectral_norm": lambda spec: math.log10(_positive(spec)[-1]),
    "norm": lambda spec: _positive(spec).sum().item(),
    "log_norm": lambda spec: math.log10(_positive(spec).sum()),
    "stable_rank": lambda spec: (_positive(spec).sum() / _positive(spec)[-1]).item(),
    "entropy": entropy,
}
# Metrics that weightwatcher measures: the column of its table, and what makes it fill that column.
WEIGHTWATCHER: dict[str, tuple[str, dict[str, bool]]] = {
    "mp_softrank": ("mp_softrank", {"mp_fit": True}),
    "random_distance": ("rand_distance", {"randomize": True}),
}
