"""Products of rows sorted by expert with each expert's own matrix; `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.grouped_linear import reference

__all__ = ["grouped_linear"]


def grouped_linear(x: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """`reference.grouped_linear` (arguments and result there), through Triton where it applies."""
    if use_triton(x, weights):
        from kernels.grouped_linear.triton import grouped_linear as launch

        return launch(x, weights, sizes)
    return reference.grouped_linear(x, weights, sizes)
