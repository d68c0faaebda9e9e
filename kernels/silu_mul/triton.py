"""Triton kernel of `silu_mul`; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gate_launch import launch_gate


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x_ptr + row * 2 * width + columns, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * 2 * width + width + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * width + columns, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=mask)


def silu_mul_bounds(num_rows: int, width: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without; width is I."""
    return 3 * num_rows * width * element_bytes, 5 * num_rows * width


def silu_mul(gate_up: torch.Tensor, *, block: int = 1024) -> torch.Tensor:
    """See `reference.silu_mul`. block: columns a program takes."""
    return launch_gate(_silu_mul_kernel, gate_up, block)
