"""Fitting the predictor: streaming second moments with closed-form ridge (many tokens), or dual ridge with cross-validation by document (few).

Axes: n tokens, F features, D KV elements, r rank. `weight` below multiplies rows [*, D] by the codec's S, so that rank is spent on what attention
sees; the draft package does not know where S comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import PredictorError
from kernels.eigen import leading_eigenvectors

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
"""Candidates of the primal fit, relative to the features' mean variance (1 after standardisation)."""

DUAL_RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Candidates of the dual fit, relative to the mean diagonal of the kernel matrix."""

Rows = Callable[[Tensor], Tensor]


@dataclass
class LinearFit:
    """A predictor before rounding, for raw (rms-normalised, not standardised) features.

    down float32 [F, r], offset float32 [r], up float32 [r, D], mu float32 [D]; ridge as chosen.
    """

    down: Tensor
    offset: Tensor
    up: Tensor
    mu: Tensor
    ridge: float

    def __call__(self, features: Tensor) -> Tensor:
        """Predictions float32 [n, D] of raw features [n, F]."""
        return self.mu + (features @ self.down + self.offset) @ self.up


class RidgeMoments:
    """Sums over tokens that closed-form ridge and the residual's covariance need; memory does not depend on the text's length.

    Sums are float32 about the first batch's mean (tf32 must be off on a GPU); symmetric products are computed in blocks above the diagonal only.
    """

    def __init__(self, num_features: int, dim: int, device: torch.device | str = "cpu", blocks: int = 6) -> None:
        self.n = 0
        self._blocks = blocks
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float32, device=device)  # noqa: E731
        self._ff, self._fy, self._yy = zeros(num_features, num_features), zeros(num_features, dim), zeros(dim, dim)
        self._f, self._y = zeros(num_features).double(), zeros(dim).double()
        self._f_shift: Tensor | None = None
        self._f_scale: Tensor | None = None
        self._y_shift: Tensor | None = None

    def add(self, features: Tensor, y: Tensor) -> None:
        """Features float32 [n, F] and KV float32 [n, D] of the same tokens; a few hundred tokens at a time are efficient."""
        if len(features) != len(y) or not len(y):
            raise PredictorError(f"{len(features)} feature rows for {len(y)} KV rows", "pass the same tokens, at least one")
        if self._f_shift is None:
            self._f_shift, self._y_shift = features.mean(0), y.mean(0)
            self._f_scale = features.std(0, correction=0).clamp_min(1e-3)
        assert self._f_shift is not None and self._f_scale is not None and self._y_shift is not None
        f, y = (features - self._f_shift) / self._f_scale, y - self._y_shift
        self.n += len(y)
        self._f += f.sum(0).double()
        self._y += y.sum(0).double()
        self._fy.addmm_(f.T, y)
        self._add_upper(self._ff, f)
        self._add_upper(self._yy, y)

    def _add_upper(self, total: Tensor, x: Tensor) -> None:
        width = -(-x.shape[1] // self._blocks)
        for at in range(0, x.shape[1], width):
            total[at : at + width, at:].addmm_(x[:, at : at + width].T, x[:, at:])

    def finish(self) -> Moments:
        """Centred moments per token. Consumes the sums (they are divided and mirrored in place)."""
        if self.n < 2 or self._f_shift is None or self._y_shift is None or self._f_scale is None:
            raise PredictorError(f"{self.n} calibration tokens", "give more text")
        f_mean, y_mean = (self._f / self.n).float(), (self._y / self.n).float()
        for total, left, right in ((self._ff, f_mean, f_mean), (self._fy, f_mean, y_mean), (self._yy, y_mean, y_mean)):
            total.div_(self.n).addr_(left, right, alpha=-1)
        for total in (self._ff, self._yy):
            total.copy_(torch.triu(total) + torch.triu(total, 1).T)
        mean = self._f_shift + f_mean * self._f_scale
        return Moments(self.n, self._ff, self._fy, self._yy, mean, self._f_scale, self._y_shift + y_mean)


@dataclass
class Moments:
    """Centred second moments: ff [F, F] and fy [F, D] of standardised features, yy [D, D]; f_mean, f_scale [F], mu [D]. Float32."""

    n: int
    ff: Tensor
    fy: Tensor
    yy: Tensor
    f_mean: Tensor
    f_scale: Tensor
    mu: Tensor

    def ridge(self, ridge: float, columns: slice = slice(None)) -> Tensor:
        """Ridge solution A, float32 [F, D] (or the given columns), for standardised features."""
        system = self.ff.clone()
        system.diagonal().add_(ridge * self.ff.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) != 0:
            return torch.linalg.solve(system, self.fy[:, columns])
        return torch.cholesky_solve(self.fy[:, columns], factor)

    def choose_ridge(self, features: Tensor, y: Tensor, candidates: Sequence[float] = RIDGES, stride: int = 16) -> float:
        """The candidate with the smallest squared error on held-out raw features [n, F] and KV y [n, D], every `stride`-th column."""
        f, target = (features - self.f_mean) / self.f_scale, (y - self.mu)[:, ::stride]
        scale = target.pow(2).mean(0).clamp_min(1e-12)
        errors = [((target - f @ self.ridge(c, slice(None, None, stride))).pow(2).mean(0) / scale).mean() for c in candidates]
        return candidates[int(torch.stack(errors).argmin())]

    def fit(self, ridge: float, rank: int, weight: Rows, unweight: Rows) -> LinearFit:
        """Reduced-rank ridge (Izenman 1975) in the metric of `weight`: the best rank-r product for the weighted prediction."""
        solution = weight(self.ridge(ridge))
        if len(self.ff) <= len(self.yy):
            values, vectors = torch.linalg.eigh(self.ff)
            half = (vectors * values.clamp_min(0).sqrt()).T @ solution
            values, vectors = leading_eigenvectors(half @ half.T, min(rank, len(half)))
            directions = half.T @ (vectors / values.clamp_min(1e-20).sqrt())
            directions = directions[:, values > 1e-7 * values[0]]
        else:
            directions = leading_eigenvectors(solution.T @ (self.ff @ solution), rank)[1]
        return _standardised(solution @ directions, unweight(directions.T.contiguous()), self.f_mean, self.f_scale, self.mu, ridge)

    def residual_covariance(self, fit: LinearFit) -> Tensor:
        """Cov(y - prediction), float32 [D, D], over the fitted tokens."""
        down = fit.down * self.f_scale[:, None]
        cross = fit.up.T @ (down.T @ self.fy)
        covariance = self.yy - cross - cross.T + fit.up.T @ ((down.T @ self.ff @ down) @ fit.up)
        return 0.5 * (covariance + covariance.T)

    def residual_of(self, solution: Tensor) -> Tensor:
        """Cov(y - prediction), float32 [D, D], of a full-rank map [F, D] from standardised features."""
        cross = solution.T @ (self.fy - 0.5 * (self.ff @ solution))
        return self.yy - cross - cross.T


def _standardised(down: Tensor, up: Tensor, f_mean: Tensor, f_scale: Tensor, mu: Tensor, ridge: float) -> LinearFit:
    down = down / f_scale[:, None]
    return LinearFit(down, -(f_mean @ down), up, mu, ridge)


@dataclass
class DualFit:
    """Result of fit_dual: the fit, and each token's prediction float32 [n, D] by a fit that never saw its document."""

    fit: LinearFit
    cross_validated: Tensor


