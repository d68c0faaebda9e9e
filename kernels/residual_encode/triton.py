"""Triton kernels of `gather_kv` and `residual_encode`; `reference.py` says what they mean.

Reading the pool is a pass of its own: inside the product every column block would turn the same keys back again, which costs the
matrix units more than writing and re-reading the rows once costs the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_kernel(
    kv_ptr,
    slot_ptr,
    cos_ptr,
    sin_ptr,
    mean_ptr,
    out_ptr,
    num_tokens,
    dim,
    heads,
    half,
    stride_layer,
    stride_kind,
    first_layer,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    plane = tl.program_id(1)  # (coded layer, K|V)
    is_key = plane % 2 == 0
    token_mask = token < num_tokens
    slot = tl.load(slot_ptr + token, mask=token_mask, other=0)
    column = tl.arange(0, HEADS * HALF)  # (head, channel of the first half)
    head, channel = column // HALF, column % HALF
    inside = (head < heads) & (channel < half)
    mask = token_mask[:, None] & inside[None, :]
    within = head * 2 * half + channel
    width = heads * 2 * half
    base = kv_ptr + (plane // 2 + first_layer).to(tl.int64) * stride_layer + (plane % 2) * stride_kind
    source = base + slot[:, None] * width + within[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    angle = token[:, None] * half + channel[None, :]
    turn = tl.where(is_key, num_tokens, 0)  # values are not turned: their angles are not even read
    angle_mask = mask & (token < turn)[:, None]
    cos = tl.load(cos_ptr + angle, mask=angle_mask, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=angle_mask, other=0.0)
    target = plane * width + within
    mean_first = tl.load(mean_ptr + target, mask=inside, other=0.0)[None, :]
    mean_second = tl.load(mean_ptr + target + half, mask=inside, other=0.0)[None, :]
    to = out_ptr + token[:, None].to(tl.int64) * dim + target[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(to, (first * cos + second * sin - mean_first).to(dtype), mask=mask)
    tl.store(to + half, (second * cos - first * sin - mean_second).to(dtype), mask=mask)


@triton.jit
def grouped_tile(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile (row, column) of a program, in bands of GROUP row tiles so that the programs running at once share rows and columns in L2."""
    band = index // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - band * GROUP, GROUP)
    inside = index % (GROUP * column_tiles)
    return band * GROUP + inside % height, inside // height


