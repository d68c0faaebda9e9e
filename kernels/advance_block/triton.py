"""Triton kernel of `advance_block`, one program a request; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.advance_block.reference import BlockState

_MOST_STATES = 1024  # values of a state that a program copies at once


@triton.jit
def _advance_block_kernel(
    token_ptr,
    own_ptr,
    best_ptr,
    num_drafts_ptr,
    length_ptr,
    first_ptr,
    previous_ptr,
    last_ptr,
    out_ptr,
    matched_ptr,
    num_accepted_ptr,
    next_token_ptr,
    exits_ptr,
    hidden_ptr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS_KEPT: tl.constexpr,
    ACCEPTED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    near = tl.arange(0, BLOCK)
    at = request * (LENGTH + 1)
    num_drafts = tl.load(num_drafts_ptr + request)
    draft = tl.load(token_ptr + at + 1 + near, mask=near < LENGTH, other=0)
    own = tl.load(own_ptr + at + near, mask=near < LENGTH, other=0)
    parted = (near >= LENGTH) | (near >= num_drafts) | (draft != own)
    kept = tl.min(tl.where(parted, near, LENGTH), 0).to(tl.int64)
    following = tl.load(own_ptr + at + kept)
    if ACCEPTED:
        matched = tl.load(matched_ptr + request)
        kept = tl.where(matched, kept, tl.load(num_accepted_ptr + request))
        following = tl.where(matched, following, tl.load(next_token_ptr + request))
    best = tl.load(best_ptr + at + near, mask=near <= LENGTH, other=0)
    finite = tl.min(tl.where((best >= 0) | (near > num_drafts), 1, 0), 0)
    shown = tl.where(near == kept, following, draft)
    to = request * (LENGTH + 2)
    tl.store(out_ptr + to + 1 + near, shown, mask=near <= LENGTH)
    tl.store(out_ptr + to, tl.where(finite == 1, kept + 1, 0))
    length = tl.load(length_ptr + request)
    tl.store(previous_ptr + request, tl.load(token_ptr + at + kept))
    tl.store(last_ptr + request, tl.maximum(following, 0))
    tl.store(first_ptr + request, length + (1 if RUNS_KEPT else kept))
    tl.store(length_ptr + request, length + kept + 1)
    if SIZE > 0:
        batch = tl.num_programs(0)
        for start in range(0, SIZE, BLOCK_SIZE):
            value = start + tl.arange(0, BLOCK_SIZE)
            state = tl.load(exits_ptr + (kept * batch + request) * SIZE + value, mask=value < SIZE)
            tl.store(hidden_ptr + request * SIZE + value, state, mask=value < SIZE)


def advance_block(
    tokens: torch.Tensor,
    own: torch.Tensor,
    best: torch.Tensor,
    num_drafts: torch.Tensor,
    state: BlockState,
    out: torch.Tensor,
    *,
    runs_kept: bool,
    accepted: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    exits: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> None:
    """See `reference.advance_block`; all tensors contiguous."""
    batch, length = len(tokens), tokens.shape[1] - 1
    size = 0 if exits is None else exits.shape[-1]
    _advance_block_kernel[(batch,)](
        tokens,
        own,
        best,
        num_drafts,
        *state,
        out,
        *(accepted or (num_drafts, num_drafts, num_drafts)),
        num_drafts if exits is None else exits,
        num_drafts if hidden is None else hidden,
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length + 1),
        RUNS_KEPT=runs_kept,
        ACCEPTED=accepted is not None,
        SIZE=size,
        BLOCK_SIZE=min(_MOST_STATES, triton.next_power_of_2(max(size, 1))),
        num_warps=1 if size <= 256 else 4,
    )
