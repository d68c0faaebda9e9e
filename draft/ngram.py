"""Drafts from the request's own tokens: what followed the last tokens where they occurred before.

The longest match is found through hash chains over pairs of tokens, as in LZ77 compressors (Ziv and Lempel, 1977; the chains are those of RFC 1951,
section 4); drafting from the prompt so is "prompt lookup decoding" (Saxena, 2023; Yang et al., "Inference with Reference", 2023). Nothing is run,
so such drafts cost their rows in the verification alone. They do not depend on random numbers: the distribution they are drawn from is a point mass.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST = 2  # tokens of a match, and of a hashed key
LONGEST = 32  # a longer match counts as one of these
MAX_CANDIDATES_TRIED = 16  # earlier occurrences of the last pair that are compared
MAX_INDEXED = 1 << 16  # latest tokens that can be found again
_FIRST_TABLE = 1 << 8
_END = 16  # tokens by which a text that was cut and went on is told
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA6B)  # odd, so that all bits of both tokens reach the key


@dataclass(frozen=True)
class Match:
    """length: of the last tokens that occurred before, SHORTEST to LONGEST. start: index of the token that followed them there."""

    length: int
    start: int


class NgramIndex:
    """Where pairs of a growing list of tokens occurred: at most 8 bytes for each of the latest MAX_INDEXED tokens, and O(1) work a token.

    The list is the caller's and is not copied. Where it was cut or its end is another, it is indexed again.
    """

    def __init__(self) -> None:
        self.length = 0  # tokens indexed
        self._heads = array("i", [-1]) * _FIRST_TABLE  # key -> index of the latest pair's last token
        self._earlier = (
            array("i", [-1]) * _FIRST_TABLE
        )  # ring: index of a pair's last token -> that of the pair before it with the same key
        self._last: Match | None = None
        self._end: list[int] = []  # the last tokens indexed

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return self._heads.itemsize * (len(self._heads) + len(self._earlier))

    def follow(self, tokens: Sequence[int]) -> None:
        """Index the tokens that joined since the last call."""
        wanted, size = min(MAX_INDEXED, len(tokens)), len(self._heads)
        if wanted > size or len(tokens) < self.length or list(tokens[self.length - len(self._end) : self.length]) != self._end:
            size = max(size, 1 << (wanted - 1).bit_length())
            self._heads, self._earlier = array("i", [-1]) * size, array("i", [-1]) * size
            self.length, self._last = max(0, len(tokens) - size), None
        mask, heads, earlier = len(self._heads) - 1, self._heads, self._earlier
        for at in range(max(1, self.length), len(tokens)):
            key = _key(tokens[at - 1], tokens[at], mask)
            earlier[at & mask] = heads[key]
            heads[key] = at
        self.length, self._end = len(tokens), list(tokens[-_END:])

    def match(self, tokens: Sequence[int]) -> Match | None:
        """The longest earlier occurrence of the last of `tokens`, the latest of equals; None where even the last pair is new.

        Compares MAX_CANDIDATES_TRIED occurrences at most; one that was found for the tokens before is followed as long as it holds.
        """
        self.follow(tokens)
        end = len(tokens)
        if end <= SHORTEST:
            return None
        last, best_length, best_end = self._last, SHORTEST - 1, -1
        if last is not None and last.start < end - 1:
            length = _common(tokens, last.start, end - 1)
            if length >= LONGEST:
                self._last = Match(LONGEST, last.start + 1)
                return self._last
            if length >= SHORTEST:
                best_length, best_end = length, last.start
        mask = len(self._heads) - 1
        at = self._earlier[(end - 1) & mask]  # the last pair itself is the latest of its key
        for _ in range(MAX_CANDIDATES_TRIED):
            if at < 1 or at < end - len(self._heads):
                break  # the chain's end, or what was overwritten
            length = _common(tokens, at, end - 1)
            if length > best_length or (length == best_length and at > best_end):
                best_length, best_end = length, at
            if best_length >= LONGEST:
                break
            at = self._earlier[at & mask]
        self._last = Match(best_length, best_end + 1) if best_length >= SHORTEST else None
        return self._last


def continuation(tokens: Sequence[int], match: Match, count: int) -> list[int]:
    """The `count` tokens that followed the match; where these run into the end of `tokens` they go on with themselves, as a repeated text does."""
    known = list(tokens[match.start : match.start + count])
    while len(known) < count:
        known += known[: count - len(known)]
    return known


def _key(first: int, second: int, mask: int) -> int:
    mixed = (first * _MULTIPLIERS[0] + second * _MULTIPLIERS[1]) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)) & mask


def _common(tokens: Sequence[int], one: int, other: int) -> int:
    """How many tokens up to index `one` equal those up to index `other`, at most LONGEST; one < other."""
    length = 0
    while length < LONGEST and one - length >= 0 and tokens[one - length] == tokens[other - length]:
        length += 1
    return length
