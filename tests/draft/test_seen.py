"""Texts seen before: the longest context speaks, the token seen most often comes first, memory is bounded, namespaces never meet."""

from __future__ import annotations

import random

import pytest

from draft.policy import CostModel, DraftingPolicy, RequestDrafting
from draft.seen import CONTEXT, KEY, MAX_NAMESPACES, SeenByNamespace, SeenTexts

PROMPT = list(range(100, 160))


def test_what_followed_most_often_is_proposed() -> None:
    texts = SeenTexts()
    assert texts.match(PROMPT, 8) is None
    for answer, times in (([1, 2, 3], 2), ([1, 5, 6, 7], 3)):
        for _ in range(times):
            texts.add(PROMPT + answer, len(PROMPT))
    found = texts.match(PROMPT, 8)
    assert found is not None and found.length == CONTEXT and found.share == 1.0 and found.tokens[0] == 1
    after = texts.match([*PROMPT, 1], 8)
    assert after is not None and after.share == pytest.approx(3 / 5) and after.tokens == [5, 6, 7]
    assert texts.match([*PROMPT, 1], 2).tokens == [5, 6]
    assert texts.match([*PROMPT[:-1], 0], 8) is None and texts.match(PROMPT[:-1], 8) is None
    texts.add([*PROMPT, 1, 2], len(PROMPT) + 1, weight=10)
    assert texts.match([*PROMPT, 1], 8).tokens[0] == 2


def test_a_prompt_shorter_than_a_context_is_known_by_its_beginning() -> None:
    texts = SeenTexts()
    texts.add([4, 5, 6, 7, 8], 2)
    assert texts.match([4, 5], 8).tokens == [6, 7, 8] and texts.match([4, 5], 8).length == CONTEXT
    assert texts.match([9, 4, 5], 8) is None and texts.match([4], 8) is None
    texts.add([1, 2, 3], 0)
    assert texts.match([], 8).tokens == [1, 2, 3]


def naive(pieces, tokens):
    """Length of the longest context of the end of `tokens` in texts, and how often each token followed it there."""
    ends = [-2] * CONTEXT + list(tokens)
    best, counts = KEY - 1, {}
    for text, start in pieces:
        padded = [-2] * CONTEXT + list(text)
        for i in range(start, len(text)):
            length = 0
            while length < CONTEXT and padded[CONTEXT + i - 1 - length] == ends[-1 - length]:
                length += 1
            if length > best:
                best, counts = length, {}
            if length == best and length >= KEY:
                counts[text[i]] = counts.get(text[i], 0) + 1
    return best, counts


@pytest.mark.parametrize("seed", range(4))
def test_against_all_texts_compared(seed) -> None:
    rng, texts, pieces, seen = random.Random(seed), SeenTexts(), [], 0
    phrases = [[rng.randrange(30) for _ in range(rng.randrange(10, 50))] for _ in range(5)]
    for _ in range(20):
        tokens = [token for _ in range(rng.randrange(1, 6)) for token in rng.choice(phrases)[rng.randrange(4) :]]
        start = rng.randrange(len(tokens))
        if rng.random() < 0.5:
            tokens += [rng.randrange(30) for _ in range(5)]
        length, counts = naive(pieces, tokens[:start])
        found = texts.match(tokens[:start], 3)
        assert (found is None) == (not counts)
        if found is not None and sum(counts.values()) <= 8:  # beyond that not all places are compared
            seen += 1
            assert found.length == length and counts[found.tokens[0]] == max(counts.values())
            assert found.share == pytest.approx(max(counts.values()) / sum(counts.values()))
        texts.add(tokens, start)
        pieces.append((tokens, start))
    assert seen > 3


def test_the_same_answer_is_stored_once_and_memory_is_bounded() -> None:
    texts, rng = SeenTexts(), random.Random(0)
    answer = [rng.randrange(1000) for _ in range(300)]
    for _ in range(50):
        texts.add(PROMPT + answer, len(PROMPT))
    assert len(texts) < 300 + CONTEXT + 8
    small = SeenTexts(max_tokens=2000)
    for _ in range(100):
        last = [rng.randrange(5000) for _ in range(70)]
        small.add(last, 10)
        assert len(small) <= 2000
        assert small.match(last[:30], 5).tokens == last[30:35]


def test_namespaces_never_meet() -> None:
    policy = DraftingPolicy(CostModel(((1, 0.0),), ((1, 1.0), (64, 1.05))), ngrams=True)
    policy.end([*PROMPT, 1, 2, 3], len(PROMPT), "one")
    drafts = {}
    for name in ("one", "two", ""):
        request = policy.request("auto", greedy=True)
        policy.begin(request, name)
        drafts[name] = policy.plan([request], [PROMPT], [8]).given
    assert drafts == {"one": [[1, 2, 3]], "two": [[]], "": [[]]}
    names = SeenByNamespace()
    for number in range(MAX_NAMESPACES + 10):
        names[str(number)].add([*PROMPT, 1], len(PROMPT))
    assert names["0"].match(PROMPT, 1) is None and names[str(MAX_NAMESPACES + 9)].match(PROMPT, 1).tokens == [1]


def test_the_source_that_promises_more_is_taken() -> None:
    request = RequestDrafting(4, ngrams=True)
    request.seen = SeenTexts()
    repeated = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 3
    assert request.look_up(repeated, 4)[0] == [1, 2, 3, 4] and not request.from_seen
    for _ in range(9):
        request.seen.add([*range(50, 60), *[1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2, 7, 7, 7, 7], 30)
    drafts, chances = request.look_up([*range(50, 60), *[1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2], 4)
    assert drafts in ([7, 7, 7, 7], [1, 2, 3, 4]) and len(chances) == 4
    for _ in range(30):  # what the text itself says proves wrong again and again
        request.observe([7], 0, 0, None, given=True)
        drafts, chances = request.look_up([*range(50, 60), *[1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2], 4)
    assert drafts == [7, 7, 7, 7] and request.from_seen and chances == sorted(chances, reverse=True)
