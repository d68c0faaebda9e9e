"""Draws that a draft and its target share: exponential races with counter-based noise."""

from __future__ import annotations

from torch import Tensor

from kernels.dispatch import use_triton
from kernels.race import reference

__all__ = ["race"]


def race(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one index per row of probs [n, V] float32, a pure function of the row, its seed and its position: see `reference.race`."""
    if use_triton(probs, seeds, positions):
        from kernels.race.triton import race as launch

        return launch(probs, seeds, positions)
    return reference.race(probs, seeds, positions)
