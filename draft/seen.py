"""Drafts from texts seen before: what followed the last tokens in earlier answers of one namespace, weighted by how often it did.

A context is the last CONTEXT tokens, found by a hash chain over its last KEY tokens; the longest context that was seen speaks, as in prediction by
partial matching (Cleary and Witten, 1984). Of the tokens that followed it the one seen most often is proposed, and then what came after it there. A
text's beginning counts as tokens of its own, so the same short prompt is a context too. Nothing is run for such drafts, and they depend on no random
numbers: the distribution they are drawn from is a point mass.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from draft.acceptance import MatchAcceptance

KEY = 8  # tokens that are hashed, and the shortest context; shorter ones are the request's own text's (`draft.ngram`)
CONTEXT = 32  # a longer context counts as one of these
MAX_CANDIDATES_TRIED = 16  # places with the same key that are compared
MAX_TOKENS = 1 << 16  # of a namespace; the older half is forgotten when they are reached
MAX_NAMESPACES = 64  # those used longest ago are forgotten
_MAX_WEIGHT = 65535
_FIRST_TABLE = 1 << 8
_END, _BEGIN = -1, -2  # between pieces of texts; what comes before a text


@dataclass(frozen=True)
class Seen:
    """What followed a context. length: of the context, KEY to CONTEXT. share: of the times it was seen, those in which `tokens[0]` followed."""

    length: int
    share: float
    tokens: list[int]


@dataclass
class SeenTexts:
    """Continuations of one namespace: about 16 bytes a token, each stored once however often it comes."""

    acceptance: MatchAcceptance = field(default_factory=MatchAcceptance)
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        self._clear(_FIRST_TABLE)

    def _clear(self, size: int) -> None:
        self._tokens = array("i", [_END])
        self._weights = array("H", [0])  # how often a token followed what is before it; 0: it stands there as context alone
        self._earlier = array("i", [-1])  # index of a key's last token -> that of the occurrence before it
        self._heads = array("i", [-1]) * size

    def __len__(self) -> int:
        """Tokens held, contexts included."""
        return len(self._tokens)

    def add(self, tokens: Sequence[int], start: int, weight: int = 1) -> None:
        """Count a text's tokens from `start` on, each in the context of those before it."""
        weight, storing = min(max(1, weight), _MAX_WEIGHT), False
        text = array("i", [*_context(tokens, start), *tokens[start:]])
        for i in range(CONTEXT, len(text)):
            token, context = text[i], text[i - CONTEXT : i]
            place = self._place(context, token)
            if place is not None:
                self._weights[place] = min(_MAX_WEIGHT, self._weights[place] + weight)
                storing = False
            else:
                if not storing:
                    if len(self._tokens) + CONTEXT >= self.max_tokens:
                        self._forget()
                    self._append(_END, 0)
                    self._tokens.extend(context)
                    self._weights.extend([0] * CONTEXT)
                    self._earlier.extend([-1] * CONTEXT)
                    storing = True
                self._append(token, weight)
                self._index(len(self._tokens) - 2)
            storing = storing and len(self._tokens) < self.max_tokens

    def match(self, tokens: Sequence[int], count: int) -> Seen | None:
        """Up to `count` tokens that are expected after `tokens`; None where their end was never seen."""
        context = array("i", _context(tokens, len(tokens)))
        longest, places = KEY - 1, []
        at = self._heads[self._key(context)]
        for _ in range(MAX_CANDIDATES_TRIED):
            if at < 0:
                break
            length = self._common(at, context)
            if length > longest:
                longest, places = length, [at + 1]
            elif length == longest and length >= KEY:
                places.append(at + 1)
            at = self._earlier[at]
        if not places:
            return None
        weights: dict[int, int] = {}
        for place in places:
            weights[self._tokens[place]] = weights.get(self._tokens[place], 0) + self._weights[place]
        best = max(weights, key=lambda token: weights[token])
        place = max((p for p in places if self._tokens[p] == best), key=lambda p: (self._weights[p], p))
        found = list(self._tokens[place : place + count])
        if _END in found:
            found = found[: found.index(_END)]
        return Seen(longest, weights[best] / sum(weights.values()), found)

    def _place(self, context: array[int], token: int) -> int | None:
        """Where this token follows this very context already."""
        known, at = self._tokens, self._heads[self._key(context)]
        for _ in range(MAX_CANDIDATES_TRIED):
            if at < 0:
                return None
            if known[at + 1] == token and self._weights[at + 1] and known[at - CONTEXT + 1 : at + 1] == context:
                return at + 1
            at = self._earlier[at]
        return None

    def _common(self, at: int, context: array[int]) -> int:
        """How many tokens up to index `at` equal the context's last ones."""
        if self._tokens[at - CONTEXT + 1 : at + 1] == context:
            return CONTEXT
        length = 0
        while length < CONTEXT and self._tokens[at - length] == context[-1 - length]:
            length += 1
        return length

    def _append(self, token: int, weight: int) -> None:
        self._tokens.append(token)
        self._weights.append(weight)
        self._earlier.append(-1)

    def _index(self, at: int) -> None:
        """Let the context that ends at index `at` be found."""
        if len(self._tokens) > 2 * len(self._heads):
            self._heads = array("i", [-1]) * (4 * len(self._heads))
            for known in range(len(self._tokens) - 1):
                if self._weights[known + 1]:
                    self._link(known)
        else:
            self._link(at)

    def _link(self, at: int) -> None:
        key = self._key(self._tokens[at - KEY + 1 : at + 1])
        self._earlier[at] = self._heads[key]
        self._heads[key] = at

    def _key(self, tokens: array[int]) -> int:
        return crc32(tokens[-KEY:].tobytes()) & (len(self._heads) - 1)

    def _forget(self) -> None:
        """Drop the older half, from the beginning of a piece on."""
        tokens, weights = self._tokens, self._weights
        try:
            start = tokens.index(_END, len(tokens) // 2)
        except ValueError:
            start = len(tokens)
        self._clear(len(self._heads))
        for token, weight in zip(tokens[start:], weights[start:], strict=True):
            self._append(token, weight)
            if weight:
                self._link(len(self._tokens) - 2)


class SeenByNamespace:
    """`SeenTexts` of each namespace; none is ever asked about another's."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, SeenTexts] = OrderedDict()

    def __getitem__(self, namespace: str) -> SeenTexts:
        texts = self._texts.setdefault(namespace, SeenTexts())
        self._texts.move_to_end(namespace)
        while len(self._texts) > MAX_NAMESPACES:
            self._texts.popitem(last=False)
        return texts


def _context(tokens: Sequence[int], end: int) -> list[int]:
    """The CONTEXT tokens before index `end`."""
    known = list(tokens[max(0, end - CONTEXT) : end])
    return [_BEGIN] * (CONTEXT - len(known)) + known
