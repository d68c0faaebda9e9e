"""Meaning of `silu_mul` in plain PyTorch: the gated activation of a SwiGLU feed-forward layer (Shazeer, 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half of the columns) * second half.

    Args:
        gate_up: [N, 2I], any float dtype.

    Returns:
        [N, I], the same dtype; silu is rounded to that dtype before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
