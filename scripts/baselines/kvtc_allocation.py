"""KVTC's bit allocation: an exact dynamic programme over runs of principal components, and the quantisers it chooses among.

Source: KVTC (arXiv 2511.01815), adaptive quantisation: minimise the squared error under a bit budget, types {drop, int2, int4, fp8},
blocks of 1, 16, 64, 256 or 1024 neighbouring components that share a 16-bit shift and scale. Simplified: blocks longer than one start
at multiples of the smallest such block (16), which keeps the table of errors small and loses nothing visible; shift and scale are per
block and per group of `group` tokens (paper: one token).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd

import numpy as np
import torch

BLOCK_SIZES = (1, 16, 64, 256, 1024)
TYPE_BITS = {"int2": 2, "int4": 4, "fp8": 8}
HEADER_BITS = 32
_FP8_MAX = 448.0
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Block:
    """Components [start, start + size) stored as `kind` (a key of TYPE_BITS)."""

    start: int
    size: int
    kind: str


@dataclass(frozen=True)
class Option:
    """One way to code components [start, start + size): integer cost in bits for a token group, squared error over the sample."""

    start: int
    size: int
    kind: str
    cost: int
    error: float


def quantise(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises along the last axis.

    Args:
        x: float32 [..., n]; each row of n shares shift and scale.
        kind: int2, int4 or fp8.

    Returns:
        shift and scale [..., 1] (float32 values that fit in float16), codes uint8 [..., n].
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if kind == "fp8":
        shift = ((low + high) / 2).half().float()
        scale = ((x - shift).abs().amax(-1, keepdim=True) / _FP8_MAX).half().float().clamp_min(1e-7)
        return shift, scale, ((x - shift) / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    levels = (1 << TYPE_BITS[kind]) - 1
    shift = low.half().float()
    scale = ((high - shift) / levels).half().float().clamp_min(1e-7)
    return shift, scale, ((x - shift) / scale).round().clamp(0, levels).to(torch.uint8)


def dequantise(shift: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Inverse of quantise, up to its error: float32, shape of codes."""
    values = codes.view(torch.float8_e4m3fn).float() if kind == "fp8" else codes.float()
    return values * scale.clamp_min(1e-7) + shift


def options(coefficients: torch.Tensor, group: int, block_sizes: tuple[int, ...] = BLOCK_SIZES) -> list[Option]:
    """Every (start, size, type) with its cost and its measured error.

    Args:
        coefficients: float32 [n, r], centred calibration coefficients, components by falling variance.
        group: tokens that share a shift and scale (n is cut to a multiple of it).
    """
    n, r = coefficients.shape
    group = min(group, n)
    x = coefficients[: n // group * group].reshape(-1, group, r)  # [token groups, group, r]
    grain = min((size for size in block_sizes if size > 1), default=1)
    found = []
    for size in block_sizes:
        if size > r:
            continue
        step = 1 if size == 1 else grain
        windows = x.unfold(2, size, step)  # [token groups, group, starts, size]
        per_chunk = max(1, _CHUNK_ELEMENTS // (x.shape[0] * group * size))
        for first in range(0, windows.shape[2], per_chunk):
            part = windows[:, :, first : first + per_chunk]
            rows = part.permute(2, 0, 1, 3).reshape(part.shape[2], x.shape[0], group * size)
            for kind, bits in TYPE_BITS.items():
                error = (dequantise(*quantise(rows, kind), kind) - rows).pow(2).sum((1, 2)).tolist()
                cost = bits * size * group + HEADER_BITS
                found += [Option((first + i) * step, size, kind, cost, e) for i, e in enumerate(error)]
    return found


def allocate(choices: list[Option], energies: list[float], budget: int) -> list[Block]:
    """The cover of all components with the least error within `budget` bits a token group: exact, over (component, bits spent).

    Args:
        choices: what options() returned; components in no chosen block are dropped.
        energies: squared error of dropping each component, [r].
        budget: most bits a token group may cost.
    """
    r = len(energies)
    unit = reduce(gcd, [c.cost for c in choices], 0) or 1
    slots = budget // unit + 1
    starts: list[list[int]] = [[] for _ in range(r)]
    for index, choice in enumerate(choices):
        if choice.cost <= budget:
            starts[choice.start].append(index)
    best = np.full((r + 1, slots), np.inf)
    best[0, 0] = 0.0
    came = np.full((r + 1, slots), -1, np.int32)  # -1: dropped, else the choice that ends here
    for i in range(r):
        here = best[i]
        reach = int(np.max(np.flatnonzero(np.isfinite(here)), initial=-1)) + 1
        dropped = here + energies[i]
        better = dropped < best[i + 1]
        best[i + 1][better], came[i + 1][better] = dropped[better], -1
        for index in starts[i]:
            choice = choices[index]
            shift, end = choice.cost // unit, i + choice.size
            count = min(reach, slots - shift)
            if count <= 0:
                continue
            total, target = here[:count] + choice.error, best[end, shift : shift + count]
            better = total < target
            target[better] = total[better]
            came[end, shift : shift + count][better] = index
    position, spent, blocks = r, int(best[r].argmin()), []
    while position:
        index = int(came[position, spent])
        if index < 0:
            position -= 1
            continue
        choice = choices[index]
        blocks.append(Block(choice.start, choice.size, choice.kind))
        position, spent = choice.start, spent - choice.cost // unit
    return blocks[::-1]
