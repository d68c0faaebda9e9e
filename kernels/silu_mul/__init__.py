"""Gated activation of the feed-forward layer; `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.silu_mul import reference

__all__ = ["silu_mul"]


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference.silu_mul` (arguments and result there), through Triton where it applies."""
    if use_triton(gate_up):
        from kernels.silu_mul.triton import silu_mul as launch

        return launch(gate_up)
    return reference.silu_mul(gate_up)
