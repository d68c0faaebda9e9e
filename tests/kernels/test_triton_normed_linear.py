"""normed_linear in Triton against its twin, and against the float32 product that it stands for."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from codec.predictor.features import rms_normalise
from kernels.normed_linear import reference, split
from kernels.normed_linear import triton as own

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1, 16, 1), (5, 3, 64, 37), (130, 2, 40, 150), (3, 2, 192, 64)]  # n, t, E, r
if torch.cuda.is_available():
    SHAPES += [(1000, 9, 896, 1088), (515, 2, 1536, 1088)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normed_linear(shape, device, assert_close):
    tokens, states, size, columns = shape
    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, states, size, generator=generator)
    rows *= 10.0 ** torch.randint(-2, 4, (tokens, states, 1), generator=generator)  # streams grow from state to state
    rows[:, :, 3] += 40 * rows.std(-1)  # as one large channel of theirs does
    rows = rows.to(device, torch.bfloat16)
    matrix = (torch.randn(states * size, columns, generator=generator) / (states * size) ** 0.5).to(device)
    got = own.normed_linear(rows, split(matrix), 1e-6)
    assert got.dtype == torch.float32 and got.shape == (tokens, columns)
    assert_close(got, reference.normed_linear(rows, split(matrix), 1e-6), 2e-5)
    assert_close(got, (rms_normalise(rows).flatten(1).double() @ matrix.double()).float(), 5e-5)
    wide = torch.zeros(tokens, states + 1, size, dtype=rows.dtype, device=device)
    wide[:, 1:] = rows
    assert torch.equal(own.normed_linear(wide[:, 1:], split(matrix), 1e-6), got)


def test_without_tokens_or_states_there_is_nothing_to_add(device):
    assert own.normed_linear(
        torch.zeros(0, 2, 8, dtype=torch.bfloat16, device=device), split(torch.ones(16, 3, device=device)), 1e-6
    ).shape == (0, 3)
    none = own.normed_linear(torch.zeros(4, 0, 8, dtype=torch.bfloat16, device=device), split(torch.ones(0, 3, device=device)), 1e-6)
    assert torch.equal(none, torch.zeros(4, 3, device=device))


def test_a_matrix_of_other_rows_is_refused(device):
    with pytest.raises(ValueError, match="2 states of 8"):
        own.normed_linear(torch.zeros(4, 2, 8, dtype=torch.bfloat16, device=device), split(torch.ones(15, 3, device=device)), 1e-6)
