"""The stored predictor: rounding to 8 bits, split into reduce and predict, refusals."""

from __future__ import annotations

import pytest
import torch

from draft.errors import DraftError
from draft.features import FeatureSpec, join_features
from draft.predictor import Predictor, zero_prediction

SIZE, TARGET_SIZE, RANK, DIM = 12, 10, 6, 40


def parts(embedding: bool = True, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    spec = FeatureSpec((2, 5, 9), embedding)
    features = spec.num_features(SIZE, TARGET_SIZE)
    down = torch.randn(features, RANK, generator=generator)
    # channels of very different size, as keys with a bias have
    up = torch.randn(RANK, DIM, generator=generator) * torch.logspace(-3, 3, DIM)
    return spec, down, torch.randn(RANK, generator=generator), up, torch.randn(DIM, generator=generator) * 5


@pytest.mark.parametrize("embedding", [True, False])
def test_eight_bits_keep_every_channel(embedding: bool) -> None:
    spec, down, offset, up, mu = parts(embedding)
    predictor = Predictor.from_pack(*Predictor.pack(spec, SIZE, down, offset, up, mu))
    rows, embeddings = torch.randn(50, 3, SIZE), torch.randn(50, TARGET_SIZE) if embedding else None
    exact = (join_features(rows, embeddings) @ down + offset) @ up
    error = (predictor(rows, embeddings) - mu - exact).pow(2).mean(0) / exact.pow(2).mean(0)
    assert float(error.max()) < 1e-3
    torch.testing.assert_close(predictor.predict(predictor.reduce(rows), embeddings), predictor(rows, embeddings))


def test_pack_is_small() -> None:
    spec, down, offset, up, mu = parts()
    tensors, settings = Predictor.pack(spec, SIZE, down, offset, up, mu)
    large = [t for t in tensors.values() if t.dim() == 2]
    assert {t.dtype for t in large} == {torch.int8} and settings == {"taps": [2, 5, 9], "embedding": True, "draft_size": SIZE}
    assert zero_prediction(tensors, 3).shape == (3, DIM)


def test_refusals() -> None:
    spec, down, offset, up, mu = parts()
    tensors, settings = Predictor.pack(spec, SIZE, down, offset, up, mu)
    predictor = Predictor.from_pack(tensors, settings)
    with pytest.raises(DraftError, match="3 taps of 12"):
        predictor.reduce(torch.randn(4, 2, SIZE))
    with pytest.raises(DraftError, match="embedding"):
        predictor.predict(torch.randn(4, RANK), None)
    with pytest.raises(DraftError, match="missing"):
        Predictor.from_pack({k: v for k, v in tensors.items() if k != "up"}, settings)
    with pytest.raises(DraftError, match="missing"):
        Predictor.from_pack(tensors, {})
