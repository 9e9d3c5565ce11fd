"""SparseGPT: pruning with the remaining weights repaired by the inverse Hessian (Frantar & Alistarh, 2023)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from lib import sparse
from lib.core.errors import first_line
from lib.core.lazy import torch
from lib.pruning.thresholds import group_ranks, smallest

log = logging.getLogger(__name__)

BLOCK = 128  # columns per block, published
HESSIAN_DAMPING = 0.01  # share of the Hessian's mean diagonal that is added to it, published
RETRIES = 2  # further attempts to factorise a Hessian, each with ten times the damping

# N:M as (N, M): N of every M columns are kept.
NM = tuple[int, int]


class Factor(NamedTuple):
    """``upper`` [in, in], the upper Cholesky factor of the inverse damped Hessian, and the ``dead`` columns [in]."""

    upper: torch.Tensor
    dead: torch.Tensor


class NotPositiveDefinite(ValueError):
    """The Hessian could not be factorised with any damping tried."""


def inverse_factor(hessian: torch.Tensor, damping: float = HESSIAN_DAMPING) -> Factor:
    """Return the factor U with inv(H + damping) = U'U, H: [in, in] float32. U replaces H in memory.

    A column whose input was always zero gets H = 1. A Hessian that is not positive definite is retried with ten
    times the ``damping`` (a share of its mean diagonal), up to twice, with a warning, before NotPositiveDefinite is
    raised. At most two matrices of this size are held, including H.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    damp = damping * diagonal.mean()
    # H reversed in both axes = LL' gives H = RR' with R = L reversed, upper triangular, so that U = inv(R): one
    # factorisation and one triangular inverse, where the plain way (factorise, invert, factorise) does three.
    _reverse(hessian)
    lower = torch.empty_like(hessian).mT  # by columns, as LAPACK and cuSOLVER want it: no copies are made
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(RETRIES + 1):
        diagonal += damp if attempt == 0 else damp * (10**attempt - 10 ** (attempt - 1))
        torch.linalg.cholesky_ex(hessian, out=(lower, failed))
        if ((failed == 0) & torch.isfinite(lower.diagonal()).all()).item():
            break
        if attempt == RETRIES:
            most = damping * 10**RETRIES
            raise NotPositiveDefinite(f"its Hessian is not positive definite, even with {most:g} of damping")
        log.warning("a Hessian is not positive definite; its damping is raised tenfold")
    _reverse(lower.mT)
    upper = _inverse(lower, hessian.zero_().mT)  # H is no longer needed: its memory is reused
    if not torch.isfinite(torch.stack(torch.aminmax(hessian))).all():  # these two show every NaN and infinity
        raise NotPositiveDefinite("the inverse of its Hessian is not finite")
    return Factor(upper, dead)


