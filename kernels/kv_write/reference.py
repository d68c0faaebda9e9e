"""Meaning of `kv_write` in plain PyTorch: rotate new keys and scatter new keys and values into the pages of one layer."""

from __future__ import annotations

import torch

from kernels.rope.reference import apply_rope


def store(x: torch.Tensor, slots: torch.Tensor | slice, pages: torch.Tensor) -> None:
    """Write rows x [N, G, d] as they are into `pages` [P, S, G, d] at `slots`: [N] int64 (page * S + offset), or the slice they form."""
    rows = pages.view(-1, *pages.shape[2:])
    if isinstance(slots, slice):
        rows[slots] = x
    else:
        rows.index_copy_(0, slots, x.to(pages.dtype))


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> None:
    """Rotate the keys and write both into their slots, in place.

    Args:
        k: [N, G, d] keys before rotation.
        v: [N, G, d].
        cos, sin: [N, d/2] float32.
        slots: [N] int64, slot = page * S + offset, no slot twice; -1: such a row is padding and is not written.
        k_pages, v_pages: [P, S, G, d], contiguous; k and v are cast to their dtype.
    """
    kept = slots >= 0
    store(apply_rope(k, cos, sin)[kept], slots[kept], k_pages)
    store(v[kept], slots[kept], v_pages)
