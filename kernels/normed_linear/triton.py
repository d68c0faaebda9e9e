"""Triton kernel of `normed_linear`; `reference.py` says what it means.

A state's scale is multiplied to its product, not to its elements: these stay in bfloat16 as the model left them, so that nothing is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.normed_linear.reference import SplitWeight

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 128, 64


@triton.jit
def _normed_linear_kernel(
    row_ptr,
    scale_ptr,
    high_ptr,
    low_ptr,
    out_ptr,
    rows,
    states,
    size,
    columns,
    stride_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    safe_row = tl.where(row < rows, row, 0).to(tl.int64)
    inside = (column < columns)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for state in range(0, states):
        a_ptr = row_ptr + safe_row[:, None] * stride_row + (state * size + inner)[None, :]
        where = (state * size + inner)[:, None].to(tl.int64) * columns + column[None, :]
        b_high_ptr, b_low_ptr = high_ptr + where, low_ptr + where
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, size, BLOCK_K):
            if EVEN:
                a = tl.load(a_ptr)
                known = inside
            else:
                a = tl.load(a_ptr, mask=(inner < size - start)[None, :], other=0.0)
                known = inside & (inner < size - start)[:, None]
            high = tl.load(b_high_ptr, mask=known, other=0.0)
            low = tl.load(b_low_ptr, mask=known, other=0.0)
            part = tl.dot(a, high, part)
            part = tl.dot(a, low, part)
            a_ptr += BLOCK_K
            b_high_ptr += BLOCK_K * columns
            b_low_ptr += BLOCK_K * columns
        total += part * tl.load(scale_ptr + safe_row * states + state)[:, None]
    tl.store(out_ptr + safe_row[:, None] * columns + column[None, :], total, mask=(row < rows)[:, None] & inside)


def normed_linear_bounds(tokens: int, states: int, size: int, columns: int) -> tuple[int, int]:
    """(bytes, operations): rows and both halves of the matrix once, two multiply-adds for each of its elements."""
    depth = states * size
    return 2 * tokens * depth + 4 * depth * columns + 4 * tokens * columns, 4 * tokens * depth * columns


def normed_linear(rows: torch.Tensor, weight: SplitWeight, eps: float) -> torch.Tensor:
    """See `reference.normed_linear`; rows in bfloat16."""
    tokens, states, size = rows.shape
    columns = weight.high.shape[1]
    if weight.high.shape != (states * size, columns) or weight.low.shape != weight.high.shape:
        raise ValueError(f"a matrix of {tuple(weight.high.shape)} for {states} states of {size} (pass one row an element)")
    rows = rows.contiguous()
    out = torch.empty(tokens, columns, dtype=torch.float32, device=rows.device)
    if not tokens or not states:
        return out.zero_()
    scale = torch.rsqrt(torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_().div_(size).add_(eps))
    # programs that run at the same time share rows: those of one row of tiles follow one another
    _normed_linear_kernel[(triton.cdiv(columns, _BLOCK_N), triton.cdiv(tokens, _BLOCK_M))](
        rows,
        scale,
        weight.high.contiguous(),
        weight.low.contiguous(),
        out,
        tokens,
        states,
        size,
        columns,
        rows.stride(0),
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        EVEN=size % _BLOCK_K == 0,
        num_warps=8,
        num_stages=3,
    )
    return out
