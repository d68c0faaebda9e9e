"""grouped_linear in Triton against its twin, and its twin against one product a row."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.grouped_linear import reference
from kernels.grouped_linear import triton as grouped

pytestmark = pytest.mark.usefixtures("poisoned")
BOUND = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def case(sizes, inputs, outputs, dtype, device):
    generator = torch.Generator().manual_seed(len(sizes))
    x = torch.randn(sum(sizes), inputs, generator=generator)
    weights = torch.randn(len(sizes), outputs, inputs, generator=generator)
    return x.to(device, dtype), weights.to(device, dtype), torch.tensor(sizes, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("sizes", "inputs", "outputs"),
    [([1], 16, 16), ([0, 3, 0, 40, 1, 0], 60, 70), ([16, 16], 64, 64), ([0, 0, 17], 100, 5), ([0, 0], 8, 8), ([1] * 9, 33, 130)],
)
def test_matches_the_twin(sizes, inputs, outputs, dtype, device, assert_close):
    x, weights, counts = case(sizes, inputs, outputs, dtype, device)
    want = reference.grouped_linear(x, weights, counts)
    rows = [weight for weight, size in zip(weights, sizes, strict=True) for _ in range(size)]
    assert want.shape == (sum(sizes), outputs)
    if rows:
        assert_close(want.float(), torch.einsum("mi,moi->mo", x.float(), torch.stack(rows).float()), BOUND[dtype])
    assert_close(grouped.grouped_linear(x, weights, counts).float(), want.float(), BOUND[dtype])


def test_a_row_does_not_depend_on_its_company(device):
    x, weights, counts = case([5, 30, 0, 2], 50, 40, torch.bfloat16, device)
    whole = grouped.grouped_linear(x, weights, counts)
    for row, group in ((0, 0), (20, 1), (36, 3)):
        alone = grouped.grouped_linear(x[row : row + 1], weights, torch.eye(4, dtype=torch.int64, device=device)[group])
        assert torch.equal(alone[0], whole[row])
