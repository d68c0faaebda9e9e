"""Interleaved rANS (range asymmetric numeral systems, Duda 2013; interleaving after Giesen 2014), vectorised over lanes with numpy.

A lane codes tokens_per_lane tokens of a span one after the other: token t belongs to lane t % lanes and is that lane's (t // lanes)-th. A token is
its gain symbol, then its K components in order. In a step every lane of every span codes one symbol. States have 32 bits, a renormalisation
moves one 16-bit word, and the lanes of a span share one stream: in every step the lanes that need a word take the next ones in lane order, so
no lane needs a length of its own, and a GPU finds its word with a prefix sum over the span's lanes.

The decoder ends where the encoder began: all states back at 2**16 and all words used. Anything else is corruption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codec.errors import CorruptedCode
from codec.rate import CLASSES_PER_GAIN, GAIN_ZERO, NUM_CLASSES, PRECISION_BITS, TOTAL, EntropyModel

STATE_LOW = 1 << 16
DAMAGED = "an entropy-coded span does not end where it should", "the bytes were altered; restore the file from a copy"
_EMIT_SHIFT = 32 - PRECISION_BITS
_MASK = TOTAL - 1


@dataclass
class RansTables:
    """Lookup form of an EntropyModel: freq and start uint32 per table entry, symbol int16 [classes, TOTAL] slot -> q (escape = limit + 1)."""

    model: EntropyModel
    freq: np.ndarray
    start: np.ndarray
    slot_symbol: np.ndarray
    gain_freq: np.ndarray
    gain_start: np.ndarray
    gain_slot: np.ndarray

    @classmethod
    def build(cls, model: EntropyModel) -> RansTables:
        freq = model.freqs.astype(np.uint32)
        start = np.empty_like(freq)
        slots = np.empty((NUM_CLASSES, TOTAL), np.int16)
        for c in range(NUM_CLASSES):
            lo, hi, a = int(model.offset[c]), int(model.offset[c + 1]), int(model.limit[c])
            start[lo:hi] = np.concatenate([[0], np.cumsum(freq[lo:hi])[:-1]])
            slots[c] = np.repeat(np.arange(-a, a + 2, dtype=np.int16), freq[lo:hi])
        gain_freq = model.gain_freqs.astype(np.uint32)
        return cls(
            model,
            freq,
            start,
            slots,
            gain_freq,
            np.concatenate([[0], np.cumsum(gain_freq)[:-1]]).astype(np.uint32),
            np.repeat(np.arange(len(gain_freq), dtype=np.uint8), gain_freq),
        )


@dataclass
class SpanStream:
    """rANS output of one span: states uint32 [lanes], words uint16 [n]."""

    num_tokens: int
    states: np.ndarray
    words: np.ndarray


def num_lanes(num_tokens: int, tokens_per_lane: int) -> int:
    return -(-num_tokens // tokens_per_lane)


class _Lanes:
    """Where the lanes of several spans sit in one flat array, and which of them hold a j-th token."""

    def __init__(self, sizes: list[int], tokens_per_lane: int):
        self.sizes = np.asarray(sizes, np.int64)
        self.per_span = -(-self.sizes // tokens_per_lane)
        self.starts = np.concatenate([[0], np.cumsum(self.per_span)])
        self.total = int(self.starts[-1])
        self.span = np.repeat(np.arange(len(sizes)), self.per_span)
        self.lane = np.arange(self.total) - self.starts[:-1][self.span]
        self.token_start = np.concatenate([[0], np.cumsum(self.sizes)])
        self.tokens_per_lane = tokens_per_lane

    def turn(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Flat lane indices that hold a j-th token, and those tokens' flat indices."""
        token = self.lane + j * self.per_span[self.span]
        active = np.flatnonzero(token < self.sizes[self.span])
        return active, (self.token_start[:-1][self.span] + token)[active]


