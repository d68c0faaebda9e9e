"""Meaning of `saved_energy` and `code_bits` in plain PyTorch.

Axes: T tokens, K components.
"""

from __future__ import annotations

import torch


def _quantised(
    sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes in steps x [T, most], and their integers q, float32, 0 where they are not kept."""
    least, most = int(counts.min()), int(counts.max())
    x = sizes[:, :most] * inverse_steps[:, None]
    q = (x + rounding).floor_()
    if least < most:
        q[:, least:] *= torch.arange(least, most, device=q.device)[None] < counts[:, None]
    return x, q


def saved_energy(sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float) -> torch.Tensor:
    """x^2 - (x - q)^2 summed over the components that are kept, in squared steps, float32 [T]: x the size in steps, q = floor(x + rounding).

    Args:
        sizes: float32 [T, K], rows dense, T at least 1. inverse_steps: float32 [T]. counts: int64 [T], the first components that are kept of each
            token.
    """
    x, q = _quantised(sizes, inverse_steps, counts, rounding)
    return x.mul_(2).sub_(q).mul_(q).sum(1)


def code_bits(sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float) -> torch.Tensor:
    """A measure of a token's bits for comparisons, float32 [T]: four for each q that is not 0, and 2 log2 q. Arguments as above."""
    _, q = _quantised(sizes, inverse_steps, counts, rounding)
    return 4 * (q > 0).sum(1) + 2 * q.clamp_min_(1).log2_().sum(1)
