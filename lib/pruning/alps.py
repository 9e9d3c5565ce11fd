"""ALPS: pruned weights that keep a layer's output, by ADMM on its inputs' Hessian (Meng et al., 2024), and a refit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from lib.core.lazy import torch
from lib.pruning.sparsegpt import NM, NotPositiveDefinite, inverse_factor, repair
from lib.pruning.thresholds import smallest

log = logging.getLogger(__name__)

# Added to the unit diagonal of the Hessian. With the published .01, little calibration text is fitted too closely.
ALPS_DAMPING = 0.1
ITERATIONS = 10  # iterations of ADMM
PER_RHO = 3  # consecutive iterations that share a rho, and so an inverse
REFIT_STEPS = 10  # conjugate-gradient steps of the refit
ROWS = 512  # rows whose elementwise products are held at a time


class Problem(NamedTuple):
    """Problem shared by layers of one input, stated for weights times ``scale``."""

    damped: torch.Tensor  # A + damping I, [in, in], A the Hessian of unit diagonal
    scale: torch.Tensor  # [in], 0 where the input was always zero
    damping: float


def prepare(hessian: torch.Tensor, damping: float = ALPS_DAMPING) -> Problem:
    """Return the problem of a ``hessian`` [in, in] float32, reusing its memory."""
    root = hessian.diagonal().sqrt()
    divisor = root.masked_fill(root == 0, 1)
    hessian.div_(divisor).div_(divisor[:, None]).diagonal().fill_(1 + damping)
    return Problem(hessian, root / root.max().clamp(min=1e-30), damping)  # results depend on relative scales only


def alps(weight: torch.Tensor, problem: Problem, ratio: float, nm: NM | None, **options: int) -> torch.Tensor:
    """Return ``weight`` [out, in] pruned by ``alps_group`` as its only layer, with the ``options`` of that function."""
    name = f"a matrix of {len(weight)}x{weight.shape[1]}"
    return alps_group({name: weight}, problem, {name: ratio}, {name: nm}, **options)[name]


def alps_group(
    weights: Mapping[str, torch.Tensor],
    problem: Problem,
    ratios: Mapping[str, float],
    nm: Mapping[str, NM | None],
    iterations: int = ITERATIONS,
    steps: int = REFIT_STEPS,
) -> dict[str, torch.Tensor]:
    """Return, by name, ``weights`` [out, in] of layers with one input, pruned by ADMM, then ``steps`` of ``refit``.

    Layers share the inverses, as rho rises by a fixed ramp: .3 to 1 in 10 iterations, .1 to 3 in 30. (The
    published rho adapts per layer, with restarts, and may not converge.) If SparseGPT's weights have the lower error
    tr(E A E'), they are used, with a warning. Two tensors [in, in] are held besides the problem's, and at most
    four and a half float32 ones of all rows.

    Args:
        ratios: fraction to remove of each whole matrix; everything that ties with the threshold is removed.
        nm: (N, M) by name: keep N of every M columns, instead of the ratio.
    """
    rows = [len(weight) for weight in weights.values()]
    goals = [(ratios[name], nm[name]) for name in weights]
    state = torch.cat(list(weights.values())).float().mul_(problem.scale)  # the rows of all layers
    target, work = state @ problem.damped, torch.empty_like(problem.damped)
    keep = _largest(state, rows, goals)
    state.masked_fill_(~keep, 0)  # S = W + U, the weights where keep and the scaled dual elsewhere
    spread, rhos = max(iterations / 10, 1), -(-iterations // PER_RHO)
    growth = (spread**2 / 0.3) ** (1 / max(rhos - 1, 1))
    for i, rho in enumerate(0.3 / spread * growth**j for j in range(rhos)):
        inverse = _inverse(problem.damped, rho, work)
        state = state if i == 0 else state.div_(torch.where(keep, 1, growth))  # rho * dual stays what it was
        with ExitStack() as stack:
            if work.is_cuda:  # the iterations tolerate TF32; set-up and refit are computed in float32
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")
            for _ in range(min(PER_RHO, iterations - i * PER_RHO)):
                dual = state.masked_fill(keep, 0)
                state = dual.addmm_(state.sub_(dual, alpha=2).mul_(rho).add_(target), inverse)  # U + W, of W - U
                del dual  # or it would be held with the next
                keep = _largest(state, rows, goals)
    del work, inverse  # memory peaks here: four tensors of all rows, and a mask
    drop = keep.logical_not_()
    _descend(state.masked_fill_(drop, 0), drop, target, problem.damped, steps)
    del target, drop, keep
    hessian = problem.damped.clone()  # the Hessian but for its size, which does not matter
    hessian.diagonal().fill_(1)
    factor, pruned = inverse_factor(hessian.mul_(problem.scale).mul_(problem.scale[:, None])), {}
    for (name, weight), goal, values in zip(weights.items(), goals, state.split(rows), strict=True):
        repaired = repair(weight.float(), factor, *goal).mul_(problem.scale)
        error, error_repaired = (_error(weight, result, problem) for result in (values, repaired))
        if error_repaired < error:
            log.warning("%s: SparseGPT's weights are taken: their error is %.3f of ALPS'", name, error_repaired / error)
            values = repaired
        pruned[name] = weight.clone() if goal == (0, None) else _unscaled(values, problem, weight.dtype)
    return pruned


def _error(weight: torch.Tensor, values: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return tr(E A E') of scaled ``values`` [out, in], E their difference to the dense ``weight``, unscaled."""
    off = (weight.float() * problem.scale).sub_(values).neg_()
    return (off @ problem.damped).sub_(off, alpha=problem.damping).mul_(off).sum()


def refit(weight: torch.Tensor, pruned: torch.Tensor, problem: Problem, steps: int = REFIT_STEPS) -> torch.Tensor:
    """Return ``pruned`` [out, in], from any pruner, after conjugate gradients towards the best values on its mask.

    They minimise tr(E (A + damping I) E'), E the difference to the dense ``weight``; each row is a separate system.
    """
    target, values = (weight.float() * problem.scale) @ problem.damped, pruned.float() * problem.scale
    _descend(values, pruned == 0, target, problem.damped, steps)
    return _unscaled(values, problem, pruned.dtype) if steps else pruned.clone()


def _unscaled(values: torch.Tensor, problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    return (values / problem.scale.clamp(min=1e-30)).to(dtype).add_(0.0)  # -0.0, e.g. after an underflow, becomes 0.0


def _inverse(damped: torch.Tensor, rho: float, work: torch.Tensor) -> torch.Tensor:
    """Return inv(A + (damping + rho) I) in the memory of ``work``; on CUDA, cuSOLVER holds a copy for a moment."""
    work.copy_(damped).diagonal().add_(rho)
    lower, failed = work.mT, torch.empty((), dtype=torch.int32, device=work.device)  # by columns: LAPACK makes no copy
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if failed:
        raise NotPositiveDefinite("its damped Hessian is not positive definite")
    return torch.cholesky_inverse(lower, out=lower)


def _descend(values: torch.Tensor, drop: torch.Tensor, target: torch.Tensor, damped: torch.Tensor, steps: int) -> None:
    """Improve ``values`` [out, in] but where ``drop``, towards ``values`` @ ``damped`` = ``target``, which is lost."""
    residual = target.addmm_(values, damped, alpha=-1).masked_fill_(drop, 0)
    direction, square = residual.clone(), _row_products(residual, residual)
    for _ in range(steps):
        image = (direction @ damped).masked_fill_(drop, 0)
        step = square / _row_products(direction, image).clamp_(min=1e-30)  # a finished or empty row: 0 / 0
        values.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        del image  # or it would be held with the next
        last, square = square, _row_products(residual, residual)
        direction.mul_(square / last.clamp_(min=1e-30)).add_(residual)


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return each row's dot product [out, 1], a few rows at a time, since the products would fill another matrix."""
    return torch.cat([(x * y).sum(1, keepdim=True) for x, y in zip(a.split(ROWS), b.split(ROWS), strict=True)])


def _largest(state: torch.Tensor, rows: list[int], goals: Sequence[tuple[float, NM | None]]) -> torch.Tensor:
    """Return a mask of the largest |state| of each layer, given its ratio and (N, M)."""
    layers = zip(state.split(rows), goals, strict=True)
    return torch.cat([smallest(layer.abs(), *goal) for layer, goal in layers]).logical_not_()
