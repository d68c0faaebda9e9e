"""Quantiser grids for standard normal data: Lloyd-Max scalars and a two-dimensional grid by k-means."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

_LLOYD_ROUNDS = 2000
_KMEANS_ROUNDS = 60
_KMEANS_POINTS = 60_000


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> torch.Tensor:
    """The 2**bits centroids that minimise the mean squared error of N(0, 1), ascending float32 [2**bits].

    Max, "Quantizing for minimum distortion", 1960; Lloyd, 1957: alternate midpoints and conditional means (closed form for
    the normal density).
    """
    levels = 1 << bits
    centroids = np.linspace(-2.5, 2.5, levels) if bits > 1 else np.array([-0.8, 0.8])
    for _ in range(_LLOYD_ROUNDS):
        edges = np.concatenate([[-np.inf], (centroids[1:] + centroids[:-1]) / 2, [np.inf]])
        density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
        mass = np.array([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
        updated = (density[:-1] - density[1:]) / np.diff(mass)
        if np.abs(updated - centroids).max() < 1e-10:
            break
        centroids = updated
    return torch.from_numpy(((centroids - centroids[::-1]) / 2).astype(np.float32))  # exactly symmetric


@lru_cache(maxsize=4)
def plane_grid(bits: int) -> torch.Tensor:
    """4**bits points in the plane for pairs of N(0, 1) numbers, float32 [4**bits, 2] (a HIGGS-like grid): k-means on a fixed normal sample.

    Symmetric points come out only approximately; the grid belongs to the fitted state, so encoder and decoder always share it.
    """
    points = np.random.default_rng(0).standard_normal((_KMEANS_POINTS, 2)).astype(np.float32)
    points = np.concatenate([points, -points])
    base = lloyd_max(bits).numpy()
    grid = np.stack(np.meshgrid(base, base, indexing="ij"), -1).reshape(-1, 2) @ np.array([[0.96, -0.28], [0.28, 0.96]], np.float32)
    for _ in range(_KMEANS_ROUNDS):
        nearest = ((grid**2).sum(1) - 2 * points @ grid.T).argmin(1)
        count = np.bincount(nearest, minlength=len(grid)).clip(1)
        grid = np.stack([np.bincount(nearest, points[:, axis], len(grid)) / count for axis in (0, 1)], 1).astype(np.float32)
    return torch.from_numpy(grid)


def nearest_scalar(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Indices uint8 of the nearest of ascending centroids, any shape."""
    return torch.bucketize(x.contiguous(), (centroids[1:] + centroids[:-1]) / 2).to(torch.uint8)


def nearest_pair(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """[..., 2n] to uint8 [..., n]: index of the nearest grid point of each pair of neighbours."""
    pairs = x.reshape(-1, 2)
    index = [(grid.pow(2).sum(1) - 2 * chunk @ grid.T).argmin(1).to(torch.uint8) for chunk in pairs.split(1 << 16)]
    return torch.cat(index).reshape(*x.shape[:-1], x.shape[-1] // 2)
