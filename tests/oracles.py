"""Oracles: slow formulations that share no code with lib, those of the benchmark and three that are only for tests."""

import math

import torch

from scripts.bench.plain import (  # noqa: F401  the tests take all oracles from here
    best_fit,
    magnitude,
    sparsegpt,
    tail_fit,
    wanda,
)


def peak_candidates(eigs: torch.Tensor) -> list[int]:
    """Return the indices around the peak of the log-spectrum's histogram from which alpha_peak's tail may start."""
    logs = torch.log10(eigs)
    low, high = logs.min(), logs.max()
    counts = [0] * 100
    for value in logs:
        counts[min(int((value - low) * (100 / (high - low))), 99)] += 1
    peak = 10 ** (low.item() + counts.index(max(counts)) * (high - low).item() / 100)
    lower = math.log10(0.95 * peak)  # A logarithm is compared with an eigenvalue, as published.
    return [i for i in range(len(eigs) - 1) if lower <= eigs[i] <= 1.5 * peak]


def wanda_variant(weight: torch.Tensor, norms: torch.Tensor, ratio: float) -> torch.Tensor | None:
    """Return ``weight`` without the scores whose running sum stays within a share of the row's, found by bisection."""
    score = (weight.abs() * norms.sqrt()).double()
    low, high, share = 0.0, 0.8, 0.4
    for _ in range(60):
        pruned = weight.clone()
        for r, row in enumerate(score.tolist()):
            total, cumulative = sum(row), 0.0
            for c in sorted(range(len(row)), key=row.__getitem__):
                cumulative += row[c]
                if cumulative > share * total:
                    break
                pruned[r, c] = 0
        sparsity = (pruned == 0).double().mean().item()
        if abs(sparsity - ratio) <= 0.001:
            return pruned
        low, high = (low, share) if sparsity > ratio else (share, high)
        share = (low + high) / 2
    return None


def sparsegpt_by_elimination(
    weight: torch.Tensor, hessian: torch.Tensor, ratio: float, nm: tuple[int, int] | None, block: int = 128
) -> torch.Tensor:
    """Optimal brain surgery column by column in float64; the inverse is shrunk by elimination, without Cholesky.

    Once the columns left of j are fixed, the inverse Hessian of the remaining ones is what elimination leaves; its
    entry at j is the squared diagonal of the Cholesky factor in the paper's formulation.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    rows, columns = w.shape
    for j in range(columns):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    inverse = torch.linalg.inv(h + torch.eye(columns) * 0.01 * h.diagonal().mean())
    diagonal, eliminated = [], []  # of the shrinking inverse: its entry at j, its row from j on
    for _ in range(columns):
        diagonal.append(inverse[0, 0].item())
        eliminated.append(inverse[0] / inverse[0, 0])
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]

    gone = torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if nm is None and j % block == 0:
            width = min(block, columns - j)
            score = torch.stack([w[:, c] ** 2 / diagonal[c] for c in range(j, j + width)], dim=1)
            gone[:, j : j + width] = score <= score.flatten().sort().values[int(score.numel() * ratio)]
        if nm is not None and j % nm[1] == 0:
            for r in range(rows):
                order = sorted(range(j, j + nm[1]), key=lambda c, r=r: w[r, c].item() ** 2 / diagonal[c])
                gone[r, order[: nm[1] - nm[0]]] = True
        error = torch.where(gone[:, j], w[:, j], 0.0)
        w[:, j:] -= torch.outer(error, eliminated[j])
        w[gone[:, j], j] = 0
    return w
