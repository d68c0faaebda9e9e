"""Predictors of many feature sets and sizes from one matrix of moments, and what their residuals cost.

Axes: n held-out tokens, F features of a set, D KV elements (of the coded layers), r rank, K kept components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from codec.predictor.features import FeatureSpec
from codec.predictor.fit import LinearFit, explained
from codec.predictor.gptq import round_weights
from codec.predictor.low_rank import Predictor
from codec.spec import KEEP_FACTOR
from codec.weighting import Weighting
from engine.calibrate.budget import stored_bytes
from engine.calibrate.search import FeatureSet, Whole, laplace_bits
from kernels.eigen import leading_eigenvectors

FULL = "full"
COMPONENTS_SHARE = 5
"""At most this part of D components are kept, about what fits a pack beside its predictor."""


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


def early_exit_sets(layers: int) -> list[FeatureSet]:
    """Sets for an early exit."""
    every = tuple(range(1, layers + 1))
    return [
        FeatureSet("embedding", (), (0,), layers),
        FeatureSet("last state", every[-1:], (0,), layers),
        FeatureSet("every second state", every[::-2][::-1], (0,), layers),
        FeatureSet("all states", every, (0,), layers),
    ]


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
    weighted = weighting.whiten(solution)
    yy = weighting.whiten_covariance(m.yy)
    cross = weighted.T @ weighting.whiten(m.fy)
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
        fit = LinearFit(down, -(m.f_mean @ down), weighting.unwhiten(u.T.contiguous()), m.mu, ridge)
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
        covariance = weighting.whiten_covariance(m.residual_of(dense))
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
    c = weighting.whiten(y - prediction) @ basis[:, :kept]
    bits = laplace_bits(c / step, variance[:kept].sqrt() / step)
    return {
        "r2_k": float(r2[0]),
        "r2_v": float(r2[1]),
        "components": kept,
        "all_components": kept < len(variance),
        "ideal_bits_per_element": float(bits.sum(1).mean()) / num_elements,
    }
