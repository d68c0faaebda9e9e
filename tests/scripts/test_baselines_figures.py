"""Numbers the baselines rest on: a fair comparison needs their own allocation and damping."""

from __future__ import annotations

import torch

from baselines.aqua import _ridge
from baselines.kvtc_allocation import TYPE_BITS, options, quantise


def test_the_ridge_is_damped_by_a_thousandth_of_the_mean_energy():
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)).double()
    weight = _ridge(x, 3 * x)
    torch.testing.assert_close(weight, torch.tensor([[3 / 1.001]]).double(), rtol=1e-6, atol=0)


def test_an_option_costs_the_square_of_its_error():
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(1)) * 5
    found = {option.kind: option for option in options(x, 64, (1,)) if option.size == 1}
    assert set(found) == set(TYPE_BITS)
    shift, scale, codes = quantise(x.T.reshape(1, 1, 64), "int2")
    error = (codes.float() * scale + shift - x.T.reshape(1, 1, 64)).pow(2).sum()
    assert abs(found["int2"].error / float(error) - 1) < 1e-3
    assert found["int2"].error > found["int4"].error > found["fp8"].error / 100
