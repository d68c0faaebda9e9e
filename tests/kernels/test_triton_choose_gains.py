"""choose_gains in Triton against its twin, symbol for symbol, and both against the search that a CPU's encoder runs."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from codec.choice import CLASSES_PER_LEVEL, RateChoice
from codec.rate import NUM_CLASSES, EntropyModel
from kernels.choose_gains import reference
from kernels.choose_gains import triton as own

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1), (6, 3), (17, 67), (9, 300)]  # T, K
if torch.cuda.is_available():
    SHAPES += [(1003, 3021)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_choose_gains(shape, device):
    tokens, components = shape
    generator = torch.Generator().manual_seed(components)
    choice = RateChoice(EntropyModel.laplace(), device)
    base = torch.randint(0, NUM_CLASSES, (components,), generator=generator, dtype=torch.int32)
    levels = torch.randint(-8, 8, (tokens,), generator=generator, dtype=torch.int32)
    scale = 2.0 ** torch.randint(-2, 7, (tokens, 1), generator=generator)  # tokens of small and large integers, some of them escapes
    q = (torch.randn(tokens, components, generator=generator) * scale).to(torch.int32)
    q, base, levels = (part.to(device) for part in (q, base, levels))
    wide = torch.full((tokens, components + 5), 1 << 20, dtype=torch.int32, device=device)
    wide[:, :components] = q
    got = own.choose_gains(wide[:, :components], base, -CLASSES_PER_LEVEL * levels, choice.prices)
    assert got.dtype == torch.uint8
    assert torch.equal(got, reference.choose_gains(q, base, -CLASSES_PER_LEVEL * levels, choice.prices))
    on_cpu = RateChoice(EntropyModel.laplace())
    assert torch.equal(got.cpu(), on_cpu.choose_gains(q.cpu(), base.cpu(), levels.cpu()))
    assert len(set(got.tolist())) > 1 or tokens < 5


def test_columns_are_refused(device):
    choice = RateChoice(EntropyModel.laplace(), device)
    zeros = torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="dense"):
        own.choose_gains(torch.zeros(4, 4, dtype=torch.int32, device=device).t(), zeros, zeros, choice.prices)
