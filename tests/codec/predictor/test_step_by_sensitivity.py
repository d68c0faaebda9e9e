"""The quantiser's step follows a token's predicted sensitivity: finer where an error harms more."""

from __future__ import annotations

import torch

from codec.predictor.dense import DensePredictor
from codec.predictor.features import FeatureSpec


def test_a_token_twice_as_sensitive_gets_a_finer_step():
    sensitivity = torch.tensor([1.0, 0.0])  # log2, of the first feature
    zeros = torch.zeros(2)
    predictor = DensePredictor(FeatureSpec((0,), ()), torch.zeros(2, 3), zeros, zeros + 1, torch.zeros(3), 2, sensitivity, 1.0)
    octaves = predictor.log2_step(torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, -5.0]]), None)
    torch.testing.assert_close(octaves, torch.tensor([0.0, -0.5, -1.0]))
    half = DensePredictor(FeatureSpec((0,), ()), torch.zeros(2, 3), zeros, zeros + 1, torch.zeros(3), 2, sensitivity, 0.5)
    torch.testing.assert_close(half.log2_step(torch.tensor([[2.0, 0.0]]), None), torch.tensor([-0.5]))
