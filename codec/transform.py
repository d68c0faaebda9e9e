"""The weighted residual's transform: principal components of all layers together ("global"), or of each layer alone ("per_layer").

Per layer costs K * 2Gd instead of K * D multiplications a token and needs far fewer calibration
tokens, which is what a quick pack on a CPU can afford. Both keep only components whose standard deviation exceeds a quarter of the finest step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from codec.errors import BadInput
from kernels.eigen import leading_eigenvectors


@dataclass
class Transform:
    """Orthonormal rows.

    Args:
        kind: "global" or "per_layer".
        basis: float32 [K, D] (global) or [K, layer_dim] (per_layer), rows in falling order of variance.
        layer: int64 [K], the coded layer of each row (per_layer; None for global).
        variance: float32 [K], of the components on held-out tokens, in units of the weighted KV.
        fine: rows before this one are stored accurately; later ones coarsely, so they are no longer orthogonal to the first ones, and what
            the first ones carry is taken out before projecting on them (None: all rows are accurate).
    """

    kind: str
    basis: torch.Tensor
    layer: torch.Tensor | None
    variance: torch.Tensor
    fine: int | None = None

    @property
    def num_components(self) -> int:
        return len(self.basis)

    def first(self, count: int) -> Transform:
        """Only the first `count` rows."""
        return Transform(
            self.kind, self.basis[:count].contiguous(), None if self.layer is None else self.layer[:count], self.variance[:count]
        )

    def kept(self, threshold: float) -> int:
        """Number of leading components with standard deviation above threshold."""
        return int((self.variance > threshold * threshold).sum())

    def project(self, z: torch.Tensor, count: int) -> torch.Tensor:
        """First `count` components, float32 [T, count], of weighted residuals z [T, D]."""
        if self.fine is not None and 0 < self.fine < count:
            first = self._project(z, 0, self.fine)
            return torch.cat([first, self._project(z - self.expand(first, z.shape[1]), self.fine, count)], 1)
        return self._project(z, 0, count)

    def _project(self, z: torch.Tensor, start: int, count: int) -> torch.Tensor:
        if self.kind == "global":
            return z @ self.basis[start:count].T
        assert self.layer is not None
        out = z.new_empty(len(z), count - start)
        width, layer, basis = self.basis.shape[1], self.layer[start:count], self.basis[start:count]
        for n in layer.unique().tolist():
            rows = (layer == n).nonzero()[:, 0]
            out[:, rows] = z[:, n * width : (n + 1) * width] @ basis[rows].T
        return out

    def expand(self, c: torch.Tensor, dim: int) -> torch.Tensor:
        """Weighted residual, float32 [T, dim], from components c [T, count]."""
        count = c.shape[1]
        if self.kind == "global":
            return c @ self.basis[:count]
        assert self.layer is not None
        z = c.new_zeros(len(c), dim)
        width = self.basis.shape[1]
        for n in self.layer[:count].unique().tolist():
            rows = (self.layer[:count] == n).nonzero()[:, 0]
            z[:, n * width : (n + 1) * width] = c[:, rows] @ self.basis[rows]
        return z

    def to(self, device: torch.device | str) -> Transform:
        layer = None if self.layer is None else self.layer.to(device)
        return Transform(self.kind, self.basis.to(device), layer, self.variance.to(device), self.fine)


def fit_global(cov: torch.Tensor, threshold: float, max_components: int) -> Transform:
    """Transform of the weighted residual's covariance cov [D, D]: components with standard deviation above threshold, at most max_components."""
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise BadInput(f"covariance of shape {tuple(cov.shape)}", "pass a square matrix")
    values, vectors = leading_eigenvectors(cov, max_components)
    count = max(1, int((values > threshold * threshold).sum()))
    return Transform("global", vectors[:, :count].T.contiguous(), None, values[:count].clone())


def fit_per_layer(covs: list[torch.Tensor], threshold: float, max_components: int, num_tokens: int | None = None) -> Transform:
    """Transform from each layer's covariance [layer_dim, layer_dim]; rows of all layers merged in falling order of variance.

    With few calibration tokens the off-diagonal part is shrunk by n / (n + layer_dim), since eigenvectors of a noisy covariance chase the noise.
    """
    bases, values, layers = [], [], []
    for n, cov in enumerate(covs):
        if num_tokens is not None:
            keep = num_tokens / (num_tokens + len(cov))
            cov = keep * cov + (1 - keep) * torch.diag(torch.diagonal(cov))
        value, vector = torch.linalg.eigh(cov)
        bases.append(vector.T)
        values.append(value.clamp_min(0))
        layers.append(torch.full((len(value),), n, dtype=torch.int64))
    basis, value, layer = torch.cat(bases), torch.cat(values), torch.cat(layers).to(values[0].device)
    order = torch.argsort(value, descending=True, stable=True)[:max_components]
    order = order[: max(1, int((value[order] > threshold * threshold).sum()))]
    return Transform("per_layer", basis[order].contiguous(), layer[order], value[order].clone())
