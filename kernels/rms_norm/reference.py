"""Meaning of `rms_norm` in plain PyTorch: root-mean-square normalisation (Zhang and Sennrich, 2019) after an optional residual addition."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual, then scale each row to unit root mean square and by `weight`; the statistics are float32.

    Args:
        x: [N, E], any float dtype (leading axes may be more than one).
        weight: [E], the same dtype, or float32 for norms whose weight half precision does not hold.
        eps: added to the mean square.
        residual: [N, E] added to x first; the sum is rounded to x's dtype before it is normalised.

    Returns:
        (normalised rows [N, E], x + residual [N, E] or x itself), both in x's dtype.
    """
    if residual is not None:
        x = x + residual
    if weight.dtype != x.dtype:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype), x
    return F.rms_norm(x, weight.shape, weight, eps), x
