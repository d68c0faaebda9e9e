"""The stored predictor: rounding to 8 bits, split into reduce and predict, refusals."""

from __future__ import annotations

import pytest
import torch

from codec.errors import PredictorError
from codec.predictor.features import FeatureSpec, join_features
from codec.predictor.low_rank import Predictor, zero_prediction

SIZE, TARGET_SIZE, RANK, DIM = 12, 10, 6, 40


def parts(target_taps: tuple[int, ...] = (0,), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    spec = FeatureSpec((2, 5, 9), target_taps)
    features = spec.num_features(SIZE, TARGET_SIZE)
    down = torch.randn(features, RANK, generator=generator)
    # channels of very different size, as keys with a bias have
    up = torch.randn(RANK, DIM, generator=generator) * torch.logspace(-3, 3, DIM)
    return spec, down, torch.randn(RANK, generator=generator), up, torch.randn(DIM, generator=generator) * 5


@pytest.mark.parametrize("target_taps", [(0,), (), (0, 2, 4)])
def test_eight_bits_keep_every_channel(target_taps: tuple[int, ...]) -> None:
    spec, down, offset, up, mu = parts(target_taps)
    predictor = Predictor.from_pack(*Predictor.pack(spec, SIZE, down, offset, up, mu))
    rows, target_rows = torch.randn(50, 3, SIZE), torch.randn(50, len(target_taps), TARGET_SIZE) if target_taps else None
    exact = (join_features(rows, target_rows) @ down + offset) @ up
    error = (predictor(rows, target_rows) - mu - exact).pow(2).mean(0) / exact.pow(2).mean(0)
    assert float(error.max()) < 1e-3
    torch.testing.assert_close(predictor.predict(predictor.reduce(rows), target_rows), predictor(rows, target_rows))


def test_pack_is_small() -> None:
    spec, down, offset, up, mu = parts()
    tensors, settings = Predictor.pack(spec, SIZE, down, offset, up, mu)
    large = [t for t in tensors.values() if t.dim() == 2]
    assert {t.dtype for t in large} == {torch.int8} and settings == {"taps": [2, 5, 9], "target_taps": [0], "draft_size": SIZE}
    assert zero_prediction(tensors, 3).shape == (3, DIM)


def test_refusals() -> None:
    spec, down, offset, up, mu = parts()
    tensors, settings = Predictor.pack(spec, SIZE, down, offset, up, mu)
    predictor = Predictor.from_pack(tensors, settings)
    with pytest.raises(PredictorError, match="3 taps of 12"):
        predictor.reduce(torch.randn(4, 2, SIZE))
    for wrong in (None, torch.randn(4, TARGET_SIZE), torch.randn(4, 2, TARGET_SIZE)):
        with pytest.raises(PredictorError, match="target's hidden states"):
            predictor.predict(torch.randn(4, RANK), wrong)
    with pytest.raises(PredictorError, match="missing"):
        Predictor.from_pack({k: v for k, v in tensors.items() if k != "up"}, settings)
    with pytest.raises(PredictorError, match="missing"):
        Predictor.from_pack(tensors, {})
