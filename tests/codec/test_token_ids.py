"""Token ids as bytes: with counts alone, and with a model's logits that are never the same twice."""

from __future__ import annotations

import random
import zlib
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.binary_coder import FLOOR, ONE, Bit, BitDecoder, BitEncoder
from codec.errors import BadInput, CorruptedCode
from codec.token_ids import COUNTED, MODELLED, checksum, decode_ids, encode_ids, read_frame, write_frame
from codec.token_paths import (
    MAX_LANES,
    Distribution,
    Paths,
    decode_paths,
    encode_paths,
    lane_order,
    reads_back,
    width_of,
)

VOCAB, SEED = 97, 5


# --- the binary coder ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(FLOOR, ONE - FLOOR)), max_size=400))
def test_bits_come_back_and_cost_what_they_should(pairs):
    encoder = BitEncoder()
    for bit, probability in pairs:
        encoder.code(int(bit), probability)
    data = encoder.finish()
    decoder = BitDecoder(data)
    assert [decoder.code(0, probability) for _, probability in pairs] == [int(bit) for bit, _ in pairs]
    decoder.finish()
    bits = -sum(np.log2((p if bit else ONE - p) / ONE) for bit, p in pairs)
    assert len(data) <= bits / 8 + 2


def test_carries_run_through_long_rows_of_ones():
    """Improbable zeros push the low end up to the very top of the interval, again and again."""
    pairs = [(0, ONE - FLOOR)] * 300 + [(1, FLOOR)] * 3 + [(0, FLOOR), (1, ONE - FLOOR)] * 200
    encoder = BitEncoder()
    for pair in pairs:
        encoder.code(*pair)
    decoder = BitDecoder(encoder.finish())
    assert [decoder.code(0, p) for _, p in pairs] == [b for b, _ in pairs]


def test_a_bit_learns_its_chance():
    draw, encoder, bit = random.Random(0), BitEncoder(), Bit()
    for _ in range(4000):
        bit.code(encoder, int(draw.random() < 0.1))
    assert bit.probability / ONE == pytest.approx(0.1, abs=0.03)
    assert 8 * len(encoder.finish()) < 4000 * 0.49  # entropy: 0.469 bits


# --- without a model ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, (1 << 32) - 1) | st.integers(0, 50), max_size=150))
def test_any_ids_come_back(ids):
    frame = encode_ids(ids)
    assert decode_ids(frame) == ids and read_frame(frame)[:3] == (COUNTED, len(ids), checksum(ids))
    assert encode_ids(ids) == frame


def test_repeated_phrases_cost_little_and_less_than_zstandard():
    draw = random.Random(1)
    phrases = [[int(49152 ** draw.random()) for _ in range(draw.randint(2, 9))] for _ in range(60)]
    ids = [token for _ in range(300) for token in draw.choice(phrases)]
    raw = zstandard.ZstdCompressor(level=19).compress(np.asarray(ids, "<u2").tobytes())
    frame = encode_ids(ids)
    assert decode_ids(frame) == ids
    assert len(frame) < len(raw)
    mixed = Bigrams().text(2000)
    raw = zstandard.ZstdCompressor(level=19).compress(np.asarray(mixed, "<u2").tobytes())
    assert len(encode_ids(mixed)) < 0.92 * len(raw)


@pytest.mark.parametrize("ids", [[-1], [1 << 32]])
def test_numbers_that_are_no_ids(ids):
    with pytest.raises(BadInput):
        encode_ids(ids)


FRAME = encode_ids([3, 1, 4, 1, 5, 9, 2, 6, 70_000, 1, 4, 1, 5] * 5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, len(FRAME) - 1), st.integers(1, 255))
def test_altered_frames_are_found_out(at, change):
    data = bytearray(FRAME)
    data[at] ^= change
    with pytest.raises(CorruptedCode):
        decode_ids(bytes(data))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.integers(0, 1 << 28))
