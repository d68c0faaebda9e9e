"""Triton kernel of `saved_energy` and `code_bits`; `reference.py` says what they mean. Sizes are read once, and only those that are kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _sums_kernel(size_ptr, inverse_ptr, count_ptr, out_ptr, rounding, stride_token, BITS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    inverse, count = tl.load(inverse_ptr + token), tl.load(count_ptr + token)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        component = start + tl.arange(0, BLOCK)
        x = tl.load(size_ptr + token * stride_token + component, mask=component < count, other=0.0) * inverse
        q = tl.floor(x + rounding)  # 0 where nothing was read
        if BITS:
            total += tl.where(q > 0, 4.0 + 2.0 * tl.log2(tl.maximum(q, 1.0)), 0.0)
        else:
            total += (2.0 * x - q) * q
    tl.store(out_ptr + token, tl.sum(total, 0))


def quantised_sums_bounds(num_tokens: int, num_components: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    return 4 * num_tokens * num_components, 6 * num_tokens * num_components


def _launch(sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float, *, bits: bool) -> torch.Tensor:
    if sizes.stride(1) != 1 or not 0 <= rounding < 1:
        raise ValueError("quantised sums are of dense rows, rounded by less than 1 (pass a tensor whose last axis is dense)")
    out = torch.empty(len(sizes), dtype=torch.float32, device=sizes.device)
    if len(sizes):
        _sums_kernel[(len(sizes),)](
            sizes, inverse_steps.contiguous(), counts.contiguous(), out, rounding, sizes.stride(0), BITS=bits, BLOCK=_BLOCK, num_warps=4
        )
    return out


def saved_energy(sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float) -> torch.Tensor:
    """See `reference.saved_energy`. Nothing is waited for."""
    return _launch(sizes, inverse_steps, counts, rounding, bits=False)


def code_bits(sizes: torch.Tensor, inverse_steps: torch.Tensor, counts: torch.Tensor, rounding: float) -> torch.Tensor:
    """See `reference.code_bits`. Nothing is waited for."""
    return _launch(sizes, inverse_steps, counts, rounding, bits=True)
