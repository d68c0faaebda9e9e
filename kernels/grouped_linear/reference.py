"""Meaning of `grouped_linear` in plain PyTorch: the products of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def grouped_linear(
    x: torch.Tensor,
    weights: torch.Tensor,
    sizes: torch.Tensor,
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.linear,
) -> torch.Tensor:
    """Each row times the transpose of its group's matrix. Groups without rows cost nothing.

    Args:
        x: [M, in], the rows of group 0 first, then those of group 1, and so on.
        weights: [X, out, in], the same dtype.
        sizes: [X] int64, rows of each group; they add up to M.
        linear: product of some rows [n, in] with one matrix [out, in].

    Returns:
        [M, out], the same dtype.
    """
    parts, start = [], 0
    for group, size in enumerate(sizes.tolist()):
        if size:
            parts.append(linear(x[start : start + size], weights[group]))
            start += size
    return torch.cat(parts) if parts else x.new_empty(0, weights.shape[1])