def test_rubbish_ends_soon(data, count):
    with pytest.raises(CorruptedCode):
        decode_ids(bytes([COUNTED]) + count.to_bytes(4, "little") + zlib.crc32(b"other").to_bytes(4, "little") + data)


@pytest.mark.parametrize("frame", [*(FRAME[:n] for n in range(0, len(FRAME), 5)), FRAME + bytes(8), b"\7" + FRAME[1:], b"\2" + FRAME[1:]])
def test_cut_and_foreign_frames(frame):
    with pytest.raises(CorruptedCode):
        decode_ids(frame)


# --- with a model -------------------------------------------------------------------------------------------------------


class Bigrams:
    """A model of 97 tokens: logits depend on the previous token alone. noise: half-width of a uniform error in every logit, new at every call."""

    def __init__(self, noise=0.0, dtype=torch.float32, seed=SEED):
        self.table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(SEED)).mul(2.5)
        self.noise, self.dtype, self.generator = noise, dtype, torch.Generator().manual_seed(seed)

    def __call__(self, previous):
        rows = self.table[torch.tensor(previous)]
        return (rows + self.noise * (2 * torch.rand(rows.shape, generator=self.generator) - 1)).to(self.dtype)

    def text(self, count):
        ids = [11]
        while len(ids) < count:
            ids.append(int(torch.multinomial(self.table[ids[-1]].softmax(-1), 1, generator=self.generator)))
        return ids

    def paths(self, ids):
        return Distribution(self([0, *ids[:-1]]), width_of(VOCAB)).paths(np.asarray(ids))


def entropy(ids):
    """Bits of ids[1:] under the model."""
    logs = Bigrams().table.log_softmax(-1)
    return -float(sum(logs[a, b] for a, b in pairwise(ids))) / np.log(2)


@pytest.mark.parametrize("count, lanes", [(0, 1), (1, 1), (1, 9), (5, 5), (5, 4), (40, 7), (64, 64), (200, 1), (201, 3)])
def test_ids_come_back_over_lanes(count, lanes):
    model = Bigrams()
    ids = model.text(max(count, 1))[:count]
    paths = model.paths(ids) if ids else Paths(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 8)))
    data = encode_paths(ids, paths, VOCAB, lanes, 1e-6)
    calls = []

    def next_logits(previous):
        calls.append(previous)
        return model(previous)

    assert decode_paths(data, count, VOCAB, next_logits) == ids
    order = lane_order(count, lanes)
    assert len(order[0]) <= lanes if count else not order
    assert calls == [[ids[n - 1] for n in rows] for rows in order[1:]] and sorted(n for rows in order for n in rows) == list(range(count))


def test_cost_is_near_the_models_entropy():
    model = Bigrams()
    ids = model.text(3000)
    data = encode_paths(ids, model.paths(ids), VOCAB, 1, 2.0**-11)
    assert entropy(ids) < 8 * len(data) < 1.05 * entropy(ids) + 64
    assert 8 * len(data) < 0.8 * 8 * len(encode_ids(ids))


