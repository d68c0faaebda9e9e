"""Triton kernels of `residual_decode_pages`; `reference.py` says what it means.

A first pass writes the product's left factor, [q step, latents] in rows: inside the product every tile of columns would turn the same integers
into numbers again and would read them two bytes at a time, which took more instructions than the product itself.
One program then holds the first and the second halves of the same heads' channels in two accumulators, so that a key is rotated in registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.residual_decode.reference import REST_MULTIPLE, Rest

DEPTH_MULTIPLE = 128  # the left factor's rows are filled up with zeros to a multiple of this, so that no tile of them needs a mask
ALIGNED = tl.constexpr(REST_MULTIPLE)


@dataclass(frozen=True)
class ProductConfig:
    """Tile of a matrix product (rows, columns, depth of a step), row tiles a band holds, warps, pipeline stages."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3


def default_product(x: torch.Tensor) -> ProductConfig:
    """A tile that fits the shared memory: float32 rows take twice the room and do without the matrix units."""
    if x.dtype == torch.float32:
        return ProductConfig(64, 64, 32, 8, 4, 2)
    room = getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 0) if x.is_cuda else 0
    return ProductConfig() if room >= 3 * (128 + 256) * 64 * 2 else ProductConfig(block_n=128, num_stages=2)


@triton.jit
def grouped_tile(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile (row, column) of a program, in bands of GROUP row tiles so that the programs running at once share rows and columns in L2."""
    band = index // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    inside = index % (GROUP * column_tiles)
    return band * GROUP + inside % height, inside // height


@triton.jit
def _inputs_kernel(
    q_ptr,
    step_ptr,
    latent_ptr,
    out_ptr,
    rows,
    components,
    latent_depth,
    width,
    stride_q_row,
    stride_q_column,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LATENTS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask = (row < rows)[:, None]
    wide_row, wide_column = row[:, None].to(tl.int64), column[None, :].to(tl.int64)
    step = tl.load(step_ptr + row, mask=row < rows, other=0.0)
    q = tl.load(q_ptr + wide_row * stride_q_row + wide_column * stride_q_column, mask=row_mask & (column < components)[None, :], other=0)
    x = q.to(tl.float32) * step[:, None]
    if LATENTS:
        own = (column >= components) & (column < components + latent_depth)
        x += tl.load(latent_ptr + wide_row * latent_depth + wide_column - components, mask=row_mask & own[None, :], other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + wide_row * width + wide_column, x.to(out_ptr.dtype.element_ty), mask=row_mask & (column < width)[None, :])


@triton.jit
def _decode_kernel(
    x_ptr,
    weight_ptr,
    mean_ptr,
    out_ptr,
    slot_ptr,
    cos_ptr,
    sin_ptr,
    rest_ptr,
    basis_ptr,
    rest_start_ptr,
    rows,
    depth,
    width,
    columns,
    heads,
    stride_kind,
    stride_rest,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    EVEN: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Columns are counted in pairs (channel i, channel i + d/2) of one head: BLOCK_H pairs a program.
    pairs = columns // 2
    row_tile, pair_tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(pairs, BLOCK_H), GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = pair_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    inner = tl.arange(0, BLOCK_K)
    safe_row = tl.where(row < rows, row, 0).to(tl.int64)
    pair_mask = (pair < pairs)[None, :]
    block, channel = pair // HALF, pair % HALF
    column = block * 2 * HALF + channel
    a_ptr = x_ptr + safe_row[:, None] * width + inner[None, :]
    b_ptr = weight_ptr + inner[:, None].to(tl.int64) * columns + column[None, :]
    first = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in range(0, depth, BLOCK_K):
        a = tl.load(a_ptr)
        if EVEN:
            b_mask = pair_mask
        else:
            b_mask = (inner[:, None] < depth - start) & pair_mask
        b_first = tl.load(b_ptr, mask=b_mask, other=0.0)
        b_second = tl.load(b_ptr + HALF, mask=b_mask, other=0.0)
        first = tl.dot(a, b_first, first, input_precision=PRECISION)
        second = tl.dot(a, b_second, second, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * columns
    if REST:
        # All of a program's columns are one layer's.
        layer = pair_tile * BLOCK_H // (heads * HALF * 2)
        begin, end = tl.multiple_of(tl.load(rest_start_ptr + layer), ALIGNED), tl.load(rest_start_ptr + layer + 1)
        layer_width = 4 * heads * HALF
        a_ptr = rest_ptr + safe_row[:, None] * stride_rest + (begin + inner)[None, :]
        b_ptr = basis_ptr + (begin + inner)[:, None].to(tl.int64) * layer_width + (column - layer * layer_width)[None, :]
        for _ in range(begin, end, BLOCK_K):
            a = tl.load(a_ptr)
            b_first = tl.load(b_ptr)
            b_second = tl.load(b_ptr + HALF)
            first = tl.dot(a, b_first, first, input_precision=PRECISION)
            second = tl.dot(a, b_second, second, input_precision=PRECISION)
            a_ptr += BLOCK_K
            b_ptr += BLOCK_K * layer_width
    mask = (row < rows)[:, None] & pair_mask
    first += tl.load(mean_ptr + column, mask=pair < pairs, other=0.0)[None, :]
    second += tl.load(mean_ptr + column + HALF, mask=pair < pairs, other=0.0)[None, :]
    plane, head = block // heads, block % heads
    is_key = (plane % 2) == 0
    angle = safe_row[:, None] * HALF + channel[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask & is_key[None, :], other=1.0)
    sin = tl.load(sin_ptr + angle, mask=mask & is_key[None, :], other=0.0)
    turned = first * cos - second * sin
    second = second * cos + first * sin
    first = turned
    slot = tl.load(slot_ptr + safe_row)
    # The planes (layer, K|V) of a contiguous pool lie stride_kind apart.
    where = plane.to(tl.int64) * stride_kind + head * 2 * HALF + channel
    to = out_ptr + slot[:, None] * (heads * 2 * HALF) + where[None, :]
    tl.store(to, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(to + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)


def residual_decode_bounds(num_tokens: int, depth: int, dim: int, element_bytes: int, symbol_bytes: int = 2) -> tuple[int, int]:
    """(bytes, operations); depth = K + r, dim = D."""
    return depth * dim * element_bytes + num_tokens * (depth * symbol_bytes + dim * element_bytes), 2 * num_tokens * depth * dim


def _launch(q, step, latents, weight, mean, kv, slots, cos, sin, config, rest):
    rows, components = q.shape
    columns = weight.shape[1]
    latent_depth = latents.shape[1] if latents is not None else 0
    depth = components + latent_depth
    if weight.shape[0] != depth:
        raise ValueError(f"weight has {weight.shape[0]} rows for {components} + {latent_depth} inputs (stack [U^T S^-1] over [A])")
    if mean.shape != (columns,):
        raise ValueError(f"mean of shape {tuple(mean.shape)} for rows of {columns} (pass one row)")
    config = config or default_product(weight)
    width = triton.cdiv(depth, DEPTH_MULTIPLE) * DEPTH_MULTIPLE
    x = torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
    _inputs_kernel[(triton.cdiv(rows, 64), width // 64)](
        q,
        step,
        latents.contiguous() if latents is not None else x,
        x,
        rows,
        components,
        latent_depth,
        width,
        q.stride(0),
        q.stride(1),
        BLOCK_M=64,
        BLOCK_K=64,
        LATENTS=latents is not None,
        num_warps=4,
    )
    heads, head_dim = kv.shape[-2:]
    block_h = config.block_n // 2
    if rest is not None:
        block_h = math.gcd(block_h, heads * head_dim)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(columns // 2, block_h),)
    _decode_kernel[grid](
        x,
        weight.contiguous(),
        mean.contiguous(),
        kv,
        slots,
        cos,
        sin,
        x if rest is None else rest.rows,
        weight if rest is None else rest.basis,
        slots if rest is None else rest.starts,
        rows,
        depth,
        width,
        columns,
        heads,
        kv.stride(1),
        0 if rest is None else rest.rows.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_H=block_h,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        HALF=head_dim // 2,
        EVEN=depth % config.block_k == 0,
        REST=rest is not None,
        PRECISION="tf32x3" if weight.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def residual_decode_pages(
    q: torch.Tensor,
    step: torch.Tensor,
    latents: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first_layer: int = 0,
    *,
    rest: Rest | None = None,
    config: ProductConfig | None = None,
) -> None:
    """See `reference.residual_decode_pages`; q may be laid out either way."""
    heads, head_dim = kv.shape[-2:]
    if not kv.is_contiguous():
        raise ValueError("residual_decode_pages needs a contiguous pool (pass the pool itself)")
    if weight.shape[1] != (kv.shape[0] - first_layer) * 2 * heads * head_dim:
        raise ValueError(f"weight has {weight.shape[1]} columns, the pool's coded layers another number (check first_layer)")
    if rest is not None:
        fits = len(rest.starts) == kv.shape[0] - first_layer + 1 and rest.basis.shape == (rest.rows.shape[1], 2 * heads * head_dim)
        if not fits or heads * head_dim % 16 or not rest.basis.is_contiguous() or rest.rows.stride(1) != 1:
            raise ValueError(
                f"what is added to {kv.shape[0] - first_layer} layers of {heads} heads of {head_dim} does not fit them (see Rest)"
            )
    if q.shape[0]:
        _launch(q, step, latents, weight, mean, kv[first_layer:], slots, cos.contiguous(), sin.contiguous(), config, rest)
