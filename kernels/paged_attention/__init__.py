"""Causal attention over a paged KV cache; `reference.py` says what it means."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.dispatch import use_triton
from kernels.paged_attention import reference

__all__ = ["paged_attention"]


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    scale: float,
    *,
    deterministic: bool = False,
) -> torch.Tensor:
    """`reference.paged_attention` (arguments and result there), through Triton where it applies."""
    if use_triton(q, k_pages):
        from kernels.paged_attention.triton import paged_attention as launch

        return launch(q, k_pages, v_pages, page_table, query_lens, context_lens, scale, deterministic=deterministic)
    return reference.paged_attention(q, k_pages, v_pages, page_table, query_lens, context_lens, scale, deterministic=deterministic)
