"""Meaning of `choose_gains` in plain PyTorch.

Axes: T tokens, K components, C scale classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.rans.reference import NUM_GAINS, entry_classes

SAMPLE = 4
"""All gains are tried on every fourth component only."""


class Prices(NamedTuple):
    """Code lengths in whole units, so that every order of summation chooses the same gains.

    limits: int32 [C], the largest size that a class codes itself; the next one is the escape's entry. centres: int32 [C], a class's entry of size 0.
    zeros: int64 [C], what a 0 takes. excess: int32 [entries], what other sizes take beyond it. gains: int64 [NUM_GAINS], what the symbol takes.
    """

    limits: torch.Tensor
    centres: torch.Tensor
    zeros: torch.Tensor
    excess: torch.Tensor
    gains: torch.Tensor


def choose_gains(q: torch.Tensor, classes: torch.Tensor, shifts: torch.Tensor, prices: Prices) -> torch.Tensor:
    """Gain symbols, uint8 [T], with a shortest code for each token's integers; the lower one of two that are as good.

    All gains are tried on every SAMPLE-th component, the best one and its neighbours on all.

    Args:
        q: int32 [T, K]. classes: int32 [K] of the components. shifts: int32 [T], classes that a token's step moves them by.
    """

    def cost(part: slice, gains: torch.Tensor) -> torch.Tensor:
        own = entry_classes(classes[part], shifts, gains, len(prices.limits))
        size = torch.minimum(q[:, part].abs(), prices.limits[own] + 1)
        excess = torch.where(size > 0, prices.excess[prices.centres[own].long() + size], 0)
        return (prices.zeros[own] + excess).sum(1) + prices.gains[gains.long()]

    every = torch.stack([cost(slice(None, None, SAMPLE), torch.full_like(shifts, gain)) for gain in range(NUM_GAINS)])
    best = every.argmin(0)
    near = torch.stack([(best + step).clamp_(0, NUM_GAINS - 1) for step in (-1, 0, 1)])
    chosen = torch.stack([cost(slice(None), gains) for gains in near]).argmin(0, keepdim=True)
    return near.gather(0, chosen)[0].to(torch.uint8)
