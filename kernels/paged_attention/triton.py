"""Triton kernels of `paged_attention`: grouped heads packed into one tile, the context split over programs, a second pass that merges them.

The split-and-merge scheme is Flash-Decoding's (Dao, Haziza, Massa, Sizov, 2023), the softmax is Milakov and Gimelshein's online one (2018).
A row of a tile is (new token, head of the group): all heads of a KV head read its keys once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
DETERMINISTIC_SPLIT = 1024  # keys a split covers when results must not depend on the batch
SLOTS = 264  # programs a large GPU runs at a time: two for each of 132 multiprocessors (their registers and shared memory allow no third)
MERGE_ROWS = 1


@triton.jit
def first_rows(query_lens_ptr, request, num_requests, REQUESTS: tl.constexpr):
    """Rows of the flattened batch before this request."""
    everyone = tl.arange(0, REQUESTS)
    return tl.sum(tl.load(query_lens_ptr + everyone, mask=(everyone < num_requests) & (everyone < request), other=0), 0)


@triton.jit
def tile_rows(
    query_lens_ptr,
    request,
    kv_head,
    tile,
    queries,
    context,
    num_requests,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Rows of a tile, (new token, head of the group): (row of the batch, head, whether it is one, keys it sees, keys any of them sees)."""
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = packed // GROUP
    first = first_rows(query_lens_ptr, request, num_requests, REQUESTS).to(tl.int64)
    settled = context - queries  # keys before this step's new tokens
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
    return first + token, kv_head * GROUP + packed % GROUP, token < queries, settled + 1 + token, settled + 1 + last


@triton.jit
def split_bounds(context, split, num_splits, split_keys, BLOCK_N: tl.constexpr):
    """Keys [start, end) of a split. split_keys > 0: fixed length; 0: the context divided evenly, in whole blocks."""
    if split_keys > 0:
        length = split_keys
    else:
        length = tl.cdiv(tl.cdiv(context, num_splits), BLOCK_N) * BLOCK_N
    start = split * length
    return start, tl.minimum(start + length, context)


@triton.jit
def sliding_bounds(context, split, num_splits, split_keys, lowest, BLOCK_N: tl.constexpr):
    """`split_bounds` of the keys from `lowest` on: fixed splits stay where they are and lose the blocks before it, others divide what is left."""
    low = tl.maximum(lowest, 0) // BLOCK_N * BLOCK_N
    if split_keys > 0:
        start, end = split_bounds(context, split, num_splits, split_keys, BLOCK_N)
        start = tl.maximum(start, low)
    else:
        start, end = split_bounds(context - low, split, num_splits, split_keys, BLOCK_N)
        start += low
        end += low
    return start, end


@triton.jit
def cap_scores(scores, cap):
    """cap * tanh(scores / cap)."""
    return cap * (1.0 - 2.0 / (tl.exp2(scores * (2.8853900817779268 / cap)) + 1.0))


