"""reconstruct in Triton against its twin: bit for bit, with escapes, tokens that are not written and damage."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.reconstruct import Escapes, Points, reference
from kernels.reconstruct import triton as own

pytestmark = pytest.mark.usefixtures("poisoned")
CLASSES = 9
SHAPES = [(1, 1), (5, 3), (37, 150), (64, 64)]  # T, K
if torch.cuda.is_available():
    SHAPES += [(4099, 3021)]


def _case(tokens, components, device, *, escaping=0.05):
    """Arguments of both, but the output; sizes from 0 to the limit, an escape in every twentieth place."""
    g = torch.Generator().manual_seed(tokens)
    points = Points(torch.randint(1, 6, (CLASSES,), generator=g, dtype=torch.int32), torch.randn(4 * CLASSES, generator=g))
    points.offsets.view(-1, 4)[:, 0] = 0.0
    classes = torch.randint(0, CLASSES, (components,), generator=g, dtype=torch.int32)
    shifts = 2 * torch.randint(-3, 4, (tokens,), generator=g, dtype=torch.int32)
    gains = torch.randint(0, 16, (tokens,), generator=g, dtype=torch.uint8)
    moved = (classes[None] + shifts[:, None]).clamp(0, CLASSES - 1)
    limit = points.limits[(moved + 2 * (gains.int()[:, None] - 8)).clamp(0, CLASSES - 1).long()]
    q = torch.randint(-100, 100, (tokens, components), generator=g) % (2 * limit + 1) - limit
    escaped = torch.rand(tokens, components, generator=g) < escaping
    q = torch.where(escaped, limit + 1, q).to(torch.int16)
    cuts = sorted({0, tokens // 3, tokens // 2, tokens})
    counts = torch.nn.functional.pad(escaped.sum(1).cumsum(0), (1, 0))
    remainders = torch.randint(0, 5000, (int(escaped.sum()),), generator=g)
    escapes = Escapes(*(part.to(device) for part in (remainders, torch.tensor(cuts), counts[cuts])))
    places = torch.randperm(2 * tokens, generator=g)[:tokens]
    places[::4] = -1
    columns = torch.randperm(components + 7, generator=g)[:components]
    steps = torch.rand(tokens, generator=g) + 0.1
    first = [part.to(device) for part in (q, classes, shifts, gains, steps)]
    return [*first, Points(*(part.to(device) for part in points)), escapes, places.to(device), columns.to(device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", ["rows", "tokens adjacent"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reconstruct(shape, layout, dtype, device):
    tokens, components = shape
    for escaping in (0.05, 0.0):
        case = _case(tokens, components, device, escaping=escaping)
        if layout != "rows":
            case[0] = case[0].t().contiguous().t()
        wide = torch.full((2 * tokens, components + 20), 7.0, dtype=dtype, device=device)
        got, want = wide.clone()[:, 3:-10], wide.clone()[:, 3:-10]  # rows of a wider buffer
        assert not bool(own.reconstruct(*case, got)) and not bool(reference.reconstruct(*case, want))
        assert torch.equal(got, want)
        written = sorted(place for place in case[-2].tolist() if place >= 0)
        others = [row for row in range(2 * tokens) if row not in set(written)]
        assert bool((got[others] == 7).all()) and len(others) == 2 * tokens - len(written)


@pytest.mark.parametrize("fault", ["missing", "elsewhere", "large"])
def test_escapes_that_do_not_fit_are_damage(fault, device):
    case = _case(40, 50, device)
    remainders, token_starts, starts = case[6]
    assert len(remainders) > 20
    if fault == "missing":
        starts = torch.cat([starts[:-1], starts[-1:] - 1])
        case[6] = Escapes(remainders[:-1], token_starts, starts)
    elif fault == "elsewhere":  # as many in all
        case[6] = Escapes(remainders, token_starts, torch.cat([starts[:1], starts[1:-1] + 1, starts[-1:]]))
    else:
        remainders = remainders.clone()
        remainders[11] = 1 << 40
        case[6] = Escapes(remainders, token_starts, starts)
    for version in (own, reference):
        assert bool(version.reconstruct(*case, torch.zeros(80, 57, device=device)))


def test_a_column_layout_is_refused(device):
    case = _case(4, 4, device)
    with pytest.raises(ValueError, match="last axis"):
        own.reconstruct(*case, torch.zeros(11, 8, device=device).t())
