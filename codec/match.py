"""Where token ids repeat: maximal runs that occurred earlier in the same text (`matches`), or in another one (`matches_in`, found by `anchors`).

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
ANCHOR_TOKENS = 16
ANCHOR_WINDOW = 64
"""N-grams of which one at least is an anchor: texts that share ANCHOR_TOKENS + ANCHOR_WINDOW - 1 tokens in a row share an anchor."""


class Match(NamedTuple):
    """Tokens [start, start + length) equal those of [source, source + length): of the same text, where source < start and the two may overlap, or of
    another one."""

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
    """
    own = np.asarray(ids, np.int64)
    return _extended(own, own, earlier_places(own, tokens), start, tokens)


def matches_in(ids: Sequence[int] | np.ndarray, source: Sequence[int] | np.ndarray, tokens: int = MIN_TOKENS) -> list[Match]:
    """The runs of ids that occur in another text, in order and without overlap, each as long as it goes on; `Match.source` is a place of that text.

    A run begins at the last place of the other text that has the same `tokens` ids, and is extended to both sides.
    """
    own, other = np.asarray(ids, np.int64), np.asarray(source, np.int64)
    hashes, known = ngram_hashes(own, tokens), ngram_hashes(other, tokens)
    if not len(hashes) or not len(known):
        return []
    order = np.argsort(known, kind="stable")
    last = np.searchsorted(known[order], hashes, side="right") - 1
    places = np.where(last >= 0, order[np.maximum(last, 0)], -1)
    for n in range(tokens):  # absent ones, and equal hashes of other tokens
        places[(places >= 0) & (own[n : n + len(hashes)] != other[places + n])] = -1
    return _extended(own, other, places, 0, tokens)


def anchors(ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places int64 [A] of n-grams of ANCHOR_TOKENS tokens that stand for a text, and their hashes uint64 [A]: the least of
    every ANCHOR_WINDOW in a row.

    Two texts choose the same ones where they agree ("winnowing": Schleimer, Wilkerson and Aiken, SIGMOD 2003).
    """
    hashes = ngram_hashes(ids, ANCHOR_TOKENS)
    if not len(hashes):
        return np.zeros(0, np.int64), hashes
    windows = np.lib.stride_tricks.sliding_window_view(hashes, min(ANCHOR_WINDOW, len(hashes)))
    places = np.unique(windows.argmin(1) + np.arange(len(windows)))
    return places, hashes[places]


def _extended(own: np.ndarray, other: np.ndarray, places: np.ndarray, start: int, tokens: int) -> list[Match]:
    """The runs from place `start` on, given for each place one in `other` with the same `tokens` ids, or -1."""
    candidates = np.flatnonzero(places >= 0).tolist()
    found: list[Match] = []
    done = start
    n = bisect_left(candidates, start)
    while n < len(candidates):
        at = candidates[n]
        source = int(places[at])
        back = 0
        while at - back > done and source - back > 0 and own[at - back - 1] == other[source - back - 1]:
            back += 1
        length = tokens + _agreement(own[at + tokens :], other[source + tokens :])
        found.append(Match(at - back, source - back, length + back))
        done = at + length
        n = bisect_left(candidates, done, n)
    return found


def _agreement(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids both begin with."""
    total, most = 0, min(len(a), len(b))
    while total < most:
        left = a[total : min(total + _BLOCK_TOKENS, most)]
        differs = np.flatnonzero(left != b[total : total + len(left)])
        if len(differs):
            return total + int(differs[0])
        total += len(left)
    return total
