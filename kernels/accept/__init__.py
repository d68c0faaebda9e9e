"""Exact rejection sampling of a block of drafted tokens, and inverse-CDF sampling of rows."""

from __future__ import annotations

from torch import Tensor

from kernels.accept import reference
from kernels.accept.reference import COUNTER_ACCEPT, COUNTER_DRAFT, COUNTER_SAMPLE, Accepted
from kernels.dispatch import use_triton

__all__ = ["COUNTER_ACCEPT", "COUNTER_DRAFT", "COUNTER_SAMPLE", "Accepted", "accept", "sample_rows"]


def sample_rows(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index per row of weights [n, V] float32 with uniform [n] float32. Returns [n] int64. See `reference.sample_rows`."""
    return reference.sample_rows(weights, uniform)


def accept(
    target_probs: Tensor,
    draft_probs: Tensor,
    draft_tokens: Tensor,
    num_drafts: Tensor,
    seeds: Tensor,
    positions: Tensor,
    max_drafts: int,
    *,
    even: bool = False,
) -> Accepted:
    """Keep drafts up to the first rejection and draw the next token: shapes and meaning in `reference.accept`."""
    if use_triton(target_probs):
        from kernels.accept.triton import accept as launch

        return launch(target_probs, draft_probs, draft_tokens, num_drafts, seeds, positions, max_drafts, even=even)
    return reference.accept(target_probs, draft_probs, draft_tokens, num_drafts, seeds, positions, max_drafts, even=even)
