"""Counter-based uniform random numbers: the meaning, in plain PyTorch integers.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A number is a pure function of
(seed, position, counter): no state is carried, so a request draws the same numbers alone, in any batch, and after a rollback.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
FEW = 16  # numbers up to which Python's own integers beat a hundred tensor operations on a CPU

Word = TypeVar("Word", int, Tensor, NDArray[Any])


def philox_words(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Four 32-bit output words of Philox4x32-10 for a counter of four and a key of two 32-bit words: int64 tensors of one shape, uint64 arrays, or
    integers."""
    c0, c1, c2, c3 = (c & MASK32 for c in counter)
    k0, k1 = key[0] & MASK32, key[1] & MASK32
    for _ in range(ROUNDS):
        # The product wraps modulo 2^64; its bit pattern is the unsigned one, so shift and mask give the unsigned halves.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def philox_uniform(seed: Tensor, position: Tensor, counter: int) -> Tensor:
    """Uniform numbers in [0, 1) on a grid of 2^-24, float32, shape of the broadcast inputs.

    seed, position: int64, broadcastable. counter: 0 <= counter < 2^32. Key = the seed's two halves; counter = (position low, position high,
    counter, 0); the number is the first output word's upper 24 bits.
    """
    seed, position = torch.broadcast_tensors(seed, position)
    if position.device.type == "cpu" and position.numel() <= FEW:
        pairs = zip(seed.flatten().tolist(), position.flatten().tolist(), strict=True)
        numbers = [(philox_words((p, p >> 32, counter, 0), (s, s >> 32))[0] >> 8) * 2.0**-24 for s, p in pairs]
        return torch.tensor(numbers, dtype=torch.float32).view(position.shape)
    counters = torch.full_like(position, counter)
    words = philox_words((position, position >> 32, counters, torch.zeros_like(position)), (seed, seed >> 32))
    return (words[0] >> 8).to(torch.float32) * 2.0**-24
