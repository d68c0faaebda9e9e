"""Rotary position embedding; `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.cpu_decode.elementwise import turn_rows
from kernels.dispatch import use_triton
from kernels.rope import reference

__all__ = ["apply_rope"]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`reference.apply_rope` (arguments and result there), through Triton or compiled code where these apply."""
    if use_triton(x, cos, sin):
        from kernels.rope.triton import apply_rope as launch

        return launch(x, cos, sin)
    if x.device.type == "cpu" and (found := turn_rows(x, cos, sin)) is not None:
        return found
    return reference.apply_rope(x, cos, sin)
