"""Paged attention's reference against a token-by-token softmax in float64, on awkward shapes, with NaN wherever it must not look."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.paged_attention import paged_attention, reference

BATCHES = {
    "one token": ([1], [1]),
    "one step": ([1], [37]),
    "prefill": ([33], [33]),
    "block after context": ([5], [64]),
    "ragged": ([1, 7, 20, 1], [50, 7, 23, 16]),
    "over a tile": ([131], [140]),
}


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch):
    monkeypatch.setenv("FORETOLD_KERNELS", "reference")


def batch_of(query_lens, context_lens, heads, groups, d, size, contiguous, dtype=torch.float32):
    """Random inputs; page slots beyond a context, and pages of nobody, are NaN."""
    generator = torch.Generator().manual_seed(4)
    counts = [-(-context // size) for context in context_lens]
    total = sum(counts) + 3
    order = torch.arange(total) if contiguous else torch.randperm(total, generator=generator)
    k_pages, v_pages = (torch.full((total, size, groups, d), math.nan, dtype=dtype) for _ in range(2))
    table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    taken = 0
    for request, (count, context) in enumerate(zip(counts, context_lens, strict=True)):
        pages = order[taken : taken + count]
        taken += count
        table[request, :count] = pages.int()
        for position in range(context):
            for target in (k_pages, v_pages):
                target[pages[position // size], position % size] = torch.randn(groups, d, generator=generator).to(dtype)
    q = torch.randn(sum(query_lens), heads, d, generator=generator).to(dtype)
    return q, k_pages, v_pages, table


def by_hand(q, k_pages, v_pages, table, query_lens, context_lens, scale):
    """One query and head at a time."""
    size, heads, groups = k_pages.shape[1], q.shape[1], k_pages.shape[2]
    out, row = torch.zeros(q.shape, dtype=torch.float64), 0
    for request, (n, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        slots = [(int(table[request, p // size]), p % size) for p in range(context)]
        k = torch.stack([k_pages[page, offset] for page, offset in slots]).double()
        v = torch.stack([v_pages[page, offset] for page, offset in slots]).double()
        for j in range(n):
            seen = context - n + 1 + j
            for head in range(heads):
                group = head * groups // heads
                scores = k[:seen, group] @ q[row, head].double() * scale
                out[row, head] = torch.softmax(scores, 0) @ v[:seen, group]
            row += 1
    return out


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "scattered"])
@pytest.mark.parametrize(("heads", "groups", "d", "size"), [(6, 2, 16, 8), (3, 3, 20, 5), (4, 1, 8, 64)])
@pytest.mark.parametrize("name", BATCHES)
@torch.inference_mode()
def test_matches_softmax_by_hand(name, heads, groups, d, size, contiguous, deterministic):
    lens, contexts = BATCHES[name]
    inputs = batch_of(lens, contexts, heads, groups, d, size, contiguous)
    got = paged_attention(*inputs, lens, contexts, 0.3, deterministic=deterministic)
    want = by_hand(*inputs, lens, contexts, 0.3)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert (got.double() - want).norm() < 1e-5 * want.norm()


@torch.inference_mode()
def test_bf16_is_close_and_lengths_may_be_tensors():
    lens, contexts = BATCHES["ragged"]
    inputs = batch_of(lens, contexts, 6, 2, 16, 8, False, torch.bfloat16)
    got = paged_attention(*inputs, torch.tensor(lens), torch.tensor(contexts), 0.25)
    want = by_hand(*inputs, lens, contexts, 0.25)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 1e-2 * want.norm()


@torch.inference_mode()
def test_neighbouring_pages_are_a_view():
    pages = reference.plan([[3, 4, 5], [7, 6]], [1, 1], [20, 9], 8, 1, torch.float32, torch.device("cpu")).spans
    assert pages[0] == slice(3, 6)
    assert isinstance(pages[1], torch.Tensor) and pages[1].tolist() == [7, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@torch.inference_mode()
def test_deterministic_rows_are_the_same_bits_in_any_block_batch_and_pages(dtype):
    q, k_pages, v_pages, table = batch_of([40, 9], [40, 60], 6, 2, 16, 8, False, dtype)
    whole = paged_attention(q, k_pages, v_pages, table, [40, 9], [40, 60], 0.3, deterministic=True)
    pages = table[0, :5].long()
    for start, n in [(0, 1), (39, 1), (20, 5), (8, 32)]:
        part = q[start : start + n]
        alone = paged_attention(part, k_pages, v_pages, table[:1], [n], [start + n], 0.3, deterministic=True)
        assert torch.equal(alone, whole[start : start + n])
        moved = paged_attention(
            part, k_pages[pages], v_pages[pages], torch.arange(5)[None].int(), [n], [start + n], 0.3, deterministic=True
        )
        assert torch.equal(moved, alone)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_long_blocks_attend_in_two_parts(monkeypatch, softcap) -> None:
    """In bf16, many tokens behind many keys; neighbours of a batch, and capped scores, are computed as ever."""
    lens, contexts = [3, 70, 129], [40, 330, 400]
    monkeypatch.setattr(reference, "_PART_ROWS", 64)
    q, k, v, table = batch_of(lens, contexts, 6, 2, 64, 16, False, torch.bfloat16)
    calls: list = []
    parts = reference._in_two_parts
    monkeypatch.setattr(reference, "_in_two_parts", lambda *given: (calls.append(given[3]), parts(*given))[1])
    made = []
    for keys in (256, 1 << 30):
        monkeypatch.setattr(reference, "_PART_KEYS", keys)
        made.append(paged_attention(q, k, v, table, lens, contexts, 0.125, softcap=softcap).float())
    assert calls == ([] if softcap else [260, 271])
    assert torch.equal(made[0][:3], made[1][:3]) and (made[0] - made[1]).norm() < 0.006 * made[1].norm()
    if softcap is None:
        truth = by_hand(q, k, v, table, lens, contexts, 0.125)
        errors = [float((found.double() - truth).norm() / truth.norm()) for found in made]
        assert errors[0] < 1.2 * errors[1] + 1e-3
    deterministic = paged_attention(q, k, v, table, lens, contexts, 0.125, deterministic=True, softcap=softcap)
    assert len(calls) == (0 if softcap else 2) and bool(deterministic.isfinite().all())