def encode(
    tables: RansTables, q: np.ndarray, classes: np.ndarray, gains: np.ndarray, sizes: list[int], tokens_per_lane: int
) -> list[SpanStream]:
    """Codes several spans at once.

    Args:
        tables: lookup tables.
        q: int32 [sum(sizes), K]; values beyond a class's limit become the escape symbol (the caller stores the remainder).
        classes: int32 [sum(sizes) or 1, K] scale class before the gain.
        gains: uint8 [sum(sizes)].
        sizes: tokens of each span.
    """
    model, lanes = tables.model, _Lanes(sizes, tokens_per_lane)
    k = q.shape[1]
    final = np.clip(classes + CLASSES_PER_GAIN * (gains.astype(np.int32)[:, None] - GAIN_ZERO), 0, NUM_CLASSES - 1)
    limit = model.limit[final]
    entry = (model.offset[:-1].astype(np.int32) + model.limit)[final] + np.where(np.abs(q) > limit, limit + 1, q)
    state = np.full(lanes.total, STATE_LOW, np.uint32)
    steps = k + 1
    words = np.zeros((tokens_per_lane * steps, lanes.total), np.uint16)
    used = np.zeros((tokens_per_lane * steps, lanes.total), bool)
    for j in reversed(range(tokens_per_lane)):
        active, token = lanes.turn(j)
        if not len(active):
            continue
        x = state[active]
        quotient, emit = np.empty_like(x), np.empty(len(x), bool)
        columns = np.ascontiguousarray(entry[token].T)  # [K, active]
        symbol_gain = gains[token]
        freq, start = tables.freq[columns], tables.start[columns]
        gain_freq, gain_start = tables.gain_freq[symbol_gain], tables.gain_start[symbol_gain]
        full = len(active) == lanes.total
        # the state (x // f) * TOTAL + x % f + start is x + start + (x // f) * (TOTAL - f): all of it stays below 2 ** 32
        rest, gain_rest = np.uint32(TOTAL) - freq, np.uint32(TOTAL) - gain_freq
        for i in reversed(range(steps)):
            f, s, r = (freq[i - 1], start[i - 1], rest[i - 1]) if i else (gain_freq, gain_start, gain_rest)
            row = j * steps + i
            np.right_shift(x, _EMIT_SHIFT, out=quotient)
            np.greater_equal(quotient, f, out=emit)
            if full:
                used[row] = emit
                words[row] = x  # keeps the low 16 bits
            else:
                used[row, active] = emit
                words[row, active] = x
            np.right_shift(x, 16, out=x, where=emit)
            np.floor_divide(x, f, out=quotient)
            quotient *= r
            x += quotient
            x += s
        state[active] = x
    result = []
    for n, (lo, hi) in enumerate(zip(lanes.starts[:-1], lanes.starts[1:], strict=True)):
        result.append(SpanStream(sizes[n], state[lo:hi].copy(), words[:, lo:hi][used[:, lo:hi]]))
    return result


def decode(tables: RansTables, streams: list[SpanStream], classes: list[np.ndarray], tokens_per_lane: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of encode.

    Args:
        streams: the spans' states and words.
        classes: per span int32 [tokens or 1, K], as given to encode.

    Returns:
        q int32 [sum(sizes), K] (the escape reads limit + 1), gains uint8 [sum(sizes)].
    """
    sizes = [s.num_tokens for s in streams]
    lanes = _Lanes(sizes, tokens_per_lane)
    k = classes[0].shape[1]
    tokens = int(sum(sizes))
    flat_classes = np.concatenate([np.broadcast_to(c, (n, k)) for c, n in zip(classes, sizes, strict=True)])
    state = np.concatenate([s.states for s in streams]).astype(np.uint32)
    counts = np.array([len(s.words) for s in streams], np.int64)
    pool = np.concatenate([*(s.words for s in streams), np.zeros(1, np.uint16)]).astype(np.uint32)
    pointer = np.concatenate([[0], np.cumsum(counts)[:-1]])
    end = np.cumsum(counts)
    q, gains = np.zeros((tokens, k), np.int32), np.zeros(tokens, np.uint8)
    flat_slot = tables.slot_symbol.reshape(-1)
    centre = (tables.model.offset[:-1] + tables.model.limit).astype(np.int64)
    last, numbers = len(pool) - 1, np.arange(lanes.total)
    for j in range(tokens_per_lane):
        active, token = lanes.turn(j)
        if not len(active):
            continue
        span = lanes.span[active]
        x = state[active]
        out = np.empty((k, len(active)), np.int32)
        base = flat_classes[token].T
        for i in range(k + 1):
            slot = x & _MASK
            if i == 0:
                gain = tables.gain_slot[slot]
                gains[token] = gain
                f, s = tables.gain_freq[gain], tables.gain_start[gain]
                column = np.clip(base + CLASSES_PER_GAIN * (gain.astype(np.int32) - GAIN_ZERO), 0, NUM_CLASSES - 1)
                rows, centres = column.astype(np.int64) << PRECISION_BITS, centre[column]
            else:
                symbol = flat_slot[rows[i - 1] + slot]
                out[i - 1] = symbol
                entry = centres[i - 1] + symbol
                f, s = tables.freq[entry], tables.start[entry]
            x >>= PRECISION_BITS
            x *= f
            slot -= s
            x += slot
            need = np.flatnonzero(x < STATE_LOW)
            if len(need):
                own = span[need]
                taken = np.bincount(own, minlength=len(streams))
                where = (pointer - taken.cumsum() + taken)[own] + numbers[: len(need)]  # spans' words lie lane after lane
                x[need] = (x[need] << 16) | pool[np.minimum(where, last)]
                pointer += taken
        q[token] = out.T
        state[active] = x
    if not (pointer == end).all() or not (state == STATE_LOW).all():
        raise CorruptedCode(*DAMAGED)
    return q, gains
