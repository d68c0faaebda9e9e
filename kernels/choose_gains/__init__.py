"""Each token's gain symbol with the shortest code. `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.choose_gains import reference
from kernels.choose_gains.reference import Prices
from kernels.dispatch import use_triton

__all__ = ["Prices", "choose_gains"]


def choose_gains(q: torch.Tensor, classes: torch.Tensor, shifts: torch.Tensor, prices: Prices) -> torch.Tensor:
    """`reference.choose_gains` (arguments and result there), through Triton where it applies."""
    if use_triton(q):
        from kernels.choose_gains import triton

        return triton.choose_gains(q, classes, shifts, prices)
    return reference.choose_gains(q, classes, shifts, prices)