@pytest.mark.parametrize("margin", [2.0**-11, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_logits_within_the_margin_give_the_same_ids(margin, seed):
    """Odds of sums of probabilities move by at most twice what the logits move by; a lead too."""
    model = Bigrams(margin / 4, seed=seed)
    ids = Bigrams().text(400)
    data = encode_paths(ids, model.paths(ids), VOCAB, 4, margin)
    for reader in range(3):
        assert decode_paths(data, len(ids), VOCAB, Bigrams(margin / 4, seed=100 * seed + reader)) == ids


def test_a_few_ulps_of_bfloat16():
    """Logits rounded to bfloat16 on one side, and off by two of its steps more on the other."""
    ids = Bigrams().text(600)
    largest = float(Bigrams().table.abs().max())
    ulp = 2.0 ** (np.floor(np.log2(largest)) - 7)
    data = encode_paths(ids, Bigrams(dtype=torch.bfloat16).paths(ids), VOCAB, 1, 2 * 2.5 * ulp)
    assert decode_paths(data, len(ids), VOCAB, Bigrams(2 * ulp, seed=9)) == ids


def test_without_a_margin_noise_does_break_it():
    """The margin is what makes the difference: the same noise, coded with none, goes astray, and is found out or gives other ids."""
    ids, broken = Bigrams().text(400), 0
    for seed in range(4):
        data = encode_paths(ids, Bigrams(0.02, seed=seed).paths(ids), VOCAB, 1, 0.0)
        try:
            broken += decode_paths(data, len(ids), VOCAB, Bigrams(0.02, seed=50 + seed)) != ids
        except CorruptedCode:
            broken += 1
    assert broken == 4


def test_reading_back_from_recorded_paths_is_as_strict_as_decoding():
    ids = Bigrams().text(300)
    paths = Bigrams().paths(ids)
    data = encode_paths(ids, paths, VOCAB, 5, 0.01)
    assert reads_back(data, ids, Bigrams(0.002, seed=1).paths(ids), VOCAB)
    assert not reads_back(data, ids, Bigrams(0.5, seed=1).paths(ids), VOCAB)
    assert not reads_back(data, [*ids[:-1], (ids[-1] + 1) % VOCAB], paths, VOCAB)
    assert not reads_back(data + bytes(8), ids, paths, VOCAB)
    assert not reads_back(data[:-9], ids, paths, VOCAB)
    other = Bigrams(0.002, seed=1).paths(ids)
    assert 0 < paths.drift(other) < 0.008 and paths.drift(paths) == 0


def test_logits_that_are_not_finite():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[0, 3], logits[1, 5], logits[2, :], logits[3, ::2] = float("nan"), float("inf"), float("nan"), -float("inf")
    found = Distribution(logits, 7).paths(np.array([3, 5, 60, 96]))
    assert np.isfinite(found.odds).all() and found.candidate[1] == 5


def test_bad_arguments():
    paths = Bigrams().paths([1, 2, 3])
    with pytest.raises(BadInput, match="vocabulary"):
        encode_paths([1, 2, VOCAB], paths, VOCAB, 1, 0.1)
    for lanes in (0, MAX_LANES + 1):
        with pytest.raises(BadInput, match="lanes"):
            encode_paths([1, 2, 3], paths, VOCAB, lanes, 0.1)


IDS = Bigrams().text(120)
CODED = encode_paths(IDS, Bigrams().paths(IDS), VOCAB, 3, 1e-3)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, len(CODED) - 1), st.integers(1, 255))
def test_altered_code_never_gives_the_ids_or_a_crash(at, change):
    data = bytearray(CODED)
    data[at] ^= change
    try:
        found = decode_paths(bytes(data), len(IDS), VOCAB, Bigrams())
    except CorruptedCode:
        return
    assert len(found) == len(IDS) and all(0 <= token < VOCAB for token in found)
    # the checksum in the frame tells; a change the coder does not notice must be one that changes nothing
    assert checksum(found) != checksum(IDS) or found == IDS


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 255), st.binary(max_size=40), st.integers(1, 300))
def test_rubbish_for_a_model_ends(head, data, count):
    with suppress(CorruptedCode):
        found = decode_paths(bytes([head]) + data, count, VOCAB, Bigrams())
        assert len(found) == count and all(0 <= token < VOCAB for token in found)


@pytest.mark.parametrize(
    "data", [b"", bytes(1) + CODED[1:], bytes([MAX_LANES + 1]) + CODED[1:], bytes([128]) + CODED[1:], CODED[:1], CODED[:20]]
)
def test_heads_and_ends_that_do_not_fit(data):
    with pytest.raises(CorruptedCode):
        decode_paths(data, 120, VOCAB, Bigrams())


def test_frames():
    frame = write_frame(MODELLED, IDS, CODED)
    assert read_frame(frame) == (MODELLED, 120, checksum(IDS), CODED)
    with pytest.raises(CorruptedCode, match="need a model"):
        decode_ids(frame)
