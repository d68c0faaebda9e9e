"""Meaning of `gelu_mul` in plain PyTorch: the gated activation of a GeGLU feed-forward layer (Shazeer, 2020), GELU in its tanh form."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(first half of the columns) * second half, gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    Args:
        gate_up: [N, 2I], any float dtype.

    Returns:
        [N, I], the same dtype; gelu is rounded to that dtype before the product.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
