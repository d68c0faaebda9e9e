"""Triton kernel of `block_inputs`, one program a request; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["offset"])  # one compilation for all passes of a block
def _block_inputs_kernel(
    length_ptr,
    first_ptr,
    limit_ptr,
    table_ptr,
    position_ptr,
    slot_ptr,
    context_ptr,
    offset,
    stride_table,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    near = tl.arange(0, BLOCK)
    written = near < COUNT
    start = tl.load(length_ptr + request) + offset
    limit = tl.load(limit_ptr + request)
    position = start + near
    inside = written & (position >= tl.load(first_ptr + request)) & (position < limit)
    page = tl.load(table_ptr + request * stride_table + position // PAGE, mask=inside, other=0).to(tl.int64)
    at = request * COUNT + near
    tl.store(position_ptr + at, tl.where(inside, position, -1), mask=written)
    tl.store(slot_ptr + at, tl.where(inside, page * PAGE + position % PAGE, -1), mask=written)
    tl.store(context_ptr + request, tl.maximum(tl.minimum(start + COUNT, limit), 0).to(tl.int32))


def block_inputs(
    lengths: torch.Tensor,
    firsts: torch.Tensor,
    limits: torch.Tensor,
    page_table: torch.Tensor,
    offset: int,
    page_size: int,
    positions: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    """See `reference.block_inputs`."""
    batch = len(lengths)
    count = len(positions) // batch
    _block_inputs_kernel[(batch,)](
        lengths,
        firsts,
        limits,
        page_table,
        positions,
        slots,
        context_lens,
        offset,
        page_table.stride(0),
        COUNT=count,
        BLOCK=triton.next_power_of_2(count),
        PAGE=page_size,
        num_warps=1,
    )
