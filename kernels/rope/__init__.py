"""Rotary position embedding; `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.rope import reference

__all__ = ["apply_rope"]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`reference.apply_rope` (arguments and result there), through Triton where it applies."""
    if use_triton(x, cos, sin):
        from kernels.rope.triton import apply_rope as launch

        return launch(x, cos, sin)
    return reference.apply_rope(x, cos, sin)
