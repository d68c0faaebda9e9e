"""Meaning of `norm_gate_up` in plain PyTorch: the first half of a gated feed-forward layer (Shazeer, 2020) on normalised rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.skinny_linear.reference import inverse_rms


def norm_gate_up(scaled: torch.Tensor, squares: torch.Tensor, parts: int, eps: float, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up of the normalised rows.

    Args:
        scaled: [N, E] residual stream times the norm's weight; squares: [P, N] float32, of which `parts` rows count (see `skinny_linear`).
        eps: of the norm.
        weight: [2I, E], the gate's rows first.
        out: [N, I], written.
    """
    factor = inverse_rms(squares, parts, scaled.shape[1], eps)
    gate, up = (F.linear(scaled.float(), weight.float()) * factor[:, None]).to(scaled.dtype).chunk(2, dim=-1)
    out.copy_(F.silu(gate).mul_(up))
