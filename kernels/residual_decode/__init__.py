"""From the residual's integers to pool pages in one product. `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.residual_decode import reference
from kernels.residual_decode.reference import REST_MULTIPLE, Rest

__all__ = ["REST_MULTIPLE", "Rest", "residual_decode_pages"]


def residual_decode_pages(
    q: torch.Tensor,
    step: torch.Tensor,
    latents: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first_layer: int = 0,
    *,
    rest: Rest | None = None,
) -> None:
    """`reference.residual_decode_pages` (arguments and result there), through Triton where it applies."""
    if use_triton(q, weight, kv) and (rest is None or rest.basis.shape[1] % 32 == 0):
        from kernels.residual_decode import triton

        triton.residual_decode_pages(q, step, latents, weight, mean, kv, slots, cos, sin, first_layer, rest=rest)
    else:
        reference.residual_decode_pages(q, step, latents, weight, mean, kv, slots, cos, sin, first_layer, rest=rest)
