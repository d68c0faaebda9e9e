"""Triton kernel of `philox_uniform`; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def uniform(seed, position, COUNTER: tl.constexpr):
    """Uniform float32 of (seed, position, counter): the first word of Philox4x32-10, upper 24 bits. seed, position: int64 of one shape."""
    low = position.to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = (low * 0).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, (zero + COUNTER).to(tl.uint32), zero)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _philox_kernel(seed_ptr, position_ptr, out_ptr, count, COUNTER: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    seed = tl.load(seed_ptr + index, mask=mask, other=0)
    position = tl.load(position_ptr + index, mask=mask, other=0)
    tl.store(out_ptr + index, uniform(seed, position, COUNTER), mask=mask)


def philox_uniform(seed: torch.Tensor, position: torch.Tensor, counter: int) -> torch.Tensor:
    """See `reference.philox_uniform`."""
    seed, position = (x.contiguous() for x in torch.broadcast_tensors(seed, position))
    out = torch.empty(position.shape, dtype=torch.float32, device=position.device)
    if out.numel():
        block = 256
        _philox_kernel[(triton.cdiv(out.numel(), block),)](seed, position, out, out.numel(), COUNTER=counter, BLOCK=block, num_warps=4)
    return out
