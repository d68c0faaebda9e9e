"""Triton kernel of attention over the last tokens kept exact: one more part for `attention.py` to merge, in the codes' rotated basis."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.paged_attention.triton import LOG2_E, Lengths, cap_scores, first_rows, tile_rows
from kernels.quantized_kv.reference import NUM_RECENT, RING, ExactRecent
from kernels.quantized_kv.triton import times_signs


@triton.jit
def _recent_kernel(
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    k_ring_ptr,
    v_ring_ptr,
    slot_ptr,
    since_ptr,
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
    k_stride_row,
    k_stride_head,
    v_stride_row,
    v_stride_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    RING: tl.constexpr,
    SLIDING: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REQUESTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    queries = tl.load(query_lens_ptr + request).to(tl.int32)
    if tile * BLOCK_M >= queries * GROUP:
        return
    context = tl.load(context_lens_ptr + request).to(tl.int32)
    row, head, row_mask, limit, reach = tile_rows(
        query_lens_ptr, request, kv_head, tile, queries, context, num_requests, GROUP, BLOCK_M, REQUESTS
    )
    first = first_rows(query_lens_ptr, request, num_requests, REQUESTS).to(tl.int64)
    start = context - queries  # position of the first new token
    since = tl.load(since_ptr + request).to(tl.int32)
    near = tl.maximum(tl.maximum(limit - RECENT, since), SINKS)  # first key a row reads here
    if SLIDING > 0:
        near = tl.maximum(near, limit - SLIDING)
    channel = tl.arange(0, D)
    q = tl.load(q_ptr + row[:, None] * stride_row + head[:, None] * stride_head + channel[None, :], mask=row_mask[:, None], other=0.0)
    ring = tl.load(slot_ptr + request).to(tl.int64) * RING
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    lowest = tl.maximum(start + 1 + tile * BLOCK_M // GROUP - RECENT, since)
    # Blocks start at multiples of their length whatever the tile: a row's sums then do not depend on the rows beside it.
    for block in range(lowest // BLOCK_N * BLOCK_N, reach, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        is_new, is_held = (key >= start) & (key < reach), (key >= since) & (key < start)
        new = first + key - start
        old = ((ring + key % RING) * kv_heads + kv_head) * D
        k = tl.load(k_new_ptr + new[:, None] * k_stride_row + kv_head * k_stride_head + channel[None, :], mask=is_new[:, None], other=0.0)
        k += tl.load(k_ring_ptr + old[:, None] + channel[None, :], mask=is_held[:, None], other=0.0)
        v = tl.load(v_new_ptr + new[:, None] * v_stride_row + kv_head * v_stride_head + channel[None, :], mask=is_new[:, None], other=0.0)
        v += tl.load(v_ring_ptr + old[:, None] + channel[None, :], mask=is_held[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if CAPPED:
            scores = cap_scores(scores, softcap_log2)
        scores = tl.where((key[None, :] >= near[:, None]) & (key[None, :] < limit[:, None]), scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        highest = new_highest
    # The merge adds the values' mean to every part.
    acc -= total[:, None] * tl.load(v_mean_ptr + kv_head * D + channel)[None, :]
    signs = tl.load(signs_ptr + channel[:, None] * D + channel[None, :])
    rotated = times_signs(acc, signs, True) / tl.sqrt(D + 0.0)
    part = row * q_heads + head
    tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
    tl.store(stat_ptr + 2 * part + 1, total, mask=row_mask)
    tl.store(part_ptr + part[:, None] * D + channel[None, :], rotated, mask=row_mask[:, None])


def attend_recent(
    q: torch.Tensor,
    recent: ExactRecent,
    v_mean: torch.Tensor,
    signs: torch.Tensor,
    lengths: Lengths,
    scale_log2: float,
    part: torch.Tensor,
    stat: torch.Tensor,
    num_sinks: int,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Weighted sums of the values of the last tokens before each query, minus `v_mean`, rotated, into `part`, and their weights into `stat`.

    Floors: 2 * (N + B * (NUM_RECENT - 1)) * G * d elements in, N * H * (d + 2) * 4 bytes out; 4 * N * H * NUM_RECENT * d operations.

    Args:
        q: [N, H, d] queries rotated to their positions, dense along d.
        signs, scale_log2, part, stat: as for `sinks.attend_sinks`.
        num_sinks: first tokens left to that.
        sliding_window, softcap: as in `reference.quantized_paged_attention`.
    """
    q_heads, d = q.shape[1:]
    kv_heads = recent.k_ring.shape[2]
    group, batch = q_heads // kv_heads, len(recent.rows)
    k_new, v_new = (x if x.stride(-1) == 1 else x.contiguous() for x in (recent.k_new, recent.v_new))
    block_m = 16
    _recent_kernel[(triton.cdiv(lengths.max_query_len * group, block_m), kv_heads, batch)](
        q,
        k_new,
        v_new,
        recent.k_ring,
        recent.v_ring,
        recent.rows,
        recent.since,
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
        k_new.stride(0),
        k_new.stride(1),
        v_new.stride(0),
        v_new.stride(1),
        GROUP=group,
        D=d,
        SINKS=num_sinks,
        RECENT=NUM_RECENT,
        RING=RING,
        SLIDING=sliding_window or 0,
        CAPPED=softcap is not None,
        BLOCK_M=block_m,
        BLOCK_N=32,
        REQUESTS=triton.next_power_of_2(batch),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2,
    )
