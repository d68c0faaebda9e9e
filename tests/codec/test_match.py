import numpy as np
import pytest

from codec.errors import BadInput
from codec.match import MIN_TOKENS, Match, earlier_places, matches, ngram_hashes


def _slow(ids, start, tokens):
    """Greedy runs by comparing everything with everything."""
    found, done, at = [], start, start
    while at + tokens <= len(ids):
        places = [s for s in range(at) if list(ids[s : s + tokens]) == list(ids[at : at + tokens])]
        if not places:
            at += 1
            continue
        source, first = places[-1], at
        while first > done and source > 0 and ids[first - 1] == ids[source - 1]:
            first, source = first - 1, source - 1
        length = 0
        while first + length < len(ids) and ids[first + length] == ids[source + length]:
            length += 1
        found.append(Match(first, source, length))
        done = at = first + length
    return found


@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("letters", [2, 3, 50])
def test_runs_are_those_of_a_plain_search(letters, start):
    rng = np.random.default_rng(letters + start)
    ids = rng.integers(letters, size=150)
    ids[90:130] = ids[5:45]
    assert matches(ids, start, 6) == _slow(ids.tolist(), start, 6)


def test_a_text_read_twice_is_one_run():
    rng = np.random.default_rng(0)
    text = rng.integers(49_152, size=3000)
    ids = np.concatenate([rng.integers(49_152, size=11), text, rng.integers(49_152, size=7), text])
    assert matches(ids) == [Match(11 + 3000 + 7, 11, 3000)]
    assert matches(np.concatenate([text, text[100:900]]), start=3000) == [Match(3000, 100, 800)]


def test_short_and_unrepeated_texts_have_no_runs():
    assert matches([]) == [] == matches([5] * (MIN_TOKENS - 1)) == matches(range(1000))
    assert len(ngram_hashes([1, 2])) == 0
    with pytest.raises(BadInput, match="n-grams of 0 tokens"):
        ngram_hashes([1], 0)


def test_equal_hashes_of_other_tokens_are_no_match(monkeypatch):
    monkeypatch.setattr("codec.match.ngram_hashes", lambda ids, tokens: np.zeros(len(ids) - tokens + 1, np.uint64))
    assert (earlier_places(np.arange(20), 4) == -1).all()


def test_a_run_may_overlap_its_source():
    assert matches([7] * 30, tokens=4) == [Match(1, 0, 29)]
