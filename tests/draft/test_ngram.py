"""The longest earlier occurrence of a text's end: found, followed, bounded."""

from __future__ import annotations

import random

import pytest

from draft import ngram
from draft.ngram import LONGEST, SHORTEST, Match, NgramIndex, continuation


def naive(tokens):
    """(length, start) of the longest earlier occurrence of the end, the latest of equals."""
    best = None
    for end in range(len(tokens) - 2, -1, -1):
        length = 0
        while length < LONGEST and end - length >= 0 and tokens[end - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length >= SHORTEST and (best is None or length > best[0]):
            best = length, end + 1
    return best


def grown(seed, steps, vocab):
    """A text with repetitions, growing and now and then cut; a copy after each step."""
    rng, tokens = random.Random(seed), []
    for _ in range(steps):
        if len(tokens) > 20 and rng.random() < 0.4:
            start = rng.randrange(len(tokens) - 12)
            tokens += tokens[start : start + rng.randrange(2, 12)]
        tokens.append(rng.randrange(vocab))
        if rng.random() < 0.05:
            del tokens[-rng.randrange(1, 9) :]
            tokens += [rng.randrange(vocab) for _ in range(rng.randrange(9))]
        yield tokens


@pytest.mark.parametrize("vocab", [4, 40, 150_000])
def test_the_longest_match_is_found(vocab):
    index, equal, total = NgramIndex(), 0, 0
    for tokens in grown(vocab, 250, vocab):
        found, wanted = index.match(tokens), naive(tokens)
        total += 1
        equal += found == (None if wanted is None else Match(*wanted))
        if found is not None:  # never more than there is, whatever was not tried
            assert tokens[found.start - found.length : found.start] == tokens[-found.length :] and found.length <= wanted[0]
    assert equal > (0.8 if vocab == 4 else 0.97) * total


def test_what_followed_goes_on_with_itself():
    assert continuation([1, 2, 3, 1, 2], Match(2, 2), 7) == [3, 1, 2, 3, 1, 2, 3]
    assert continuation([7, 7, 7], Match(2, 2), 3) == [7, 7, 7]
    assert continuation([1, 2, 3, 4, 1, 2], Match(2, 2), 2) == [3, 4]


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3], [5, 6, 5]])
def test_a_new_end_has_no_match(tokens):
    assert NgramIndex().match(tokens) is None


def test_memory_and_work_are_bounded(monkeypatch):
    monkeypatch.setattr(ngram, "MAX_INDEXED", 1 << 10)
    compared = []
    common = ngram._common
    monkeypatch.setattr(ngram, "_common", lambda *args: compared.append(1) or common(*args))
    rng, tokens, index = random.Random(0), [], NgramIndex()
    for _ in range(5000):
        tokens.append(rng.randrange(3))  # few pairs, so that every chain is long
        compared.clear()
        index.match(tokens)
        assert len(compared) <= ngram.MAX_CANDIDATES_TRIED + 1
    assert index.num_bytes == 8 << 10
    whole = NgramIndex()
    whole.match(tokens)
    assert whole.num_bytes == 8 << 10 and whole.length == 5000
    far = [900, 901, 902, *range(1, 2000), 900, 901]
    assert index.match(far) is None, "what lies further back than is indexed is forgotten"
    assert NgramIndex().match(far[-600:] + far[:600] + [900, 901]) == Match(2, 602)
