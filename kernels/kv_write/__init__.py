"""Rotation of new keys and the write of new keys and values into their pages; `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.kv_write import reference

__all__ = ["kv_write"]


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> None:
    """`reference.kv_write` (arguments and result there), through Triton where it applies."""
    if use_triton(k, k_pages):
        from kernels.kv_write.triton import kv_write as launch

        launch(k, v, cos, sin, slots, k_pages, v_pages)
    else:
        reference.kv_write(k, v, cos, sin, slots, k_pages, v_pages)
