"""Triton kernel of `decode_attention`: one launch, the last of a request's splits merges them.

The split-and-merge scheme is Flash-Decoding's (Dao, Haziza, Massa, Sizov, 2023). Splits have a fixed length, so that a token's sums
have the same order whatever the context's length is in this step and whoever shares the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.decode_attention.config import DecodeAttentionConfig
from kernels.paged_attention.triton import LOG2_E, load_page, merge_splits, page_rows
from kernels.skinny_linear.product import admit_next, arrive, await_previous, prefetch
from kernels.skinny_linear.tiles import next_power_of_2

MOST_ROWS = 64  # (new token, head) pairs a program takes: more would not fit its registers


@triton.jit
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, position_ptr, context_ptr, out_ptr, part_ptr, stat_ptr, ticket_ptr,
    scale_log2, num_rows, stride_table, stride_page, stride_token, stride_head,
    LENGTH: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // GROUPS
    TILES: tl.constexpr = LENGTH // TOKENS
    unit = tl.program_id(0)
    kv_head = unit % GROUPS
    tile = unit // GROUPS % TILES
    request = unit // GROUPS // TILES
    admit_next(EARLY)
    # Lengths, positions and the page table are settled before the step's first kernel: they need not wait.
    context = tl.load(context_ptr + request).to(tl.int32)
    splits = tl.cdiv(context, SPLIT)
    programs = tl.maximum(tl.minimum(splits, tl.num_programs(1)), 1)
    table_row_ptr = table_ptr + request.to(tl.int64) * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_head
    v_ptr += kv_head.to(tl.int64) * stride_head
    channel = tl.arange(0, BLOCK_D)
    channel_mask = channel < HEAD_DIM
    if PREFETCH:
        start = tl.program_id(1) * SPLIT
        key = start + tl.arange(0, SPLIT)
        page = tl.load(table_row_ptr + key // PAGE, mask=key < context, other=0).to(tl.int64)
        line = tl.arange(0, (HEAD_DIM + 63) // 64) * 64
        offset = (page * stride_page + key % PAGE * stride_token)[:, None] + line[None, :]
        if start < context:
            prefetch(k_ptr + offset)
            prefetch(v_ptr + offset)
    packed = tl.arange(0, BLOCK_M)
    row = (request * LENGTH + tile * TOKENS + packed // GROUP).to(tl.int64)
    row_mask = packed < TOKENS * GROUP
    head = kv_head * GROUP + packed % GROUP
    limit = tl.load(position_ptr + row, mask=row_mask, other=-1).to(tl.int32) + 1
    row_head = row * HEADS + head
    out_mask = row_mask[:, None] & channel_mask[None, :]
    await_previous(EARLY)
    if tl.program_id(1) >= programs:
        return
    q = tl.load(q_ptr + row_head[:, None] * HEAD_DIM + channel[None, :], mask=out_mask, other=0.0)
    for split in range(tl.program_id(1), tl.maximum(splits, 1), programs):
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        end = tl.minimum((split + 1) * SPLIT, context)
        page = load_page(table_row_ptr, split * SPLIT, end, PAGE, BLOCK_N)
        for block in tl.range(split * SPLIT, end, BLOCK_N, num_stages=STAGES):
            key = block + tl.arange(0, BLOCK_N)
            inside = key < end
            base, offset = page_rows(page, block, stride_page, stride_token, PAGE, BLOCK_N)
            page = load_page(table_row_ptr, block + BLOCK_N, end, PAGE, BLOCK_N)
            k = tl.load(k_ptr + base + offset[None, :] + channel[:, None], mask=inside[None, :] & channel_mask[:, None], other=0.0)
            # Values past the end may be anything, NaN included, so they are not merely weighted by zero.
            v = tl.load(v_ptr + base + offset[:, None] + channel[None, :], mask=inside[:, None] & channel_mask[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
            scores = tl.where(key[None, :] < limit[:, None], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(scores - safe[:, None])
            shrink = tl.exp2(highest - safe)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            highest = new_highest
        if splits <= 1:
            out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out_ptr + row_head[:, None] * HEAD_DIM + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)
        else:
            part = row_head + num_rows * HEADS * split
            tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
            tl.store(stat_ptr + 2 * part + 1, total, mask=row_mask)
            tl.store(part_ptr + part[:, None] * HEAD_DIM + channel[None, :], acc, mask=out_mask)
    if splits > 1 and arrive(ticket_ptr + unit, programs):
        out = merge_splits(
            part_ptr, stat_ptr, row_head, row_mask, channel, channel_mask, splits, num_rows * HEADS, HEAD_DIM, BLOCK_M, BLOCK_D, AHEAD
        )
        tl.store(out_ptr + row_head[:, None] * HEAD_DIM + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)


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
    early: bool = False,
) -> None:
    """See `reference.decode_attention`; the grid does not depend on the lengths.

    part: float32 of `decode_attention_parts` elements. tickets: int32, zero, one a token and KV head; left zero. early: see `skinny_linear`.
    """
    rows, heads, head_dim = q.shape
    batch, max_pages = page_table.shape
    size, groups = k_pages.shape[1:3]
    length = rows // batch
    group = heads // groups
    fitting = [t for t in range(1, length + 1) if length % t == 0 and t * group <= MOST_ROWS]
    tokens = max(fitting, default=1) if config.whole_block else 1
    block_m = max(16, next_power_of_2(tokens * group))
    keys = max_pages * size
    splits = triton.cdiv(keys, config.split)
    stat = part[splits * rows * heads * head_dim :]
    programs = max(1, min(splits, config.programs))
    _decode_attention_kernel[(batch * (length // tokens) * groups, programs)](
        q, k_pages, v_pages, page_table, positions, context_lens, out, part, stat, tickets,
        scale * LOG2_E, rows, page_table.stride(0), *k_pages.stride()[:3],
        LENGTH=length, TOKENS=tokens, HEADS=heads, GROUPS=groups, HEAD_DIM=head_dim, PAGE=size, SPLIT=config.split,
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_D=max(16, next_power_of_2(head_dim)),
        STAGES=config.stages, AHEAD=min(config.ahead, max(1, MOST_ROWS // block_m)), PREFETCH=config.prefetch and early, EARLY=early,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=config.warps, launch_pdl=early,
    )  # fmt: skip
