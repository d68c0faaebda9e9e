"""Feature rows and the per-request buffer that keeps them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.errors import PredictorError
from codec.predictor.features import FeatureBuffer, FeatureSpec, join_features, rms_normalise


def test_rms_normalise_ignores_scale() -> None:
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rms_normalise(x * 100), rms_normalise(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rms_normalise(x).pow(2).mean(-1), torch.ones(5, 3), rtol=1e-4, atol=1e-4)
    assert rms_normalise(torch.zeros(2, 4)).isfinite().all()


def test_join_features_order_and_sizes() -> None:
    rows, target_rows = torch.randn(4, 2, 6), torch.randn(4, 3, 5)
    joined, spec = join_features(rows, target_rows), FeatureSpec((3, 7), (0, 1, 2))
    assert joined.shape == (4, spec.num_features(6, 5)) and spec.recomputed_layers == 2
    assert FeatureSpec.from_settings(spec.as_settings()) == spec and FeatureSpec((1,), ()).recomputed_layers == 0
    torch.testing.assert_close(joined[:, 6:12], rms_normalise(rows[:, 1]))
    torch.testing.assert_close(joined[:, 17:22], rms_normalise(target_rows[:, 1]))
    with pytest.raises(PredictorError):
        join_features(None, None)


@given(st.lists(st.tuples(st.sampled_from(["append", "skip", "truncate"]), st.integers(0, 90)), max_size=25))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_buffer_against_a_list(operations: list[tuple[str, int]]) -> None:
    buffer, model, counter = FeatureBuffer(dtype=torch.float32), [], 0
    for operation, n in operations:
        if operation == "append":
            rows = torch.arange(counter, counter + n, dtype=torch.float32)[:, None, None].expand(n, 2, 3)
            buffer.append(rows)
            model += list(range(counter, counter + n))
            counter += n
        elif operation == "skip":
            buffer.skip(n)
            model += [None] * n
        else:
            length = min(n, len(model))
            buffer.truncate(length)
            model = model[:length]
        assert buffer.length == len(model)
        for start, end in ((0, len(model)), (len(model) // 2, len(model)), (len(model) // 3, len(model) // 2)):
            taken = buffer.take(start, end)
            if start >= end or None in model[start:end]:
                assert taken is None
            else:
                assert taken is not None and taken[:, 1, 2].tolist() == model[start:end]


def test_buffer_reduces_on_arrival_and_refuses_bad_cuts() -> None:
    buffer = FeatureBuffer(reduce=lambda rows: rows.sum(1)[:, :2], dtype=torch.float32)
    buffer.append(torch.ones(3, 4, 5))
    taken = buffer.take(0, 3)
    assert taken is not None and taken.shape == (3, 2) and float(taken[0, 0]) == 4
    assert buffer.take(0, 4) is None
    with pytest.raises(PredictorError):
        buffer.truncate(4)


def test_forgotten_rows_are_given_back_and_later_ones_stay() -> None:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(300, 2, 3, generator=generator).bfloat16()
    buffer = FeatureBuffer()
    buffer.skip(4)
    buffer.append(rows[:200])
    before = buffer.nbytes
    buffer.forget(150)
    assert buffer.length == 204 and buffer.nbytes < before / 2
    assert buffer.take(149, 160) is None and buffer.take(0, 3) is None
    buffer.append(rows[200:])
    found = buffer.take(150, 304)
    assert found is not None and torch.equal(found, rows[146:])
    buffer.forget(100)  # gone already
    buffer.truncate(160)
    found = buffer.take(150, 160)
    assert found is not None and torch.equal(found, rows[146:156])
    buffer.truncate(120)  # into what is gone: it has to be made again
    buffer.append(rows[:5])
    assert buffer.take(110, 125) is None
    found = buffer.take(120, 125)
    assert found is not None and torch.equal(found, rows[:5])
