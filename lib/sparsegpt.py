"""Weights, a Hessian and a ratio become repaired weights (SparseGPT: Frantar & Alistarh, 2023)."""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from lib.selection import nth_smallest

log = logging.getLogger(__name__)

BLOCK = 128  # columns per block, published
DAMPING = 0.01  # share of the Hessian's mean diagonal, published
RETRIES = 2  # each with ten times the damping


class Factor(NamedTuple):
    """``upper`` [in, in], the upper Cholesky factor of the inverse damped Hessian, and the ``dead`` columns [in]."""

    upper: Tensor
    dead: Tensor


class NotPositiveDefinite(ValueError):
    """The Hessian could not be factorised, whatever damping was tried."""


def inverse_factor(hessian: Tensor) -> Factor:
    """Return the factor U with inv(H + damping) = U'U, H: [in, in] float32. U takes H's place in memory.

    A column whose input was always zero gets H = 1. A Hessian that is not positive definite is tried again with ten
    times the damping, twice, with a warning. No more than two matrices of this size are held, H among them.

    Raises:
        NotPositiveDefinite: and then still it is not, or its inverse overflows.
    """
    hessian = hessian.contiguous()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    damp = DAMPING * diagonal.mean()
    # H reversed in both axes = LL' gives H = RR' with R = L reversed, upper triangular, so that U = inv(R): one
    # factorisation and one triangular solve, where the plain way (factorise, invert, factorise) does three.
    _reverse(hessian)
    lower = torch.empty_like(hessian).mT  # by columns, as LAPACK and cuSOLVER want it: no copies are made
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(RETRIES + 1):
        diagonal += damp if attempt == 0 else damp * (10**attempt - 10 ** (attempt - 1))
        torch.linalg.cholesky_ex(hessian, out=(lower, failed))
        if ((failed == 0) & torch.isfinite(lower.diagonal()).all()).item():
            break
        if attempt == RETRIES:
            told = f"even with {DAMPING * 10**RETRIES:g} of damping"
            raise NotPositiveDefinite(f"its Hessian is not positive definite, {told}")
        log.warning("a Hessian is not positive definite; its damping is raised tenfold")
    _reverse(lower.mT)
    upper = hessian.zero_().fill_diagonal_(1).mT  # H has served; the identity, by columns
    torch.linalg.solve_triangular(lower, upper, upper=True, out=upper)
    if not torch.isfinite(torch.stack(torch.aminmax(hessian))).all():  # these two show every NaN and infinity
        raise NotPositiveDefinite("the inverse of its Hessian is not finite")
    return Factor(upper, dead)


def _reverse(matrix: Tensor) -> None:
    """Reverse both axes of a contiguous ``matrix`` in place: a flip would make a copy."""
    flat = matrix.view(-1)
    half, chunk = len(flat) // 2, BLOCK * len(matrix)
    for left in range(0, half, chunk):
        right = min(left + chunk, half)
        head, tail = flat[left:right], flat[len(flat) - right : len(flat) - left]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)


def repair(weight: Tensor, factor: Factor, ratio: float, nm: tuple[int, int] | None) -> Tensor:
    """Return ``weight`` [out, in] with ``ratio`` of each block of 128 columns zeroed and the others making up for it.

    Args:
        ratio: fraction to remove, in [0, 1]; not used with ``nm``.
        nm: (N, M), keep N of every M columns, chosen group by group from the weights as updated so far.
    """
    rows, columns = weight.shape
    w = torch.empty(columns, rows, device=weight.device)  # [in, out] float32: a column of W is a row in memory
    w.copy_(weight.detach().T).masked_fill_(factor.dead[:, None], 0)
    upper, diagonal = factor.upper, factor.upper.diagonal()
    width = BLOCK if nm is None else max(nm[1], BLOCK - BLOCK % nm[1])  # a group never straddles two blocks
    for left in range(0, columns, width):
        right = min(left + width, columns)
        block, errors = w[left:right], torch.empty_like(w[left:right])  # [block, out]
        if nm is None:
            remove = _smallest(block.square() / diagonal[left:right, None].square(), ratio)
        for i in range(right - left):
            if nm is not None and i % nm[1] == 0:
                group = slice(i, i + nm[1])
                score = block[group].square() / diagonal[left:right][group, None].square()  # [M, out]
                lowest = score.topk(nm[1] - nm[0], dim=0, largest=False).indices
                chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(0, lowest, True)
            gone = remove[i] if nm is None else chosen[i % nm[1]]
            row = upper[left + i, left:right]
            torch.mul(block[i] / row[i], gone, out=errors[i])
            block[i].masked_fill_(gone, 0)
            block[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
        w[right:].addmm_(upper[left:right, right:].T, errors, alpha=-1)
    return torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(w.T)


def _smallest(score: Tensor, ratio: float) -> Tensor:
    """Return a mask of the entries up to the int(n * ratio)-th (from 0) of the sorted scores, inclusive (published)."""
    index = int(score.numel() * ratio)
    if index >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    return score <= nth_smallest(score, index)
