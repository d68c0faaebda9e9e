"""Triton kernel of `embed_rows`; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _embed_rows_kernel(
    id_ptr,
    embedding_ptr,
    norm_ptr,
    stream_ptr,
    scaled_ptr,
    squares_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EMBED: tl.constexpr,
):
    token = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    mask = channel < WIDTH
    at = token * WIDTH + channel
    if EMBED:
        number = tl.maximum(tl.load(id_ptr + token).to(tl.int64), 0)
        row = tl.load(embedding_ptr + number * WIDTH + channel, mask=mask, other=0.0)
        tl.store(stream_ptr + at, row, mask=mask)
    else:
        row = tl.load(stream_ptr + at, mask=mask, other=0.0)
    wide = row.to(tl.float32)
    norm = tl.load(norm_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + at, (wide * norm).to(scaled_ptr.dtype.element_ty), mask=mask)
    tl.store(squares_ptr + token, tl.sum(wide * wide, 0))


def embed_rows_floors(tokens: int, width: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    return (3 * tokens + 1) * width * element_bytes + 12 * tokens, 3 * tokens * width


def embed_rows(
    token_ids: torch.Tensor | None,
    embedding: torch.Tensor,
    norm: torch.Tensor,
    stream: torch.Tensor,
    scaled: torch.Tensor,
    squares: torch.Tensor,
) -> int:
    """See `reference.embed_rows`. Never launched early: what later kernels of the step read before their turn is settled when it ends."""
    tokens, width = stream.shape
    _embed_rows_kernel[(tokens,)](
        norm if token_ids is None else token_ids,
        embedding,
        norm,
        stream,
        scaled,
        squares,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        EMBED=token_ids is not None,
        num_warps=8,
    )
    return 1
