"""Predictors of many feature sets and sizes from one matrix of moments, and what their residuals cost.

Axes: n held-out tokens, F features of a set, D KV elements (of the coded layers), r rank, K kept components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec.predictor.features import FeatureSpec
from codec.predictor.fit import LinearFit, Moments, explained
from codec.predictor.gptq import round_weights
from codec.predictor.low_rank import Predictor
from codec.quantize import ROUNDING, quantise
from codec.spec import KEEP_FACTOR
from codec.weighting import Weighting, apply_blocks, both_sides
from engine.calibrate.budget import stored_bytes
from kernels.eigen import leading_eigenvectors

FULL = "full"
COMPONENTS_SHARE = 5
"""At most this part of D components are kept, about what fits a pack beside its predictor."""


@dataclass(frozen=True)
class FeatureSet:
    """name; taps: layers of the draft (or of the target's trunk). target_taps: the target's own states, 0 its embeddings. first_layer: the target's
    layers below it are run again, exact and not coded."""

    name: str
    taps: tuple[int, ...]
    target_taps: tuple[int, ...]
    first_layer: int


def separate_sets(num_taps: int, again: Sequence[int]) -> list[FeatureSet]:
    """Sets for a draft with states 0 .. num_taps - 1, and the target's own after its first m layers for each m of `again`."""
    every = tuple(range(num_taps))
    third = tuple(range(num_taps - 1, -1, -3))[::-1]
    sets = [
        FeatureSet("embedding", (), (0,), 0),
        FeatureSet("last state", every[-1:], (0,), 0),
        FeatureSet("every third state", third, (0,), 0),
        FeatureSet("all states", every, (0,), 0),
    ]
    for m in again:
        own = tuple(sorted({0, m // 2, m}))
        sets += [FeatureSet(f"target's {m} layers", (), own, m), FeatureSet(f"all states + target's {m} layers", every, own, m)]
    return sets


def trunk_sets(layers: int) -> list[FeatureSet]:
    """Sets for a trunk of the target's first layers."""
    every = tuple(range(1, layers + 1))
    return [
        FeatureSet("embedding", (), (0,), layers),
        FeatureSet("last state", every[-1:], (0,), layers),
        FeatureSet("every second state", every[::-2][::-1], (0,), layers),
        FeatureSet("all states", every, (0,), layers),
    ]


class Whole:
    """Moments of all features and layers, and held-out rows: a set's are parts of them.

    Args:
        taps, target_taps: what the columns of the features are, in this order; sizes E and E_t.
        moments: of all tokens.
        features, y: held-out raw features [n, F] and KV [n, D].
        weighting: of all layers, so that a step means the same for every set.
        layer_dim: KV elements of a layer.
        first_layer: of y.
    """

    def __init__(
        self,
        taps: tuple[int, ...],
        target_taps: tuple[int, ...],
        sizes: tuple[int, int],
        moments: Moments,
        features: Tensor,
        y: Tensor,
        weighting: Weighting,
        layer_dim: int,
        first_layer: int,
    ) -> None:
        self.taps, self.target_taps, self.sizes = taps, target_taps, sizes
        self.moments, self.features, self.y, self.weighting = moments, features, y, weighting
        self.layer_dim, self.first_layer = layer_dim, first_layer

    def columns(self, one: FeatureSet) -> Tensor:
        """Feature columns of a set, int64 [F]."""
        size, target_size = self.sizes
        offset = len(self.taps) * size
        parts = [torch.arange(size) + size * self.taps.index(tap) for tap in one.taps]
        parts += [torch.arange(target_size) + offset + target_size * self.target_taps.index(tap) for tap in one.target_taps]
        return torch.cat(parts).to(self.features.device)

    def part(self, one: FeatureSet) -> tuple[Moments, Tensor, Tensor, Weighting]:
        """Moments, held-out features and KV, and weights of a set."""
        index, skip = self.columns(one), (one.first_layer - self.first_layer) * self.layer_dim
        m, root = self.moments, self.weighting.root
        blocks = skip // root.shape[-1]
        whole = len(index) == len(m.ff)
        ff = m.ff if whole else m.ff[index][:, index]
        part = Moments(m.n, ff, m.fy[index][:, skip:], m.yy[skip:, skip:], m.f_mean[index], m.f_scale[index], m.mu[skip:])
        return part, self.features[:, index], self.y[:, skip:], Weighting(root[blocks:], self.weighting.inverse[blocks:])


def sweep(whole: Whole, one: FeatureSet, ranks: Sequence[int | str], step: float, num_elements: int) -> Iterator[dict[str, Any]]:
    """One row for each rank ("full" twice, in 4 and 8 bits) of a feature set.

    Args:
        step: of the quantiser. num_elements: KV elements a token, of all layers.

    A row's all_components says whether every component worth keeping was kept: False, and COMPONENTS_SHARE cut the last ones off.
    """
    m, features, y, weighting = whole.part(one)
    spec = FeatureSpec(one.taps, one.target_taps)
    ridge = m.choose_ridge(features, y)
    solution = m.ridge(ridge)
    weighted = apply_blocks(solution, weighting.root)
    yy = both_sides(m.yy, weighting.root)
    cross = weighted.T @ apply_blocks(m.fy, weighting.root)
    predicted = weighted.T @ (m.ff @ weighted)
    low = sorted({int(r) for r in ranks if r != FULL and int(r) < min(solution.shape)})
    directions = leading_eigenvectors(predicted, low[-1])[1] if low else predicted[:, :0]
    fixed = {
        "features": one.name,
        "taps": list(one.taps),
        "target_taps": list(one.target_taps),
        "first_layer": one.first_layer,
        "num_features": len(m.ff),
        "ridge": ridge,
    }
    for rank in low:
        u = directions[:, :rank]
        down = (weighted @ u) / m.f_scale[:, None]
        fit = LinearFit(down, -(m.f_mean @ down), apply_blocks(u.T.contiguous(), weighting.inverse), m.mu, ridge)
        tensors, settings = Predictor.pack(spec, whole.sizes[0], fit.down, fit.offset, fit.up, fit.mu)
        predictor = Predictor.from_pack(tensors, settings, y.device)
        prediction = torch.cat([predictor.predict_features(rows) for rows in features.split(2048)])
        taken = u @ (u.T @ cross)
        covariance = yy - taken - taken.T + u @ ((u.T @ predicted @ u) @ u.T)
        yield (
            fixed
            | {"rank": rank, "storage_bits": 8, "predictor_bytes": stored_bytes(tensors)}
            | _cost(y, prediction, covariance, weighting, m.mu, step, num_elements, whole.layer_dim)
        )
    standard = (features - m.f_mean) / m.f_scale
    for bits in (4, 8) if FULL in ranks else ():
        stored = round_weights(solution, m.ff, bits=bits)
        dense = stored.dense()
        size = stored.codes.numel() * bits // 8 + 2 * stored.scale.numel() + 12 * len(m.ff) + 4 * len(m.mu)
        prediction = m.mu + torch.cat([rows @ dense for rows in standard.split(2048)])
        covariance = both_sides(m.residual_of(dense), weighting.root)
        yield (
            fixed
            | {"rank": FULL, "storage_bits": bits, "predictor_bytes": size}
            | _cost(y, prediction, covariance, weighting, m.mu, step, num_elements, whole.layer_dim)
        )


def _cost(
    y: Tensor, prediction: Tensor, covariance: Tensor, weighting: Weighting, mu: Tensor, step: float, num_elements: int, layer_dim: int
) -> dict[str, Any]:
    """R2 and bits on held-out tokens; the transform is that of the residual's weighted covariance [D, D] on the others."""
    r2 = explained(y, prediction, mu).reshape(-1, 2, layer_dim // 2).mean((0, 2))
    variance, basis = leading_eigenvectors(covariance, len(covariance) // COMPONENTS_SHARE)
    kept = max(1, int((variance > (KEEP_FACTOR * step) ** 2).sum()))
    c = apply_blocks(y - prediction, weighting.root) @ basis[:, :kept]
    bits = laplace_bits(c / step, variance[:kept].sqrt() / step)
    return {
        "r2_k": float(r2[0]),
        "r2_v": float(r2[1]),
        "components": kept,
        "all_components": kept < len(variance),
        "ideal_bits_per_element": float(bits.sum(1).mean()) / num_elements,
    }


def laplace_bits(x: Tensor, scale: Tensor) -> Tensor:
    """Ideal code length, float32 [n, K], of the quantised x [n, K] (in steps) under discretised Laplace densities of standard deviation scale [K].

    As `codec.rate.laplace_probabilities`: zero covers |x| < 1 - ROUNDING, n covers n - ROUNDING <= |x| < n + 1 - ROUNDING.
    """
    rate = math.sqrt(2) / scale
    size = quantise(x).abs().float()
    zero = -torch.log2(-torch.expm1(-(1 - ROUNDING) * rate))
    more = 1 + (size - ROUNDING) * rate * math.log2(math.e) - torch.log2(-torch.expm1(-rate))
    return torch.where(size > 0, more, zero)
