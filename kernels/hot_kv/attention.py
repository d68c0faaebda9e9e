"""Triton kernels of `hot_paged_attention`; `reference.py` says what it means.

Three launches: `_prepare_kernel` rotates the queries (once a step, not once a key), `_split_kernel` attends over a stretch of the context with
the codes taken apart in registers, `_merge_kernel` joins the stretches, rotates the output back and adds the values' mean.

Taking codes apart is what costs: three operations a channel, where bfloat16 pages cost none. So tiles are 64 rows high even where there are
fewer: from there on Hopper's asynchronous products (wgmma) read both factors from shared memory, which leaves the threads to the codes.

The keys' mean: with mean (m1, m2) in halves and angle t_i of a key's position, q . R(t) m = sum_i a_i cos t_i + b_i sin t_i with
a = q1 m1 + q2 m2, b = q2 m1 - q1 m2. So the means' share of a block's scores is one more product, of (a, b) with the block's rows of the
tables of cos and sin in 16-bit floats.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.hot_kv.recent import attend_recent
from kernels.hot_kv.reference import (
    LEVEL_COEFFICIENTS,
    NUM_RECENT,
    NUM_SINKS,
    HotMeans,
    HotPages,
    HotRecent,
    HotSinks,
    hadamard_signs,
    levels,
)
from kernels.hot_kv.sinks import attend_sinks
from kernels.hot_kv.triton import times_signs
from kernels.paged_attention import triton as paged
from kernels.paged_attention.triton import (
    LOG2_E,
    AttentionConfig,
    Lengths,
    choose_splits,
    load_page,
    merge_splits,
    page_rows,
    split_bounds,
    tile_rows,
)

MAX_BLOCK = 128  # keys a block may have


@triton.jit
def _prepare_kernel(
    q_ptr, k_mean_ptr, signs_ptr, rotated_ptr, pair_ptr, size_ptr, scale_log2, num_rows, q_heads, stride_row, stride_head,
    D: tl.constexpr, GROUP: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
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
        # Turning a pair keeps its length, so after this division no turn leaves 16-bit floats' best range.
        size = tl.sqrt(tl.max(a * a + b * b, 1)) + 1e-30
        tl.store(pair_ptr + target + half[None, :], (a / size[:, None]).to(tl.float16), mask=mask)
        tl.store(pair_ptr + target + HALF + half[None, :], (b / size[:, None]).to(tl.float16), mask=mask)
        tl.store(size_ptr + index, size, mask=index < num_rows)


@triton.jit
def _load_codes(code_ptr, base, offset, D: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """Bytes of BLOCK_N rows: (those with the lower bits, those with the 3-bit format's upper bits, else the lower again).

    FAST: each byte once, [BLOCK_N, bytes], beside a 3-bit byte the one whose lowest four bits are its upper bits; else one a channel, [BLOCK_N, D].
    """
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 4
    ROW_BYTES: tl.constexpr = D * BITS // 8
    code_ptr += base * ROW_BYTES
    row = (offset * ROW_BYTES)[:, None]
    if FAST:
        column = tl.arange(0, D // PER_BYTE)
        low = tl.load(code_ptr + row + column[None, :])
        if BITS == 3:
            high = tl.load(code_ptr + row + (D // 4 + column // 2)[None, :])
            return low, high
        else:
            return low, low
    else:
        column = tl.arange(0, D) % (D // PER_BYTE)
        low = tl.load(code_ptr + row + column[None, :])
        if BITS == 3:
            high = tl.load(code_ptr + row + (D // 4 + column // 2)[None, :])
            return low, high
        else:
            return low, low


@triton.jit
def _levels(low, high, level_ptr, D: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Levels [BLOCK_N, D], in the order of `ordered_signs`, of what `_load_codes` loaded.

    With ASM two at a time in packed arithmetic (sm_90 PTX), else from a table.
    """
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 4
    if ASM == "":
        column = tl.arange(0, D)
        byte, place = column % (D // PER_BYTE), column // (D // PER_BYTE)
        shift = place * (8 // PER_BYTE)
        code = (low.to(tl.int32) >> shift[None, :]) & (15 if BITS == 4 else 3)
        if BITS == 3:
            code |= ((high.to(tl.int32) >> (byte % 2 * 4 + place)[None, :]) & 1) << 2
        return tl.load(level_ptr + code).to(DTYPE)
    elif BITS == 4:
        p0, p1 = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [low], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
        return tl.reshape(tl.permute(tl.join(p0, p1), 0, 2, 1), [BLOCK_N, D])
    else:
        if BITS == 3:
            odd = (tl.arange(0, D // 4) % 2 * 4).to(tl.uint8)
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [low, high >> odd[None, :]],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [low],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        return tl.reshape(tl.permute(tl.join(tl.join(p0, p1), tl.join(p2, p3)), 0, 3, 2, 1), [BLOCK_N, D])


@triton.jit
def _split_kernel(
    q_ptr, pair_ptr, size_ptr, k_code_ptr, k_scale_ptr, v_code_ptr, v_scale_ptr, table_ptr, query_lens_ptr, context_lens_ptr,
    since_ptr, angle_ptr, level_ptr, part_ptr, stat_ptr,
    num_requests, num_rows, num_splits, split_keys, q_heads, kv_heads, stride_table,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REQUESTS: tl.constexpr, MEAN: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
    if RECENT > 0:
        limit = tl.maximum(limit - RECENT, tl.load(since_ptr + request).to(tl.int32))

    FAST: tl.constexpr = ASM != ""
    channel, near = tl.arange(0, D), tl.arange(0, BLOCK_N)[:, None]
    q = tl.load(q_ptr + row_head[:, None] * D + channel[None, :], mask=row_mask[:, None], other=0.0)
    if MEAN:
        pair = tl.load(pair_ptr + row_head[:, None] * D + channel[None, :], mask=row_mask[:, None], other=0.0)
        size = tl.load(size_ptr + row_head, mask=row_mask, other=0.0)

    start, end = split_bounds(context, split, num_splits, split_keys, BLOCK_N)
    end = tl.minimum(end, reach)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_row_ptr = table_ptr + request.to(tl.int64) * stride_table
    # A block's page is fetched one turn ahead: an address that waits for a load inside the turn would cost the pipeline half its depth.
    page = load_page(table_row_ptr, start, end, PAGE, BLOCK_N)
    for block in range(start, end, BLOCK_N):
        token = block + tl.arange(0, BLOCK_N)
        base, offset = page_rows(page * kv_heads + kv_head, block, PAGE, 1, PAGE, BLOCK_N)  # rows of [P, G, S]
        page = load_page(table_row_ptr, block + BLOCK_N, end, PAGE, BLOCK_N)
        # Rows behind the last key are read like any other, for wide loads: their page is there, whatever they hold, and they get no weight.
        k_low, k_high = _load_codes(k_code_ptr, base, offset, D, BITS, FAST)
        v_low, v_high = _load_codes(v_code_ptr, base, offset, D, BITS, FAST)
        k_scale = tl.load(k_scale_ptr + base + offset)
        v_scale = tl.load(v_scale_ptr + base + offset)

        k = _levels(k_low, k_high, level_ptr, D, BITS, BLOCK_N, ASM, q_ptr.dtype.element_ty)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * k_scale.to(tl.float32)[None, :]
        if MEAN:
            angles = tl.load(angle_ptr + block * D + near * D + channel[None, :])
            scores += tl.dot(pair, tl.trans(angles)) * size[:, None]
        seen = token[None, :] < limit[:, None]
        if SINKS > 0:
            seen = seen & (token >= SINKS)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        v_factor = tl.where(token < end, v_scale.to(tl.float32), 0.0)
        weights = (weights * v_factor[None, :]).to(q_ptr.dtype.element_ty)
        v = _levels(v_low, v_high, level_ptr, D, BITS, BLOCK_N, ASM, q_ptr.dtype.element_ty)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
        highest = new_highest

    part = split.to(tl.int64) * num_rows * q_heads + row_head
    tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
    tl.store(stat_ptr + 2 * part + 1, total, mask=row_mask)
    tl.store(part_ptr + part[:, None] * D + channel[None, :], acc, mask=(row_mask & (total > 0))[:, None])


@triton.jit
def _merge_kernel(
    part_ptr, stat_ptr, signs_ptr, v_mean_ptr, out_ptr, num_splits, row_heads, q_heads,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < row_heads
    channel = tl.arange(0, D)
    rotated = merge_splits(part_ptr, stat_ptr, row, row_mask, channel, channel < D, num_splits, row_heads, D, ROWS, D, AHEAD)
    inverse = tl.load(signs_ptr + channel[None, :] * D + channel[:, None])  # the transpose
    out = times_signs(rotated, inverse, True) / tl.sqrt(D + 0.0)
    kv_head = (row % q_heads) // GROUP
    out += tl.load(v_mean_ptr + kv_head[:, None] * D + channel[None, :])
    tl.store(out_ptr + row[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


@functools.cache
def ordered_signs(head_dim: int, bits: int, device: torch.device) -> torch.Tensor:
    """`hadamard_signs` with its columns in the order in which codes come apart: the first code of every byte, then the second, ...

    Neighbours in that order come from neighbouring bytes, so no two halves of a register have to be exchanged. Only queries and outputs know.
    """
    per_byte = 2 if bits == 4 else 4
    order = torch.arange(head_dim).view(-1, per_byte).t().flatten()
    return hadamard_signs(head_dim, device)[:, order.to(device)].contiguous()


def level_assembly(bits: int) -> str:
    """PTX that turns four bytes (and for 3 bits the four bytes with their upper bits) into the levels they hold, two at a time.

    Output m of a byte is its m-th code's level, so the bytes may be any four. Two bytes are spread over a word's halves; a code c becomes the
    bfloat16 128 + 2c by writing it into a mantissa, u = 2c - (2^bits - 1) by one subtraction (exact), and the level is u (a + b u^2) with the
    roundings of `reference.levels`.
    """
    codes, width = (2, 4) if bits == 4 else (4, 2)
    low, high = f"${2 * codes}", f"${2 * codes + 1}"

    def twice(value: float) -> str:
        bits16 = int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
        return f"0x{bits16:04X}{bits16:04X}"

    def moved(source: str, by: int) -> str:
        return f"shl.b32 t, {source}, {by};" if by >= 0 else f"shr.b32 t, {source}, {-by};"

    a, b = LEVEL_COEFFICIENTS[bits]
    mask = ((1 << width) - 1) << 1
    lines = ["{ .reg .b32 t, u, s, x, y, one, low, nil, ca, cb;", f"mov.b32 one, {twice(1.0)};", f"mov.b32 low, {twice(-(127.0 + 2**bits))};"]
    lines += ["mov.b32 nil, 0x80008000;", f"mov.b32 ca, {twice(a)};", f"mov.b32 cb, {twice(b)};"]
    for half, spread in enumerate(("0x4140", "0x4342")):
        lines.append(f"prmt.b32 x, {low}, 0, {spread};")
        if bits == 3:
            lines.append(f"prmt.b32 y, {high}, 0, {spread};")
        for code in range(codes):
            lines.append(moved("x", 1 - width * code))
            lines.append(f"lop3.b32 u, t, 0x{mask:04X}{mask:04X}, 0x43004300, 0xEA;")
            if bits == 3:
                lines.append(moved("y", 3 - code))
                lines.append("lop3.b32 u, t, 0x00080008, u, 0xEA;")
            lines += ["fma.rn.bf16x2 u, u, one, low;", "fma.rn.bf16x2 s, u, u, nil;", "fma.rn.bf16x2 s, s, cb, ca;"]
            lines.append(f"fma.rn.bf16x2 ${2 * code + half}, u, s, nil;")
    return "\n".join([*lines, "}"])


_angle_tables = WeakTensorKeyDictionary()  # cos table -> (weak reference to its sin table, both side by side)


def angle_table(cos_table: torch.Tensor, sin_table: torch.Tensor) -> torch.Tensor:
    """cos beside sin, float16 [positions + MAX_BLOCK, d]: a block is read whole.

    Made once for a pair of tensors and kept as long as they are, so these must stay as they are.
    """
    kept = _angle_tables.get(cos_table)
    if kept is not None and kept[0]() is sin_table:
        return kept[1]
    both = F.pad(torch.cat([cos_table, sin_table], 1), (0, 0, 0, MAX_BLOCK)).to(torch.float16)
    # What a graph computes while it is captured is not there before its first replay.
    if not (cos_table.is_cuda and torch.cuda.is_current_stream_capturing()):
        _angle_tables[cos_table] = weakref.ref(sin_table), both
    return both


def hot_row_bytes(head_dim: int, bits: int) -> float:
    """Bytes of a key and a value of one head: two rows of codes, two scales. For `paged_attention_floors`."""
    return head_dim * bits / 4 + 4


def hot_paged_attention(
    q: torch.Tensor,
    pages: HotPages,
    means: HotMeans,
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    page_table: torch.Tensor,
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    scale: float,
    *,
    sinks: HotSinks | None = None,
    recent: HotRecent | None = None,
    deterministic: bool = False,
    max_query_len: int | None = None,
    config: AttentionConfig | None = None,
    packed_arithmetic: bool | None = None,
) -> torch.Tensor:
    """See `reference.hot_paged_attention`; floors: `paged_attention_floors` with `hot_row_bytes`.

    The tables must cover the longest context and be the same tensors every time (`angle_table`). max_query_len, config: as for `paged_attention`.
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
    config = config or AttentionConfig(block_m=64 if fast else 0)
    block_n = 64 if deterministic else config.block_n
    # Lengths on the device are not read back; their caller answers for tables that reach far enough.
    if means.k_mean is not None and not isinstance(context_lens, torch.Tensor) and len(cos_table) < lengths.max_context_len:
        raise ValueError(f"tables of {len(cos_table)} positions for a context of {lengths.max_context_len} (make them longer)")
    block_m = 32 if deterministic else config.block_m or max(16, min(triton.next_power_of_2(lengths.max_query_len * group), 64))
    tiles = triton.cdiv(lengths.max_query_len * group, block_m)
    if deterministic:
        split_keys, num_splits = paged.DETERMINISTIC_SPLIT, triton.cdiv(lengths.max_context_len, paged.DETERMINISTIC_SPLIT)
    else:
        split_keys, num_splits = 0, choose_splits(config.num_splits, batch * kv_heads * tiles, lengths.max_context_len, block_n)
    signs = ordered_signs(d, bits, device)
    rotated = torch.empty((num_rows, q_heads, d), dtype=q.dtype, device=device)
    with_mean = means.k_mean is not None
    pair = torch.empty((num_rows, q_heads, d), dtype=torch.float16, device=device) if with_mean else rotated
    size = torch.empty((num_rows, q_heads), dtype=torch.float32, device=device) if with_mean else rotated
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    _prepare_kernel[(triton.cdiv(num_rows * q_heads, 16),)](
        q, means.k_mean if means.k_mean is not None else means.v_mean, signs, rotated, pair, size, scale * LOG2_E,
        num_rows * q_heads, q_heads, q.stride(0), q.stride(1),
        D=d, GROUP=group, MEAN=with_mean, ROWS=16, SPLIT=q.dtype != torch.bfloat16, num_warps=4,
    )  # fmt: skip
    # what is exact comes first: a part's place must not depend on the number of splits
    first_split = (sinks is not None) + (recent is not None)
    num_parts = num_splits + first_split
    part = torch.empty((num_parts, num_rows, q_heads, d), dtype=torch.float32, device=device)
    stat = torch.empty((num_parts, num_rows, q_heads, 2), dtype=torch.float32, device=device)
    if sinks is not None:
        attend_sinks(q, sinks, means.v_mean, signs, lengths, scale * LOG2_E, part[0], stat[0])
    if recent is not None:
        at = first_split - 1
        attend_recent(q, recent, means.v_mean, signs, lengths, scale * LOG2_E, part[at], stat[at], 0 if sinks is None else NUM_SINKS)
    _split_kernel[(kv_heads, num_splits * tiles, batch)](
        rotated, pair, size, pages.k_codes, pages.k_scale, pages.v_codes, pages.v_scale, page_table, lengths.query_lens, lengths.context_lens,
        lengths.context_lens if recent is None else recent.since,
        angle_table(cos_table, sin_table) if with_mean else rotated, levels(bits, device), part[first_split:], stat[first_split:],
        batch, num_rows, num_splits, split_keys, q_heads, kv_heads, page_table.stride(0),
        GROUP=group, PAGE=page_size, D=d, BITS=bits, BLOCK_M=block_m, BLOCK_N=block_n, REQUESTS=triton.next_power_of_2(batch),
        MEAN=with_mean, SINKS=0 if sinks is None else NUM_SINKS, RECENT=0 if recent is None else NUM_RECENT,
        ASM=level_assembly(bits) if fast else "", PRECISION=precision,
        num_warps=4 if deterministic else config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(num_rows * q_heads, 16),)](
        part, stat, signs, means.v_mean, out, num_parts, num_rows * q_heads, q_heads,
        GROUP=group, D=d, ROWS=16, AHEAD=4, num_warps=8,
    )  # fmt: skip
    return out
