"""Entropy-decoded integers to rows of a product's left factor. `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.reconstruct import reference
from kernels.reconstruct.reference import Escapes, Points

__all__ = ["Escapes", "Points", "reconstruct"]


def reconstruct(
    q: torch.Tensor,
    classes: torch.Tensor,
    shifts: torch.Tensor,
    gains: torch.Tensor,
    steps: torch.Tensor,
    points: Points,
    escapes: Escapes,
    places: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """`reference.reconstruct` (arguments and result there), through Triton where it applies."""
    if use_triton(q, out):
        from kernels.reconstruct import triton

        return triton.reconstruct(q, classes, shifts, gains, steps, points, escapes, places, columns, out)
    return reference.reconstruct(q, classes, shifts, gains, steps, points, escapes, places, columns, out)
