"""Triton kernel of `decode_attention`: one launch, the last of a request's splits merges them.

The split-and-merge scheme is Flash-Decoding's (Dao, Haziza, Massa, Sizov, 2023). Splits have a fixed length, so that a token's sums
have the same order whatever the context's length is in this step and whoever shares the batch; or each request's keys are spread over its programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.decode_attention.config import DecodeAttentionConfig
from kernels.paged_attention.triton import LOG2_E, load_page, page_rows
from kernels.skinny_linear.product import admit_next, arrive, await_previous
from kernels.skinny_linear.tiles import next_power_of_2

MOST_ROWS = 32  # (new token, head) pairs a program takes: twice as many bring warp-group products, which Triton 3.6 fails to compile here


@triton.jit
def _block_addresses(
    table_row_ptr,
    block,
    end,
    channel,
    stride_page,
    stride_token,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] offsets of keys block .. block + BLOCK_N - 1."""
    base, offset = page_rows(load_page(table_row_ptr, block, end, PAGE, BLOCK_N), block, stride_page, stride_token, PAGE, BLOCK_N)
    return base + offset[:, None] + channel[None, :]


@triton.jit
def _attend(q, k, v, key, limit, acc, highest, total, scale_log2, PRECISION: tl.constexpr):
    """One block's keys and values [BLOCK_N, BLOCK_D] added to the running softmax (Milakov and Gimelshein, 2018)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    scores = tl.where(key[None, :] < limit[:, None], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(highest - safe)
    total = total * shrink + tl.sum(weights, 1)
    return tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION), new_highest, total


@triton.jit
def _merge(
    part_ptr,
    stat_ptr,
    row_head,
    row_mask,
    channel,
    channel_mask,
    splits,
    row_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Softmax-weighted mean [BLOCK_M, BLOCK_D] of the splits' results; empty ones at the end change no bit.

    AHEAD of them are unrolled, so that their loads overlap. One at a time, because a sum over an axis of splits would cross the warps.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    bound = tl.where(row_mask, splits, 0)
    for base in range(0, splits, AHEAD):
        for near in tl.static_range(AHEAD):
            mask = bound > base + near
            part = (base + near) * row_heads + row_head
            theirs = tl.load(part_ptr + part[:, None] * HEAD_DIM + channel[None, :], mask=mask[:, None] & channel_mask[None, :], other=0.0)
            their_highest = tl.load(stat_ptr + 2 * part, mask=mask, other=float("-inf"))
            their_total = tl.load(stat_ptr + 2 * part + 1, mask=mask, other=0.0)
            new_highest = tl.maximum(highest, their_highest)
            safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weight = tl.exp2(their_highest - safe)
            shrink = tl.exp2(highest - safe)
            acc = acc * shrink[:, None] + theirs * weight[:, None]
            total = total * shrink + their_total * weight
            highest = new_highest
    return acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit(do_not_specialize=["num_rows", "length", "tokens", "stride_table"])  # one compilation for blocks whose rows fill the same tile
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    position_ptr,
    context_ptr,
    unsettled_ptr,
    out_ptr,
    part_ptr,
    stat_ptr,
    ticket_ptr,
    scale_log2,
    num_rows,
    length,
    tokens,
    stride_table,
    stride_page,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    ONCE: tl.constexpr,
    SPREAD: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // GROUPS
    tiles = length // tokens
    unit = tl.program_id(0)
    kv_head = unit % GROUPS
    tile = unit // GROUPS % tiles
    request = unit // GROUPS // tiles
    admit_next(EARLY)
    # Lengths, positions and the page table are settled before the step's first kernel: they need not wait. Nor do the keys and values of
    # earlier steps: those of the first block are fetched before the queries are there. Those of other rows of this step are not settled.
    context = tl.load(context_ptr + request).to(tl.int32)
    settled = context - length
    if unsettled_ptr is not None:
        settled -= tl.load(unsettled_ptr + request).to(tl.int32)
    if SPREAD:
        keys = tl.maximum(tl.cdiv(tl.cdiv(context, tl.num_programs(1)), BLOCK_N) * BLOCK_N, SPLIT)
    else:
        keys = SPLIT
    splits = tl.cdiv(context, keys)
    programs = tl.maximum(tl.minimum(splits, tl.num_programs(1)), 1)
    table_row_ptr = table_ptr + request.to(tl.int64) * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_head
    v_ptr += kv_head.to(tl.int64) * stride_head
    channel = tl.arange(0, BLOCK_D)
    channel_mask = channel < HEAD_DIM
    start = tl.program_id(1) * keys
    near = tl.arange(0, BLOCK_N)
    first = _block_addresses(table_row_ptr, start, context, channel, stride_page, stride_token, PAGE, BLOCK_N)
    old = ((start + near < settled)[:, None]) & channel_mask[None, :]
    old_k = tl.load(k_ptr + first, mask=old, other=0.0)
    old_v = tl.load(v_ptr + first, mask=old, other=0.0)
    packed = tl.arange(0, BLOCK_M)
    row = (request * length + tile * tokens + packed // GROUP).to(tl.int64)
    row_mask = packed < tokens * GROUP
    head = kv_head * GROUP + packed % GROUP
    limit = tl.load(position_ptr + row, mask=row_mask, other=-1).to(tl.int32) + 1
    row_head = row * HEADS + head
    out_mask = row_mask[:, None] & channel_mask[None, :]
    await_previous(EARLY)
    if tl.program_id(1) >= programs:
        return
    q = tl.load(q_ptr + row_head[:, None] * HEAD_DIM + channel[None, :], mask=out_mask, other=0.0)
    # Values past the end may be anything, NaN included, so they are not merely weighted by zero.
    new = ((start + near >= settled) & (start + near < context))[:, None] & channel_mask[None, :]
    old_k = tl.where(new, tl.load(k_ptr + first, mask=new, other=0.0), old_k)
    old_v = tl.where(new, tl.load(v_ptr + first, mask=new, other=0.0), old_v)
    for split in range(tl.program_id(1), tl.program_id(1) + 1 if ONCE else tl.maximum(splits, 1), programs):
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        begin = split * keys
        end = tl.minimum(begin + keys, context)
        if ONCE or split == tl.program_id(1):
            acc, highest, total = _attend(q, old_k, old_v, begin + near, limit, acc, highest, total, scale_log2, PRECISION)
            begin += BLOCK_N
        if not ONCE or SPREAD or SPLIT > BLOCK_N:
            more = begin < end
            if more:  # a loop's first loads cost time even where it has nothing to do
                for block in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                    key = block + near
                    at = _block_addresses(table_row_ptr, block, end, channel, stride_page, stride_token, PAGE, BLOCK_N)
                    mask = (key < end)[:, None] & channel_mask[None, :]
                    k = tl.load(k_ptr + at, mask=mask, other=0.0)
                    v = tl.load(v_ptr + at, mask=mask, other=0.0)
                    acc, highest, total = _attend(q, k, v, key, limit, acc, highest, total, scale_log2, PRECISION)
        if splits <= 1:
            out = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
            tl.store(out_ptr + row_head[:, None] * HEAD_DIM + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
        else:
            part = row_head + num_rows * HEADS * split
            tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
            tl.store(stat_ptr + 2 * part + 1, total, mask=row_mask)
            tl.store(part_ptr + part[:, None] * HEAD_DIM + channel[None, :], acc, mask=out_mask)
    if splits > 1 and arrive(ticket_ptr + unit, programs):
        # No matrix instruction here: no more rows than there are, so that more splits fit the registers at once.
        near_row = tl.arange(0, BLOCK_R)
        merged_row = (request * length + tile * tokens + near_row // GROUP).to(tl.int64) * HEADS + kv_head * GROUP + near_row % GROUP
        merged_mask = near_row < tokens * GROUP
        merged = _merge(
            part_ptr, stat_ptr, merged_row, merged_mask, channel, channel_mask, splits, num_rows * HEADS, HEAD_DIM, BLOCK_R, BLOCK_D, AHEAD
        )
        out_at = merged_row[:, None] * HEAD_DIM + channel[None, :]
        tl.store(out_ptr + out_at, merged.to(out_ptr.dtype.element_ty), mask=merged_mask[:, None] & channel_mask[None, :])


def decode_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    positions: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    config: DecodeAttentionConfig,
    part: torch.Tensor,
    tickets: torch.Tensor,
    unsettled: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """See `reference.decode_attention`; the grid does not depend on the lengths.

    part: float32 of `decode_attention_parts` elements. tickets: int32, zero, one a token and KV head; left zero. unsettled: [B] integers, keys right
    before a request's new tokens that other requests of the step write, as where a prompt's tokens are requests of one token each; None: nobody does.
    early: see `skinny_linear`.
    """
    rows, heads, head_dim = q.shape
    batch, max_pages = page_table.shape
    size, groups = k_pages.shape[1:3]
    length = rows // batch
    group = heads // groups
    fitting = [t for t in range(1, length + 1) if length % t == 0 and t * group <= MOST_ROWS]
    tokens = max(fitting, default=1) if config.whole_block else 1
    block_r = next_power_of_2(tokens * group)
    block_m = max(16, block_r)
    keys = max_pages * size
    splits = config.most_splits(keys)
    stat = part[splits * rows * heads * head_dim :]
    programs = max(1, min(splits, config.programs))
    units = batch * (length // tokens) * groups
    _decode_attention_kernel[(units, programs)](
        q,
        k_pages,
        v_pages,
        page_table,
        positions,
        context_lens,
        unsettled,
        out,
        part,
        stat,
        tickets,
        scale * LOG2_E,
        rows,
        length,
        tokens,
        page_table.stride(0),
        *k_pages.stride()[:3],
        HEADS=heads,
        GROUPS=groups,
        HEAD_DIM=head_dim,
        PAGE=size,
        SPLIT=config.split,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_N=config.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        STAGES=config.stages,
        AHEAD=min(config.ahead, max(1, 2 * MOST_ROWS // block_r)),
        ONCE=programs == splits,
        SPREAD=config.spread,
        EARLY=early,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        launch_pdl=early,
    )