def _inverse(upper: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the inverse of the triangle ``upper`` [in, in], written into ``zeros``.

    The inverse of [A B; 0 C] is [inv(A), -inv(A) B inv(C); 0, inv(C)]: one strip of columns at a time, each from those
    before it. Solving for the identity would take twice as long, mostly for zeros.
    """
    for left in range(0, len(upper), BLOCK):
        strip = slice(left, left + BLOCK)
        corner = zeros[strip, strip].fill_diagonal_(1)
        corner.copy_(torch.linalg.solve_triangular(upper[strip, strip], corner, upper=True))
        if left:
            zeros[:left, strip].addmm_(zeros[:left, :left], upper[:left, strip] @ corner, beta=0, alpha=-1)
    return zeros


def _reverse(matrix: torch.Tensor) -> None:
    """Reverse both axes of a contiguous ``matrix`` in place: a flip would make a copy."""
    flat = matrix.view(-1)
    half, chunk = len(flat) // 2, BLOCK * len(matrix)
    for left in range(0, half, chunk):
        right = min(left + chunk, half)
        head, tail = flat[left:right], flat[len(flat) - right : len(flat) - left]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)


def repair(weight: torch.Tensor, factor: Factor, ratio: float, nm: NM | None) -> torch.Tensor:
    """Return ``weight`` [out, in] with ``ratio`` of each block of 128 columns zeroed and the rest compensating.

    With ``nm``, (N, M), N of every M columns are kept instead, chosen group by group from the weights updated so far.
    """
    return repair_group({"": weight}, factor, {"": ratio}, {"": nm})[""]


def repair_group(
    weights: Mapping[str, torch.Tensor], factor: Factor, ratios: Mapping[str, float], nm: Mapping[str, NM | None]
) -> dict[str, torch.Tensor]:
    """Return, by name, each of ``weights`` [out, in] repaired as by ``repair``; they share an input and its factor.

    They are solved as one matrix, each with its own masks; if their M, and so the blocks, differ, one after another.
    """
    groups = {nm[name] and nm[name][1] for name in weights}  # M, or None
    if len(groups) > 1:
        return {name: repair(weight, factor, ratios[name], nm[name]) for name, weight in weights.items()}
    (group,) = groups
    sizes = [len(weight) for weight in weights.values()]
    # [in, out] float32: a column of W is a row in memory. Torch transposes fast from whole tensors of one dtype.
    stacked = torch.cat([weight.detach() for weight in weights.values()])
    dtype, stacked = stacked.dtype, stacked.float()
    w = torch.empty_like(stacked.T, memory_format=torch.contiguous_format).copy_(stacked.T)
    del stacked
    w.masked_fill_(factor.dead[:, None], 0)
    width, solve = _width(group), block_solver(w.device, group)
    if group:
        counts = [torch.full((len(x),), group - nm[name][0], dtype=torch.int32) for name, x in weights.items()]
        drop = torch.cat(counts).to(w.device)
    for left in range(0, len(w), width):
        right = left + width
        block = w[left:right]  # [block, out]
        upper = factor.upper[left:right, left:right].contiguous()
        if not group:
            scores = (block.square() / upper.diagonal()[:, None].square()).split(sizes, dim=1)
            masks = [smallest(score, ratios[name], None) for name, score in zip(weights, scores, strict=True)]
            drop = torch.cat(masks, dim=1).float()
            del scores, masks  # or they would be held beside the result
        errors = solve(block, upper, drop, group)
        w[right:].addmm_(factor.upper[left:right, right:].T, errors, alpha=-1)
    repaired = w.to(dtype).T.contiguous().split(sizes)
    return {name: rows.to(weight.dtype) for (name, weight), rows in zip(weights.items(), repaired, strict=True)}


def _width(group: int | None) -> int:
    """Return the columns of a block: a group never straddles two of them."""
    return max(group, BLOCK - BLOCK % group) if group else BLOCK


@cache
def block_solver(device: torch.device, group: int | None) -> Callable[..., torch.Tensor]:
    """Return the solver of a block on ``device``: a kernel, Triton's or C++, where one works, else ``solve_block``."""
    try:
        if device.type == "cpu":
            kernel = sparse.load_kernel().solve_block
        elif device.type == "cuda" and find_spec("triton"):
            from lib.pruning.sparsegpt_triton import solve_block_on_gpu as kernel
        else:
            return solve_block
        _check_kernel(kernel, device, group)
        return kernel
    except sparse.Unavailable as error:
        log.debug("SparseGPT's blocks are solved by a slower loop: %s", error)
    except Exception as error:  # a compiler fails in many ways; after each the loop is as good as before
        message = "SparseGPT's %s kernel does not work here (%s); a slower loop takes its place"
        log.warning(message, device.type, first_line(error))
    return solve_block


def _check_kernel(kernel: Callable[..., torch.Tensor], device: torch.device, group: int | None) -> None:
    """Raise AssertionError unless ``kernel`` agrees with ``solve_block`` on a block of few rows."""
    columns, outputs, draw = _width(group), 70, torch.Generator().manual_seed(0)
    block = torch.randn(columns, outputs, generator=draw).to(device)
    upper = (torch.eye(columns) + 0.1 * torch.rand(columns, columns, generator=draw).triu(1)).to(device)
    mask = (torch.rand(columns, outputs, generator=draw) < 0.5).float()
    drop = (torch.full((outputs,), group // 2, dtype=torch.int32) if group else mask).to(device)
    solved = block.clone()
    errors = kernel(solved, upper, drop, group)
    torch.testing.assert_close(errors, solve_block(block, upper, drop, group), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(solved, block, rtol=1e-4, atol=1e-5)


def solve_block(block: torch.Tensor, upper: torch.Tensor, drop: torch.Tensor, group: int | None) -> torch.Tensor:
    """Zero entries of ``block`` [columns, out] in place, repair the columns after each, return the errors, same shape.

    ``upper`` is the factor's diagonal square for these columns. In ``drop``, shaped like ``block``, 1 is to zero and 0
    to keep; with ``group`` it is how many of each to zero, int32 [out].
    """
    errors, diagonal = torch.empty_like(block), upper.diagonal()
    gone = torch.empty_like(block) if group else drop
    # All views at once: made one by one, they would take as long as some of the sums.
    rows = zip(block.unbind(), gone.unbind(), errors.unbind(), diagonal.unbind(), upper.unbind(), strict=True)
    for i, (column, mask, error, pivot, row) in enumerate(rows):
        if group and i % group == 0:
            members = slice(i, i + group)
            gone[members] = group_ranks(block[members].square() / diagonal[members, None].square()) < drop
        torch.mul(column, mask, out=error)
        column.sub_(error)  # w - w is 0, w - 0 is w
        error.div_(pivot)
        block[i + 1 :].addr_(row[i + 1 :], error, alpha=-1)
    return errors
