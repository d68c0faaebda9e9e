"""Triton kernels of `quantized_paged_attention`; `reference.py` says what it means.

Three launches: `_prepare_kernel` rotates the queries (once a step, not once a key), `_split_kernel` attends over a stretch of the context with
the codes taken apart in registers, `_merge_kernel` joins the stretches, rotates the output back and adds the values' mean.

Taking codes apart (`levels.py`) is what costs. So keys are the rows of both products and queries the columns: Hopper's asynchronous products
(wgmma) want 64 rows, but no more columns than there are queries, and they take the first factor from registers, where codes come apart.
And weights are measured from the highest score of a split's first block, not of all so far: any number near it serves. Where it was not near,
sums leave the range of floats, and the split is taken again with a running maximum.

The keys' mean: with mean (m1, m2) in halves and angle t_i of a key's position, q . R(t) m = sum_i a_i cos t_i + b_i sin t_i with
a = q1 m1 + q2 m2, b = q2 m1 - q1 m2. With t = far + near, far the angles of the block's first key, that is (a, b) turned by -far times cos and sin
of near, which are the same for every block: one more product, in 16-bit floats, with matrices that stay in shared memory. Its second factor is
laid out as the values' product's is, queries adjacent: with another layout in the same place of shared memory, ptxas 12.8 adds the steps of the
values' descriptor to registers that it never set, and the product reads anywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.paged_attention import triton as paged
from kernels.paged_attention.triton import (
    LOG2_E,
    AttentionConfig,
    Lengths,
    cap_scores,
    choose_splits,
    load_page,
    merge_splits,
    sliding_bounds,
    split_bounds,
    tile_rows,
)
from kernels.quantized_kv.levels import block_rows, decode_levels, level_assembly, load_codes, ordered_signs
from kernels.quantized_kv.recent import attend_recent
from kernels.quantized_kv.reference import NUM_RECENT, NUM_SINKS, ChannelMeans, ExactRecent, ExactSinks, QuantizedPages, levels
from kernels.quantized_kv.sinks import attend_sinks
from kernels.quantized_kv.triton import times_signs

MAX_BLOCK = 128  # keys a block may have
LARGEST = tl.constexpr(2.0**100)  # weight a split may have beside its first block's largest; a scale and a level more are still a number
LARGEST_SHARE = tl.constexpr(16384.0)  # bound on what a channel's mean adds to a score


@triton.jit
def _prepare_kernel(
    q_ptr,
    k_mean_ptr,
    signs_ptr,
    rotated_ptr,
    pair_ptr,
    scale_log2,
    num_rows,
    q_heads,
    stride_row,
    stride_head,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (row, head)
    mask = (index < num_rows)[:, None]
    row, head = (index // q_heads).to(tl.int64), index % q_heads
    HALF: tl.constexpr = D // 2
    channel, half = tl.arange(0, D), tl.arange(0, HALF)
    source = q_ptr + row[:, None] * stride_row + head[:, None] * stride_head
    q = tl.load(source + channel[None, :], mask=mask, other=0.0)
    signs = tl.load(signs_ptr + channel[:, None] * D + channel[None, :])
    rotated = times_signs(q, signs, SPLIT) * (scale_log2 / tl.sqrt(D + 0.0))
    target = index.to(tl.int64)[:, None] * D
    tl.store(rotated_ptr + target + channel[None, :], rotated.to(rotated_ptr.dtype.element_ty), mask=mask)
    if MEAN:
        q1 = tl.load(source + half[None, :], mask=mask, other=0.0).to(tl.float32) * scale_log2
        q2 = tl.load(source + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32) * scale_log2
        mean = k_mean_ptr + (head // GROUP)[:, None] * D + half[None, :]
        m1, m2 = tl.load(mean, mask=mask, other=0.0), tl.load(mean + HALF, mask=mask, other=0.0)
        a, b = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2
        # within 16-bit floats, whatever factor the angles have
        a, b = tl.clamp(a, -LARGEST_SHARE, LARGEST_SHARE), tl.clamp(b, -LARGEST_SHARE, LARGEST_SHARE)
        pair = pair_ptr + index[:, None] + half[None, :] * num_rows
        tl.store(pair, a.to(tl.float16), mask=mask)
        tl.store(pair + HALF * num_rows, b.to(tl.float16), mask=mask)


@triton.jit
def _load_scales(k_scale_ptr, v_scale_ptr, block, page, kv_head, kv_heads, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    base, offset = block_rows(page * kv_heads + kv_head, block, PAGE, 1, PAGE, BLOCK_N)
    return tl.load(k_scale_ptr + base + offset), tl.load(v_scale_ptr + base + offset)


@triton.jit
def _load_angles(angle_ptr, block, end, D: tl.constexpr, MEAN: tl.constexpr):
    """cos and sin of the block's first position: [D / 2] each. Any where there is no such block."""
    angles = angle_ptr + tl.minimum(block, end) * D + tl.arange(0, D // 2)
    if MEAN:
        return tl.load(angles), tl.load(angles + D // 2)
    else:
        return block, block


@triton.jit
def _sum_pairs(weights):
    """Sums of the two rows of every 16 that a thread holds: [BLOCK_N / 16, 8, BLOCK_M]."""
    return tl.sum(tl.reshape(weights, [weights.shape[0] // 16, 2, 8, weights.shape[1]]), 1)


@triton.jit
def _turn(
    block,
    first,
    page,
    k_scale,
    v_scale,
    end,
    q,
    a,
    b,
    near_cos,
    near_sin,
    far_cos,
    far_sin,
    limit,
    acc,
    highest,
    total,
    k_code_ptr,
    v_code_ptr,
    level_ptr,
    kv_head,
    kv_heads,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEAN: tl.constexpr,
    SINKS: tl.constexpr,
    MASKED: tl.constexpr,
    SLIDING: tl.constexpr,
    CAPPED: tl.constexpr,
    softcap_log2,
    position,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums with BLOCK_N more keys in them. MASKED: some of these may be hidden from some rows, and `highest` is kept the highest score;
    else it is minus the `first` block's highest, and who calls looks after sums too large for it. SLIDING, CAPPED: only where MASKED; position: of each
    row, in its text."""
    DTYPE: tl.constexpr = q.dtype
    place = page * kv_heads + kv_head  # of [P, G]
    k_low, k_high = load_codes(k_code_ptr, place, block, D, BITS, PAGE, BLOCK_N, True, ASM != "")
    v_low, v_high = load_codes(v_code_ptr, place, block, D, BITS, PAGE, BLOCK_N, False, ASM != "")

    k = decode_levels(k_low, k_high, level_ptr, D, BITS, BLOCK_N, True, ASM, DTYPE)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if MEAN:
        means = tl.dot(near_cos, a * far_cos[:, None] + b * far_sin[:, None])
        means = tl.dot(near_sin, b * far_cos[:, None] - a * far_sin[:, None], means)
    k_scale = tl.broadcast_to(k_scale.to(tl.float32)[:, None], scores.shape)
    if MASKED:
        scores = scores * k_scale
        if MEAN:
            scores += means
        if CAPPED:
            scores = cap_scores(scores, softcap_log2)
        token = block + tl.arange(0, BLOCK_N)
        seen = token[:, None] < limit[None, :]
        if SLIDING > 0:
            seen = seen & (token[:, None] > position[None, :] - SLIDING)
        if SINKS > 0:
            seen = seen & (token >= SINKS)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        v_scale = tl.where(token < end, v_scale.to(tl.float32), 0.0)
        new_highest = tl.maximum(highest, tl.max(scores, 0))
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - safe[None, :])
        shrink = tl.exp2(highest - safe)
        total = total * tl.expand_dims(shrink, [0, 1]) + _sum_pairs(weights)
        acc = acc * shrink[None, :]
        highest = new_highest
    else:
        if first:
            if MEAN:
                highest = -tl.max(scores * k_scale + means, 0)
            else:
                highest = -tl.max(scores * k_scale, 0)
        if MEAN:
            weights = tl.exp2(tl.fma(scores, k_scale, means + highest[None, :]))
        else:
            weights = tl.exp2(tl.fma(scores, k_scale, highest[None, :]))
        total += _sum_pairs(weights)
    weights = (weights * v_scale.to(tl.float32)[:, None]).to(DTYPE)
    v = decode_levels(v_low, v_high, level_ptr, D, BITS, BLOCK_N, False, ASM, DTYPE)
    acc = tl.dot(tl.trans(v), weights, acc, input_precision=PRECISION)
    return acc, highest, total


@triton.jit
def _split_kernel(
    q_ptr,
    pair_ptr,
    k_code_ptr,
    k_scale_ptr,
    v_code_ptr,
    v_scale_ptr,
    table_ptr,
    query_lens_ptr,
    context_lens_ptr,
    since_ptr,
    angle_ptr,
    near_ptr,
    level_ptr,
    part_ptr,
    stat_ptr,
    softcap_log2,
    num_requests,
    num_rows,
    num_splits,
    split_keys,
    q_heads,
    kv_heads,
    stride_table,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REQUESTS: tl.constexpr,
    MEAN: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    EDGES: tl.constexpr,
    SLIDING: tl.constexpr,
    CAPPED: tl.constexpr,
    ASM: tl.constexpr,
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
    row_head = row * q_heads + head
    position = limit - 1
    shown = context - queries + 1 + tile * BLOCK_M // GROUP  # keys that all rows see
    if RECENT > 0:
        since = tl.load(since_ptr + request).to(tl.int32)
        limit = tl.maximum(limit - RECENT, since)
        shown = tl.maximum(shown - RECENT, since)

    channel = tl.arange(0, D)
    q = tl.load(q_ptr + row_head[:, None] * D + channel[None, :], mask=row_mask[:, None], other=0.0)
    if SLIDING > 0:
        lowest = context - queries + 1 + tile * BLOCK_M // GROUP - SLIDING
        start, end = sliding_bounds(context, split, num_splits, split_keys, lowest, BLOCK_N)
    else:
        start, end = split_bounds(context, split, num_splits, split_keys, BLOCK_N)
    end = tl.minimum(end, reach)
    # Keys are the rows of every tile, of which Hopper's products want 64: so queries are not padded beyond 16.
    acc = tl.zeros([D, BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N // 16, 8, BLOCK_M], tl.float32)
    table_row_ptr = table_ptr + request.to(tl.int64) * stride_table
    # With EDGES the blocks that are hidden from some row, the first and the last ones, have a loop of their own.
    lead = 0
    stop = end
    if EDGES:
        if SINKS > 0:
            lead = ((start < SINKS) & (start < end)).to(tl.int32)
        stop = start + tl.maximum((tl.minimum(end, shown) - start) // BLOCK_N, lead) * BLOCK_N
    inner = start + lead * BLOCK_N
    a, b, near_cos, near_sin = q, q, q, q
    if MEAN:
        half = tl.arange(0, D // 2)
        rows = num_rows * q_heads
        pair = pair_ptr + row_head[None, :] + half[:, None] * rows
        a, b = tl.load(pair, mask=row_mask[None, :], other=0.0), tl.load(pair + D // 2 * rows, mask=row_mask[None, :], other=0.0)
        near = near_ptr + tl.arange(0, BLOCK_N)[:, None] * D + half[None, :]
        near_cos, near_sin = tl.load(near), tl.load(near + D // 2)
    # A block's scales and angles are fetched a turn ahead and its page two: a turn that waits for one is twice as long.
    page = load_page(table_row_ptr, inner, end, PAGE, BLOCK_N)
    ahead = load_page(table_row_ptr, inner + BLOCK_N, end, PAGE, BLOCK_N)
    k_scale, v_scale = _load_scales(k_scale_ptr, v_scale_ptr, inner, page, kv_head, kv_heads, PAGE, BLOCK_N)
    far_cos, far_sin = _load_angles(angle_ptr, inner, end, D, MEAN)
    for block in range(inner, stop, BLOCK_N):
        # loaded twice rather than handed on: a value that lives for two turns would keep the compiler from pipelining the loop
        next_page = load_page(table_row_ptr, block + BLOCK_N, end, PAGE, BLOCK_N)
        next_k_scale, next_v_scale = _load_scales(k_scale_ptr, v_scale_ptr, block + BLOCK_N, ahead, kv_head, kv_heads, PAGE, BLOCK_N)
        next_cos, next_sin = _load_angles(angle_ptr, block + BLOCK_N, end, D, MEAN)
        ahead = load_page(table_row_ptr, block + 2 * BLOCK_N, end, PAGE, BLOCK_N)
        acc, highest, total = _turn(
            block,
            block == inner,
            page,
            k_scale,
            v_scale,
            end,
            q,
            a,
            b,
            near_cos,
            near_sin,
            far_cos,
            far_sin,
            limit,
            acc,
            highest,
            total,
            k_code_ptr,
            v_code_ptr,
            level_ptr,
            kv_head,
            kv_heads,
            PAGE,
            D,
            BITS,
            BLOCK_N,
            MEAN,
            SINKS,
            not EDGES,
            SLIDING,
            CAPPED,
            softcap_log2,
            position,
            ASM,
            PRECISION,
        )
        page, k_scale, v_scale, far_cos, far_sin = next_page, next_k_scale, next_v_scale, next_cos, next_sin
    if EDGES:
        highest = tl.where(inner < stop, -highest, highest)
        # Where later scores rise above the first block's by hundreds (or are no numbers), that split is taken again, the slow way.
        if tl.max((total < LARGEST).to(tl.int32) ^ 1) > 0:
            lead, stop = 0, start
            acc, total = tl.zeros_like(acc), tl.zeros_like(total)
            highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for i in tl.range(0, lead + tl.cdiv(tl.maximum(end - stop, 0), BLOCK_N), num_stages=1):
            block = tl.where(i < lead, start, stop + (i - lead) * BLOCK_N)
            page = load_page(table_row_ptr, block, end, PAGE, BLOCK_N)
            k_scale, v_scale = _load_scales(k_scale_ptr, v_scale_ptr, block, page, kv_head, kv_heads, PAGE, BLOCK_N)
            far_cos, far_sin = _load_angles(angle_ptr, block, end, D, MEAN)
            acc, highest, total = _turn(
                block,
                False,
                page,
                k_scale,
                v_scale,
                end,
                q,
                a,
                b,
                near_cos,
                near_sin,
                far_cos,
                far_sin,
                limit,
                acc,
                highest,
                total,
                k_code_ptr,
                v_code_ptr,
                level_ptr,
                kv_head,
                kv_heads,
                PAGE,
                D,
                BITS,
                BLOCK_N,
                MEAN,
                SINKS,
                True,
                SLIDING,
                CAPPED,
                softcap_log2,
                position,
                ASM,
                PRECISION,
            )

    whole = tl.sum(tl.sum(total, 0), 0)
    part = split.to(tl.int64) * num_rows * q_heads + row_head
    tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
    tl.store(stat_ptr + 2 * part + 1, whole, mask=row_mask)
    tl.store(part_ptr + part[None, :] * D + channel[:, None], acc, mask=(row_mask & (whole > 0))[None, :])


@triton.jit
def _merge_kernel(
    part_ptr,
    stat_ptr,
    signs_ptr,
    v_mean_ptr,
    out_ptr,
    num_splits,
    row_heads,
    q_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    # A row a program: with many splits and few rows their loads must not queue up, and one row turned back is no matrix product yet.
    row = tl.program_id(0).to(tl.int64)
    one, channel = tl.arange(0, 1), tl.arange(0, D)
    rotated = merge_splits(part_ptr, stat_ptr, row + one, one == 0, channel, channel < D, num_splits, row_heads, D, 1, D, AHEAD)  # [1, D]
    signs = tl.load(signs_ptr + channel[:, None] * D + channel[None, :]).to(tl.float32)
    out = tl.sum(signs * rotated, 1) / tl.sqrt(D + 0.0)
    out += tl.load(v_mean_ptr + (row % q_heads) // GROUP * D + channel)
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))


_angle_tables = WeakTensorKeyDictionary()  # cos table -> (weak reference to its sin table, both side by side)


def angle_tables(cos_table: torch.Tensor, sin_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos beside sin, float16: of a position [positions + MAX_BLOCK, d], and of a key's distance from its block's start [MAX_BLOCK, d].

    The second without the factor, if any, that the tables scale their angles by: cos 0 is that factor.
    Made once for a pair of tensors and kept as long as they are, so these must stay as they are.
    """
    kept = _angle_tables.get(cos_table)
    if kept is not None and kept[0]() is sin_table:
        return kept[1]
    both = F.pad(torch.cat([cos_table, sin_table], 1), (0, 0, 0, MAX_BLOCK))
    made = both.to(torch.float16), (both[:MAX_BLOCK] / cos_table[0, 0]).to(torch.float16)
    # What a graph computes while it is captured is not there before its first replay.
    if not (cos_table.is_cuda and torch.cuda.is_current_stream_capturing()):
        _angle_tables[cos_table] = weakref.ref(sin_table), made
    return made


def quantized_row_bytes(head_dim: int, bits: int) -> float:
    """Bytes of a key and a value of one head: two rows of codes, two scales. For `paged_attention_bounds`."""
    return head_dim * bits / 4 + 4


def quantized_paged_attention(
    q: torch.Tensor,
    pages: QuantizedPages,
    means: ChannelMeans,
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    page_table: torch.Tensor,
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    scale: float,
    *,
    sinks: ExactSinks | None = None,
    recent: ExactRecent | None = None,
    deterministic: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    max_query_len: int | None = None,
    config: AttentionConfig | None = None,
    packed_arithmetic: bool | None = None,
) -> torch.Tensor:
    """See `reference.quantized_paged_attention`; roofline bounds: `paged_attention_bounds` with `quantized_row_bytes`.

    The tables must cover the longest context and be the same tensors every time (`angle_tables`). max_query_len, config: as for `paged_attention`.
    packed_arithmetic: take codes apart with `level_assembly`; None for wherever it runs.
    """
    num_rows, q_heads, d = q.shape
    kv_heads, page_size = pages.k_scale.shape[1:]
    out = torch.empty((num_rows, q_heads, d), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    if q.stride(-1) != 1:
        q = q.contiguous()
    batch, group, device, bits = len(query_lens), q_heads // kv_heads, q.device, pages.bits
    lengths = Lengths.of(query_lens, context_lens, num_rows, page_table.shape[1] * page_size, device, max_query_len)
    fast = q.is_cuda and q.dtype == torch.bfloat16 if packed_arithmetic is None else packed_arithmetic
    with_mean = means.k_mean is not None
    config = config or AttentionConfig(block_n=64 if fast else 32)
    block_n = 64 if deterministic else config.block_n
    # Lengths on the device are not read back; their caller answers for tables that reach far enough.
    if means.k_mean is not None and not isinstance(context_lens, torch.Tensor) and len(cos_table) < lengths.max_context_len:
        raise ValueError(f"tables of {len(cos_table)} positions for a context of {lengths.max_context_len} (make them longer)")
    block_m = 32 if deterministic else config.block_m or max(16, min(triton.next_power_of_2(lengths.max_query_len * group), 64))
    tiles = triton.cdiv(lengths.max_query_len * group, block_m)
    if deterministic:
        split_keys, num_splits = paged.DETERMINISTIC_SPLIT, triton.cdiv(lengths.max_context_len, paged.DETERMINISTIC_SPLIT)
    else:
        split_keys, num_splits = 0, choose_splits(config.num_splits, batch * kv_heads * tiles, lengths.keys_within(sliding_window), block_n)
    k_signs, v_signs = (ordered_signs(d, bits, device, fast, rows) for rows in (True, False))
    k_codes, v_codes = (x.view(torch.int16) if bits == 4 else x for x in (pages.k_codes, pages.v_codes))
    rotated = torch.empty((num_rows, q_heads, d), dtype=q.dtype, device=device)
    pair = torch.empty((d, num_rows * q_heads), dtype=torch.float16, device=device) if with_mean else rotated
    angles, near = angle_tables(cos_table, sin_table) if with_mean else (rotated, rotated)
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    _prepare_kernel[(triton.cdiv(num_rows * q_heads, 16),)](
        q,
        means.k_mean if means.k_mean is not None else means.v_mean,
        k_signs,
        rotated,
        pair,
        scale * LOG2_E,
        num_rows * q_heads,
        q_heads,
        q.stride(0),
        q.stride(1),
        D=d,
        GROUP=group,
        MEAN=with_mean,
        ROWS=16,
        SPLIT=q.dtype != torch.bfloat16,
        num_warps=4,
    )
    # what is exact comes first: a part's place must not depend on the number of splits
    first_split = (sinks is not None) + (recent is not None)
    num_parts = num_splits + first_split
    part = torch.empty((num_parts, num_rows, q_heads, d), dtype=torch.float32, device=device)
    stat = torch.empty((num_parts, num_rows, q_heads, 2), dtype=torch.float32, device=device)
    if sinks is not None:
        attend_sinks(
            q, sinks, means.v_mean, v_signs, lengths, scale * LOG2_E, part[0], stat[0], sliding_window=sliding_window, softcap=softcap
        )
    if recent is not None:
        at = first_split - 1
        num_sinks = 0 if sinks is None else NUM_SINKS
        kind: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap}
        attend_recent(q, recent, means.v_mean, v_signs, lengths, scale * LOG2_E, part[at], stat[at], num_sinks, **kind)
    _split_kernel[(kv_heads, num_splits * tiles, batch)](
        rotated,
        pair,
        k_codes,
        pages.k_scale,
        v_codes,
        pages.v_scale,
        page_table,
        lengths.query_lens,
        lengths.context_lens,
        lengths.context_lens if recent is None else recent.since,
        angles,
        near,
        levels(bits, device),
        part[first_split:],
        stat[first_split:],
        1.0 if softcap is None else softcap * LOG2_E,
        batch,
        num_rows,
        num_splits,
        split_keys,
        q_heads,
        kv_heads,
        page_table.stride(0),
        GROUP=group,
        PAGE=page_size,
        D=d,
        BITS=bits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        REQUESTS=triton.next_power_of_2(batch),
        MEAN=with_mean,
        SINKS=0 if sinks is None else NUM_SINKS,
        RECENT=0 if recent is None else NUM_RECENT,
        EDGES=not deterministic and sliding_window is None and softcap is None,
        SLIDING=sliding_window or 0,
        CAPPED=softcap is not None,
        ASM=level_assembly(bits) if fast else "",
        PRECISION=precision,
        num_warps=4 if deterministic else config.num_warps,
        num_stages=config.num_stages,
    )
    _merge_kernel[(num_rows * q_heads,)](
        part,
        stat,
        v_signs,
        means.v_mean,
        out,
        num_parts,
        num_rows * q_heads,
        q_heads,
        GROUP=group,
        D=d,
        AHEAD=32,
        num_warps=4,
    )
    return out
