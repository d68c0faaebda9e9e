"""The residual's integers: pool rows, one matrix product, a quantiser. `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.residual_encode import reference
from kernels.residual_encode.reference import ROUNDING, SYMBOL_LIMIT

__all__ = ["gather_kv", "residual_encode"]


def gather_kv(
    kv: torch.Tensor, slots: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mean: torch.Tensor, first_layer: int = 0
) -> torch.Tensor:
    """`reference.gather_kv` (arguments and result there), through Triton where it applies."""
    if use_triton(kv, slots):
        from kernels.residual_encode import triton

        return triton.gather_kv(kv, slots, cos, sin, mean, first_layer)
    return reference.gather_kv(kv, slots, cos, sin, mean, first_layer)


def residual_encode(
    y: torch.Tensor,
    latents: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    inverse_step: torch.Tensor,
    *,
    rounding: float = ROUNDING,
    limit: int = SYMBOL_LIMIT,
) -> torch.Tensor:
    """`reference.residual_encode` (arguments and result there), through Triton where it applies."""
    if use_triton(y, weight):
        from kernels.residual_encode import triton

        return triton.residual_encode(y, latents, weight, bias, inverse_step, rounding=rounding, limit=limit)
    return reference.residual_encode(y, latents, weight, bias, inverse_step, rounding=rounding, limit=limit)
