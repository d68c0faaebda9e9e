"""Meaning of `norm_qkv` in plain PyTorch: normalised rows to rotated queries, and keys and values in their cache slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.kv_write.reference import store
from kernels.rope.reference import apply_rope
from kernels.skinny_linear.reference import inverse_rms


def norm_qkv(
    scaled: torch.Tensor,
    squares: torch.Tensor,
    parts: int,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    qk_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    q: torch.Tensor,
) -> None:
    """Finish the RMS norm, multiply by the QKV matrix, norm and turn queries and keys, write keys and values to their slots.

    Args:
        scaled: [N, E] residual stream times the norm's weight; squares: [P, N] float32, of which `parts` rows count (see `skinny_linear`).
        eps: of all norms here.
        weight: [(H + 2G) d, E], bias: [(H + 2G) d] or None.
        qk_norm: [2, d] RMS weights of queries and keys, or None.
        cos, sin: [T, d/2] float32 by position.
        positions: [N] integers below T.
        slots: [N] int64, page * S + row; nothing is written for a negative one (padding).
        k_pages, v_pages: [P, S, G, d] contiguous, of one layer; written.
        q: [N, H, d], written: rotated queries.
    """
    heads, head_dim = q.shape[1:]
    groups = k_pages.shape[2]
    factor = inverse_rms(squares, parts, scaled.shape[1], eps)
    wide = F.linear(scaled.float(), weight.float()) * factor[:, None]
    qkv = (wide if bias is None else wide + bias.float()).to(scaled.dtype).unflatten(1, (-1, head_dim))
    queries, keys, values = qkv.split((heads, groups, groups), dim=1)
    if qk_norm is not None:
        queries = F.rms_norm(queries.float(), (head_dim,), qk_norm[0].float(), eps).to(q.dtype)
        keys = F.rms_norm(keys.float(), (head_dim,), qk_norm[1].float(), eps).to(q.dtype)
    cos, sin = cos[positions], sin[positions]
    q.copy_(apply_rope(queries, cos, sin))
    kept = slots >= 0
    store(apply_rope(keys, cos, sin)[kept], slots[kept], k_pages)
    store(values[kept], slots[kept], v_pages)
