"""Triton kernels of `reconstruct`; `reference.py` says what it means.

A program takes a few tokens, neighbours in memory, through all of their components, so that it knows how many escapes came before each one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.rans.shared import GAIN_CLASSES, ZERO_GAIN
from kernels.reconstruct.reference import MOST, Escapes, Points

_TOKENS = 16  # of a program: 32 bytes of int16, what memory is read in
_COMPONENTS = 64


@triton.jit
def _class_of(base, shift, gain_shift, num_classes):
    """Classes [tokens, components]: moved by the token's step, then by its gain, each within the classes there are."""
    own = tl.minimum(tl.maximum(base[None, :] + shift[:, None], 0), num_classes - 1)
    return tl.minimum(tl.maximum(own + gain_shift[:, None], 0), num_classes - 1)


# One compilation wherever a chunk's tokens begin: only strides of one are compiled in.
_POINTERS = ["q_ptr", "shift_ptr", "gain_ptr", "step_ptr", "remainder_ptr", "first_ptr", "place_ptr", "out_ptr", "count_ptr", "large_ptr"]
_NUMBERS = ["tokens", "components", "num_remainders", "stride_out"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _count_kernel(
    q_ptr,
    class_ptr,
    shift_ptr,
    gain_ptr,
    limit_ptr,
    count_ptr,
    tokens,
    components,
    num_classes,
    stride_token,
    stride_component,
    TOKENS: tl.constexpr,
    COMPONENTS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    wide = token.to(tl.int64)
    shift = tl.load(shift_ptr + token, mask=inside, other=0)
    gain_shift = GAIN_CLASSES * (tl.load(gain_ptr + token, mask=inside, other=0).to(tl.int32) - ZERO_GAIN)
    total = tl.zeros([TOKENS], tl.int32)
    for start in range(0, components, COMPONENTS):
        component = start + tl.arange(0, COMPONENTS)
        known = component < components
        mask = inside[:, None] & known[None, :]
        q = tl.load(q_ptr + wide[:, None] * stride_token + component[None, :].to(tl.int64) * stride_component, mask=mask, other=0)
        own = _class_of(tl.load(class_ptr + component, mask=known, other=0), shift, gain_shift, num_classes)
        limit = tl.load(limit_ptr + own, mask=mask, other=0)
        total += tl.sum((mask & (q.to(tl.int32) > limit)).to(tl.int32), 1)
    tl.store(count_ptr + token, total, mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _value_kernel(
    q_ptr,
    class_ptr,
    shift_ptr,
    gain_ptr,
    step_ptr,
    limit_ptr,
    offset_ptr,
    remainder_ptr,
    first_ptr,
    place_ptr,
    column_ptr,
    out_ptr,
    large_ptr,
    tokens,
    components,
    num_classes,
    num_remainders,
    stride_token,
    stride_component,
    stride_out,
    MOST: tl.constexpr,
    TOKENS: tl.constexpr,
    COMPONENTS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    wide = token.to(tl.int64)
    shift = tl.load(shift_ptr + token, mask=inside, other=0)
    gain_shift = GAIN_CLASSES * (tl.load(gain_ptr + token, mask=inside, other=0).to(tl.int32) - ZERO_GAIN)
    step = tl.load(step_ptr + token, mask=inside, other=0.0)
    place = tl.load(place_ptr + token, mask=inside, other=-1)
    before = tl.load(first_ptr + token, mask=inside, other=0)
    large = tl.zeros([TOKENS], tl.int32)
    for start in range(0, components, COMPONENTS):
        component = start + tl.arange(0, COMPONENTS)
        known = component < components
        mask = inside[:, None] & known[None, :]
        q = tl.load(q_ptr + wide[:, None] * stride_token + component[None, :].to(tl.int64) * stride_component, mask=mask, other=0)
        q = q.to(tl.int32)
        own = _class_of(tl.load(class_ptr + component, mask=known, other=0), shift, gain_shift, num_classes)
        limit = tl.load(limit_ptr + own, mask=mask, other=0)
        escaped = mask & (q > limit)
        rank = before[:, None] + tl.cumsum(escaped.to(tl.int64), 1) - 1
        before += tl.sum(escaped.to(tl.int64), 1)
        remainder = tl.load(remainder_ptr + rank, mask=escaped & (rank < num_remainders), other=0)
        size = limit + 1 + (remainder >> 1)
        large = tl.maximum(large, tl.max((escaped & (size > MOST)).to(tl.int32), 1))
        size = tl.minimum(size, MOST).to(tl.int32)
        q = tl.where(escaped, tl.where(remainder % 2 == 1, -size, size), q)
        sign = (q > 0).to(tl.float32) - (q < 0).to(tl.float32)
        offset = tl.load(offset_ptr + 4 * own + tl.minimum(tl.abs(q), 3), mask=mask, other=0.0)
        value = (q.to(tl.float32) + sign * offset) * step[:, None]
        column = tl.load(column_ptr + component, mask=known, other=0)
        to = out_ptr + place[:, None] * stride_out + column[None, :]
        tl.store(to, value.to(out_ptr.dtype.element_ty), mask=mask & (place >= 0)[:, None])
    tl.store(large_ptr + token, large.to(tl.int8), mask=inside)


def reconstruct_bounds(num_tokens: int, num_components: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without: integers in, components out, some ten operations each."""
    return num_tokens * num_components * (2 + element_bytes), 10 * num_tokens * num_components


def reconstruct(
    q: torch.Tensor,
    classes: torch.Tensor,
    shifts: torch.Tensor,
    gains: torch.Tensor,
    steps: torch.Tensor,
    points: Points,
    escapes: Escapes,
    places: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `reference.reconstruct`; q is read fastest with tokens adjacent. Nothing is waited for."""
    tokens, components = q.shape
    if out.stride(1) != 1:
        raise ValueError("reconstruct writes rows (pass a tensor whose last axis is dense)")
    if not tokens:
        return torch.zeros((), dtype=torch.bool, device=q.device)
    counts = torch.empty(tokens, dtype=torch.int32, device=q.device)
    large = torch.empty(tokens, dtype=torch.int8, device=q.device)
    shape = {"TOKENS": _TOKENS, "COMPONENTS": _COMPONENTS, "num_warps": 4}
    grid = (triton.cdiv(tokens, _TOKENS),)
    sizes = tokens, components, len(points.limits)
    _count_kernel[grid](q, classes, shifts, gains, points.limits, counts, *sizes, q.stride(0), q.stride(1), **shape)
    firsts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    _value_kernel[grid](
        q,
        classes,
        shifts,
        gains,
        steps,
        points.limits,
        points.offsets,
        escapes.remainders,
        firsts,
        places,
        columns,
        out,
        large,
        *sizes,
        len(escapes.remainders),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        MOST=MOST,
        **shape,
    )
    return (firsts[escapes.token_starts] != escapes.starts).any() | large.any()
