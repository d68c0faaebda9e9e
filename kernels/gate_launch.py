"""Launch of the elementwise kernels that multiply a gate, through its activation, with what it gates."""

from __future__ import annotations

from typing import Any

import torch
import triton


def launch_gate(kernel: Any, gate_up: torch.Tensor, block: int) -> torch.Tensor:
    """[..., I] of gate_up [..., 2 I] from a kernel over (row, block of columns); block: columns a program takes, at most."""
    x = gate_up.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    num_rows = x.numel() // (2 * width) if width else 0
    if num_rows:
        block = min(block, triton.next_power_of_2(width))
        kernel[(num_rows, triton.cdiv(width, block))](x, out, width, BLOCK=block, num_warps=4)
    return out
