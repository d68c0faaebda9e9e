"""Meaning of `block_inputs` in plain PyTorch: positions, slots and context lengths of consecutive tokens behind lengths on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def block_inputs(
    lengths: Tensor,
    firsts: Tensor,
    limits: Tensor,
    page_table: Tensor,
    offset: int,
    page_size: int,
    positions: Tensor,
    slots: Tensor,
    context_lens: Tensor,
) -> None:
    """Request b's n tokens stand at lengths[b] + offset and the positions after it; those before firsts[b] or from limits[b] on are padding.

    Args:
        lengths, firsts, limits: [B] int64; limits: positions for which there are pages (0: a request that is padding itself).
        page_table: [B, P] int32 pages of `page_size` tokens.
        offset: of the first token, -1 or more; lengths[b] + offset >= 0 unless it is padding.
        positions, slots: [B n] int64, written; slots are page * page_size + row; both -1 for padding.
        context_lens: [B] int32, written: tokens up to the last one's position, at most limits[b].
    """
    batch = len(lengths)
    own = lengths[:, None] + offset + torch.arange(len(positions) // batch, device=lengths.device)  # [B, n]
    inside = (own >= firsts[:, None]) & (own < limits[:, None])
    pages = page_table.gather(1, torch.where(inside, own // page_size, 0)).long()
    positions.copy_(torch.where(inside, own, -1).flatten())
    slots.copy_(torch.where(inside, pages * page_size + own % page_size, -1).flatten())
    context_lens.copy_(torch.minimum(own[:, -1] + 1, limits).clamp_min(0))
