"""Keys and values kept in 4, 3 or 2 bits while they are attended. `reference.py` says what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernels.dispatch import use_triton
from kernels.quantized_kv import reference
from kernels.quantized_kv.reference import (
    FORMATS,
    NUM_RECENT,
    NUM_SINKS,
    RING,
    ChannelMeans,
    ExactRecent,
    ExactSinks,
    QuantizedPages,
    new_pages,
)

__all__ = [
    "FORMATS",
    "NUM_RECENT",
    "NUM_SINKS",
    "RING",
    "ChannelMeans",
    "ExactRecent",
    "ExactSinks",
    "QuantizedPages",
    "new_pages",
    "quantized_kv_write",
    "quantized_paged_attention",
]


def quantized_kv_write(
    k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, means: ChannelMeans, pages: QuantizedPages
) -> None:
    """`reference.quantized_kv_write` (arguments there), through Triton where it applies."""
    if use_triton(k, pages.k_codes):
        from kernels.quantized_kv import triton

        triton.quantized_kv_write(k, v, cos, sin, slots, means, pages)
    else:
        reference.quantized_kv_write(k, v, cos, sin, slots, means, pages)


def quantized_paged_attention(
    q: torch.Tensor,
    pages: QuantizedPages,
    means: ChannelMeans,
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    page_table: torch.Tensor,
    query_lens: Sequence[int] | torch.Tensor,
    context_lens: Sequence[int] | torch.Tensor,
    scale: float,
    *,
    sinks: ExactSinks | None = None,
    recent: ExactRecent | None = None,
    deterministic: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    max_query_len: int | None = None,
) -> torch.Tensor:
    """`reference.quantized_paged_attention` (arguments and result there), through Triton where it applies.

    max_query_len: bound on query_lens that lie on a device, whose tiles are else laid out for the worst case.
    """
    fixed = (q, pages, means, cos_table, sin_table, page_table, query_lens, context_lens, scale)
    kind: dict[str, Any] = {"deterministic": deterministic, "sliding_window": sliding_window, "softcap": softcap}
    if use_triton(q, pages.k_codes):
        from kernels.quantized_kv import attention

        return attention.quantized_paged_attention(*fixed, sinks=sinks, recent=recent, max_query_len=max_query_len, **kind)
    return reference.quantized_paged_attention(*fixed, sinks=sinks, recent=recent, **kind)
