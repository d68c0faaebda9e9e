"""Uniform quantiser with a dead zone, and the reconstruction points that go with it."""

from __future__ import annotations

import torch

ROUNDING = 0.42
"""q = sign(x) * floor(|x| + ROUNDING): below one half, so small values fall to zero, which costs little error and saves many bits."""

LEVELS_PER_OCTAVE = 4
MIN_LEVEL, MAX_LEVEL = -8, 7
"""A token may use its own step: step * 2 ** (level / LEVELS_PER_OCTAVE), level an integer in this range."""

Q_LIMIT = 1 << 24


def quantise(x: torch.Tensor, rounding: float = ROUNDING) -> torch.Tensor:
    """Integers nearest to x [*, K] (already divided by the step), float32 in and int32 out, clamped to +-Q_LIMIT."""
    return (torch.sign(x) * torch.floor(x.abs() + rounding)).clamp_(-Q_LIMIT, Q_LIMIT).to(torch.int32)


def token_steps(step: float, levels: torch.Tensor | None, num_tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Step of each token, float32 [T, 1]."""
    if levels is None:
        return torch.full((num_tokens, 1), step, dtype=torch.float32, device=device)
    return step * torch.exp2(levels.to(device=device, dtype=torch.float32) / LEVELS_PER_OCTAVE)[:, None]


def levels_of(octaves: torch.Tensor) -> torch.Tensor:
    """Step levels int8 [T] nearest to the wanted distance from the usual step, in octaves [T]."""
    return torch.round(octaves * LEVELS_PER_OCTAVE).clamp_(MIN_LEVEL, MAX_LEVEL).to(torch.int8)
