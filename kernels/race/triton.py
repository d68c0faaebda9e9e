"""Triton kernel of `race`: noise is made where it is used, nothing of the vocabulary's size is written; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.race.reference import COUNTER_RACE, COUNTER_RACE_BLOCK, RACE_BLOCK

MAX_PARTS = 16  # programs a row


@triton.jit
def _exponential(word):
    """-log(1 - v), v = (word + 1/2) 2^-32, float32; a series where 1 - v would lose v's digits."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    return tl.where(v < 0.00390625, v * (1.0 + v * (0.5 + v * 0.33333334)), -tl.log(1.0 - v))


@triton.jit
def _race_kernel(
    probs_ptr,
    seed_ptr,
    position_ptr,
    time_ptr,
    index_ptr,
    vocab,
    tiles_per_part,
    PARTS: tl.constexpr,
    COUNTER_B: tl.constexpr,
    COUNTER_I: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    low = position.to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    p_row = probs_ptr + row.to(tl.int64) * vocab
    inner = tl.arange(0, BLOCK)
    endless = float("inf")
    best = tl.full([], float("inf"), tl.float32)
    winner = tl.full([], 0, tl.int32)
    for tile in range(part * tiles_per_part, (part + 1) * tiles_per_part):
        block = tile * TILE + tl.arange(0, TILE)
        index = block[:, None] * BLOCK + inner[None, :]
        p = tl.load(p_row + index, mask=index < vocab, other=0.0)
        zero = (block * 0).to(tl.uint32)
        word, place, _third, _fourth = tl.philox(seed, zero + low, zero + high, zero + COUNTER_B, block.to(tl.uint32))
        least = _exponential(word) / BLOCK
        first = (place & (BLOCK - 1)).to(tl.int32)
        peak = tl.max(p, 1)
        bound = tl.where(peak > 0, least / peak, endless)
        if tl.min(bound, 0) < best:
            zeros = (index * 0).to(tl.uint32)
            words, _seconds, _thirds, _fourths = tl.philox(seed, zeros + low, zeros + high, zeros + COUNTER_I, index.to(tl.uint32))
            noise = least[:, None] + tl.where(inner[None, :] == first[:, None], 0.0, _exponential(words))
            time = tl.where(p > 0, noise / p, endless)
            soonest = tl.min(tl.min(time, 1), 0)
            if soonest < best:
                best = soonest
                winner = tl.min(tl.min(tl.where(time == soonest, index, vocab), 1), 0)
    tl.store(time_ptr + row * PARTS + part, best)
    tl.store(index_ptr + row * PARTS + part, winner.to(tl.int64))


def race_floors(num_rows: int, vocab: int) -> tuple[int, int]:
    """(bytes, operations): every probability is read once; the least of 64 indices costs one number of 80 operations and a logarithm."""
    return num_rows * vocab * 4, num_rows * vocab * 84 // RACE_BLOCK


def race(probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, *, tile: int = 16, num_warps: int = 4) -> torch.Tensor:
    """See `reference.race`. tile: blocks of 64 indices a program reads at once."""
    n, vocab = probs.shape
    num_tiles = triton.cdiv(triton.cdiv(vocab, RACE_BLOCK), tile)
    parts = min(MAX_PARTS, triton.next_power_of_2(num_tiles))
    times = torch.empty(n, parts, dtype=torch.float32, device=probs.device)
    indices = torch.empty(n, parts, dtype=torch.int64, device=probs.device)
    if n == 0:
        return indices.new_empty(0)
    _race_kernel[(n, parts)](
        probs.contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        times,
        indices,
        vocab,
        triton.cdiv(num_tiles, parts),
        PARTS=parts,
        COUNTER_B=COUNTER_RACE_BLOCK,
        COUNTER_I=COUNTER_RACE,
        TILE=tile,
        BLOCK=RACE_BLOCK,
        num_warps=num_warps,
    )
    return indices.gather(1, times.argmin(1, keepdim=True))[:, 0]