def fit_dual(
    features: Tensor,
    y: Tensor,
    documents: Sequence[int],
    rank: int,
    weight: Rows,
    unweight: Rows,
    candidates: Sequence[float] = DUAL_RIDGES,
) -> DualFit:
    """Ridge in its dual form, for fewer tokens than features; the penalty is chosen by leaving out one document at a time.

    Leaving out a block B of rows changes its residual to (C^-1_BB)^-1 (C^-1 y)_B with C = K + ridge I (K the kernel matrix), exactly, so all
    cross-validated predictions come out of one factorisation.

    Args:
        features: float32 [n, F], raw.
        y: float32 [n, D].
        documents: tokens of each document, in order; sums to n.
    """
    if sum(documents) != len(y) or len(features) != len(y) or len(documents) < 2:
        raise PredictorError(f"{len(y)} tokens in {len(documents)} documents", "pass at least two documents whose lengths add up")
    f_mean, f_scale, mu = features.mean(0), features.std(0, correction=0).clamp_min(1e-3), y.mean(0)
    f, target = (features - f_mean) / f_scale, weight(y - mu)
    kernel = f @ f.T
    level = float(kernel.diagonal().mean())
    sample = target[:, :: max(1, target.shape[1] // 512)].contiguous()
    errors = [_left_out(kernel, c * level, sample, documents)[0].pow(2).sum() for c in candidates]
    chosen = candidates[int(torch.stack(errors).argmin())]
    residual, dual = _left_out(kernel, chosen * level, target, documents)
    predicted = target - chosen * level * dual  # K dual, without its cancellations
    values, vectors = leading_eigenvectors(predicted @ predicted.T, min(rank, len(f)))
    keep = values > 1e-7 * values[0]
    directions = predicted.T @ (vectors[:, keep] / values[keep].sqrt())
    fit = _standardised(f.T @ (dual @ directions), unweight(directions.T.contiguous()), f_mean, f_scale, mu, chosen)
    cross_validated = unweight((target - residual) @ directions @ directions.T) + mu
    return DualFit(fit, cross_validated)


def _left_out(kernel: Tensor, ridge: float, y: Tensor, documents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Residuals [n, M] with each row's document left out, and the dual coefficients [n, M] of the fit to all rows."""
    system = kernel.double()
    system.diagonal().add_(ridge)
    # in float64: repeated text makes kernel matrices whose small eigenvalues drown in float32 rounding
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system)).float()
    dual = inverse @ y
    residual = torch.empty_like(dual)
    at = 0
    for size in documents:
        block = slice(at, at + size)
        residual[block] = torch.linalg.solve(inverse[block, block], dual[block])
        at += size
    return residual, dual


def explained(y: Tensor, prediction: Tensor, mu: Tensor) -> Tensor:
    """R2 of each column, float32 [D], against the mean mu [D], for y and prediction [n, D]."""
    spread = (y - mu).pow(2).mean(0)
    return 1 - (y - prediction).pow(2).mean(0) / spread.clamp_min(1e-12)
