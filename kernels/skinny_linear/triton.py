"""Triton kernel of `linear_residual`; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.skinny_linear.product import (
    admit_next,
    arrive,
    await_previous,
    first_steps,
    prefetch_rows,
    skinny_product,
    split_columns,
)
from kernels.skinny_linear.tiles import Tile, held_steps, token_block


@triton.jit(do_not_specialize=["tokens"])  # one compilation for any number of rows up to the block
def _linear_residual_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    stream_ptr,
    norm_ptr,
    scaled_ptr,
    squares_ptr,
    part_ptr,
    ticket_ptr,
    tokens,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    HELD: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    admit_next(EARLY)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < ROWS
    first, last = split_columns(split, WIDTH, BLOCK_K * SLICES, SPLITS)
    if LINES:
        prefetch_rows(w_ptr, tl.minimum(row, ROWS - 1), first, last, WIDTH, LINES)
    EVEN_ROWS: tl.constexpr = ROWS % BLOCK_N == 0
    held = first_steps(w_ptr, row, row_mask, first, last, WIDTH, SPLITS, BLOCK_M, BLOCK_K, SLICES, EVEN_ROWS, HELD)
    norm = tl.load(norm_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
    token = tl.arange(0, BLOCK_M)
    mask = row_mask[:, None] & (token < tokens)[None, :]
    at = token[None, :] * ROWS + row[:, None]
    await_previous(EARLY)
    # Asked for before the product, so that nothing waits for it after.
    before = tl.load(stream_ptr + at, mask=mask, other=0.0).to(tl.float32)
    acc = skinny_product(
        held,
        x_ptr,
        w_ptr,
        row,
        row_mask,
        first,
        last,
        tokens,
        WIDTH,
        SPLITS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SLICES,
        STAGES,
        EVEN_ROWS,
        HELD,
        PRECISION,
    )
    if SPLITS > 1:
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + token[None, :]
        part_ptr += tile * SPLITS * BLOCK_N * BLOCK_M
        tl.store(part_ptr + split * BLOCK_N * BLOCK_M + within, acc)
        if not arrive(ticket_ptr + tile, SPLITS):
            return
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(part_ptr + other * BLOCK_N * BLOCK_M + within)
    if BIAS:
        acc += bias[:, None]
    dtype = stream_ptr.dtype.element_ty
    # The product is rounded before the sum and the sum after it, as two operations would round them.
    stream = (before + acc.to(dtype).to(tl.float32)).to(dtype)
    tl.store(stream_ptr + at, stream, mask=mask)
    wide = stream.to(tl.float32)
    tl.store(scaled_ptr + at, (wide * norm[:, None]).to(dtype), mask=mask)
    tl.store(squares_ptr + tile * tokens + token, tl.sum(tl.where(mask, wide * wide, 0.0), 0), mask=token < tokens)


def linear_residual_floors(tokens: int, rows: int, width: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    return (rows * width + tokens * (width + 3 * rows) + rows) * element_bytes, 2 * tokens * rows * width


def square_parts(rows: int, tile: Tile) -> int:
    """Partial sums of squares a `linear_residual` with this tile leaves for each token."""
    return triton.cdiv(rows, tile.block_n)


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stream: torch.Tensor,
    norm: torch.Tensor,
    scaled: torch.Tensor,
    squares: torch.Tensor,
    *,
    tile: Tile,
    part: torch.Tensor,
    tickets: torch.Tensor,
    early: bool = False,
) -> int:
    """See `reference.linear_residual`; returns how many rows of `squares` were written.

    part: float32, room for splits * rounded-up rows * token block. tickets: int32, zero, one a tile; left zero.
    early: launched while the kernel before it still runs (programmatic dependent launch).
    """
    tokens, width = x.shape
    rows = weight.shape[0]
    tiles = square_parts(rows, tile)
    _linear_residual_kernel[(tiles, tile.splits)](
        x,
        weight,
        weight if bias is None else bias,
        stream,
        norm,
        scaled,
        squares,
        part,
        tickets,
        tokens,
        ROWS=rows,
        WIDTH=width,
        SPLITS=tile.splits,
        BLOCK_M=token_block(tokens, tile),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SLICES=tile.slices,
        STAGES=tile.stages,
        LINES=tile.lines if early else 0,
        HELD=held_steps(width, tile),
        BIAS=bias is not None,
        EARLY=early,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        launch_pdl=early,
    )
    return tiles
