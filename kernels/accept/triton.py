"""Triton kernel of `accept`: one launch, one program a request, nothing read back; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.accept.reference import COUNTER_ACCEPT, COUNTER_SAMPLE, SAMPLE_BLOCK, Accepted
from kernels.philox.triton import uniform


@triton.jit
def _accept_kernel(
    target_ptr,
    draft_ptr,
    token_ptr,
    num_drafts_ptr,
    seed_ptr,
    position_ptr,
    accepted_ptr,
    next_ptr,
    sums_ptr,
    num_requests,
    vocab,
    num_tiles,
    even_drafts,
    COUNTER_A: tl.constexpr,
    COUNTER_S: tl.constexpr,
    REQUESTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    request = tl.program_id(0)
    if EVEN:
        draft_start = request.to(tl.int64) * even_drafts
    else:
        everyone = tl.arange(0, REQUESTS)
        before = tl.load(num_drafts_ptr + everyone, mask=(everyone < num_requests) & (everyone < request), other=0)
        draft_start = tl.sum(before, 0)
    target_start = draft_start + request
    drafts = tl.load(num_drafts_ptr + request)
    seed = tl.load(seed_ptr + request)
    position = tl.load(position_ptr + request)

    accepted = drafts * 0
    going = accepted == 0
    for step in range(drafts):
        token = tl.load(token_ptr + draft_start + step)
        p = tl.load(target_ptr + (target_start + step) * vocab + token)
        q = tl.load(draft_ptr + (draft_start + step) * vocab + token)
        going = going & (uniform(seed, position + step, COUNTER_A) * q < p)
        accepted += going.to(tl.int64)

    p_row = target_ptr + (target_start + accepted) * vocab
    q_row = draft_ptr + (draft_start + accepted) * vocab
    rejected = accepted < drafts
    q_words = tl.where(rejected, vocab, 0)
    # Level one: float64 sums of blocks of BLOCK words, of p and of the residual max(p - q, 0), kept in scratch.
    rows, inner = tl.arange(0, TILE), tl.arange(0, BLOCK)
    p_sums = sums_ptr + request.to(tl.int64) * 2 * num_tiles * TILE
    r_sums = p_sums + num_tiles * TILE
    for tile in range(num_tiles):
        block = tile * TILE + rows
        word = block[:, None] * BLOCK + inner[None, :]
        p = tl.load(p_row + word, mask=word < vocab, other=0.0)
        q = tl.load(q_row + word, mask=word < q_words, other=0.0)
        tl.store(p_sums + block, tl.sum(p.to(tl.float64), 1))
        tl.store(r_sums + block, tl.sum(tl.maximum(p - q, 0.0).to(tl.float64), 1))
    tl.debug_barrier()
    blocks = tl.arange(0, BLOCKS)
    inside = blocks < num_tiles * TILE
    p_block = tl.load(p_sums + blocks, mask=inside, other=0.0)
    r_block = tl.load(r_sums + blocks, mask=inside, other=0.0)
    use_residual = rejected & (tl.sum(r_block, 0) > 0)
    mass = tl.where(use_residual, r_block, p_block)
    ends = tl.cumsum(mass, 0)
    # Ends past the vocabulary repeat the total; the total itself is the largest end (sums of non-negative terms never fall).
    total = tl.max(ends, 0)
    draw = uniform(seed, position + accepted, COUNTER_S).to(tl.float64)
    wanted = draw * total
    # A parallel scan may round two equal ends apart, so a block must hold mass of its own to be chosen.
    first = tl.min(tl.where((ends > wanted) & (mass > 0), blocks, BLOCKS), 0)
    chosen = tl.minimum(first, tl.max(tl.where(mass > 0, blocks, 0), 0))
    start = tl.max(tl.where(blocks == chosen - 1, ends, 0.0), 0)
    # Level two: inside the chosen block.
    word = chosen * BLOCK + inner
    p = tl.load(p_row + word, mask=word < vocab, other=0.0)
    q = tl.load(q_row + word, mask=word < q_words, other=0.0)
    weight = tl.where(use_residual, tl.maximum(p - q, 0.0), p)
    inner_ends = tl.cumsum(weight.to(tl.float64), 0)
    first = tl.min(tl.where((inner_ends > wanted - start) & (weight > 0), inner, BLOCK), 0)
    offset = tl.minimum(first, tl.max(tl.where(weight > 0, inner, 0), 0))
    tl.store(accepted_ptr + request, accepted)
    tl.store(next_ptr + request, (chosen * BLOCK + offset).to(tl.int64))


def accept_bounds(num_requests: int, num_drafts: int, vocab: int) -> tuple[int, int]:
    """(bytes, operations): one row of p and q a request, three operations a word."""
    return num_requests * vocab * 8 + num_drafts * 16, 3 * num_requests * vocab


def accept(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_tokens: torch.Tensor,
    num_drafts: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    max_drafts: int,
    *,
    even: bool = False,
    tile: int = 8,
    num_warps: int = 8,
) -> Accepted:
    """See `reference.accept`. tile: blocks of 1024 words a program reads at once."""
    batch, vocab = num_drafts.shape[0], target_probs.shape[1]
    device = target_probs.device
    num_accepted = torch.empty(batch, dtype=torch.int64, device=device)
    next_token = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return Accepted(num_accepted, next_token)
    num_tiles = triton.cdiv(triton.cdiv(vocab, SAMPLE_BLOCK), tile)
    sums = torch.empty(batch * 2 * num_tiles * tile, dtype=torch.float64, device=device)
    _accept_kernel[(batch,)](
        target_probs.contiguous(),
        draft_probs.contiguous(),
        draft_tokens.contiguous(),
        num_drafts.contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        num_accepted,
        next_token,
        sums,
        batch,
        vocab,
        num_tiles,
        max_drafts,
        COUNTER_A=COUNTER_ACCEPT,
        COUNTER_S=COUNTER_SAMPLE,
        REQUESTS=triton.next_power_of_2(batch),
        TILE=tile,
        BLOCK=SAMPLE_BLOCK,
        BLOCKS=triton.next_power_of_2(num_tiles * tile),
        EVEN=even,
        num_warps=num_warps,
    )
    return Accepted(num_accepted, next_token)
