"""Matrices stored in 8 or 4 bits a number, with one float32 scale a row."""

from __future__ import annotations

import torch

from codec.errors import BadInput


def quantise_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [N, M] (or uint8 [N, ceil(M / 2)], two a byte, for 4 bits) and scales float32 [N] of x [N, M]."""
    if bits not in (4, 8):
        raise BadInput(f"{bits}-bit rows", "use 8 or 4 bits")
    top = 127 if bits == 8 else 7
    x = x.float().cpu()
    scale = x.abs().amax(1).clamp_min(1e-30) / top
    if bits == 4:
        # clipping the few largest numbers of a row makes the others' grid finer: 2.75 root mean squares is near the optimum for Gaussian rows
        scale = torch.minimum(scale, 2.75 * x.pow(2).mean(1).sqrt().clamp_min(1e-30) / top)
    codes = torch.round(x / scale[:, None]).clamp_(-top, top).to(torch.int8)
    if bits == 8:
        return codes, scale
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = (codes[:, 0::2] + 8).to(torch.uint8), (codes[:, 1::2] + 8).to(torch.uint8)
    return low | high << 4, scale


def dequantise_rows(codes: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """float32 [N, columns], inverse of quantise_rows up to rounding."""
    if codes.dtype == torch.int8:
        return codes.float() * scale[:, None]
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :columns]
    return (pairs.float() - 8) * scale[:, None]
