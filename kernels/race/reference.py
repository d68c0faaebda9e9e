"""Exponential races: index i of row p wins when E_i / p_i is smallest, E_i independent exponentials of rate 1. The meaning, in NumPy.

The winner has distribution p. With the noise a function of (seed, position, index) alone, two rows p and q that draw at the same position
name the same index with probability at least (1 - d) / (1 + d), d their total variation, although neither knows the other: Daliri,
Musco, Suresh: "Coupling without communication and drafter-invariant speculative decoding" (2024).

Noise comes in blocks of 64 indices. The least of 64 exponentials is itself exponential, of rate 64; which index has it is uniform, and the
others exceed it by exponentials of rate 1 (they have no memory). So the least of a block is drawn first, and bounds E_i / p_i from below by
a division by the block's largest p: few blocks need the noise of their indices. Axes: n rows, V vocabulary, K blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.philox.reference import philox_words

COUNTER_RACE_BLOCK, COUNTER_RACE = 3, 4  # after those of kernels.accept
RACE_BLOCK = 64
FIRST_BLOCKS = 8  # blocks whose indices get their noise at once; more only where one of the others could still win

Floats = NDArray[np.float64]


def exponentials(seed: int, position: int, vocab: int) -> Floats:
    """The noise E [V] of one row: what `race` evaluates in parts."""
    seeds, positions = np.array([seed], np.uint64), np.array([position], np.uint64)
    least, first = _block_noise(seeds, positions, -(-vocab // RACE_BLOCK))
    blocks = np.arange(least.shape[1])[None]
    return _index_noise(seeds, positions, blocks, least, first).reshape(-1)[:vocab]


def race(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one index per row: the smallest E_i / p_i, the first of equal ones.

    probs [n, V] float32, >= 0 and finite, at least one positive a row; seeds, positions [n] int64. Returns [n] int64 on their device. Philox
    counters are (position low, position high, counter, number), number a block's or an index's; the least of a block is
    -log(1 - v) / 64 with v = (first word + 1/2) 2^-32, its place the second word's low six bits; an index's excess is -log(1 - v).
    """
    rows = probs.detach().cpu()
    n, vocab = rows.shape
    whole = vocab - vocab % RACE_BLOCK
    largest = rows[:, :whole].reshape(n, whole // RACE_BLOCK, RACE_BLOCK).amax(-1)
    if whole < vocab:
        largest = torch.cat((largest, rows[:, whole:].amax(-1, keepdim=True)), 1)
    values, peaks = rows.numpy(), largest.numpy().astype(np.float64)
    keys, places = seeds.cpu().numpy().astype(np.uint64), positions.cpu().numpy().astype(np.uint64)
    least, first = _block_noise(keys, places, peaks.shape[1])
    with np.errstate(divide="ignore"):
        bounds = least / peaks
    winners = np.zeros(n, np.int64)
    open_rows, count = np.arange(n), FIRST_BLOCKS
    while len(open_rows):
        count = min(count, peaks.shape[1])
        own = bounds[open_rows]
        nearest = np.sort(np.argpartition(own, count - 1, axis=1)[:, :count], axis=1)
        at = (open_rows[:, None], nearest)
        noise = _index_noise(keys[open_rows], places[open_rows], nearest, least[at], first[at])
        index = nearest[..., None] * RACE_BLOCK + np.arange(RACE_BLOCK)
        p = np.where(index < vocab, values[open_rows[:, None, None], np.minimum(index, vocab - 1)], 0).astype(np.float64)
        with np.errstate(divide="ignore"):
            times = (noise / p).reshape(len(open_rows), -1)
        best = times.argmin(1)
        winners[open_rows] = index.reshape(len(open_rows), -1)[np.arange(len(open_rows)), best]
        np.put_along_axis(own, nearest, np.inf, 1)
        open_rows = open_rows[own.min(1) < times.min(1)]
        count *= 8
    return torch.from_numpy(winners).to(probs.device)


def _block_noise(seeds: NDArray[np.uint64], positions: NDArray[np.uint64], blocks: int) -> tuple[Floats, NDArray[np.int64]]:
    """Least exponential of every block [n, K], and the index within the block that has it [n, K]."""
    words = _words(seeds[:, None], positions[:, None], COUNTER_RACE_BLOCK, np.arange(blocks, dtype=np.uint64)[None])
    return _exponential(words[0]) / RACE_BLOCK, (words[1] & (RACE_BLOCK - 1)).astype(np.int64)


def _index_noise(
    seeds: NDArray[np.uint64], positions: NDArray[np.uint64], blocks: NDArray[Any], least: Floats, first: NDArray[np.int64]
) -> Floats:
    """Exponentials [n, k, 64] of the indices of blocks [n, k], whose least ones and their places are given [n, k]."""
    inner = np.arange(RACE_BLOCK)
    index = (blocks[..., None] * RACE_BLOCK + inner).astype(np.uint64)
    excess = _exponential(_words(seeds[:, None, None], positions[:, None, None], COUNTER_RACE, index)[0])
    return least[..., None] + np.where(inner == first[..., None], 0.0, excess)


def _words(seeds: NDArray[np.uint64], positions: NDArray[np.uint64], counter: int, numbers: NDArray[np.uint64]) -> tuple[Any, ...]:
    zero = np.zeros(np.broadcast_shapes(positions.shape, numbers.shape), np.uint64)  # of the full shape, so that every word is an array
    return philox_words((positions + zero, (positions >> 32) + zero, zero + counter, numbers + zero), (seeds, seeds >> 32))


def _exponential(words: NDArray[np.uint64]) -> Floats:
    """-log(1 - v) of v = (word + 1/2) 2^-32: small values keep their precision."""
    return -np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32)
