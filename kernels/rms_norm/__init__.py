"""RMS normalisation fused with the residual addition; `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.cpu_decode.elementwise import norm_rows
from kernels.dispatch import use_triton
from kernels.rms_norm import reference

__all__ = ["rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.rms_norm` (arguments and result there), through Triton or compiled code where these apply."""
    if use_triton(x, weight):
        from kernels.rms_norm.triton import rms_norm as launch

        return launch(x, weight, eps, residual)
    if x.device.type == "cpu" and (found := norm_rows(x, weight, eps, residual)) is not None:
        return found
    return reference.rms_norm(x, weight, eps, residual)
