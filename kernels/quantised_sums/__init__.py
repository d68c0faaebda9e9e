"""What a quantiser saves of tokens' energy, and what its integers take. `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.quantised_sums import reference

__all__ = ["code_bits", "saved_energy"]


def saved_energy(sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float) -> torch.Tensor:
    """`reference.saved_energy` (arguments and result there), through Triton where it applies."""
    if use_triton(sizes):
        from kernels.quantised_sums import triton

        return triton.saved_energy(sizes, inverse_steps, counts, rounding)
    return reference.saved_energy(sizes, inverse_steps, counts, rounding)


def code_bits(sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float) -> torch.Tensor:
    """`reference.code_bits` (arguments and result there), through Triton where it applies."""
    if use_triton(sizes):
        from kernels.quantised_sums import triton

        return triton.code_bits(sizes, inverse_steps, counts, rounding)
    return reference.code_bits(sizes, inverse_steps, counts, rounding)
