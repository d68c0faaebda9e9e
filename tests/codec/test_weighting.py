"""The attention weighting's scales: keys against values, and layers against each other."""

from __future__ import annotations

import torch

from codec.spec import KvLayout
from codec.weighting import Weighting, attention_weighting

D = 4


def _weights(energy: list[float]) -> torch.Tensor:
    """|S| of keys and values of two like layers, [layers, 2], whose residual streams have the given energies."""
    eye = torch.eye(D)
    layout = KvLayout(num_layers=2, num_kv_heads=1, head_dim=D)
    found = attention_weighting(layout, [eye, eye], eye.expand(2, 1, D, D), eye.expand(2, 1, D, D), torch.tensor(energy))
    return found.sensitivity_sqrt.diagonal(dim1=1, dim2=2).mean(1).reshape(2, 2)


def test_a_logit_is_divided_by_the_root_of_the_head_size():
    # a value's metric is W_o^T W_o = 1; a key's is the trace of the values' spread, 4, times E[q q^T] = 1, over d = 4
    own = _weights([1.0, 1.0])
    torch.testing.assert_close(own[:, 0], own[:, 1])


def test_errors_count_relative_to_the_residual_stream():
    own = _weights([1.0, 16.0])
    torch.testing.assert_close(own[0], 4 * own[1])


def test_blocks_that_say_nothing_stay_invertible():
    metric = torch.stack([torch.eye(D), torch.zeros(D, D)])
    for given in (metric, metric * 0):
        found = Weighting.from_metric(given)
        assert found.inverse.isfinite().all()
        torch.testing.assert_close(found.sensitivity_sqrt @ found.inverse, torch.eye(D).expand(2, D, D))
    silent = Weighting.from_metric(metric).sensitivity_sqrt.diagonal(dim1=1, dim2=2)
    assert (silent[1] < 0.1 * silent[0]).all(), "a head nobody looks at weighs little"
