"""The entropy coder: round trips, agreement with the ideal code length, and with an independent coder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.choice import RateChoice, final_classes
from codec.errors import CorruptedCode
from codec.rans import RansTables, SpanStream, decode, encode
from codec.rate import GAIN_ZERO, NUM_CLASSES, TOTAL, EntropyModel, class_of, class_scale, laplace_probabilities, normalise

MODEL = EntropyModel.laplace()
TABLES = RansTables.build(MODEL)
CHOICE = RateChoice(MODEL)


def ideal_bits(q: np.ndarray, classes: np.ndarray, gains: np.ndarray) -> float:
    level, own_gains = torch.zeros(len(q), dtype=torch.int32), torch.from_numpy(gains)
    return float(CHOICE.code_lengths(torch.from_numpy(q), final_classes(torch.from_numpy(classes), level, own_gains), own_gains).sum())


def sample(rng: np.random.Generator, tokens: int, classes: np.ndarray) -> np.ndarray:
    """Integers int32 [tokens, K] that follow their classes' Laplace density."""
    x = rng.laplace(size=(tokens, len(classes))) * class_scale(classes) / np.sqrt(2)
    return (np.sign(x) * np.floor(np.abs(x) + 0.42)).astype(np.int32)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 19), min_size=1, max_size=4), st.integers(1, 30), st.integers(1, 8))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_round_trip(seed: int, sizes: list[int], components: int, per_lane: int) -> None:
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, NUM_CLASSES, components).astype(np.int32)
    shape = (sum(sizes), components)
    outliers = (rng.random(shape) < 0.02) * rng.integers(-5000, 5000, shape)
    q = (sample(rng, sum(sizes), classes) + outliers).astype(np.int32)
    gains = rng.integers(0, 16, sum(sizes)).astype(np.uint8)
    streams = encode(TABLES, q, classes[None], gains, sizes, per_lane)
    back, back_gains = decode(TABLES, streams, [classes[None]] * len(sizes), per_lane)
    final = np.clip(classes[None] + 2 * (gains[:, None].astype(int) - GAIN_ZERO), 0, NUM_CLASSES - 1)
    limit = MODEL.limit[final]
    assert (back == np.where(np.abs(q) > limit, limit + 1, q)).all()
    assert (back_gains == gains).all()


def test_spans_do_not_depend_on_their_company() -> None:
    rng = np.random.default_rng(1)
    classes = np.sort(rng.integers(10, 60, 25)).astype(np.int32)[None]
    q, gains = sample(rng, 40, classes[0]), np.full(40, GAIN_ZERO, np.uint8)
    together = encode(TABLES, q, classes, gains, [7, 20, 13], 4)
    alone = encode(TABLES, q[7:27], classes, gains[7:27], [20], 4)[0]
    assert (together[1].states == alone.states).all() and (together[1].words == alone.words).all()


def test_length_is_near_ideal() -> None:
    rng = np.random.default_rng(2)
    classes = class_of(np.geomspace(8, 0.25, 400), 1.0)
    q, gains = sample(rng, 64, classes), np.full(64, GAIN_ZERO, np.uint8)
    stream = encode(TABLES, q, classes[None], gains, [64], 4)[0]
    ideal = ideal_bits(q, classes, gains)
    real = 32 * len(stream.states) + 16 * len(stream.words)
    assert ideal < real < 1.02 * ideal + 64 * 6


def test_length_agrees_with_constriction() -> None:
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(3)
    c = int(class_of(np.array([1.5]), 1.0)[0])
    limit = int(MODEL.limit[c])
    q = np.clip(sample(rng, 256, np.full(40, c)), -limit, limit)
    gains = np.full(256, GAIN_ZERO, np.uint8)
    stream = encode(TABLES, q, np.full((1, 40), c, np.int32), gains, [256], 64)[0]
    table = MODEL.freqs[MODEL.offset[c] : MODEL.offset[c + 1]].astype(np.float64) / TOTAL
    coder = constriction.stream.stack.AnsCoder()
    gain_table = MODEL.gain_freqs.astype(np.float64) / TOTAL
    for probabilities, symbols in ((table, (q + limit).ravel()), (gain_table, gains.astype(np.int32))):
        coder.encode_reverse(symbols.astype(np.int32), constriction.stream.model.Categorical(probabilities, perfect=False))
    theirs = 32 * len(coder.get_compressed())
    ours = 32 * len(stream.states) + 16 * len(stream.words)
    # ours ends four lanes instead of one stream
    assert abs(ours - theirs) < 0.004 * theirs + 4 * 32


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_altered_streams_are_refused_or_differ(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = class_of(np.geomspace(4, 0.3, 30), 1.0)[None]
    q, gains = sample(rng, 16, classes[0]), np.full(16, GAIN_ZERO, np.uint8)
    stream = encode(TABLES, q, classes, gains, [16], 4)[0]
    states, words = stream.states.copy(), stream.words.copy()
    which = int(rng.integers(0, len(states) + len(words)))
    if which < len(states):
        states[which] ^= np.uint32(1 << int(rng.integers(0, 32)))
    else:
        words[which - len(states)] ^= np.uint16(1 << int(rng.integers(0, 16)))
    try:
        back, _ = decode(TABLES, [SpanStream(16, states, words)], [classes], 4)
    except CorruptedCode:
        return
    assert (back != q).any()


def test_missing_and_extra_words_are_refused() -> None:
    rng = np.random.default_rng(4)
    classes = class_of(np.geomspace(4, 0.3, 30), 1.0)[None]
    q, gains = sample(rng, 16, classes[0]), np.full(16, GAIN_ZERO, np.uint8)
    stream = encode(TABLES, q, classes, gains, [16], 4)[0]
    for words in (stream.words[:-1], np.append(stream.words, np.uint16(7)), stream.words[:0]):
        with pytest.raises(CorruptedCode):
            decode(TABLES, [SpanStream(16, stream.states, words)], [classes], 4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=300))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_frequencies_sum_to_the_total(weights: list[float]) -> None:
    freq = normalise(np.array(weights) + 1e-9)
    assert freq.sum() == TOTAL and freq.min() >= 1


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0, 7.0])
def test_laplace_cells_match_the_quantiser(scale: float) -> None:
    rng = np.random.default_rng(5)
    x = rng.laplace(size=200_000) * scale / np.sqrt(2)
    q = (np.sign(x) * np.floor(np.abs(x) + 0.42)).astype(int)
    expected = laplace_probabilities(scale, 40)
    for value in (0, 1, -1, 3):
        seen = (q == value).mean()
        assert abs(seen - expected[40 + value]) < 5 * np.sqrt(seen / 200_000) + 1e-4
