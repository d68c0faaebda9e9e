"""Triton kernel of `kv_write`; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _kv_write_kernel(
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    k_pages_ptr,
    v_pages_ptr,
    heads,
    half,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    slot = tl.load(slot_ptr + token)
    inside = channel < tl.where(slot >= 0, half, 0)  # nothing of a padded row
    mask = (head < heads)[:, None] & inside[None, :]
    cos = tl.load(cos_ptr + token * half + channel, mask=inside, other=1.0)[None, :]
    sin = tl.load(sin_ptr + token * half + channel, mask=inside, other=0.0)[None, :]
    k_from = k_ptr + token * k_stride_token + head[:, None] * k_stride_head + channel[None, :]
    v_from = v_ptr + token * v_stride_token + head[:, None] * v_stride_head + channel[None, :]
    first = tl.load(k_from, mask=mask, other=0.0)
    second = tl.load(k_from + half, mask=mask, other=0.0)
    v_first = tl.load(v_from, mask=mask, other=0.0)
    v_second = tl.load(v_from + half, mask=mask, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    # Rounded to the activation's dtype first, like the twin, then to the pages'.
    turned_first = (wide_first * cos - wide_second * sin).to(first.dtype)
    turned_second = (wide_second * cos + wide_first * sin).to(first.dtype)
    to = (slot * heads + head[:, None]) * 2 * half + channel[None, :]
    dtype = k_pages_ptr.dtype.element_ty
    tl.store(k_pages_ptr + to, turned_first.to(dtype), mask=mask)
    tl.store(k_pages_ptr + to + half, turned_second.to(dtype), mask=mask)
    tl.store(v_pages_ptr + to, v_first.to(dtype), mask=mask)
    tl.store(v_pages_ptr + to + half, v_second.to(dtype), mask=mask)


def kv_write_bounds(num_tokens: int, heads: int, head_dim: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    elements = num_tokens * heads * head_dim
    return 4 * elements * element_bytes + num_tokens * (4 * head_dim + 8), 3 * elements


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> None:
    """See `reference.kv_write`. k and v may be slices of a wider row (fused QKV)."""
    tokens, heads, head_dim = k.shape
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("kv_write needs contiguous pages (pass one layer's keys and values of the pool, not a permuted view)")
    if tokens == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _kv_write_kernel[(tokens,)](
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        slots,
        k_pages,
        v_pages,
        heads,
        head_dim // 2,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=2,
        enable_fp_fusion=False,
    )
