"""Meaning of `reconstruct` in plain PyTorch.

Axes: T tokens, K components, C scale classes, n escaped integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.rans.reference import entry_classes

MOST = 1 << 24
"""Of an escaped integer's size; larger ones are damage."""


class Points(NamedTuple):
    """Of scale classes: limits int32 [C], the largest size that a class codes itself; offsets float32 [4 C], what the reconstruction point of a size
    of 0, 1, 2, and of 3 and more, lies beyond it."""

    limits: torch.Tensor
    offsets: torch.Tensor


class Escapes(NamedTuple):
    """What integers beyond their class's limit have left over.

    remainders: int64 [n], twice the size beyond limit + 1, plus 1 for a negative integer; in order of tokens, and of a token's components.
    token_starts: int64 [spans + 1], the first token of each span. starts: int64 [spans + 1], the first remainder of each.
    """

    remainders: torch.Tensor
    token_starts: torch.Tensor
    starts: torch.Tensor


def reconstruct(
    q: torch.Tensor,
    classes: torch.Tensor,
    shifts: torch.Tensor,
    gains: torch.Tensor,
    steps: torch.Tensor,
    points: Points,
    escapes: Escapes,
    places: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write tokens' components, the reconstruction points of their integers times their steps, into rows of `out`.

    Args:
        q: int16 or int32 [T, K], an escape as limit + 1.
        classes: int32 [K] of the components. shifts: int32 [T], classes that a token's step moves them by. gains: uint8 [T], gain symbols.
        steps: float32 [T].
        places: int64 [T], the row of each token, no row twice; negative ones are not written.
        columns: int64 [K], the column of each component.
        out: [R, W] of any float dtype; other places are left as they are.

    Returns:
        A bool scalar on the device: the escapes do not fit the integers. What was written must then be thrown away.
    """
    own = entry_classes(classes, shifts, gains, len(points.limits))
    limit = points.limits.long()[own]
    escaped = q > limit
    counts = torch.nn.functional.pad(escaped.sum(1).cumsum(0), (1, 0))
    remainders = torch.cat([escapes.remainders, escapes.remainders.new_zeros(1)])
    rank = (escaped.flatten().cumsum(0) - 1).clamp_(0, len(remainders) - 1).view(escaped.shape)
    remainder = remainders[rank]
    size = limit + 1 + (remainder >> 1)
    values = torch.where(escaped, torch.where(remainder % 2 == 1, -size, size), q.long())
    wrong = (counts[escapes.token_starts] != escapes.starts).any() | (escaped & (size > MOST)).any()
    values = values.clamp(-MOST, MOST)
    c = (values + values.sign() * points.offsets[4 * own + values.abs().clamp(max=3)]) * steps[:, None]
    rows = (places >= 0).nonzero()[:, 0]
    out[places[rows][:, None], columns[None, :]] = c[rows].to(out.dtype)
    return wrong
