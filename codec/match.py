"""Where token ids repeat: maximal runs that occurred earlier, in the same text or in one put before it.

A run is found by n-grams: two places agree for at least `MIN_TOKENS` tokens. Linear in the number of tokens but for one sort.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codec.errors import BadInput

MIN_TOKENS = 8
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BLOCK_TOKENS = 512


class Match(NamedTuple):
    """Tokens [start, start + length) equal those of [source, source + length); source < start. The two may overlap."""

    start: int
    source: int
    length: int


def ngram_hashes(ids: Sequence[int] | np.ndarray, tokens: int = MIN_TOKENS) -> np.ndarray:
    """uint64 [T - tokens + 1]: of the n-gram that begins at each place; equal ones have equal hashes. Empty for fewer than `tokens` ids.

    Raises BadInput for n-grams of no tokens.
    """
    if tokens < 1:
        raise BadInput(f"n-grams of {tokens} tokens", "give at least 1")
    own = np.asarray(ids, np.uint64)
    count = max(0, len(own) - tokens + 1)
    found = np.zeros(count, np.uint64)
    for n in range(tokens):
        found *= _FACTOR  # of 64 bits: what runs over is dropped
        found += own[n : n + count] + np.uint64(1)
        found ^= found >> np.uint64(29)
    return found


def earlier_places(ids: Sequence[int] | np.ndarray, tokens: int = MIN_TOKENS) -> np.ndarray:
    """int64 [T - tokens + 1]: the latest earlier place with the same n-gram, or -1."""
    own, hashes = np.asarray(ids, np.int64), ngram_hashes(ids, tokens)
    order = np.argsort(hashes, kind="stable")
    previous = np.full(len(hashes), -1, np.int64)
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    previous[order[same + 1]] = order[same]
    found = np.flatnonzero(previous >= 0)
    differs = np.zeros(len(found), bool)
    for n in range(tokens):  # equal hashes of other tokens
        differs |= own[found + n] != own[previous[found] + n]
    previous[found[differs]] = -1
    return previous


def matches(ids: Sequence[int] | np.ndarray, start: int = 0, tokens: int = MIN_TOKENS) -> list[Match]:
    """The runs of ids [start, T) that occurred before, in order and without overlap, each as long as it goes on.

    A run begins at the latest place that has the same `tokens` ids, and is extended to both sides. With start > 0 the tokens before it are
    sources only.
    To look for repetitions of another text, put its ids first and give their number as `start`.
    """
    own = np.asarray(ids, np.int64)
    previous = earlier_places(own, tokens)
    candidates = np.flatnonzero(previous >= 0).tolist()
    found: list[Match] = []
    done = start
    n = bisect_left(candidates, start)
    while n < len(candidates):
        at = candidates[n]
        source = int(previous[at])
        back = 0
        while at - back > done and source - back > 0 and own[at - back - 1] == own[source - back - 1]:
            back += 1
        length = tokens + _agreement(own, at + tokens, source + tokens)
        found.append(Match(at - back, source - back, length + back))
        done = at + length
        n = bisect_left(candidates, done, n)
    return found


def _agreement(ids: np.ndarray, a: int, b: int) -> int:
    """How many ids from a on equal those from b < a on."""
    total = 0
    while a + total < len(ids):
        left = ids[a + total : a + total + _BLOCK_TOKENS]
        differs = np.flatnonzero(left != ids[b + total : b + total + len(left)])
        if len(differs):
            return total + int(differs[0])
        total += len(left)
    return total
