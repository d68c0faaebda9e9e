"""Triton kernel of `norm_gate_up`; `reference.py` says what it means. A program takes the same rows of the gate's matrix and of the other."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.skinny_linear.product import (
    admit_next,
    await_previous,
    first_steps,
    halves,
    prefetch_rows,
    skinny_product,
    sum_squares,
)
from kernels.skinny_linear.tiles import Tile, held_steps, next_power_of_2, token_block


@triton.jit(do_not_specialize=["tokens", "parts"])  # one compilation for any number of rows up to the block
def _norm_gate_up_kernel(
    x_ptr,
    squares_ptr,
    w_ptr,
    out_ptr,
    tokens,
    parts,
    eps,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    HELD: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2
    tile = tl.program_id(0)
    admit_next(EARLY)
    near = tl.arange(0, BLOCK_N)
    channel = tile * HALF + near % HALF
    row = near // HALF * INNER + channel
    if LINES:
        prefetch_rows(w_ptr, tl.minimum(row, 2 * INNER - 1), 0, WIDTH, WIDTH, LINES)
    EVEN_ROWS: tl.constexpr = INNER % HALF == 0
    held = first_steps(w_ptr, row, channel < INNER, 0, WIDTH, WIDTH, 1, BLOCK_M, BLOCK_K, SLICES, EVEN_ROWS, HELD)
    await_previous(EARLY)
    squares = sum_squares(squares_ptr, tokens, parts, BLOCK_M, PARTS)
    acc = skinny_product(
        held,
        x_ptr,
        w_ptr,
        row,
        channel < INNER,
        0,
        WIDTH,
        tokens,
        WIDTH,
        1,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SLICES,
        STAGES,
        EVEN_ROWS,
        HELD,
        PRECISION,
    )
    acc *= tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)[None, :]
    dtype = out_ptr.dtype.element_ty
    gate, up = halves(acc.to(dtype).to(tl.float32), HALF, BLOCK_M)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    token = tl.arange(0, BLOCK_M)
    column = tile * HALF + tl.arange(0, HALF)
    mask = (column < INNER)[:, None] & (token < tokens)[None, :]
    tl.store(out_ptr + token[None, :] * INNER + column[:, None], (silu * up).to(dtype), mask=mask)


def norm_gate_up_floors(tokens: int, inner: int, width: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without; inner is I."""
    return (2 * inner * width + tokens * (width + inner)) * element_bytes, 4 * tokens * inner * width


def norm_gate_up(
    scaled: torch.Tensor,
    squares: torch.Tensor,
    parts: int,
    eps: float,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    tile: Tile,
    early: bool = False,
) -> None:
    """See `reference.norm_gate_up`. tile.block_n counts rows of both matrices; splits are not used. early: see `skinny_linear.triton`."""
    tokens, width = scaled.shape
    inner = weight.shape[0] // 2
    tiles = triton.cdiv(inner, tile.block_n // 2)
    _norm_gate_up_kernel[(tiles,)](
        scaled,
        squares,
        weight,
        out,
        tokens,
        parts,
        eps,
        INNER=inner,
        WIDTH=width,
        PARTS=next_power_of_2(parts),
        BLOCK_M=token_block(tokens, tile),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SLICES=tile.slices,
        STAGES=tile.stages,
        LINES=tile.lines if early else 0,
        HELD=held_steps(width, dataclasses.replace(tile, splits=1)),
        EARLY=early,
        PRECISION="ieee" if scaled.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        launch_pdl=early,
    )
