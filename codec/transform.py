"""The weighted residual's transform: principal components of all layers together ("global"), or of each layer alone ("per_layer").

A transform may be completed by a fallback basis (`Fallback`): principal components of each layer, all of them, for what the rows leave over. A span of
text that the rows were not made for is then coded as finely as any other, for more bits.

Per layer costs K * 2Gd instead of K * D multiplications a token and needs far fewer calibration
tokens, which is what a quick pack on a CPU can afford. Both keep only components whose standard deviation exceeds a quarter of the finest step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from codec.errors import BadInput
from kernels.eigen import leading_eigenvectors


@dataclass
class Fallback:
    """A complete orthonormal basis of every layer, for what a transform's rows leave over.

    Args:
        basis: [layers, W, W], rows, float32 unless `Transform.rounded`; W elements of a layer.
        order: int64 [layers * W], the rows, counted through all layers, in falling order of variance.
    """

    basis: torch.Tensor
    order: torch.Tensor

    def project(self, rest: torch.Tensor, count: int) -> torch.Tensor:
        """First `count` components in `order`, float32 [T, count], of rest [T, D]."""
        layers, width, _ = self.basis.shape
        parts = rest.to(self.basis.dtype).reshape(len(rest), layers, width).transpose(0, 1)
        c = torch.bmm(parts, self.basis.transpose(1, 2))
        return c.transpose(0, 1).reshape(len(rest), -1)[:, self.order[:count]].float()

    def expand(self, c: torch.Tensor) -> torch.Tensor:
        """float32 [T, D] from components c [T, count]."""
        layers, width, _ = self.basis.shape
        full = c.new_zeros(len(c), layers * width)
        full[:, self.order[: c.shape[1]]] = c
        return torch.bmm(full.reshape(len(c), layers, width).transpose(0, 1), self.basis).transpose(0, 1).reshape(len(c), -1)

    def to(self, device: torch.device | str) -> Fallback:
        return Fallback(self.basis.to(device), self.order.to(device))


@dataclass
class Transform:
    """Orthonormal rows, and components of what they leave over where there is a fallback basis.

    Args:
        kind: "global" or "per_layer".
        basis: [K, D] (global) or [K, layer_dim] (per_layer), rows in falling order of variance; float32 unless `rounded`.
        layer: int64 [K], the coded layer of each row (per_layer; None for global).
        variance: float32 [K], or [K + layers * W] with a fallback basis, of the components on held-out tokens, in units of the weighted KV.
        fine: rows before this one are stored accurately; later ones coarsely, so they are no longer orthogonal to the first ones, and what
            the first ones carry is taken out before projecting on them (None: all rows are accurate).
    """

    kind: str
    basis: torch.Tensor
    layer: torch.Tensor | None
    variance: torch.Tensor
    fine: int | None = None
    fallback: Fallback | None = None

    @property
    def num_rows(self) -> int:
        """Components along the rows, which come first."""
        return len(self.basis)

    @property
    def num_components(self) -> int:
        """All of them: the fallback basis's too."""
        return len(self.variance)

    def first(self, count: int) -> Transform:
        """Only the first `count` rows, without a fallback basis."""
        return Transform(
            self.kind, self.basis[:count].contiguous(), None if self.layer is None else self.layer[:count], self.variance[:count]
        )

    def kept(self, threshold: float, *, fallback: bool = False) -> int:
        """Number of components with standard deviation above threshold: of the rows, or of all rows and the fallback basis."""
        above, rows = self.variance > threshold * threshold, self.num_rows
        return rows + int(above[rows:].sum()) if fallback else int(above[:rows].sum())

    def project(self, z: torch.Tensor, count: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """First `count` components, float32 [T, count], of weighted residuals z [T, D]. rows: those along the rows [T, num_rows], where they are known
        and more are wanted."""
        if count > self.num_rows:
            assert self.fallback is not None, "the transform has no fallback basis"
            first = self.project(z, self.num_rows) if rows is None else rows
            return torch.cat([first, self.fallback.project(z - self._expand_rows(first, z.shape[1]), count - self.num_rows)], 1)
        if self.fine is not None and 0 < self.fine < count:
            first = self._project(z, 0, self.fine)
            return torch.cat([first, self._project(z - self._expand_rows(first, z.shape[1]), self.fine, count)], 1)
        return self._project(z, 0, count)

    def _project(self, z: torch.Tensor, start: int, count: int) -> torch.Tensor:
        if self.kind == "global":
            return (z.to(self.basis.dtype) @ self.basis[start:count].T).float()
        assert self.layer is not None
        out = z.new_empty(len(z), count - start)
        width, layer, basis = self.basis.shape[1], self.layer[start:count], self.basis[start:count]
        for n in layer.unique().tolist():
            rows = (layer == n).nonzero()[:, 0]
            out[:, rows] = (z[:, n * width : (n + 1) * width].to(basis.dtype) @ basis[rows].T).float()
        return out

    def expand(self, c: torch.Tensor, dim: int) -> torch.Tensor:
        """Weighted residual, float32 [T, dim], from components c [T, count]."""
        z = self._expand_rows(c[:, : self.num_rows], dim)
        return z + self.fallback.expand(c[:, self.num_rows :]) if self.fallback is not None and c.shape[1] > self.num_rows else z

    def _expand_rows(self, c: torch.Tensor, dim: int) -> torch.Tensor:
        count = c.shape[1]
        if self.kind == "global":
            return (c.to(self.basis.dtype) @ self.basis[:count]).float()
        assert self.layer is not None
        z = c.new_zeros(len(c), dim)
        width = self.basis.shape[1]
        for n in self.layer[:count].unique().tolist():
            rows = (self.layer[:count] == n).nonzero()[:, 0]
            z[:, n * width : (n + 1) * width] = (c[:, rows].to(self.basis.dtype) @ self.basis[rows]).float()
        return z

    def whole_rows(self, start: int, end: int, dim: int) -> torch.Tensor:
        """Rows [start, end) over all elements, float32 [end - start, dim]: what `expand` makes of the unit vectors."""
        basis = self.basis[start:end].float()
        if self.layer is None:
            return basis
        out, width = basis.new_zeros(len(basis), dim), basis.shape[1]
        columns = self.layer[start:end, None] * width + torch.arange(width, device=basis.device)
        return out.scatter_(1, columns, basis)

    def rounded(self, dtype: torch.dtype) -> Transform:
        """The same transform for products in `dtype`: what goes in and comes out stays float32, sums are as exact as the device makes them."""
        fallback = None if self.fallback is None else Fallback(self.fallback.basis.to(dtype), self.fallback.order)
        return Transform(self.kind, self.basis.to(dtype), self.layer, self.variance, self.fine, fallback)

    def to(self, device: torch.device | str) -> Transform:
        layer = None if self.layer is None else self.layer.to(device)
        fallback = None if self.fallback is None else self.fallback.to(device)
        return Transform(self.kind, self.basis.to(device), layer, self.variance.to(device), self.fine, fallback)


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
    basis, value, layer = _layer_rows(covs, num_tokens)
    count = max(1, int((value[:max_components] > threshold * threshold).sum()))
    return Transform("per_layer", basis[:count].contiguous(), layer[:count], value[:count].clone())


def _layer_rows(covs: list[torch.Tensor], num_tokens: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvectors of all layers as rows in falling order of variance, their variances, and their layers; num_tokens as in `fit_per_layer`."""
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
    order = torch.argsort(value, descending=True, stable=True)
    return basis[order], value[order], layer[order]


def fit_fallback(rest: torch.Tensor, layer_dim: int) -> tuple[Fallback, torch.Tensor]:
    """A fallback basis for weighted residuals rest float32 [n, D] without what a transform's rows carry, and its components' variances in `order`,
    float32 [D]. Noisy eigenvectors are shrunk towards channels as in `fit_per_layer`."""
    parts = rest.split(layer_dim, 1)
    covs = [part.T @ part / len(part) for part in parts]
    basis, variance, layer = _layer_rows(covs, len(rest))
    return assembled_fallback(basis, layer), variance


def assembled_fallback(basis: torch.Tensor, layer: torch.Tensor) -> Fallback:
    """From rows [layers * W, W] in falling order of variance, of layers int64 [layers * W]. Raises BadInput unless every layer has W rows."""
    width = basis.shape[1]
    layers = len(basis) // max(width, 1)
    if len(basis) != layers * width or not bool((torch.bincount(layer, minlength=layers) == width).all()):
        raise BadInput("the rows of a fallback basis are not those of whole layers", "pass as many for every layer as it has elements")
    place = torch.argsort(layer, stable=True)  # rows of one layer stay in their order
    order = torch.empty_like(place)
    order[place] = torch.arange(len(place), device=place.device)
    return Fallback(basis[place].reshape(layers, width, width).contiguous(), order)
