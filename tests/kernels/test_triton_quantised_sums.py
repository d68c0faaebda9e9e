"""saved_energy and code_bits in Triton against their twins."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.quantised_sums import reference
from kernels.quantised_sums import triton as own

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1), (7, 40), (33, 1500)]  # T, K
if torch.cuda.is_available():
    SHAPES += [(4099, 14_633)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_sums(shape, device, assert_close):
    tokens, components = shape
    generator = torch.Generator().manual_seed(tokens)
    sizes = (torch.randn(tokens, components + 3, generator=generator).abs() * 6).to(device)
    sizes[:, components:] = float("nan")  # beyond what is kept
    inverse = (torch.rand(tokens, generator=generator) + 0.2).to(device)
    counts = torch.randint(1, components + 1, (tokens,), generator=generator).to(device)
    for kept in (counts, torch.full_like(counts, components)):
        for name in ("saved_energy", "code_bits"):
            got = getattr(own, name)(sizes, inverse, kept, 0.42)
            want = getattr(reference, name)(sizes[:, :components], inverse, kept, 0.42)
            assert got.dtype == want.dtype == torch.float32
            assert_close(got, want, 1e-5)
            assert bool((got != 0).any()) or components == 1


def test_columns_are_refused(device):
    with pytest.raises(ValueError, match="dense"):
        ones = torch.ones(4, device=device)
        own.saved_energy(torch.ones(4, 4, device=device).t(), ones, ones.long(), 0.42)
