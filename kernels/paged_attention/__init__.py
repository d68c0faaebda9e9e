"""Causal attention over a paged KV cache; `reference.py` says what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    visible: torch.Tensor | None = None,
    windows: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    max_query_len: int | None = None,
    usual_context: int | None = None,
) -> torch.Tensor:
    """`reference.paged_attention` (arguments and result there), through Triton where it applies.

    max_query_len: bound on query_lens that lie on a device, whose tiles are else laid out for the worst case. usual_context: keys that a launch is
    laid out for, where page_table reaches farther than most contexts do; any context may be longer.
    """
    kind: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap}
    fixed = (q, k_pages, v_pages, page_table, query_lens, context_lens, scale)
    if use_triton(q, k_pages):
        from kernels.paged_attention.triton import paged_attention as launch

        return launch(
            *fixed,
            deterministic=deterministic,
            visible=visible,
            windows=windows,
            max_query_len=max_query_len,
            usual_context=usual_context,
            **kind,
        )
    return reference.paged_attention(*fixed, deterministic=deterministic, visible=visible, windows=windows, **kind)
