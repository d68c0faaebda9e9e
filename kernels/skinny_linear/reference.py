"""Meaning of `linear_residual` in plain PyTorch: a projection added to the residual stream, prepared for the next normalisation.

An RMS norm is the product of the stream, the norm's weight and one factor per token. The first product and the sum of squares behind
the factor are left here, where the stream is at hand; the factor is applied by the next projection to its result, which it commutes with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def prepare_rows(stream: torch.Tensor, norm: torch.Tensor, scaled: torch.Tensor, squares: torch.Tensor) -> int:
    """scaled = stream * norm, squares[0] = each row's sum of squares; returns 1, the rows of `squares` written.

    Args:
        stream: [N, E], any float dtype.
        norm: [E], the next norm's weight.
        scaled: [N, E], written.
        squares: [P, N] float32, its first row written.
    """
    wide = stream.float()
    scaled.copy_(wide * norm.float())
    squares[0] = wide.square().sum(1)
    return 1


def inverse_rms(squares: torch.Tensor, parts: int, width: int, eps: float) -> torch.Tensor:
    """[N] float32: 1 / root mean square of each row, from the partial sums of squares [P, N] of which `parts` rows count."""
    return torch.rsqrt(squares[:parts].sum(0) / width + eps)


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stream: torch.Tensor,
    norm: torch.Tensor,
    scaled: torch.Tensor,
    squares: torch.Tensor,
) -> int:
    """stream += x @ weight^T + bias, then `prepare_rows`.

    Args:
        x: [N, K], any float dtype.
        weight: [E, K], bias: [E] or None.
        stream: [N, E] residual stream, added to in place.
        norm: [E] weight of the RMS norm that follows.
        scaled: [N, E], written: the new stream times `norm`.
        squares: [P, N] float32, written: partial sums of squares of the new stream.

    Returns:
        How many rows of `squares` were written: their sum over those rows is a token's sum of squares.
    """
    stream += F.linear(x, weight, bias)
    return prepare_rows(stream, norm, scaled, squares)
