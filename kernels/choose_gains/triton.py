"""Triton kernel of `choose_gains`; `reference.py` says what it means. A program takes a token: gains down, components across a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.choose_gains.reference import SAMPLE, Prices
from kernels.rans.shared import GAIN_CLASSES, ZERO_GAIN

_GAINS = tl.constexpr(16)
_EVERY = tl.constexpr(SAMPLE)


@triton.jit
def _cost(
    q_row_ptr,
    class_ptr,
    shift,
    gains,
    limit_ptr,
    centre_ptr,
    zero_ptr,
    excess_ptr,
    gain_price_ptr,
    components,
    num_classes,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Code lengths, int64 [ROWS], of every STEP-th component under each of the gains int32 [ROWS]."""
    move = (gains[:, None] - ZERO_GAIN) * GAIN_CLASSES
    total = tl.load(gain_price_ptr + gains)
    for start in range(0, components, BLOCK * STEP):
        component = start + STEP * tl.arange(0, BLOCK)
        known = component < components
        q = tl.load(q_row_ptr + component, mask=known, other=0)
        size = tl.abs(q[None, :])
        own = tl.minimum(tl.maximum(tl.load(class_ptr + component, mask=known, other=0) + shift, 0), num_classes - 1)
        own = tl.minimum(tl.maximum(own[None, :] + move, 0), num_classes - 1)
        mask = known[None, :] & (own >= 0)
        size = tl.minimum(size, tl.load(limit_ptr + own, mask=mask, other=0) + 1)
        excess = tl.load(excess_ptr + tl.load(centre_ptr + own, mask=mask, other=0) + size, mask=mask & (size > 0), other=0)
        total += tl.sum(tl.load(zero_ptr + own, mask=mask, other=0) + excess.to(tl.int64), 1)
    return total


@triton.jit
def _choose_kernel(
    q_ptr,
    class_ptr,
    shift_ptr,
    limit_ptr,
    centre_ptr,
    zero_ptr,
    excess_ptr,
    gain_price_ptr,
    out_ptr,
    components,
    num_classes,
    stride_token,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    shift = tl.load(shift_ptr + token)
    q_row_ptr = q_ptr + token * stride_token
    gains = tl.arange(0, _GAINS)
    every = _cost(
        q_row_ptr,
        class_ptr,
        shift,
        gains,
        limit_ptr,
        centre_ptr,
        zero_ptr,
        excess_ptr,
        gain_price_ptr,
        components,
        num_classes,
        _EVERY,
        _GAINS,
        BLOCK,
    )
    # the lowest gain of the least cost, found by whole numbers alone
    best = tl.min(tl.where(every == tl.min(every, 0), gains, _GAINS), 0)
    order = tl.arange(0, 4)
    near = tl.minimum(tl.maximum(best + tl.minimum(order, 2) - 1, 0), _GAINS - 1)
    whole = _cost(
        q_row_ptr,
        class_ptr,
        shift,
        near,
        limit_ptr,
        centre_ptr,
        zero_ptr,
        excess_ptr,
        gain_price_ptr,
        components,
        num_classes,
        1,
        4,
        4 * BLOCK,
    )
    chosen = tl.min(tl.where(whole == tl.min(whole, 0), near, _GAINS), 0)
    tl.store(out_ptr + token, chosen.to(tl.uint8))


def choose_gains_bounds(num_tokens: int, num_components: int) -> tuple[int, int]:
    """(bytes, operations): integers once; seven lookups' worth of gains a component (16 on every fourth, three on all), ten operations each."""
    return 4 * num_tokens * num_components, 70 * num_tokens * num_components


def choose_gains(q: torch.Tensor, classes: torch.Tensor, shifts: torch.Tensor, prices: Prices) -> torch.Tensor:
    """See `reference.choose_gains`; rows of q are dense. Nothing is waited for."""
    tokens, components = q.shape
    if q.stride(1) != 1:
        raise ValueError("choose_gains reads rows (pass a tensor whose last axis is dense)")
    out = torch.empty(tokens, dtype=torch.uint8, device=q.device)
    if tokens:
        _choose_kernel[(tokens,)](
            q,
            classes,
            shifts,
            prices.limits,
            prices.centres,
            prices.zeros,
            prices.excess,
            prices.gains,
            out,
            components,
            len(prices.limits),
            q.stride(0),
            BLOCK=64,
            num_warps=4,
        )
    return out