@triton.jit
def load_page(table_row_ptr, block, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page numbers of keys block .. block + BLOCK_N - 1: one where a block cannot cross a page, else one a key."""
    if PAGE % BLOCK_N == 0:
        return tl.load(table_row_ptr + block // PAGE, mask=block < end, other=0).to(tl.int64)
    else:
        token = block + tl.arange(0, BLOCK_N)
        return tl.load(table_row_ptr + token // PAGE, mask=token < end, other=0).to(tl.int64)


@triton.jit
def page_rows(page, block, stride_page, stride_token, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where keys block .. block + BLOCK_N - 1 lie: (start, each key's offset from it).

    Where a block cannot cross a page the start is one number and the offsets are the same for every block: no address is computed twice.
    """
    near = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        return page * stride_page + tl.multiple_of(block % PAGE, BLOCK_N) * stride_token, near * stride_token
    else:
        return block * 0, page * stride_page + ((block + near) % PAGE) * stride_token


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_splits", "stride_table"])  # not compiled anew in the middle of a text
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    query_lens_ptr,
    context_lens_ptr,
    visible_ptr,
    window_ptr,
    out_ptr,
    part_ptr,
    stat_ptr,
    scale_log2,
    softcap_log2,
    num_requests,
    num_rows,
    num_splits,
    split_keys,
    q_heads,
    head_dim,
    stride_q_row,
    stride_q_head,
    stride_table,
    stride_page,
    stride_token,
    stride_head,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REQUESTS: tl.constexpr,
    DIRECT: tl.constexpr,
    TREE: tl.constexpr,
    SLIDING: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1) % num_splits
    tile = tl.program_id(1) // num_splits
    request = tl.program_id(2)
    queries = tl.load(query_lens_ptr + request).to(tl.int32)
    if tile * BLOCK_M >= queries * GROUP:
        return
    context = tl.load(context_lens_ptr + request).to(tl.int32)
    row, head, row_mask, limit, reach = tile_rows(
        query_lens_ptr, request, kv_head, tile, queries, context, num_requests, GROUP, BLOCK_M, REQUESTS
    )
    channel = tl.arange(0, BLOCK_D)
    channel_mask = channel < head_dim
    q = tl.load(
        q_ptr + row[:, None] * stride_q_row + head[:, None] * stride_q_head + channel[None, :],
        mask=row_mask[:, None] & channel_mask[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    if TREE:
        visible = tl.load(visible_ptr + row, mask=row_mask, other=0)

    if SLIDING > 0:
        lowest = context - queries + 1 - SLIDING
        if not TREE:
            lowest += tile * BLOCK_M // GROUP
        start, end = sliding_bounds(context, split, num_splits, split_keys, lowest, BLOCK_N)
    else:
        start, end = split_bounds(context, split, num_splits, split_keys, BLOCK_N)
    if TREE:
        window = tl.load(window_ptr + row, mask=row_mask, other=0).to(tl.int32)
    else:
        end = tl.minimum(end, reach)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_row_ptr = table_ptr + request.to(tl.int64) * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_head
    v_ptr += kv_head.to(tl.int64) * stride_head
    # A block's page is fetched one turn ahead: an address that waits for a load inside the turn would cost the pipeline half its depth.
    page = load_page(table_row_ptr, start, end, PAGE, BLOCK_N)
    for block in range(start, end, BLOCK_N):
        token = block + tl.arange(0, BLOCK_N)
        inside = token < end
        if SLIDING > 0:  # pages before the window may have been given to somebody else
            inside = inside & (token >= lowest)
        base, offset = page_rows(page, block, stride_page, stride_token, PAGE, BLOCK_N)
        page = load_page(table_row_ptr, block + BLOCK_N, end, PAGE, BLOCK_N)
        k = tl.load(k_ptr + base + offset[None, :] + channel[:, None], mask=inside[None, :] & channel_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        if CAPPED:
            scores = cap_scores(scores, softcap_log2)
        seen = token[None, :] < limit[:, None]
        if SLIDING > 0:
            seen = seen & (token[None, :] >= limit[:, None] - SLIDING)
        if TREE:
            new = token[None, :] - window[:, None]
            bit = (visible[:, None] >> tl.minimum(tl.maximum(new, 0), 62)) & 1
            seen = (token < end)[None, :] & ((new < 0) | ((new < 63) & (bit == 1)))
            if SLIDING > 0:
                seen = seen & (new > -SLIDING)
        scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        # Values past the end or before a window may be anything, NaN included, so they are not merely weighted by zero.
        v = tl.load(v_ptr + base + offset[:, None] + channel[None, :], mask=inside[:, None] & channel_mask[None, :], other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new_highest

    row_head = row * q_heads + head
    out_mask = row_mask[:, None] & channel_mask[None, :]
    if DIRECT:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + row_head[:, None] * head_dim + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        part = split.to(tl.int64) * num_rows * q_heads + row_head
        tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
        tl.store(stat_ptr + 2 * part + 1, total, mask=row_mask)
        tl.store(part_ptr + part[:, None] * head_dim + channel[None, :], acc, mask=out_mask & (total > 0)[:, None])


@triton.jit
def merge_splits(
    part_ptr,
    stat_ptr,
    row,
    row_mask,
    channel,
    channel_mask,
    num_splits,
    row_heads,
    head_dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Softmax-weighted mean [ROWS, BLOCK_D] float32 of the splits' results, AHEAD of them at a time so that their loads do not queue up.

    A split's place in the sums is its number alone: empty ones behind it change no bit.
    """
    ahead = tl.arange(0, AHEAD)[:, None]
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for base in range(0, num_splits, AHEAD):
        mask = row_mask[None, :] & (base + ahead < num_splits)
        scores = tl.load(stat_ptr + 2 * ((base + ahead) * row_heads + row[None, :]), mask=mask, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(scores, 0))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for base in range(0, num_splits, AHEAD):
        mask = row_mask[None, :] & (base + ahead < num_splits)
        part = (base + ahead) * row_heads + row[None, :]  # [AHEAD, ROWS]
        weight = tl.exp2(tl.load(stat_ptr + 2 * part, mask=mask, other=float("-inf")) - highest[None, :])
        split_total = tl.load(stat_ptr + 2 * part + 1, mask=mask, other=0.0)
        split_acc = tl.load(
            part_ptr + part[:, :, None] * head_dim + channel[None, None, :], mask=mask[:, :, None] & channel_mask[None, None, :], other=0.0
        )
        total += tl.sum(split_total * weight, 0)
        split_acc = tl.where((split_total > 0)[:, :, None], split_acc, 0.0)  # an empty split's row was never written
        acc += tl.sum(split_acc * weight[:, :, None], 0)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["num_splits", "row_heads"])
def _merge_kernel(
    part_ptr,
    stat_ptr,
    out_ptr,
    num_splits,
    row_heads,
    head_dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < row_heads
    channel = tl.arange(0, BLOCK_D)
    channel_mask = channel < head_dim
    out = merge_splits(part_ptr, stat_ptr, row, row_mask, channel, channel_mask, num_splits, row_heads, head_dim, ROWS, BLOCK_D, AHEAD)
    mask = row_mask[:, None] & channel_mask[None, :]
    tl.store(out_ptr + row[:, None] * head_dim + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class AttentionConfig:
    """Launch shape: keys a step of the loop takes, warps, pipeline stages, splits of the context, rows of a tile (0: chosen from the sizes)."""

    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    num_splits: int = 0
    block_m: int = 0


@dataclass(frozen=True)
class Lengths:
    """A ragged batch's lengths on the device, int32 [B], and the host's upper bounds on them."""

    query_lens: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    max_context_len: int

    def keys_within(self, sliding_window: int | None) -> int:
        """Keys that a request's new tokens see at most, together."""
        if sliding_window is None:
            return self.max_context_len
        return min(self.max_context_len, sliding_window + self.max_query_len)

    @classmethod
    def of(
        cls,
        query_lens: Sequence[int] | torch.Tensor,
        context_lens: Sequence[int] | torch.Tensor,
        num_rows: int,
        table_keys: int,
        device: torch.device,
        max_query_len: int | None = None,
    ) -> Lengths:
        """From lists, or from device tensors without reading them back: then the bounds come from the shapes (a graph can be captured)."""
        batch = len(query_lens)
        longest = max_query_len or max(num_rows - batch + 1, 1)
        keys = table_keys
        if not isinstance(query_lens, torch.Tensor):
            longest = max(query_lens, default=1)
            query_lens = torch.tensor(list(query_lens), dtype=torch.int32).to(device, non_blocking=True)
        if not isinstance(context_lens, torch.Tensor):
            keys = max(context_lens, default=1)
            context_lens = torch.tensor(list(context_lens), dtype=torch.int32).to(device, non_blocking=True)
        return cls(query_lens.to(device), context_lens.to(device), longest, keys)


@functools.cache
def choose_splits(config_splits: int, base_programs: int, keys: int, block_n: int, slots: int = SLOTS) -> int:
    """Splits of the context, none shorter than two blocks, that end soonest.

    Programs run `slots` at a time, each as long as its blocks and a start worth three more; a part costs its merging about a tenth of a block.
    """
    if config_splits:
        return config_splits
    blocks = triton.cdiv(keys, block_n)

    def cost(splits: int) -> float:
        return triton.cdiv(base_programs * splits, slots) * (triton.cdiv(blocks, splits) + 3) + splits / 10

    return min(range(1, max(1, min(slots, blocks // 2)) + 1), key=cost)


def paged_attention_bounds(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    kv_row_bytes: float,
    element_bytes: int,
) -> tuple[int, int]:
    """(bytes, operations): every key and value read once (kv_row_bytes for a key and a value of one head), queries in and results out."""
    keys = sum(context_lens)
    pairs = sum(n * (c - n) + n * (n + 1) // 2 for n, c in zip(query_lens, context_lens, strict=True))
    return int(keys * kv_heads * kv_row_bytes) + 2 * sum(query_lens) * q_heads * head_dim * element_bytes, 4 * pairs * q_heads * head_dim


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    scale: float,
    *,
    deterministic: bool = False,
    visible: torch.Tensor | None = None,
    windows: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    max_query_len: int | None = None,
    usual_context: int | None = None,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """See `reference.paged_attention`; k_pages and v_pages may have any strides but 1 along d, the same for both.

    max_query_len: bound on query_lens when these are a device tensor; without it N - B + 1 is assumed.
    usual_context: keys that splits are chosen for, where page_table reaches farther than most contexts do; any context may be longer.
    config: launch shape; without it one that suits the sizes.
    """
    num_rows, q_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    if k_pages.shape != v_pages.shape or k_pages.stride() != v_pages.stride() or k_pages.stride(-1) != 1:
        raise ValueError("keys and values must have the same shape and strides and dense channels (pass k and v of one pool)")
    out = torch.empty((num_rows, q_heads, head_dim), dtype=q.dtype, device=q.device)
    batch = len(query_lens)
    if num_rows == 0:
        return out
    if q.stride(-1) != 1:
        q = q.contiguous()
    lengths = Lengths.of(query_lens, context_lens, num_rows, page_table.shape[1] * page_size, q.device, max_query_len)
    group = q_heads // kv_heads
    packed_rows = lengths.max_query_len * group
    if config is None:
        config = AttentionConfig() if head_dim * q.element_size() <= 256 else AttentionConfig(block_n=32, num_stages=2)
    # Deterministic: one tile height and one split length for all, so a row meets the same instructions wherever it stands.
    block_m = 32 if deterministic else config.block_m or max(16, min(triton.next_power_of_2(packed_rows), 64))
    tiles = triton.cdiv(packed_rows, block_m)
    block_n = 64 if deterministic else config.block_n
    if deterministic:
        split_keys, num_splits = DETERMINISTIC_SPLIT, triton.cdiv(lengths.max_context_len, DETERMINISTIC_SPLIT)
    else:
        keys = min(lengths.keys_within(sliding_window), usual_context or lengths.max_context_len)
        busy = min(batch * tiles, triton.cdiv(num_rows * group, block_m) + batch - 1)  # tiles that hold rows, at most
        split_keys, num_splits = 0, choose_splits(config.num_splits, busy * kv_heads, keys, block_n)
    direct = num_splits == 1 and not deterministic
    part = out if direct else torch.empty((num_splits, num_rows, q_heads, head_dim), dtype=torch.float32, device=q.device)
    stat = out if direct else torch.empty((num_splits, num_rows, q_heads, 2), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    if windows is None and visible is not None:
        windows = (lengths.context_lens - lengths.query_lens).repeat_interleave(lengths.query_lens, output_size=num_rows)
    _split_kernel[(kv_heads, num_splits * tiles, batch)](
        q,
        k_pages,
        v_pages,
        page_table,
        lengths.query_lens,
        lengths.context_lens,
        visible if visible is not None else page_table,
        windows if windows is not None else page_table,
        out,
        part,
        stat,
        scale * LOG2_E,
        1.0 if softcap is None else softcap * LOG2_E,
        batch,
        num_rows,
        num_splits,
        split_keys,
        q_heads,
        head_dim,
        q.stride(0),
        q.stride(1),
        page_table.stride(0),
        *k_pages.stride()[:3],
        GROUP=group,
        PAGE=page_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        REQUESTS=triton.next_power_of_2(batch),
        DIRECT=direct,
        TREE=visible is not None,
        SLIDING=sliding_window or 0,
        CAPPED=softcap is not None,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=4 if deterministic else config.num_warps,
        num_stages=config.num_stages,
    )
    if not direct:
        _merge_kernel[(triton.cdiv(num_rows * q_heads, MERGE_ROWS),)](
            part, stat, out, num_splits, num_rows * q_heads, head_dim, ROWS=MERGE_ROWS, BLOCK_D=block_d, AHEAD=8, num_warps=1
        )
    return out
