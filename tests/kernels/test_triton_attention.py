"""paged_attention in Triton against dense attention in float64, and the promises of its deterministic mode."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from kernels.paged_attention import reference
from kernels.paged_attention import triton as paged

pytestmark = pytest.mark.usefixtures("poisoned")
BOUND = {torch.float32: 2e-5, torch.bfloat16: 6e-3}


def make_batch(query_lens, context_lens, heads, kv_heads, head_dim, page_size, dtype, device, seed=0):
    """Queries and pages whose unused rows hold NaN; pages of a request lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-c // page_size) for c in context_lens]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    table = torch.full((len(counts), max(counts) + 1), 10**6, dtype=torch.int32)
    pool = torch.full((2, len(order), page_size, kv_heads, head_dim), float("nan"))
    keys, values = [], []
    for b, (count, context) in enumerate(zip(counts, context_lens, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[b, :count] = torch.tensor(pages, dtype=torch.int32)
        kv = torch.randn(2, context, kv_heads, head_dim, generator=generator).to(dtype).float()
        for t in range(context):
            pool[:, pages[t // page_size], t % page_size] = kv[:, t]
        keys.append(kv[0])
        values.append(kv[1])
    q = torch.randn(sum(query_lens), heads, head_dim, generator=generator).to(dtype)
    return q.to(device), pool.to(device, dtype), table.to(device), keys, values


def dense(q, keys, values, query_lens, context_lens, scale, visible=None, sliding_window=None, softcap=None):
    """Causal attention in float64, one request and head at a time."""
    q = q.double().cpu()
    out = torch.empty_like(q)
    row = 0
    for n, context, k, v in zip(query_lens, context_lens, keys, values, strict=True):
        for j in range(n):
            allowed = torch.arange(context) <= context - n + j
            if visible is not None:
                new = torch.arange(context) - (context - n)
                allowed = (new < 0) | ((int(visible[row]) >> new.clamp_min(0)) & 1).bool()
            if sliding_window is not None:
                allowed &= torch.arange(context) > context - n + j - sliding_window
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores = (k[:, g].double() @ q[row, h]) * scale
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                out[row, h] = torch.softmax(scores.masked_fill(~allowed, float("-inf")), 0) @ v[:, g].double()
            row += 1
    return out


SMALL = [
    ([1], [1], 1, 1, 16, 16),
    ([3, 1, 5], [3, 70, 33], 4, 2, 16, 16),
    ([2, 6], [65, 129], 6, 1, 60, 5),
    ([5], [200], 12, 2, 64, 64),
]
LARGE = [
    ([5] * 8, [4097, 1, 64, 65, 3000, 777, 5, 2048], 12, 2, 128, 64),
    ([1] * 3, [4096, 100, 9000], 32, 8, 128, 64),
    ([300], [500], 14, 2, 64, 16),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SMALL + (LARGE if torch.cuda.is_available() else []), ids=str)
def test_matches_dense_attention(shape, dtype, deterministic, device, assert_close):
    query_lens, context_lens, heads, kv_heads, head_dim, page_size = shape
    context_lens = [max(c, n) for c, n in zip(context_lens, query_lens, strict=True)]
    q, pool, table, keys, values = make_batch(query_lens, context_lens, heads, kv_heads, head_dim, page_size, dtype, device)
    want = dense(q, keys, values, query_lens, context_lens, head_dim**-0.5).float().to(device)
    for splits in (1, 3):
        config = paged.AttentionConfig(num_splits=splits, block_n=32)
        got = paged.paged_attention(
            q, pool[0], pool[1], table, query_lens, context_lens, head_dim**-0.5, deterministic=deterministic, config=config
        )
        assert_close(got.float(), want, BOUND[dtype])


def test_matches_the_twin(device, assert_close):
    query_lens, context_lens = [2, 3], [40, 17]
    q, pool, table, _, _ = make_batch(query_lens, context_lens, 4, 2, 32, 8, torch.float32, device)
    table = table.clamp_max(pool.shape[1] - 1)
    pool = pool.nan_to_num(0.0)
    want = reference.paged_attention(q, pool[0], pool[1], table, query_lens, context_lens, 0.2)
    assert_close(paged.paged_attention(q, pool[0], pool[1], table, query_lens, context_lens, 0.2), want, 2e-5)


@pytest.mark.parametrize(("sliding_window", "softcap"), [(1, None), (20, None), (64, 0.7), (1000, None), (None, 0.7)])
def test_windows_and_soft_caps(sliding_window, softcap, device, assert_close):
    """Windows of one token, that cut a split, and longer than the context; in the twin and in Triton, however the context is split."""
    query_lens, context_lens = [3, 1, 40], [3, 170, 133]
    q, pool, table, keys, values = make_batch(query_lens, context_lens, 4, 2, 16, 16, torch.float32, device)
    options = {"sliding_window": sliding_window, "softcap": softcap}
    want = dense(q, keys, values, query_lens, context_lens, 0.25, **options).float().to(device)
    if sliding_window is not None:  # nobody reads what lies before a window
        for b, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True)):
            for token in range(context - queries + 1 - sliding_window):
                pool[:, table[b, token // 16], token % 16] = float("nan")
    fixed = (table, query_lens, context_lens, 0.25)
    for more in (
        {"config": paged.AttentionConfig(num_splits=1, block_n=32)},
        {"config": paged.AttentionConfig(num_splits=3, block_n=32)},
        {"deterministic": True},
    ):
        assert_close(paged.paged_attention(q, pool[0], pool[1], *fixed, **options, **more), want, 2e-5)
    table, pool = table.clamp_max(pool.shape[1] - 1), pool.nan_to_num(0.0)
    for deterministic in (False, True):
        twin = reference.paged_attention(q, pool[0], pool[1], table, *fixed[1:], deterministic=deterministic, **options)
        assert_close(twin, want, 2e-5)


def test_a_window_over_a_tree_of_drafts(device, assert_close):
    """Leaves beside the last draft see their path within the window that ends at their own position."""
    positions, slots = [20, 21, 22, 22], [20, 21, 22, 23]
    visible = torch.tensor([1 << (slot - position) for slot, position in zip(slots, positions, strict=True)], device=device)
    q, pool, table, keys, values = make_batch([4], [24], 4, 2, 16, 8, torch.float32, device)
    rows = []
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        seen = [*range(position + 1 - 5, position), slot]
        k, v = (x[0][seen].double().repeat_interleave(2, 1) for x in (keys, values))
        rows.append(torch.einsum("ht,thd->hd", (torch.einsum("hd,thd->ht", q[row].double().cpu(), k) * 0.25).softmax(-1), v))
    want = torch.stack(rows).float().to(device)
    options = {"visible": visible, "windows": torch.tensor(positions, dtype=torch.int32, device=device), "sliding_window": 5}
    assert_close(paged.paged_attention(q, pool[0], pool[1], table, [4], [24], 0.25, **options), want, 2e-5)
    table, pool = table.clamp_max(pool.shape[1] - 1), pool.nan_to_num(0.0)
    assert_close(reference.paged_attention(q, pool[0], pool[1], table, [4], [24], 0.25, **options), want, 2e-5)


@pytest.mark.parametrize("twin", [True, False], ids=["twin", "triton"])
def test_deterministic_bits_of_a_window(twin, device, monkeypatch):
    monkeypatch.setattr(paged, "DETERMINISTIC_SPLIT", 64)
    q, pool, table, _, _ = make_batch([40, 1], [90, 50], 4, 2, 16, 16, torch.bfloat16, device)
    table, pool = table.clamp_max(pool.shape[1] - 1), pool.nan_to_num(0.0)
    call = reference.paged_attention if twin else paged.paged_attention
    options = {"deterministic": True, "sliding_window": 30, "softcap": 3.0}
    batch = call(q, pool[0], pool[1], table, [40, 1], [90, 50], 0.25, **options)
    for j in (0, 1, 17, 39):
        assert torch.equal(call(q[j : j + 1], pool[0], pool[1], table[:1], [1], [51 + j], 0.25, **options), batch[j : j + 1])


@pytest.mark.parametrize("sliding_window", [None, 20])
def test_padding_sees_nothing_and_contexts_may_be_longer_than_usual(sliding_window, device, assert_close):
    """A request without new tokens and one of padding alone, whose table names no page; in the twin and in Triton, however contexts are split."""
    query_lens, context_lens = [3, 0, 21], [70, 0, 200]
    q, pool, table, keys, values = make_batch(query_lens, context_lens, 6, 2, 16, 16, torch.float32, device)
    want = torch.zeros(40, 6, 16)
    want[:24] = dense(q, keys, values, query_lens, context_lens, 0.25, sliding_window=sliding_window).float()
    want = want.to(device)
    q = torch.cat([q, torch.full((16, 6, 16), float("nan"), device=device)])
    table = torch.cat([table, torch.full_like(table[:1], 10**6)])
    lens = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([*query_lens, 16], [*context_lens, 0])]
    fixed = (q, pool[0], pool[1], table, *lens, 0.25)
    for more in (
        {},
        {"usual_context": 16},
        {"usual_context": 100},
        {"config": paged.AttentionConfig(num_splits=3, block_n=32)},
        {"deterministic": True},
    ):
        assert_close(paged.paged_attention(*fixed, sliding_window=sliding_window, max_query_len=40, **more), want, 2e-5)
    for deterministic in (False, True):
        assert_close(reference.paged_attention(*fixed, deterministic=deterministic, sliding_window=sliding_window), want, 2e-5)


@pytest.mark.parametrize(("usual_context", "keys"), [(None, 64), (32, 32)])
def test_a_launch_is_laid_out_for_the_tiles_and_keys_that_there_are(usual_context, keys, monkeypatch, device):
    """Of requests whose lengths the device knows: not each as long as all together, over all that the table reaches."""
    asked, choose = [], paged.choose_splits
    monkeypatch.setattr(paged, "choose_splits", lambda *sizes: asked.append(sizes) or choose(*sizes))
    q, pool, table, _, _ = make_batch([30, 10], [40, 60], 12, 2, 16, 16, torch.float32, device)
    lens = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([30, 10], [40, 60])]
    paged.paged_attention(q, pool[0], pool[1], table[:, :4], *lens, 0.2, max_query_len=40, usual_context=usual_context)
    assert asked == [(0, 2 * (-(-40 * 6 // 64) + 1), keys, 64)]


def test_lengths_on_the_device_give_the_same_result(device):
    query_lens, context_lens = [2, 1], [40, 17]
    q, pool, table, _, _ = make_batch(query_lens, context_lens, 4, 2, 32, 8, torch.float32, device)
    config = paged.AttentionConfig(num_splits=2)
    want = paged.paged_attention(q, pool[0], pool[1], table, query_lens, context_lens, 0.2, config=config)
    lens = [torch.tensor(x, dtype=torch.int32, device=device) for x in (query_lens, context_lens)]
    assert torch.equal(paged.paged_attention(q, pool[0], pool[1], table, *lens, 0.2, config=config), want)
    assert torch.equal(paged.paged_attention(q, pool[0], pool[1], table, *lens, 0.2, config=config, max_query_len=2), want)


def test_tree_of_drafts(device, assert_close):
    # Two branches after a common token: 0 <- 1 <- 2 and 0 <- 3 <- 4.
    visible = torch.tensor([0b00001, 0b00011, 0b00111, 0b01001, 0b11001], dtype=torch.int64)
    q, pool, table, keys, values = make_batch([5], [23], 4, 2, 16, 8, torch.float32, device)
    want = dense(q, keys, values, [5], [23], 0.25, visible).float().to(device)
    got = paged.paged_attention(q, pool[0], pool[1], table, [5], [23], 0.25, visible=visible.to(device))
    assert_close(got, want, 2e-5)
    table, pool = table.clamp_max(pool.shape[1] - 1), pool.nan_to_num(0.0)
    twin = reference.paged_attention(q, pool[0], pool[1], table, [5], [23], 0.25, visible=visible.to(device))
    assert_close(twin, want, 2e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_trees_with_gaps(device, assert_close, deterministic):
    """Leaves that lie behind places nobody may read, in windows of their own; a request without leaves beside them."""
    query_lens, context_lens, windows = [3, 2], [70, 18], [51, 52, 5, 15, 17]
    bits = [[0, 1, 18], [0, 17], [0, 62], [0, 1], [0]]
    visible = torch.tensor([sum(1 << bit for bit in own) for own in bits], dtype=torch.int64, device=device)
    q, pool, table, keys, values = make_batch(query_lens, context_lens, 4, 2, 16, 8, torch.float32, device)
    rows = []
    for row, own in enumerate(bits):
        request = int(row >= 3)
        seen = [*range(windows[row]), *(windows[row] + bit for bit in own)]
        k, v = (x[request][seen].double().cpu().repeat_interleave(2, 1) for x in (keys, values))
        weights = (torch.einsum("hd,thd->ht", q[row].double().cpu(), k) * 0.25).softmax(-1)
        rows.append(torch.einsum("ht,thd->hd", weights, v))
    want = torch.stack(rows).float().to(device)
    options = {"visible": visible, "windows": torch.tensor(windows, dtype=torch.int32, device=device), "deterministic": deterministic}
    got = paged.paged_attention(q, pool[0], pool[1], table, query_lens, context_lens, 0.25, **options)
    assert_close(got, want, 2e-5)
    table, pool = table.clamp_max(pool.shape[1] - 1), pool.nan_to_num(0.0)
    twin = reference.paged_attention(q, pool[0], pool[1], table, query_lens, context_lens, 0.25, **options)
    assert_close(twin, want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_deterministic_bits_do_not_depend_on_the_company(dtype, device, monkeypatch):
    """The last token alone, inside a block of four, and in a batch of three with a longer neighbour: the same bits."""
    monkeypatch.setattr(paged, "DETERMINISTIC_SPLIT", 64)
    query_lens, context_lens = [1, 4, 2], [300, 140, 9]
    q, pool, table, _, _ = make_batch(query_lens, context_lens, 6, 2, 32, 16, dtype, device)
    batch = paged.paged_attention(q, pool[0], pool[1], table, query_lens, context_lens, 0.2, deterministic=True)
    block = paged.paged_attention(q[1:5], pool[0], pool[1], table[1:2], [4], [140], 0.2, deterministic=True)
    assert torch.equal(batch[1:5], block)
    for j in range(4):
        single = paged.paged_attention(q[1 + j : 2 + j], pool[0], pool[1], table[1:2], [1], [137 + j], 0.2, deterministic=True)
        assert torch.equal(single, block[j : j + 1])


def test_refuses_pages_of_different_strides(device):
    pages = torch.zeros(2, 4, 2, 8, device=device)
    with pytest.raises(ValueError, match="same shape and strides"):
        paged.paged_attention(torch.zeros(1, 2, 8, device=device), pages, pages[:, :, :1], torch.zeros(1, 1), [1], [1], 1.0)