@triton.jit
def _encode_kernel(
    y_ptr,
    latent_ptr,
    weight_ptr,
    bias_ptr,
    inverse_step_ptr,
    out_ptr,
    rows,
    depth,
    latent_depth,
    columns,
    load_columns,
    stride_weight,
    stride_out_row,
    stride_out_column,
    rounding,
    limit,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    LATENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, column_tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows past the edge read the first one again instead of a mask: what they give is never stored.
    safe_row = tl.where(row < rows, row, 0).to(tl.int64)
    column_mask = (column < load_columns)[None, :]
    a_ptr = y_ptr + safe_row[:, None] * depth + inner[None, :]
    b_ptr = weight_ptr + inner[:, None].to(tl.int64) * stride_weight + column[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN:
            a, b = tl.load(a_ptr), tl.load(b_ptr, mask=column_mask, other=0.0)
        else:
            left = depth - start
            a = tl.load(a_ptr, mask=inner[None, :] < left, other=0.0)
            b = tl.load(b_ptr, mask=(inner[:, None] < left) & column_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * stride_weight
    if LATENTS:
        a_ptr = latent_ptr + safe_row[:, None] * latent_depth + inner[None, :]
        b_ptr = weight_ptr + (depth + inner[:, None]).to(tl.int64) * stride_weight + column[None, :]
        for start in range(0, latent_depth, BLOCK_K):
            left = latent_depth - start
            a = tl.load(a_ptr, mask=inner[None, :] < left, other=0.0)
            b = tl.load(b_ptr, mask=(inner[:, None] < left) & column_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_ptr += BLOCK_K
            b_ptr += BLOCK_K * stride_weight
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0)
    inverse_step = tl.load(inverse_step_ptr + safe_row)
    scaled = (acc + bias[None, :]) * inverse_step[:, None]
    magnitude = tl.minimum(tl.floor(tl.abs(scaled) + rounding), limit)
    q = tl.where(scaled < 0, -magnitude, magnitude).to(tl.int16)
    to = out_ptr + row[:, None].to(tl.int64) * stride_out_row + column[None, :].to(tl.int64) * stride_out_column
    tl.store(to, q, mask=(row < rows)[:, None] & (column < columns)[None, :])


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


def gather_kv_bounds(num_tokens: int, dim: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    return 2 * num_tokens * dim * element_bytes + 4 * dim, 4 * num_tokens * dim


def residual_encode_bounds(num_tokens: int, depth: int, num_components: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations); depth = D + r."""
    moved = (num_tokens + num_components) * depth * element_bytes + 2 * num_tokens * num_components
    return moved, 2 * num_tokens * depth * num_components


def padded_columns(weight: torch.Tensor, multiple: int = 64) -> torch.Tensor:
    """The same matrix [*, K] as a view of one whose rows are a multiple of `multiple` long, so that 16-byte loads stay aligned."""
    width = triton.cdiv(weight.shape[1], multiple) * multiple
    return torch.nn.functional.pad(weight, (0, width - weight.shape[1]))[:, : weight.shape[1]]


def gather_kv(
    kv: torch.Tensor, slots: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mean: torch.Tensor, first_layer: int = 0, *, rows: int = 8
) -> torch.Tensor:
    """See `reference.gather_kv`. rows: tokens a program reads."""
    layers, _, _, _, heads, head_dim = kv.shape
    if kv[0, 0].is_contiguous() is False:
        raise ValueError("gather_kv needs contiguous pages (pass the pool, not a permuted view)")
    planes, tokens = 2 * (layers - first_layer), len(slots)
    dim = planes * heads * head_dim
    out = torch.empty((tokens, dim), dtype=kv.dtype, device=kv.device)
    if out.numel():
        _gather_kernel[(triton.cdiv(tokens, rows), planes)](
            kv,
            slots,
            cos.contiguous(),
            sin.contiguous(),
            mean,
            out,
            tokens,
            dim,
            heads,
            head_dim // 2,
            kv.stride(0),
            kv.stride(1),
            first_layer,
            ROWS=rows,
            HEADS=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(head_dim // 2),
            num_warps=4,
        )
    return out


def residual_encode(
    y: torch.Tensor,
    latents: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    inverse_step: torch.Tensor,
    *,
    rounding: float = 0.42,
    limit: int = 32767,
    component_major: bool = False,
    config: ProductConfig | None = None,
) -> torch.Tensor:
    """See `reference.residual_encode`.

    component_major: lay the result [T, K] out with tokens adjacent, as `rans_encode` reads it fastest.
    weight: rows should start 16 bytes apart or multiples of that (`padded_columns`): a row of odd length is read two values at a time.
    """
    rows, depth = y.shape
    columns = weight.shape[1]
    latent_depth = latents.shape[1] if latents is not None else 0
    if weight.shape[0] != depth + latent_depth:
        raise ValueError(f"weight has {weight.shape[0]} rows for {depth} + {latent_depth} inputs (stack [S U] over [-A S U])")
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    # Padding behind the rows may be read (its products are dropped): then the bound on columns is a round number and loads stay wide.
    readable = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    load_columns = weight.stride(0) if readable >= weight.shape[0] * weight.stride(0) else columns
    config = config or default_product(y)
    if component_major:
        out = torch.empty((columns, rows), dtype=torch.int16, device=y.device).t()
    else:
        out = torch.empty((rows, columns), dtype=torch.int16, device=y.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)
    _encode_kernel[grid](
        y.contiguous(),
        latents.contiguous() if latents is not None else y,
        weight,
        bias,
        inverse_step,
        out,
        rows,
        depth,
        latent_depth,
        columns,
        load_columns,
        weight.stride(0),
        out.stride(0),
        out.stride(1),
        rounding,
        float(limit),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        EVEN=depth % config.block_k == 0,
        LATENTS=latents is not None,
        PRECISION="tf32x3" if y.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
