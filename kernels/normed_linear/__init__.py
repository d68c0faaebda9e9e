"""Products of rms-normalised rows with a float32 matrix. `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.normed_linear import reference
from kernels.normed_linear.reference import SplitWeight, split

__all__ = ["SplitWeight", "normed_linear", "split"]


def normed_linear(rows: torch.Tensor, weight: SplitWeight, eps: float) -> torch.Tensor:
    """`reference.normed_linear` (arguments and result there), through Triton where it applies: to rows in bfloat16."""
    if rows.dtype == torch.bfloat16 and use_triton(rows, weight.high):
        from kernels.normed_linear import triton

        return triton.normed_linear(rows, weight, eps)
    return reference.normed_linear(rows, weight, eps)
