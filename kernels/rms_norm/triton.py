"""Triton kernel of `rms_norm`; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])  # one compilation for any number of rows
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    num_rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    where = rows[:, None] * width + columns[None, :]
    x = tl.load(x_ptr + where, mask=mask, other=0.0)  # [ROWS, BLOCK]
    if ADD:
        # The sum is rounded to the activation's dtype before it is normalised, as the next layer will read it.
        x = (x.to(tl.float32) + tl.load(residual_ptr + where, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + where, x, mask=mask)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    out = x * inverse[:, None] * weight[None, :]
    tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm_bounds(num_rows: int, width: int, element_bytes: int, with_residual: bool) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    passes = 4 if with_residual else 2
    return (passes * num_rows + 1) * width * element_bytes, (4 + with_residual) * num_rows * width


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.rms_norm`."""
    width = x.shape[-1]
    flat = x.contiguous()
    num_rows = flat.numel() // width if width else 0
    out = torch.empty_like(flat)
    total = torch.empty_like(flat) if residual is not None else x
    if num_rows == 0:
        return out, total
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    added = residual.contiguous() if residual is not None else flat
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        flat,
        added,
        weight,
        out,
        total if residual is not None else out,
        num_rows,
        width,
        eps,
        ROWS=rows,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=4 if block <= 2048 else 8,
    )
    return out, total
