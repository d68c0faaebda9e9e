"""Triton kernel of `grouped_linear`; `reference.py` says what it means.

No size is read back from the device: as many tiles of rows are launched as there can be at most, and each finds its group by counting the tiles of
the groups before. Tiles have one shape and sum in one order, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    size_ptr,
    out_ptr,
    num_groups,
    inputs,
    outputs,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    sizes = tl.load(size_ptr + groups, mask=groups < num_groups, other=0).to(tl.int32)
    tiles = (sizes + BLOCK_M - 1) // BLOCK_M
    done = tl.cumsum(tiles, 0)  # tiles up to the end of each group
    if tile >= tl.max(done, 0):
        return
    group = tl.sum((done <= tile).to(tl.int32), 0)
    before = groups < group
    row = tl.sum(tl.where(before, sizes, 0), 0) + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.sum(tl.where(groups <= group, sizes, 0), 0)
    column, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_ptr += row.to(tl.int64)[:, None] * inputs + k[None, :]
    weight_ptr += group.to(tl.int64) * inputs * outputs + column.to(tl.int64)[None, :] * inputs + k[:, None]
    row_mask, column_mask = (row < end)[:, None], (column < outputs)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, inputs, BLOCK_K):
        inside = at + k < inputs
        x = tl.load(x_ptr + at, mask=row_mask & inside[None, :], other=0.0)
        weight = tl.load(weight_ptr + at, mask=column_mask & inside[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    out = out_ptr + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask & column_mask)


def grouped_linear_bounds(num_rows: int, groups_hit: int, inputs: int, outputs: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without: the matrices of groups with rows read once, rows in and out."""
    return (groups_hit * inputs * outputs + num_rows * (inputs + outputs)) * element_bytes, 2 * num_rows * inputs * outputs


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """See `reference.grouped_linear`."""
    x, weights = x.contiguous(), weights.contiguous()
    (num_rows, inputs), (groups, outputs) = x.shape, weights.shape[:2]
    out = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    block_m, block_n, block_k = 16, 64, 64
    tiles = min(num_rows, groups) + num_rows // block_m  # every group's last tile may be a part of one
    _grouped_linear_kernel[(tiles, triton.cdiv(outputs, block_n))](
        x,
        weights,
        sizes,
        out,
        groups,
        inputs,
        outputs,
        GROUPS=triton.next_power_of_2(groups),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
    )
    return out
