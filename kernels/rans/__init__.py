"""Entropy coding of the residual's integers, thousands of lanes at once. `reference.py` says what it means."""

from __future__ import annotations

import torch

from kernels.dispatch import use_triton
from kernels.rans import reference
from kernels.rans.reference import RansDecoded, RansStreams, RansTables, build_tables

__all__ = ["RansDecoded", "RansStreams", "RansTables", "build_tables", "rans_decode", "rans_encode"]


def rans_encode(
    tables: RansTables,
    q: torch.Tensor,
    classes: torch.Tensor,
    gains: torch.Tensor,
    token_starts: torch.Tensor,
    tokens_per_lane: int,
    *,
    shifts: torch.Tensor | None = None,
    max_span_tokens: int = 64,
) -> RansStreams:
    """`reference.rans_encode` (arguments and result there), through Triton where it applies. max_span_tokens: bound known to the host."""
    if use_triton(q):
        from kernels.rans import triton

        return triton.rans_encode(tables, q, classes, gains, token_starts, tokens_per_lane, shifts=shifts, max_span_tokens=max_span_tokens)
    return reference.rans_encode(tables, q, classes, gains, token_starts, tokens_per_lane, shifts=shifts)


def rans_decode(
    tables: RansTables,
    streams: RansStreams,
    classes: torch.Tensor,
    token_starts: torch.Tensor,
    tokens_per_lane: int,
    *,
    num_tokens: int,
    shifts: torch.Tensor | None = None,
    max_span_tokens: int = 64,
) -> RansDecoded:
    """`reference.rans_decode` (arguments and result there), through Triton where it applies. num_tokens: T, known to the host."""
    if use_triton(streams.states):
        from kernels.rans import triton

        return triton.rans_decode(
            tables, streams, classes, token_starts, tokens_per_lane, num_tokens=num_tokens, shifts=shifts, max_span_tokens=max_span_tokens
        )
    return reference.rans_decode(tables, streams, classes, token_starts, tokens_per_lane, shifts=shifts)
