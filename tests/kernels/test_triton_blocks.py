"""Kernels of speculative steps that are captured whole, against their twins: integers, so they must be the same."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.accept import reference as accept_reference
from kernels.accept import triton as accept_triton
from kernels.advance import reference as advance_reference
from kernels.advance import triton as advance_triton
from kernels.advance_block import BlockState
from kernels.advance_block import reference as advance_block_reference
from kernels.advance_block import triton as advance_block_triton
from kernels.block_inputs import reference as inputs_reference
from kernels.block_inputs import triton as inputs_triton

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("count, offset", [(1, 0), (2, -1), (5, 0), (1, 3)], ids=str)
def test_positions_slots_and_lengths(count, offset, device):
    size, pages = 4, 6
    lengths = torch.tensor([1, 7, 9, 22, 0], device=device)
    firsts = torch.tensor([0, 7, 8, 21, 0], device=device)
    limits = torch.tensor([24, 8, 24, 24, 0], device=device)  # room for all, one more token, ..., a padding request
    table = torch.randperm(5 * pages, generator=torch.Generator().manual_seed(0)).view(5, pages).int().to(device)
    found = []
    for module in (inputs_triton, inputs_reference):
        out = [torch.full((5 * count,), -7, device=device) for _ in range(2)] + [torch.full((5,), -7, dtype=torch.int32, device=device)]
        module.block_inputs(lengths, firsts, limits, table, offset, size, *out)
        found.append(out)
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    positions, slots, contexts = (x.cpu() for x in found[0])
    for b in range(5):
        for j in range(count):
            at = int(lengths[b]) + offset + j
            inside = int(firsts[b]) <= at < int(limits[b])
            assert int(positions[b * count + j]) == (at if inside else -1)
            assert int(slots[b * count + j]) == (int(table[b, at // size]) * size + at % size if inside else -1)
        assert int(contexts[b]) == max(0, min(int(lengths[b]) + offset + count, int(limits[b])))


@pytest.mark.parametrize("batch", [1, 5, 32, 33, 128])
def test_a_step_leaves_its_tokens_to_the_next_one(batch, device):
    tokens = torch.randint(-1, 1000, (batch,), generator=torch.Generator().manual_seed(batch)).to(device)
    lengths = (torch.arange(batch, device=device) * 7) % 12
    found = []
    for module in (advance_triton, advance_reference):
        own, token_ids = lengths.clone(), torch.full((batch,), -7, device=device)
        drawn = torch.full((2, batch), -7, device=device)
        module.advance(tokens, own, token_ids, drawn)
        module.advance(tokens + 1, own, token_ids, drawn)  # the tokens before stay
        found.append((own, token_ids, drawn))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    own, token_ids, drawn = found[0]
    assert torch.equal(own, lengths + 2) and torch.equal(token_ids, tokens + 1)
    places = torch.arange(batch, device=device)
    assert torch.equal(drawn[lengths % 2, places], tokens) and torch.equal(drawn[(lengths + 1) % 2, places], tokens + 1)


@pytest.mark.parametrize("num_drafts", [[3], [0, 3, 1], [2, 2]], ids=str)
def test_accept_of_evenly_spaced_rows(num_drafts, device):
    """As of the ragged rows of the same drafts."""
    vocab, most, batch = 300, 3, len(num_drafts)
    generator = torch.Generator().manual_seed(sum(num_drafts))
    p = torch.softmax(torch.randn(batch, most + 1, vocab, generator=generator) * 2, -1)
    q = torch.softmax(torch.randn(batch, most, vocab, generator=generator) * 2, -1)
    tokens = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(batch, most)
    rest = [x.to(device) for x in (torch.tensor(num_drafts), torch.arange(batch) * 977, torch.arange(batch) + 5)]
    even = [x.to(device) for x in (p.flatten(0, 1), q.flatten(0, 1), tokens.flatten())]
    rows = [
        torch.cat([p[b, : n + 1] for b, n in enumerate(num_drafts)]),
        torch.cat([q[b, :n] for b, n in enumerate(num_drafts)]),
        torch.cat([tokens[b, :n] for b, n in enumerate(num_drafts)]),
    ]
    want = accept_reference.accept(*(x.to(device) for x in rows), *rest, max(num_drafts))
    for module in (accept_triton, accept_reference):
        got = module.accept(*even, *rest, most, even=True)
        assert torch.equal(got.num_accepted, want.num_accepted) and torch.equal(got.next_token, want.next_token)


@pytest.mark.parametrize("runs_kept, accepts, size", [(False, False, 96), (True, False, 0), (False, True, 1200), (True, True, 64)], ids=str)
@pytest.mark.parametrize("batch, length", [(1, 1), (5, 2), (8, 3), (33, 7)], ids=str)
def test_drafts_that_are_kept_and_the_state_behind_them(batch, length, runs_kept, accepts, size, device):
    draw = torch.Generator().manual_seed(100 * batch + length)

    def drawn(low, high, *shape):
        return torch.randint(low, high, shape, generator=draw).to(device)

    tokens, best = drawn(0, 2, batch, length + 1), drawn(0, 2, batch, length + 1)
    best[drawn(0, 8, batch, length + 1) == 0] = -1
    own = torch.where(drawn(0, 4, batch, length + 1) == 0, 1, best)
    num_drafts, lengths = drawn(0, length + 1, batch), drawn(5, 90, batch)
    accepted = (drawn(0, 2, batch) == 0, drawn(0, length + 1, batch), drawn(0, 9, batch)) if accepts else None
    exits = torch.randn(length + 1, batch, size, generator=draw).to(device) if size else None
    found = []
    for module in (advance_block_triton, advance_block_reference):
        state = BlockState(lengths.clone(), *(torch.full((batch,), -7, device=device) for _ in range(3)))
        out = torch.full((batch, length + 2), -7, device=device)
        hidden = torch.full((batch, size), -7.0, device=device) if size else None
        module.advance_block(tokens, own, best, num_drafts, state, out, runs_kept=runs_kept, accepted=accepted, exits=exits, hidden=hidden)
        found.append([*state, out, *([] if hidden is None else [hidden])])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
    length_after, first, previous, last, out = (x.cpu() for x in found[0][:5])
    for b in range(batch):
        kept = 0
        while kept < int(num_drafts[b]) and tokens[b, kept + 1] == own[b, kept]:
            kept += 1
        following = own[b, kept]
        if accepted is not None and not accepted[0][b]:
            kept, following = int(accepted[1][b]), accepted[2][b]
        finite = bool((best[b, : int(num_drafts[b]) + 1] >= 0).all())
        assert int(out[b, 0]) == (kept + 1 if finite else 0)
        assert out[b, 1 : 2 + kept].tolist() == [*tokens[b, 1 : 1 + kept].tolist(), int(following)]
        assert int(length_after[b]) == int(lengths[b]) + kept + 1 and int(last[b]) == max(0, int(following))
        assert int(previous[b]) == int(tokens[b, kept]) and int(first[b]) == int(lengths[b]) + (1 if runs_kept else kept)
        if exits is not None:
            assert torch.equal(found[0][5][b], exits[kept, b])
