"""Matrices stored in 8, 4, 3 or 2 bits a number, and how many bits each row of a transform is worth.

A row of length 1 that is rounded keeps its length, so a component coded along it loses just the share of its energy that the row has turned away.
Components of small variance can bear a large share: most of a large transform fits in two or three bits a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from codec.errors import BadInput

ROW_BITS = (8, 4, 3, 2)
GROUP = 64
"""Numbers of a row that share a step."""

ENERGY_LOST = {8: 5e-5, 4: 0.0115, 3: 0.0345, 2: 0.1175}
"""Share of a row's energy that rounding turns away; for 2 to 4 bits the uniform quantiser's on a Gaussian (Max 1960, table II)."""

_CACHED_NUMBERS = 1 << 17
"""Numbers that are made of codes at once, in several passes over them: they stay in a core's cache."""

_CLIPS = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
_STEPS_PER_OCTAVE = 8


def quantise_rows(x: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Stored form of x float32 [N, M]: "codes" uint8 [N, bits, ceil(M / 8)] (bit planes), "step" uint8 [N, ceil(M / 64)] (eighths of an octave below
    the row's largest), "peak" float32 [N]."""
    if bits not in ROW_BITS:
        raise BadInput(f"{bits}-bit rows", f"use one of {ROW_BITS} bits")
    num_rows, columns = x.shape
    groups = -(-columns // GROUP)
    x = torch.nn.functional.pad(x.float(), (0, groups * GROUP - columns)).reshape(num_rows, groups, GROUP)
    levels = 2**bits
    widest = x.abs().amax(2).clamp_min(1e-30) * 2 / levels
    step, error = widest, torch.full_like(widest, math.inf)
    for clip in _CLIPS:
        missed = (x - _rounded(x, widest * clip, levels)[1]).pow(2).sum(2)
        step, error = torch.where(missed < error, widest * clip, step), torch.minimum(missed, error)
    peak = step.amax(1)
    below = torch.round(_STEPS_PER_OCTAVE * torch.log2(peak[:, None] / step)).clamp_(0, 255)
    codes, back = _rounded(x, peak[:, None] * torch.exp2(-below / _STEPS_PER_OCTAVE), levels)
    norm = back.flatten(1)[:, :columns].norm(dim=1)
    peak = torch.where(norm > 0, peak * x.flatten(1).norm(dim=1) / norm.clamp_min(1e-30), peak)
    flat = codes.flatten(1)[:, :columns].to(torch.uint8).cpu().numpy()
    planes = [np.packbits((flat >> bit) & 1, axis=1) for bit in range(bits)]
    stored = torch.from_numpy(np.stack(planes, 1)) if num_rows else torch.zeros(0, bits, -(-columns // 8), dtype=torch.uint8)
    return {"codes": stored, "step": below.to(torch.uint8).cpu(), "peak": peak.cpu()}


def _rounded(x: torch.Tensor, step: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.floor(x / step[..., None] + levels / 2).clamp_(0, levels - 1)
    return codes, (codes - (levels - 1) / 2) * step[..., None]


def dequantise_rows(parts: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    """float32 [N, columns], inverse of quantise_rows up to rounding."""
    planes = parts["codes"].numpy()
    num_rows, bits, _ = planes.shape
    step = parts["peak"][:, None] * torch.exp2(-parts["step"].float() / _STEPS_PER_OCTAVE)
    whole, rest = divmod(columns, GROUP)
    out = torch.empty(num_rows, columns, dtype=torch.float32)
    for at in range(0, num_rows, some := max(1, _CACHED_NUMBERS // max(1, columns))):
        block, own = planes[at : at + some], step[at : at + some]
        codes = np.unpackbits(block[:, 0], axis=1, count=columns)
        for bit in range(1, bits):
            plane = np.unpackbits(block[:, bit], axis=1, count=columns)
            plane <<= bit
            codes |= plane
        numbers = out[at : at + some]
        numbers.copy_(torch.from_numpy(codes)).sub_((2**bits - 1) / 2)
        numbers[:, : whole * GROUP].unflatten(1, (whole, GROUP)).mul_(own[:, :whole, None])
        if rest:
            numbers[:, whole * GROUP :].mul_(own[:, whole:])
    return out


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one stored row."""
    return bits * -(-width // 8) + -(-width // GROUP) + 4


def allocate_bits(variance: Sequence[float], width: int, room_bytes: float, step: float) -> list[int]:
    """Bits of each row of a transform, falling from row to row; shorter than `variance` where the last rows are not worth their bytes.

    A component of variance v coded at `step` is worth v - t - t log(v / t), t = step^2 / 12: the error it takes away less the bits it costs, at the
    slope of uniform quantisation; of the coded energy v - t, a row of few bits loses ENERGY_LOST. The same price per byte for all rows (a Lagrange
    multiplier, found by bisection) decides.

    Args:
        variance: of the components, in falling order. width: numbers of a row. room_bytes: for all rows. step: the finest quantiser step.
    """
    v = np.maximum(np.asarray(variance, np.float64), 1e-30)
    floor = step * step / 12
    worth = np.where(v > floor, v - floor - floor * np.log(np.maximum(v, floor) / floor), 0.0)
    gains = np.stack([worth - np.maximum(v - floor, 0) * ENERGY_LOST[b] for b in ROW_BITS] + [np.zeros_like(v)])
    costs = np.array([row_bytes(width, b) for b in ROW_BITS] + [0], np.float64)[:, None]
    bits = np.array([*ROW_BITS, 0])

    def choose(price: float) -> np.ndarray:
        chosen = bits[(gains - price * costs).argmax(0)]
        return np.minimum.accumulate(chosen)  # what is dropped stays dropped, and steps only go down

    def spent(chosen: np.ndarray) -> int:
        return sum(int((chosen == b).sum()) * row_bytes(width, b) for b in ROW_BITS)

    high = float(gains.max()) / row_bytes(width, min(ROW_BITS)) + 1e-12
    low = 1e-9 * high  # not free: rows worth nothing must lose against none
    if spent(choose(low)) > room_bytes:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(choose(middle)) > room_bytes else (low, middle)
        low = high
    chosen = choose(low)
    return [int(b) for b in chosen[chosen > 0]]
