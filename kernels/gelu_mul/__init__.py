"""Gated activation of a GeGLU feed-forward layer; `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.gelu_mul import reference

__all__ = ["gelu_mul"]


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`reference.gelu_mul` (arguments and result there), through Triton where it applies."""
    if use_triton(gate_up):
        from kernels.gelu_mul.triton import gelu_mul as launch

        return launch(gate_up)
    return reference.gelu_mul(gate_up)
