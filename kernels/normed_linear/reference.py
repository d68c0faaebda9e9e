"""Meaning of `normed_linear` in plain PyTorch.

Axes: n tokens, t states a token, E size of a state, r columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SplitWeight(NamedTuple):
    """A float32 matrix as the sum of two bfloat16 ones, to 16 bits: what a GPU's matrix units take without rounding."""

    high: torch.Tensor
    low: torch.Tensor


def split(weight: torch.Tensor) -> SplitWeight:
    """Of a float32 matrix."""
    high = weight.to(torch.bfloat16)
    return SplitWeight(high.contiguous(), (weight - high.float()).to(torch.bfloat16).contiguous())


def normed_linear(rows: torch.Tensor, weight: SplitWeight, eps: float) -> torch.Tensor:
    """float32 [n, r]: rows [n, t, E], each state divided by its root mean square, side by side, times weight [t * E, r]."""
    x = rows.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x.flatten(1) @ (weight.high.float() + weight.low.float())
