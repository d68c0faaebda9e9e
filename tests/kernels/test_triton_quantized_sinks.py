"""First and last tokens kept exact beside quantised pages: attention reads them and not their codes, in the twin and in Triton."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.kv_write import kv_write
from kernels.paged_attention import reference as dense
from kernels.paged_attention import triton as paged
from kernels.quantized_kv import attention, quantized_kv_write, reference
from kernels.quantized_kv.reference import NUM_RECENT, NUM_SINKS, RING, ChannelMeans, ExactRecent, ExactSinks, QuantizedPages, new_pages
from tests.kernels.cases import in_turn

pytestmark = pytest.mark.usefixtures("poisoned")
GPU = torch.cuda.is_available()
SHAPES = [([1], [1], 2, 1, 32, 16), ([3, 1], [3, 40], 4, 2, 32, 16), ([2, 1], [70, 5], 6, 1, 64, 2)]
if GPU:
    SHAPES += [([5] * 4, [3000, 65, 129, 5], 12, 2, 128, 64), ([700, 1], [700, 100], 32, 8, 128, 64)]


def _filled(shape, bits, dtype, device, sink_scale=6.0):
    """Requests whose first tokens dwarf the others, their codes spoiled: (q, pages, means, angles, table, sinks, true keys and values)."""
    query_lens, context_lens, heads, kv_heads, d, size = shape
    generator = torch.Generator().manual_seed(bits)
    longest = max(context_lens) + 128
    angle = torch.arange(longest)[:, None] * 1000.0 ** (-torch.arange(d // 2) * 2 / d)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    mean = torch.randn(2, kv_heads, d, generator=generator).to(device)
    means = ChannelMeans(mean[0], mean[1])
    counts = [-(-c // size) for c in context_lens]
    order = torch.randperm(sum(counts), generator=generator).tolist()
    pages = new_pages(bits, len(order), size, kv_heads, d, device)
    true = torch.zeros(2, len(order), size, kv_heads, d, device=device, dtype=dtype)
    slots = len(counts) + 2
    kept = torch.full((2, slots, NUM_SINKS, kv_heads, d), float("nan"), device=device, dtype=dtype)
    rows = torch.randperm(slots, generator=generator)[: len(counts)].to(device, torch.int32)
    table = torch.zeros((len(counts), max(counts)), dtype=torch.int32)
    for b, context in enumerate(context_lens):
        mine = [order.pop() for _ in range(counts[b])]
        table[b, : counts[b]] = torch.tensor(mine)
        kv = torch.randn(2, context, kv_heads, d, generator=generator)
        kv[:, :NUM_SINKS] *= sink_scale
        kv = (kv.to(device) + mean[:, None]).to(dtype)
        slot = torch.tensor([mine[t // size] * size + t % size for t in range(context)], device=device)
        quantized_kv_write(kv[0], kv[1], cos[:context], sin[:context], slot, means, pages)
        n = min(context, NUM_SINKS)
        for scales in (pages.k_scale, pages.v_scale):
            scales[slot[:n] // size, :, slot[:n] % size] = 1000.0
        first = int(rows[b]) * NUM_SINKS + torch.arange(n, device=device)
        kv_write(kv[0][:n], kv[1][:n], cos[:n], sin[:n], first, kept[0], kept[1])
        kv_write(kv[0], kv[1], cos[:context], sin[:context], slot, true[0], true[1])
    q = torch.randn(sum(query_lens), heads, d, generator=generator).to(device, dtype)
    return q, pages, means, (cos, sin), table.to(device), ExactSinks(kept[0], kept[1], rows), true


@pytest.mark.parametrize("dtype,shape,two_bits", in_turn([torch.float32, torch.bfloat16], SHAPES))
def test_triton_against_the_twin(shape, two_bits, dtype, device, assert_close):
    bits = 2 if two_bits else 4
    q, pages, means, angles, table, sinks, _ = _filled(shape, bits, dtype, device)
    fixed = (pages, means, *angles, table, shape[0], shape[1], 0.1)
    want = reference.quantized_paged_attention(q.float(), *fixed, sinks=sinks)
    bound = 3e-3 if dtype == torch.float32 else 1e-2
    for options in ({}, {"config": paged.AttentionConfig(num_splits=2, block_n=32)}, {"deterministic": True}, {"packed_arithmetic": False}):
        got = attention.quantized_paged_attention(q, *fixed, sinks=sinks, **options)
        assert_close(got.float(), want, bound)


@pytest.mark.parametrize(("sliding_window", "softcap"), [(1, None), (2, 1.5), (37, None), (None, 1.5)])
def test_windows_and_soft_caps(sliding_window, softcap, device, assert_close):
    """First tokens outside of the window are not read; the twin is right by its own dense attention over the decoded pages."""
    shape = ([3, 1], [5, 40], 4, 2, 32, 16)
    q, pages, means, angles, table, sinks, true = _filled(shape, 4, torch.float32, device)
    rows, options = shape[:2], {"sliding_window": sliding_window, "softcap": softcap}
    want = reference.quantized_paged_attention(q, pages, means, *angles, table, *rows, 0.1, sinks=sinks, **options)
    exact = dense.paged_attention(q, true[0], true[1], table, *rows, 0.1, **options)
    assert float((want - exact).norm() / exact.norm()) < 0.2
    for more in ({}, {"config": paged.AttentionConfig(num_splits=2, block_n=32)}, {"deterministic": True}):
        got = attention.quantized_paged_attention(q, pages, means, *angles, table, *rows, 0.1, sinks=sinks, **options, **more)
        assert_close(got, want, 3e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sinks_stand_in_for_their_codes(shape, device):
    q, pages, means, angles, table, sinks, true = _filled(shape, 4, torch.float32, device)
    fixed = (means, *angles, table, shape[0], shape[1], 0.1)
    want = dense.paged_attention(q, true[0], true[1], table, shape[0], shape[1], 0.1)

    def error(given):
        got = reference.quantized_paged_attention(q, pages, *fixed, sinks=given)
        return float((got - want).norm() / want.norm())

    assert error(sinks) < 0.06 and error(None) > 1.0  # the codes of the first tokens were spoiled


def test_a_context_of_sinks_alone_is_exact(device):
    q, pages, means, angles, table, sinks, true = _filled(([2, 1], [4, 2], 2, 1, 32, 4), 2, torch.float32, device)
    fixed = (table, [2, 1], [4, 2], 0.2)
    want = dense.paged_attention(q, true[0], true[1], *fixed)
    for function in (reference.quantized_paged_attention, attention.quantized_paged_attention):
        torch.testing.assert_close(function(q, pages, means, *angles, *fixed, sinks=sinks), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "triton"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_deterministic_bits_do_not_depend_on_the_company(bits, twin, device, monkeypatch):
    monkeypatch.setattr(paged, "DETERMINISTIC_SPLIT", 64)
    q, pages, means, angles, table, sinks, _ = _filled(([3, 1], [90, 40], 4, 2, 32, 16), bits, torch.bfloat16, device)
    call = reference.quantized_paged_attention if twin else attention.quantized_paged_attention
    batch = call(q, pages, means, *angles, table, [3, 1], [90, 40], 0.1, sinks=sinks, deterministic=True)
    alone = ExactSinks(sinks.k, sinks.v, sinks.rows[:1])
    for j in range(3):
        one = call(q[j : j + 1], pages, means, *angles, table[:1], [1], [88 + j], 0.1, sinks=alone, deterministic=True)
        assert torch.equal(one, batch[j : j + 1])


@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_fast_transform_is_the_rotation(head_dim):
    x = torch.randn(7, 2, head_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reference.hadamard(x), x @ reference.rotation(head_dim), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.hadamard(reference.hadamard(x), inverse=True), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(reference.hadamard(x)[3], reference.hadamard(x[3]))


def test_reading_leaves_the_pages_alone(device):
    q, pages, means, angles, table, sinks, _ = _filled(SHAPES[1], 4, torch.float32, device)
    before = QuantizedPages(4, *(t.clone() for t in pages[1:]))
    reference.quantized_paged_attention(q, pages, means, *angles, table, *SHAPES[1][:2], 0.1, sinks=sinks)
    assert all(torch.equal(a, b) for a, b in zip(before[1:], pages[1:], strict=True))


# --- the last tokens ----------------------------------------------------------------------------------------------------

RECENT_SHAPES = [
    ([1], [1], 2, 1, 32, 16, [0]),
    ([3, 1, 40], [3, 60, 45], 4, 2, 32, 16, [0, 0, 2]),
    ([2, 5], [150, 130], 6, 1, 64, 2, [60, 124]),
]
if GPU:
    RECENT_SHAPES += [([5] * 4, [3000, 65, 129, 5], 12, 2, 128, 64, [2900, 20, 120, 0]), ([700, 1], [800, 100], 32, 8, 128, 64, [80, 0])]


def _with_recent(shape, bits, dtype, device):
    """`_filled` with the last tokens: those from `since` on in rings and as new rows, the ring's other rows spoiled."""
    query_lens, context_lens, since = shape[0], shape[1], shape[6]
    q, pages, means, angles, table, sinks, true = _filled(shape[:6], bits, dtype, device)
    slots, size = len(sinks.k), shape[5]
    rings = torch.full((2, slots, RING, *true.shape[3:]), float("nan"), device=device, dtype=dtype)
    new = []
    for b, (n, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        at = torch.arange(context, device=device)
        rows = true[:, table[b].long()[at // size], at % size]  # keys rotated
        held = torch.arange(max(since[b], context - n - RING), context - n, device=device)
        rings[:, int(sinks.rows[b]), held % RING] = rows[:, held]
        new.append(rows[:, context - n :])
    k_new, v_new = torch.cat(new, 1)
    recent = ExactRecent(k_new, v_new, rings[0], rings[1], sinks.rows, torch.tensor(since, dtype=torch.int32, device=device))
    return q, (pages, means, *angles, table, query_lens, context_lens, 0.1), sinks, recent, true


@pytest.mark.parametrize("bits,dtype,shape,with_sinks", in_turn([3], [torch.float32, torch.bfloat16], RECENT_SHAPES))
def test_recent_triton_against_the_twin(shape, bits, dtype, with_sinks, device, assert_close):
    q, fixed, sinks, recent, _ = _with_recent(shape, bits, dtype, device)
    if not with_sinks:  # their codes are spoiled, and would outshout everything
        fixed[0].k_scale.clamp_(max=10.0)
        fixed[0].v_scale.clamp_(max=10.0)
    given = {"sinks": sinks if with_sinks else None, "recent": recent}
    wide = recent._replace(**{name: getattr(recent, name).float() for name in ("k_new", "v_new", "k_ring", "v_ring")})
    want = reference.quantized_paged_attention(q.float(), *fixed, **(given | {"recent": wide}))
    bound = 3e-3 if dtype == torch.float32 else 1e-2
    ways = ({}, {"deterministic": True}) if dtype == torch.float32 else ({"config": paged.AttentionConfig(num_splits=2, block_n=32)},)
    for options in ways:
        assert_close(attention.quantized_paged_attention(q, *fixed, **given, **options).float(), want, bound)
    assert_close(reference.quantized_paged_attention(q.float(), *fixed, **(given | {"recent": wide}), deterministic=True), want, 1e-5)


@pytest.mark.parametrize("shape", RECENT_SHAPES, ids=str)
def test_recent_tokens_stand_in_for_their_codes(shape, device):
    q, fixed, sinks, recent, true = _with_recent(shape, 4, torch.float32, device)
    pages, table, query_lens, context_lens, size = fixed[0], fixed[4], shape[0], shape[1], shape[5]
    spoiled = QuantizedPages(4, *(t.clone() for t in pages[1:]))
    want = dense.paged_attention(q, true[0], true[1], table, query_lens, context_lens, 0.1)
    harmed = torch.zeros(len(q), dtype=torch.bool, device=device)  # queries of requests with spoiled codes
    for b, (n, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        # codes that no query should read: those near the first one, which are near the others too or hidden from the first
        for p in range(max(NUM_SINKS, recent.since.tolist()[b], context - NUM_RECENT), context - n + 1):
            spoiled.k_scale[table[b, p // size].long(), :, p % size] = 1000.0
            harmed[sum(query_lens[:b]) : sum(query_lens[: b + 1])] = True
    got = reference.quantized_paged_attention(q, spoiled, *fixed[1:], sinks=sinks, recent=recent)
    assert float((got - want).norm() / want.norm()) < 0.06
    lost = reference.quantized_paged_attention(q, spoiled, *fixed[1:], sinks=sinks)
    assert not harmed.any() or float((lost - want)[harmed].norm() / want[harmed].norm()) > 0.1


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "triton"])
def test_recent_deterministic_bits_do_not_depend_on_the_block(twin, device, monkeypatch):
    monkeypatch.setattr(paged, "DETERMINISTIC_SPLIT", 64)
    call = reference.quantized_paged_attention if twin else attention.quantized_paged_attention
    shape = ([20, 1], [90, 40], 6, 2, 32, 16, [5, 0])
    q, (pages, means, cos, sin, table, *_), sinks, recent, _ = _with_recent(shape, 3, torch.bfloat16, device)
    whole = call(q, pages, means, cos, sin, table, [20, 1], [90, 40], 0.1, sinks=sinks, recent=recent, deterministic=True)
    slot = int(sinks.rows[0])
    row = ExactSinks(sinks.k, sinks.v, sinks.rows[:1])
    for j in (0, 1, 4, 15, 16, 19):  # of 20
        # the tokens before it have moved into the ring
        ring = [r.clone() for r in (recent.k_ring, recent.v_ring)]
        for r, new in zip(ring, (recent.k_new, recent.v_new), strict=True):
            r[slot, torch.arange(70, 70 + j) % RING] = new[:j]
        own = ExactRecent(recent.k_new[j : j + 1], recent.v_new[j : j + 1], ring[0], ring[1], sinks.rows[:1], recent.since[:1])
        one = call(q[j : j + 1], pages, means, cos, sin, table[:1], [1], [71 + j], 0.1, sinks=row, recent=own, deterministic=True)
        assert torch.equal(one, whole[j : j + 1]), j
