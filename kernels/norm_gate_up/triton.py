"""Triton kernel of `norm_gate_up`; `reference.py` says what it means. A program takes the same rows of the gate's matrix and of the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.skinny_linear.product import admit_next, await_previous, halves, inverse_rms, prefetch_rows, skinny_product
from kernels.skinny_linear.tiles import Tile, next_power_of_2, token_block


@triton.jit
def _norm_gate_up_kernel(
    x_ptr, squares_ptr, w_ptr, out_ptr, tokens, parts, eps,
    INNER: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    tile = tl.program_id(0)
    admit_next(EARLY)
    near = tl.arange(0, BLOCK_N)
    channel = tile * HALF + near % HALF
    row = near // HALF * INNER + channel
    if LINES:
        prefetch_rows(w_ptr, tl.minimum(row, 2 * INNER - 1), 0, WIDTH, WIDTH, LINES)
    await_previous(EARLY)
    acc = skinny_product(
        x_ptr, w_ptr, row, channel < INNER, 0, WIDTH, tokens,
        WIDTH, 1, BLOCK_M, BLOCK_N, BLOCK_K, SLICES, STAGES, INNER % HALF == 0, PRECISION,
    )  # fmt: skip
    acc *= inverse_rms(squares_ptr, tokens, parts, eps, WIDTH, BLOCK_M, PARTS)[None, :]
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
    _norm_gate_up_kernel[(triton.cdiv(inner, tile.block_n // 2),)](
        scaled, squares, weight, out, tokens, parts, eps,
        INNER=inner, WIDTH=width, PARTS=next_power_of_2(parts), BLOCK_M=token_block(tokens, tile), BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, SLICES=tile.slices, STAGES=tile.stages, LINES=tile.lines if early else 0, EARLY=early,
        PRECISION="ieee" if scaled.dtype == torch.float32 else "tf32", num_warps=tile.warps, launch_pdl=early,
    )  # fmt: skip
