"""Low-bit rounding of a map against its inputs' covariance, and the dense predictor stored that way."""

from __future__ import annotations

import pytest
import torch

from codec.errors import PredictorError
from codec.predictor.dense import DensePredictor
from codec.predictor.features import FeatureSpec, join_features
from codec.predictor.gptq import pack_nibbles, round_weights, unpack_nibbles


def correlated(num_tokens: int, num_features: int, seed: int) -> torch.Tensor:
    """Features that share a few strong directions, as layers of one residual stream do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_tokens, 6, generator=generator) @ torch.randn(6, num_features, generator=generator)
    x = shared + 0.3 * torch.randn(num_tokens, num_features, generator=generator)
    return (x - x.mean(0)) / x.std(0)


def relative_error(x: torch.Tensor, weights: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((x @ (weights - rounded)).pow(2).mean() / (x @ weights).pow(2).mean())


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (3, 20)])
def test_output_error_is_far_below_plain_rounding(bits: int, group: int) -> None:
    x = correlated(2000, 150, 0)
    weights = torch.randn(150, 37, generator=torch.Generator().manual_seed(1))
    rounded = round_weights(weights, x.T @ x / len(x), bits=bits, group=group)
    assert rounded.codes.dtype == torch.int8 and rounded.codes.min() >= -(2 ** (bits - 1)) and rounded.codes.max() < 2 ** (bits - 1)
    plain_scale = weights.abs().amax(0) / (2 ** (bits - 1) - 1)
    plain = torch.round(weights / plain_scale) * plain_scale
    ours, theirs = relative_error(x, weights, rounded.dense()), relative_error(x, weights, plain)
    print(f"{bits} bits, groups of {group}: {ours:.2e} against {theirs:.2e}")
    assert ours < 0.35 * theirs


def test_white_inputs_are_rounded_no_worse_than_to_nearest() -> None:
    weights = torch.randn(64, 9, generator=torch.Generator().manual_seed(2))
    rounded = round_weights(weights, torch.eye(64), bits=4, group=64)
    assert float((rounded.dense() - weights).pow(2).mean() / weights.pow(2).mean()) < 0.02


def test_a_covariance_without_an_inverse_is_refused() -> None:
    with pytest.raises(PredictorError, match="not positive definite"):
        round_weights(torch.ones(3, 2), -torch.eye(3))
    with pytest.raises(PredictorError, match="bits"):
        round_weights(torch.ones(3, 2), torch.eye(3), bits=1)


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_nibbles_round_trip(dim: int) -> None:
    codes = torch.randint(-8, 8, (5, dim), generator=torch.Generator().manual_seed(dim)).to(torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), dim), codes)


def test_dense_predictor_is_the_ridge_solution_up_to_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    n, taps, draft_size, target_size, dim = 3000, 2, 12, 10, 33
    rows, target_rows = torch.randn(n, taps, draft_size, generator=generator) + 0.5, torch.randn(n, 1, target_size, generator=generator)
    features = join_features(rows, target_rows)
    mean, std = features.mean(0), features.std(0)
    standard = (features - mean) / std
    truth_map = torch.randn(standard.shape[1], dim, generator=generator)
    y = 2.0 + standard @ truth_map
    spec = FeatureSpec((1, 3))
    weights = round_weights(truth_map, standard.T @ standard / n)
    tensors, settings = DensePredictor.pack(spec, draft_size, weights, mean, std, torch.full((dim,), 2.0), attention=truth_map[:, 0])
    predictor = DensePredictor.from_pack(tensors, settings)
    predicted = predictor.predict(predictor.reduce(rows), target_rows)
    assert float((predicted - y).pow(2).mean() / y.var()) < 0.01
    assert predictor.log2_step(predictor.reduce(rows), target_rows) is None
    octaves = DensePredictor.from_pack(tensors, settings | {"level_strength": 0.5}).log2_step(predictor.reduce(rows), target_rows)
    assert octaves is not None and torch.allclose(octaves, -0.25 * (standard @ truth_map[:, 0]), atol=1e-3)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < 0.2 * truth_map.numel() * 4 + 4000
    with pytest.raises(PredictorError, match="target's hidden states"):
        predictor.predict(predictor.reduce(rows), None)
    with pytest.raises(PredictorError, match="taps"):
        predictor.reduce(rows[:, :1])
    with pytest.raises(PredictorError, match="missing"):
        DensePredictor.from_pack({k: v for k, v in tensors.items() if k != "mean"}, settings)
