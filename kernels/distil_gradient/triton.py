"""Triton kernel of `distil_gradient`: a row a program, which reads its logits three times and writes nothing of their number in float32;
`reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.distil_gradient.reference import DistilRows

_BLOCK = 2048


@triton.jit
def _distil_gradient_kernel(
    draft_ptr,
    target_ptr,
    log_sum_ptr,
    weight_ptr,
    sums_ptr,
    best_ptr,
    size,
    mix,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    draft_ptr += row * size
    target_ptr += row * size
    lanes = tl.arange(0, BLOCK)
    # a lane keeps the largest of its logits and the sum of exponentials below it; numbers this low add nothing
    peak = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        at = start + lanes
        x = tl.load(draft_ptr + at, mask=at < size, other=-1e30).to(tl.float32)
        higher = tl.maximum(peak, x)
        total = total * tl.exp(peak - higher) + tl.exp(x - higher)
        place = tl.where(x > peak, at, place)
        peak = higher
    largest = tl.max(peak, 0)
    log_total = largest + tl.log(tl.sum(total * tl.exp(peak - largest), 0))
    tl.store(best_ptr + row, tl.min(tl.where(peak == largest, place, size), 0).to(tl.int64))

    log_sum = tl.load(log_sum_ptr + row)
    mass = tl.zeros((BLOCK,), tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    accepted = tl.zeros((BLOCK,), tl.float32)
    divergence = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + lanes
        log_q = tl.load(draft_ptr + at, mask=at < size, other=-1e30).to(tl.float32) - log_total
        log_p = tl.load(target_ptr + at, mask=at < size, other=-1e30).to(tl.float32) - log_sum
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        mass += p
        share += tl.where(q < p, q, 0.0)
        accepted += tl.minimum(p, q)
        divergence += p * (log_p - log_q)
    whole = tl.sum(mass, 0)
    slope = whole + (tl.sum(share, 0) - whole) * mix
    tl.store(sums_ptr + 3 * row, tl.sum(accepted, 0))
    tl.store(sums_ptr + 3 * row + 1, tl.sum(divergence, 0))
    tl.store(sums_ptr + 3 * row + 2, whole)

    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_ptr + row)
    for start in range(0, size, BLOCK):
        at = start + lanes
        q = tl.exp(tl.load(draft_ptr + at, mask=at < size, other=-1e30).to(tl.float32) - log_total)
        p = tl.exp(tl.load(target_ptr + at, mask=at < size, other=-1e30).to(tl.float32) - log_sum)
        gradient = q * slope - (1.0 - mix) * p - mix * tl.where(q < p, q, 0.0)
        tl.store(draft_ptr + at, (gradient * weight).to(draft_ptr.dtype.element_ty), mask=at < size)


def distil_gradient(draft: Tensor, target: Tensor, log_sum: Tensor, mix: float, weight: Tensor | None = None) -> DistilRows:
    """See `reference.distil_gradient`."""
    assert draft.is_contiguous() and target.is_contiguous() and draft.shape == target.shape
    rows, size = draft.shape
    sums = torch.empty(rows, 3, device=draft.device)
    best = torch.empty(rows, dtype=torch.int64, device=draft.device)
    if rows:
        _distil_gradient_kernel[(rows,)](
            draft,
            target,
            log_sum,
            log_sum if weight is None else weight.contiguous(),
            sums,
            best,
            size,
            float(mix),
            WEIGHTED=weight is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return DistilRows(*sums.unbind(1), best)
