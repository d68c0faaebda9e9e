"""Meaning of `apply_rope` in plain PyTorch: rotary position embedding (Su et al., 2021), halves convention of the Llama family."""

from __future__ import annotations

import math

import torch


def widen(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles [N, d/2] laid out for `rotate`, once for many calls: cos [N, 1, 1, d/2], signed sin [N, 1, 2, d/2]."""
    return cos[:, None, None], torch.stack((-sin, sin), dim=1)[:, None]


def rotate(x: torch.Tensor, wide_cos: torch.Tensor, wide_sin: torch.Tensor) -> torch.Tensor:
    """`apply_rope` of x [N, heads, d] with angles from `widen`."""
    # only exactly rounded operations, no fused multiply-add: a row's result does not depend on the rows beside it
    pairs = x.float().unflatten(-1, (2, -1))
    return (pairs * wide_cos + pairs.flip(-2) * wide_sin).flatten(-2).to(x.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i of the first half with channel i of the second half by the row's angle.

    Args:
        x: [N, *, d], any float dtype, d even.
        cos, sin: [N, d/2] float32 of the angles; pass -sin to turn back.

    Returns:
        [N, *, d] in x's dtype; the arithmetic is float32.
    """
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return rotate(rows, *widen(cos, sin)).view(x.shape)
