"""Triton kernels of `hot_paged_attention`; `reference.py` says what it means.

Three launches: `_prepare_kernel` rotates the queries (once a step, not once a key), `_split_kernel` attends over a stretch of the context with
the codes taken apart in registers, `_merge_kernel` joins the stretches, rotates the output back and adds the values' mean.

The keys' mean: with mean (m1, m2) in halves and angle t_i of a key's position, q . R(t) m = sum_i a_i cos t_i + b_i sin t_i with
a = q1 m1 + q2 m2, b = q2 m1 - q1 m2. For keys p0 + j of a block the pair (a, b) is turned by p0 once, and one table of cos and sin of
0 .. BLOCK_N - 1, the same for every block, head and request, serves the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.hot_kv.reference import LEVEL_COEFFICIENTS, HotMeans, HotPages, levels, rotation
from kernels.paged_attention import triton as paged
from kernels.paged_attention.triton import (
    LOG2_E,
    AttentionConfig,
    Lengths,
    choose_splits,
    first_rows,
    load_page,
    merge_splits,
    split_bounds,
)


@triton.jit
def _prepare_kernel(
    q_ptr, k_mean_ptr, rotation_ptr, rotated_ptr, pair_ptr, size_ptr, scale_log2, num_rows, q_heads, stride_row, stride_head,
    D: tl.constexpr, GROUP: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (row, head)
    mask = (index < num_rows)[:, None]
    row, head = (index // q_heads).to(tl.int64), index % q_heads
    HALF: tl.constexpr = D // 2
    channel, half = tl.arange(0, D), tl.arange(0, HALF)
    source = q_ptr + row[:, None] * stride_row + head[:, None] * stride_head
    q = tl.load(source + channel[None, :], mask=mask, other=0.0)
    matrix = tl.load(rotation_ptr + channel[:, None] * D + channel[None, :])
    rotated = tl.dot(q, matrix.to(q.dtype), input_precision=PRECISION) * (scale_log2 / tl.sqrt(D + 0.0))
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
        tl.store(pair_ptr + target + half[None, :], a / size[:, None], mask=mask)
        tl.store(pair_ptr + target + HALF + half[None, :], b / size[:, None], mask=mask)
        tl.store(size_ptr + index, size, mask=index < num_rows)


@triton.jit
def _byte_columns(WIDTH: tl.constexpr, FAST: tl.constexpr, UPPER: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """(byte of a row's low bits, shift) of each column of a plane. FAST: bytes in order, taken apart four at a time by `_planes_fast`."""
    column = tl.arange(0, WIDTH)
    if FAST:
        return column, column * 0
    word, inner = column // 4, column % 4
    place = 2 * PLANE + inner // 2
    if UPPER:
        return 2 * word + inner % 2, place
    FIELDS: tl.constexpr = 4 if BITS == 4 else 8
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 4
    field = place + FIELDS * (inner % 2)
    return 4 * word + field // PER_BYTE, (field % PER_BYTE) * (8 // PER_BYTE)


@triton.jit
def _plane(code_ptr, row, mask, level_ptr, D: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """Levels bfloat16 [BLOCK_N, plane] by table, anywhere."""
    WIDTH: tl.constexpr = D // 2 if BITS == 4 else D // 4
    LOW_MASK: tl.constexpr = 15 if BITS == 4 else 3
    byte, shift = _byte_columns(WIDTH, False, False, BITS, PLANE)
    low = tl.load(code_ptr + row[:, None] + byte[None, :], mask=mask, other=0).to(tl.int32)
    code = (low >> shift[None, :]) & LOW_MASK
    if BITS == 3:
        byte, shift = _byte_columns(WIDTH, False, True, BITS, PLANE)
        high = tl.load(code_ptr + row[:, None] + D // 4 + byte[None, :], mask=mask, other=0).to(tl.int32)
        code |= ((high >> shift[None, :]) & 1) << 2
    return tl.load(level_ptr + code)


@triton.jit
def _planes_fast(code_ptr, row, mask, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Levels bfloat16 of all planes, [BLOCK_N, plane] each, evaluated two at a time in packed arithmetic (sm_90 PTX)."""
    if BITS == 4:
        low = tl.load(code_ptr + row[:, None] + tl.arange(0, D // 2)[None, :], mask=mask, other=0)
        first, second = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [low], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
        return first, second, first, second
    else:
        column = tl.arange(0, D // 4)
        low = tl.load(code_ptr + row[:, None] + column[None, :], mask=mask, other=0)
        if BITS == 3:
            byte = 2 * (column // 4) + (column % 4) // 2
            high = tl.load(code_ptr + row[:, None] + D // 4 + byte[None, :], mask=mask, other=0)
            return tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [low, high],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [low],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip


@triton.jit
def _planes(code_ptr, row, mask, level_ptr, D: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Four planes [BLOCK_N, plane] (at 4 bits the last two repeat the first two and are not used)."""
    if ASM != "":
        return _planes_fast(code_ptr, row, mask, D, BITS, ASM)
    else:
        p0 = _plane(code_ptr, row, mask, level_ptr, D, BITS, 0).to(DTYPE)
        p1 = _plane(code_ptr, row, mask, level_ptr, D, BITS, 1).to(DTYPE)
        if BITS == 4:
            return p0, p1, p0, p1
        else:
            p2 = _plane(code_ptr, row, mask, level_ptr, D, BITS, 2).to(DTYPE)
            p3 = _plane(code_ptr, row, mask, level_ptr, D, BITS, 3).to(DTYPE)
            return p0, p1, p2, p3


@triton.jit
def _split_kernel(
    q_ptr, pair_ptr, size_ptr, k_code_ptr, k_scale_ptr, v_code_ptr, v_scale_ptr, table_ptr, query_lens_ptr, context_lens_ptr,
    cos_ptr, sin_ptr, level_ptr, part_ptr, stat_ptr,
    num_requests, num_rows, num_splits, split_keys, q_heads, kv_heads, stride_table,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REQUESTS: tl.constexpr, MEAN: tl.constexpr, ASM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    split = tl.program_id(1) % num_splits
    tile = tl.program_id(1) // num_splits
    request = tl.program_id(2)
    queries = tl.load(query_lens_ptr + request).to(tl.int32)
    if tile * BLOCK_M >= queries * GROUP:
        return
    context = tl.load(context_lens_ptr + request).to(tl.int32)
    first = first_rows(query_lens_ptr, request, num_requests, REQUESTS).to(tl.int64)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_in_block = packed // GROUP
    row_head = (first + token_in_block) * q_heads + kv_head * GROUP + packed % GROUP
    row_mask = token_in_block < queries
    limit = context - queries + 1 + token_in_block

    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = D // 2 if BITS == 4 else D // 4
    ROW_BYTES: tl.constexpr = D * BITS // 8
    column = tl.arange(0, WIDTH)
    q_row = q_ptr + row_head[:, None] * D + column[None, :]
    q0 = tl.load(q_row, mask=row_mask[:, None], other=0.0)
    q1 = tl.load(q_row + WIDTH, mask=row_mask[:, None], other=0.0)
    if BITS != 4:
        q2 = tl.load(q_row + 2 * WIDTH, mask=row_mask[:, None], other=0.0)
        q3 = tl.load(q_row + 3 * WIDTH, mask=row_mask[:, None], other=0.0)
    if MEAN:
        half = tl.arange(0, HALF)
        near = tl.arange(0, BLOCK_N)
        near_cos = tl.load(cos_ptr + near[None, :] * HALF + half[:, None]).to(tl.float16)  # [HALF, BLOCK_N]
        near_sin = tl.load(sin_ptr + near[None, :] * HALF + half[:, None]).to(tl.float16)
        pair = pair_ptr + row_head[:, None] * D + half[None, :]
        a = tl.load(pair, mask=row_mask[:, None], other=0.0)
        b = tl.load(pair + HALF, mask=row_mask[:, None], other=0.0)
        size = tl.load(size_ptr + row_head, mask=row_mask, other=0.0)
        # Tables of a model whose rotation also scales hold that factor twice in the composed angle; cos 0 is the factor.
        unscale = 1.0 / tl.load(cos_ptr)

    start, end = split_bounds(context, split, num_splits, split_keys, BLOCK_N)
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
    end = tl.minimum(end, context - queries + 1 + last_token)
    acc0 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    acc1 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if BITS != 4:
        acc2 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        acc3 = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table_row_ptr = table_ptr + request.to(tl.int64) * stride_table
    page = load_page(table_row_ptr, start, end, PAGE, BLOCK_N)
    for block in range(start, end, BLOCK_N):
        token = block + tl.arange(0, BLOCK_N)
        inside = token < end
        where = (page * kv_heads + kv_head) * PAGE + token % PAGE  # row of [P, G, S]
        page = load_page(table_row_ptr, block + BLOCK_N, end, PAGE, BLOCK_N)
        k_scale = tl.load(k_scale_ptr + where, mask=inside, other=0.0).to(tl.float32)
        k0, k1, k2, k3 = _planes(k_code_ptr, where * ROW_BYTES, inside[:, None], level_ptr, D, BITS, ASM, q_ptr.dtype.element_ty)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        if BITS != 4:
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
            scores = tl.dot(q3, tl.trans(k3), scores, input_precision=PRECISION)
        scores *= k_scale[None, :]
        if MEAN:
            far_cos = tl.load(cos_ptr + block * HALF + half) * unscale
            far_sin = tl.load(sin_ptr + block * HALF + half) * unscale
            turned_a = (a * far_cos[None, :] + b * far_sin[None, :]).to(tl.float16)
            turned_b = (b * far_cos[None, :] - a * far_sin[None, :]).to(tl.float16)
            mean_scores = tl.dot(turned_a, near_cos)
            mean_scores = tl.dot(turned_b, near_sin, mean_scores)
            scores += mean_scores * size[:, None]
        scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        total = total * shrink + tl.sum(weights, 1)
        v_scale = tl.load(v_scale_ptr + where, mask=inside, other=0.0).to(tl.float32)
        weights = (weights * v_scale[None, :]).to(q_ptr.dtype.element_ty)
        v0, v1, v2, v3 = _planes(v_code_ptr, where * ROW_BYTES, inside[:, None], level_ptr, D, BITS, ASM, q_ptr.dtype.element_ty)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if BITS != 4:
            acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision=PRECISION)
            acc3 = tl.dot(weights, v3, acc3 * shrink[:, None], input_precision=PRECISION)
        highest = new_highest

    part = split.to(tl.int64) * num_rows * q_heads + row_head
    tl.store(stat_ptr + 2 * part, highest, mask=row_mask)
    tl.store(stat_ptr + 2 * part + 1, total, mask=row_mask)
    mask = (row_mask & (total > 0))[:, None]
    to = part_ptr + part[:, None] * D + column[None, :]
    tl.store(to, acc0, mask=mask)
    tl.store(to + WIDTH, acc1, mask=mask)
    if BITS != 4:
        tl.store(to + 2 * WIDTH, acc2, mask=mask)
        tl.store(to + 3 * WIDTH, acc3, mask=mask)


@triton.jit
def _merge_kernel(
    part_ptr, stat_ptr, rotation_ptr, v_mean_ptr, out_ptr, num_splits, row_heads, q_heads,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < row_heads
    channel = tl.arange(0, D)
    rotated = merge_splits(part_ptr, stat_ptr, row, row_mask, channel, channel < D, num_splits, row_heads, D, ROWS, D)
    inverse = tl.load(rotation_ptr + channel[None, :] * D + channel[:, None])  # the transpose
    out = tl.dot(rotated, inverse, input_precision=PRECISION)
    kv_head = (row % q_heads) // GROUP
    out += tl.load(v_mean_ptr + kv_head[:, None] * D + channel[None, :])
    tl.store(out_ptr + row[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


def level_assembly(bits: int) -> str:
    """PTX that turns the four bytes of a word ($n, and for 3 bits the upper bits in the operand after it) into levels, two at a time.

    A code c becomes the bfloat16 128 + 2c by writing it into a mantissa, u = 2c - (2^bits - 1) by one subtraction (exact), and the level
    is u (a + b u^2), with the roundings of `reference.levels`.
    """
    pairs = 4 if bits == 4 else 8
    width = 4 if bits == 4 else 2

    def twice(value: float) -> str:
        bits16 = int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
        return f"0x{bits16:04X}{bits16:04X}"

    def moved(source: str, by: int) -> str:
        return f"shl.b32 t, {source}, {by};" if by >= 0 else f"shr.b32 t, {source}, {-by};"

    a, b = LEVEL_COEFFICIENTS[bits]
    mask = ((1 << width) - 1) << 1
    lines = ["{ .reg .b32 t, u, s, one, low, nil, ca, cb;", f"mov.b32 one, {twice(1.0)};", f"mov.b32 low, {twice(-(127.0 + 2**bits))};"]
    lines += ["mov.b32 nil, 0x80008000;", f"mov.b32 ca, {twice(a)};", f"mov.b32 cb, {twice(b)};"]
    for pair in range(pairs):
        lines.append(moved(f"${pairs}", 1 - width * pair))
        lines.append(f"lop3.b32 u, t, 0x{mask:04X}{mask:04X}, 0x43004300, 0xEA;")
        if bits == 3:
            lines.append(moved(f"${pairs + 1}", 3 - pair))
            lines.append("lop3.b32 u, t, 0x00080008, u, 0xEA;")
        lines += ["fma.rn.bf16x2 u, u, one, low;", "fma.rn.bf16x2 s, u, u, nil;", "fma.rn.bf16x2 s, s, cb, ca;"]
        lines.append(f"fma.rn.bf16x2 ${pair}, u, s, nil;")
    return "\n".join([*lines, "}"])


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
    deterministic: bool = False,
    max_query_len: int | None = None,
    config: AttentionConfig | None = None,
    packed_arithmetic: bool | None = None,
) -> torch.Tensor:
    """See `reference.hot_paged_attention`; floors: `paged_attention_floors` with `hot_row_bytes`.

    The tables must cover the longest context rounded up to a block. max_query_len, config: as for `paged_attention`.
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
    config = config or AttentionConfig(block_n=64)
    block_n = 64 if deterministic else config.block_n
    if means.k_mean is not None and len(cos_table) < triton.cdiv(lengths.max_context_len, block_n) * block_n - block_n + 1:
        raise ValueError(f"tables of {len(cos_table)} positions for a context of {lengths.max_context_len} (make them longer)")
    if means.k_mean is not None and len(cos_table) < block_n:
        raise ValueError(f"tables of {len(cos_table)} positions are shorter than a block of {block_n} (make them longer)")
    block_m = 32 if deterministic else max(16, min(triton.next_power_of_2(lengths.max_query_len * group), 64))
    tiles = triton.cdiv(lengths.max_query_len * group, block_m)
    if deterministic:
        split_keys, num_splits = paged.DETERMINISTIC_SPLIT, triton.cdiv(lengths.max_context_len, paged.DETERMINISTIC_SPLIT)
    else:
        split_keys, num_splits = 0, choose_splits(config.num_splits, batch * kv_heads * tiles, lengths.max_context_len, block_n)
    matrix = rotation(d, device)
    rotated = torch.empty((num_rows, q_heads, d), dtype=q.dtype, device=device)
    with_mean = means.k_mean is not None
    pair = torch.empty((num_rows, q_heads, d), dtype=torch.float32, device=device) if with_mean else rotated
    size = torch.empty((num_rows, q_heads), dtype=torch.float32, device=device) if with_mean else rotated
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    # The matrix's signs alone are exact in 16 bits; its factor d^-1/2 is applied to the product.
    _prepare_kernel[(triton.cdiv(num_rows * q_heads, 16),)](
        q, means.k_mean if means.k_mean is not None else means.v_mean, matrix.sign(), rotated, pair, size, scale * LOG2_E,
        num_rows * q_heads, q_heads, q.stride(0), q.stride(1),
        D=d, GROUP=group, MEAN=with_mean, ROWS=16, PRECISION=precision, num_warps=4,
    )  # fmt: skip
    part = torch.empty((num_splits, num_rows, q_heads, d), dtype=torch.float32, device=device)
    stat = torch.empty((num_splits, num_rows, q_heads, 2), dtype=torch.float32, device=device)
    fast = q.is_cuda and q.dtype == torch.bfloat16 if packed_arithmetic is None else packed_arithmetic
    _split_kernel[(kv_heads, num_splits * tiles, batch)](
        rotated, pair, size, pages.k_codes, pages.k_scale, pages.v_codes, pages.v_scale, page_table, lengths.query_lens, lengths.context_lens,
        cos_table, sin_table, levels(bits, device), part, stat,
        batch, num_rows, num_splits, split_keys, q_heads, kv_heads, page_table.stride(0),
        GROUP=group, PAGE=page_size, D=d, BITS=bits, BLOCK_M=block_m, BLOCK_N=block_n, REQUESTS=triton.next_power_of_2(batch),
        MEAN=with_mean, ASM=level_assembly(bits) if fast else "", PRECISION=precision,
        num_warps=4 if deterministic else config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(num_rows * q_heads, 16),)](
        part, stat, matrix, means.v_mean, out, num_splits, num_rows * q_heads, q_heads,
        GROUP=group, D=d, ROWS=16, PRECISION=precision, num_warps=4,
    )  # fmt: skip
    return out
