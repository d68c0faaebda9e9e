"""Leading eigenvectors of a symmetric positive matrix by subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4)."""

from __future__ import annotations

import torch


def orthonormal(y: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns spanning y [D, K] float32, by two rounds of Cholesky QR; Householder QR where y is rank deficient."""
    for _ in range(2):
        gram = (y.T @ y).double()
        shift = 1e-12 * gram.diagonal().mean() * torch.eye(len(gram), device=y.device, dtype=torch.float64)
        factor, info = torch.linalg.cholesky_ex(gram + shift)
        if int(info) != 0:
            return torch.linalg.qr(y)[0]
        y = torch.linalg.solve_triangular(factor.float(), y.T, upper=False).T
    return y


def leading_eigenvectors(cov: torch.Tensor, count: int, iterations: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues [count] and their eigenvectors [D, count] of cov [D, D] float32, in falling order, eigenvalues clamped at 0.

    Small matrices, and requests for more than 60% of the spectrum, are decomposed in full. Otherwise the subspace is an eighth wider than asked
    for, so that the last vectors asked for have converged too.
    """
    dim = len(cov)
    count = min(count, dim)
    columns = min(dim, count + max(16, count // 8))
    if dim <= 1024 or columns > 0.6 * dim:
        values, vectors = torch.linalg.eigh(cov)
        return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    y = torch.randn(dim, columns, generator=generator).to(cov)
    for _ in range(iterations):
        y = orthonormal(cov @ y)
    small = y.T @ (cov @ y)
    values, rotation = torch.linalg.eigh(0.5 * (small + small.T))
    return values.flip(0)[:count].clamp_min(0), y @ rotation.flip(1)[:, :count]
