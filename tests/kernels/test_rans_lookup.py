"""What the rANS kernels look up: divisions are exact for every frequency, and trees of every depth find every slot."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.rans import lookup, reference
from kernels.rans import triton as gpu

LIMITS = [1, 7, 8, 127, 128, 2047, 2048, 4095]


def test_a_state_is_divided_exactly_by_every_frequency():
    freq = torch.arange(1, reference.TOTAL)
    divisor = lookup.divisors(freq, torch.zeros_like(freq))
    low, high = divisor & 0xFFFFFFFF, divisor >> 32 & 0xFFFFFFFF
    assert torch.equal(low >> 18, freq)
    generator = torch.Generator().manual_seed(0)
    limit = freq << 18
    for quotient in (0, 1, 2, 77, (1 << 18) - 2, (1 << 18) - 1, *torch.randint(0, 1 << 18, (200,), generator=generator).tolist()):
        for state in (freq * quotient, freq * quotient + freq - 1):  # where an error in the quotient would show first
            assert bool((state < limit).all())
            # the product of 32 and 32 bits, in halves that int64 holds
            plus, multiplier = state + (high >> 31), high | 1 << 31
            upper = (plus >> 16) * multiplier + ((plus & 0xFFFF) * multiplier >> 16)
            assert torch.equal(upper >> 16 >> (low & 15), torch.full_like(freq, quotient))


def _tables() -> reference.RansTables:
    """Classes of every depth, some symbols a thousand times likelier than others."""
    generator = torch.Generator().manual_seed(1)
    freqs = []
    for limit in LIMITS:
        n = 2 * limit + 2
        weight = torch.rand(n, generator=generator, dtype=torch.float64) ** 8
        freq = (weight / weight.sum() * (reference.TOTAL - n)).long() + 1
        freq[freq.argmax()] += reference.TOTAL - int(freq.sum())
        freqs.append(freq)
    gains = torch.full((reference.NUM_GAINS,), reference.TOTAL // reference.NUM_GAINS)
    return reference.build_tables(torch.cat(freqs), torch.tensor(LIMITS), gains)


def test_every_slot_is_found_in_trees_of_every_depth():
    tables = _tables()
    slots = torch.arange(reference.TOTAL)
    key = slots << 18 | 0x3FFFF
    nodes = tables.nodes.long() & 0xFFFFFFFF
    for n, limit in enumerate(LIMITS):
        centre = int(tables.info[n]) >> reference.INFO_BITS
        want = reference._find(tables, torch.full_like(slots, centre - limit), torch.full_like(slots, 2 * limit + 2), slots)
        node, symbol, front = torch.full_like(slots, n), torch.zeros_like(slots), 7
        for depth in range(4):
            found = (key[:, None] - nodes[node] & 0xFFFFFFFF).min(1).values
            place = 15 - (found >> 14 & 15)
            symbol = symbol * 16 + place - 15 if depth else place - 7
            if bool((found & 0x3FFF != 0x3FFF).all()):
                break
            node, front = int(tables.first_child[n]) + front + symbol, 16 * front + 31
        packed = tables.packed[want].long()
        assert torch.equal(symbol, want - centre)
        assert torch.equal(~found & 0x3FFF, packed & 0xFFFF)
        assert torch.equal(found >> 18, slots - (packed >> 16))


@pytest.mark.usefixtures("poisoned")
def test_classes_of_every_depth_side_by_side(device):
    tables = _tables().to(device)
    generator = torch.Generator().manual_seed(2)
    classes = torch.arange(len(LIMITS), dtype=torch.int32)[torch.randperm(len(LIMITS), generator=generator)].to(device)
    q = torch.randint(-5000, 5000, (11, len(LIMITS)), generator=generator).to(torch.int16)
    q[::2] //= 700
    gains = torch.randint(6, 11, (11,), generator=generator).to(torch.uint8).to(device)
    starts, q = torch.tensor([0, 9, 11], device=device), q.to(device)
    want = reference.rans_encode(tables, q, classes, gains, starts, 2)
    got = gpu.rans_encode(tables, q, classes, gains, starts, 2, max_span_tokens=9)
    assert torch.equal(got.words[: len(want.words)], want.words)
    assert torch.equal(got.states[: len(want.states)], want.states)
    decoded = gpu.rans_decode(tables, want, classes, starts, 2, num_tokens=11, max_span_tokens=9)
    assert torch.equal(decoded.q, reference.rans_decode(tables, want, classes, starts, 2).q)
    assert torch.equal(decoded.gains, gains)
    assert decoded.intact.all()
