"""Triton kernel of `apply_rope`; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    half,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    inside = channel < half
    mask = (head < heads)[:, None] & inside[None, :]
    cos = tl.load(cos_ptr + token * half + channel, mask=inside, other=1.0)[None, :]
    sin = tl.load(sin_ptr + token * half + channel, mask=inside, other=0.0)[None, :]
    source = x_ptr + token * stride_token + head[:, None] * stride_head + channel[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = out_ptr + (token * heads + head[:, None]) * 2 * half + channel[None, :]
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


def rope_bounds(num_elements: int, num_tokens: int, half: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    return 2 * num_elements * element_bytes + 8 * num_tokens * half, 3 * num_elements


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `reference.apply_rope`. Heads of a wider row (a slice of fused QKV) are read in place."""
    tokens, half = x.shape[0], x.shape[-1] // 2
    rows = x.reshape(tokens, -1, 2 * half)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = rows.shape[1]
    if rows.numel():
        block = min(triton.next_power_of_2(heads), 16)
        # No fused multiply-add: the twin's result is reproduced to the last bit.
        _rope_kernel[(tokens, triton.cdiv(heads, block))](
            rows,
            cos.contiguous(),
            sin.contiguous(),
            out,
            heads,
            half,
            rows.stride(0),
            rows.stride(1),
            HEADS=block,
            HALF=triton.next_power_of_2(half),
            num_warps=2,
            enable_fp_fusion=False,
        )
    return out
