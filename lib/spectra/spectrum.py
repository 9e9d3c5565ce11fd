"""Spectra: eigenvalues of weight matrices, whole or in windows of one aspect ratio (FARMS)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lib.core.lazy import torch

# Numbers in the FARMS windows that are decomposed at a time: 256 MiB in float32.
_BATCH_ENTRIES = 2**26


class Spectrum(NamedTuple):
    """Ascending eigenvalues of W'W, as float32 on the CPU."""

    eigs: torch.Tensor  # [N], N = min(shape), of a convolution [out, in, kh, kw] kh * kw * min(out, in)
    shape: tuple[int, ...]
    fell_back: bool = False  # whether the fast driver was replaced by an SVD


class Farms(NamedTuple):
    """Windows of FARMS (Hu et al., ICML 2025): ``rows`` x int(rows * ratio), at ``steps`` places in each direction."""

    rows: int = 2000
    ratio: float = 1.0
    steps: int = 15


class NoFit(ValueError):
    """The spectrum admits no power-law fit; the message gives the reason."""


def spectrum(weight: torch.Tensor, driver: str = "exact", farms: Farms | None = None) -> Spectrum:
    """Return the spectrum of ``weight`` [out, in]: its squared singular values, ascending, none dropped.

    They are the ESD of the correlation matrix W'W (paper, section 3.1). For a convolution [out, in, kh, kw] they are
    those of the matrices [out, in] at all kernel positions together, each matrix scaled by sqrt(1/2) (published).
    ``driver`` is a name of DRIVERS: ``exact`` computes on the CPU, ``fast`` on the weight's own device. With ``farms``,
    the spectra of its windows are joined instead. Values that are not finite, or a window that is larger than the
    matrix, raise NoFit.
    """
    matrix = weight.detach()
    if not torch.isfinite(matrix).all():
        raise NoFit("the weight holds values that are not finite")

    if farms is not None:
        (height, width), tops, lefts = farms_windows(tuple(matrix.shape), farms)
        windows = [matrix[y : y + height, x : x + width] for y in tops for x in lefts]  # views
        count = max(1, _BATCH_ENTRIES // (height * width))
        batches = (torch.stack(windows[first : first + count]) for first in range(0, len(windows), count))
    elif matrix.ndim == 4:
        batches = [matrix.float().permute(2, 3, 0, 1).flatten(0, 1) * math.sqrt(0.5)]  # [kh * kw, out, in]
    else:
        batches = [matrix[None]]  # [1, out, in]

    spectra = [DRIVERS[driver](batch) for batch in batches]
    eigs = torch.cat([eigs.flatten().cpu() for eigs, _ in spectra]).sort().values
    return Spectrum(eigs, tuple(weight.shape), any(fell_back for _, fell_back in spectra))


def _exact(matrices: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return LAPACK's squared float32 singular values of ``matrices`` [B, out, in], ascending, as published."""
    return torch.linalg.svdvals(matrices.cpu().float()).square().flip(-1), False


def _fast(matrices: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return the eigenvalues of the float64 Gram matrices on the shorter side, and whether an SVD was needed.

    Their errors are about 2 sqrt(N) eps of the largest eigenvalue: if that exceeds 1e-3 of the smallest (a float32 SVD
    would then be off by more), the matrix gets a float64 SVD. A float32 Gram matrix has negative eigenvalues.
    """
    wide = matrices.double()
    wide = wide if wide.shape[-2] <= wide.shape[-1] else wide.mT
    eigs = torch.linalg.eigvalsh(wide @ wide.mT)
    noise = 2e3 * math.sqrt(eigs.shape[-1]) * torch.finfo(torch.float64).eps
    bad = eigs[:, 0] <= noise * eigs[:, -1]
    if bad.any():
        eigs[bad] = torch.linalg.svdvals(wide[bad]).square().flip(-1)
    return eigs.float(), bool(bad.any())


# How the singular values are computed: [B, out, in] -> ([B, N] float32 eigenvalues, ascending; was there a fallback).
DRIVERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, bool]]] = {"exact": _exact, "fast": _fast}


def farms_windows(shape: tuple[int, int], farms: Farms) -> tuple[tuple[int, int], list[int], list[int]]:
    """Return the windows' shape, and the rows and columns at which they start; NoFit if one has too many columns."""
    rows = min(farms.rows, *shape)  # limited to the matrix's shorter side
    window = (rows, int(rows * farms.ratio))
    if not 0 < window[1] <= shape[1]:
        raise NoFit(f"windows of {window[0]}x{window[1]} do not fit into a matrix of {shape[0]}x{shape[1]}")
    starts = []
    for size, length in zip(shape, window, strict=True):
        room = size - length
        step = max(1, room // (farms.steps - 1)) if farms.steps > 1 else 1
        # In a small matrix several would start at the same place: each is taken once.
        starts.append(sorted({min(i * step, room) for i in range(farms.steps)}))
    return window, *starts
