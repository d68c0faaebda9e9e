"""Meaning of `embed_rows` in plain PyTorch: the residual stream's start, prepared for the first normalisation."""

from __future__ import annotations

import torch

from kernels.skinny_linear.reference import prepare_rows


def embed_rows(
    token_ids: torch.Tensor | None,
    embedding: torch.Tensor,
    norm: torch.Tensor,
    stream: torch.Tensor,
    scaled: torch.Tensor,
    squares: torch.Tensor,
) -> int:
    """stream = rows `token_ids` of the embedding (or the stream as it is, without ids), then `prepare_rows`.

    Args:
        token_ids: [N] integers, or None to start from what `stream` holds; a negative one is read as 0.
        embedding: [V, E]; norm: [E], the first norm's weight.
        stream: [N, E], written unless token_ids is None; scaled: [N, E], squares: [P, N] float32, written (see `skinny_linear`).

    Returns:
        1, the rows of `squares` written.
    """
    if token_ids is not None:
        stream.copy_(embedding[token_ids.long().clamp_min(0)])
    return prepare_rows(stream, norm, scaled, squares)
