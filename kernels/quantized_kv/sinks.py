"""Triton kernel of attention over the first tokens kept exact: one more part for `attention.py` to merge, in the codes' rotated basis."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.paged_attention.triton import LOG2_E, Lengths, cap_scores, first_rows
from kernels.quantized_kv.reference import NUM_SINKS, ExactSinks
from kernels.quantized_kv.triton import times_signs


@triton.jit
def _sink_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slot_ptr,
    v_mean_ptr,
    signs_ptr,
    query_lens_ptr,
    context_lens_ptr,
    part_ptr,
    stat_ptr,
    scale_log2,
    softcap_log2,
    num_requests,
    q_heads,
    kv_heads,
    stride_row,
    stride_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    SLIDING: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    tile, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    queries = tl.load(query_lens_ptr + request).to(tl.int32)
    if tile * BLOCK_M >= queries * GROUP:
        return
    context = tl.load(context_lens_ptr + request).to(tl.int32)
    first = first_rows(query_lens_ptr, request, num_requests, REQUESTS).to(tl.int64)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_in_block = packed // GROUP
    row, head = first + token_in_block, kv_head * GROUP + packed % GROUP
    row_mask = token_in_block < queries
    limit = context - queries + 1 + token_in_block
    channel = tl.arange(0, D)
    q = tl.load(q_ptr + row[:, None] * stride_row + head[:, None] * stride_head + channel[None, :], mask=row_mask[:, None], other=0.0)
    q = q.to(tl.float32)
    place = (tl.load(slot_ptr + request).to(tl.int64) * SINKS * kv_heads + kv_head) * D
    mean = tl.load(v_mean_ptr + kv_head * D + channel)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for sink in tl.static_range(SINKS):
        at = place + sink * kv_heads * D + channel
        # rows of tokens not there yet hold anything: 0 instead, and no weight
        key = tl.load(k_ptr + at, mask=channel * 0 + sink < context, other=0.0).to(tl.float32)
        value = tl.load(v_ptr + at, mask=channel * 0 + sink < context, other=0.0).to(tl.float32) - mean
        score = tl.sum(q * key[None, :], 1) * scale_log2
        if CAPPED:
            score = cap_scores(score, softcap_log2)
        seen = sink < limit
        if SLIDING > 0:
            seen = seen & (sink >= limit - SLIDING)
        score = tl.where(seen, score, float("-inf"))
        new_highest = tl.maximum(highest, score)
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing seen so far
        weight, shrink = tl.exp2(score - safe), tl.exp2(highest - safe)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value[None, :]
        highest = new_highest
    signs = tl.load(signs_ptr + channel[:, None] * D + channel[None, :])
    rotated = times_signs(acc, signs, True) / tl.sqrt(D + 0.0)
    part = row * q_heads + head
    tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
    tl.store(stat_ptr + 2 * part + 1, total, mask=row_mask)
    tl.store(part_ptr + part[:, None] * D + channel[None, :], rotated, mask=row_mask[:, None])


def attend_sinks(
    q: torch.Tensor,
    sinks: ExactSinks,
    v_mean: torch.Tensor,
    signs: torch.Tensor,
    lengths: Lengths,
    scale_log2: float,
    part: torch.Tensor,
    stat: torch.Tensor,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Weighted sums of the sinks' values minus `v_mean`, rotated, into `part`; what the merge needs to know of them into `stat`.

    Floors: 2 * B * NUM_SINKS * G * d elements in, N * H * (d + 2) * 4 bytes out; 4 * N * H * NUM_SINKS * d operations.

    Args:
        q: [N, H, d] queries rotated to their positions, dense along d.
        signs: bfloat16 [d, d], the rotation's signs, its columns in the order that `part` is to have.
        scale_log2: factor of the scores, for powers of two.
        part: [N, H, d] float32; stat: [N, H, 2] float32, highest score and total weight.
        sliding_window, softcap: as in `reference.quantized_paged_attention`.
    """
    q_heads, d = q.shape[1:]
    kv_heads = sinks.k.shape[2]
    group, batch = q_heads // kv_heads, len(sinks.rows)
    block_m = 16
    _sink_kernel[(triton.cdiv(lengths.max_query_len * group, block_m), kv_heads, batch)](
        q,
        sinks.k,
        sinks.v,
        sinks.rows,
        v_mean,
        signs,
        lengths.query_lens,
        lengths.context_lens,
        part,
        stat,
        scale_log2,
        1.0 if softcap is None else softcap * LOG2_E,
        batch,
        q_heads,
        kv_heads,
        q.stride(0),
        q.stride(1),
        GROUP=group,
        D=d,
        SINKS=NUM_SINKS,
        SLIDING=sliding_window or 0,
        CAPPED=softcap is not None,
        BLOCK_M=block_m,
        REQUESTS=triton.next_power_of_2(batch),
        num_warps=4,
    )
