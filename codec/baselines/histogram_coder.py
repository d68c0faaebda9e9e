"""Arithmetic coding with one stored histogram per channel: interleaved rANS, a token a lane, a channel a step.

rANS after Duda (2013), interleaved over lanes after Giesen (2014): 32-bit states, 16-bit words, 12-bit frequencies. All lanes code
the same channel in a step, so numpy works on whole rows. codec/rans.py is the project's own coder for scale classes; this one serves
CacheGen's free-form histograms.
"""
from __future__ import annotations

import numpy as np

from codec.errors import CorruptedCode

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
_LOW = 1 << 16


def frequencies(counts: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Histograms to coding frequencies: every usable symbol at least 1, each row summing to 2**12.

    Args:
        counts: [C, A] non-negative.
        used: bool [C, A], the symbols that can occur (at least one in a row, at most 2**11).
    """
    weight = np.where(used, counts + 0.05, 0.0)
    spare = TOTAL - used.sum(1, keepdims=True)
    exact = weight / weight.sum(1, keepdims=True) * spare
    result = np.where(used, np.floor(exact).astype(np.int64) + 1, 0)
    rest = TOTAL - result.sum(1)
    order = np.argsort(-np.where(used, exact - np.floor(exact), -1.0), 1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], 1)
    return (result + (rank < rest[:, None])).astype(np.uint32)


def encode(symbols: np.ndarray, freqs: np.ndarray) -> bytes:
    """symbols uint8 [T, C], freqs uint32 [C, A] to bytes: T final states, then the words in decoding order."""
    tokens, channels = symbols.shape
    starts = (np.cumsum(freqs, 1) - freqs).astype(np.uint64)
    columns = symbols.T.astype(np.int64)
    freq = np.take_along_axis(freqs.astype(np.uint64), columns, 1)
    start = np.take_along_axis(starts, columns, 1)
    state = np.full(tokens, _LOW, np.uint64)
    words, used = np.zeros((channels, tokens), np.uint16), np.zeros((channels, tokens), bool)
    for i in reversed(range(channels)):
        f = freq[i]
        emit = state >= (f << np.uint64(32 - PRECISION_BITS))
        used[i], words[i] = emit, state.astype(np.uint16)
        state = np.where(emit, state >> np.uint64(16), state)
        quotient = state // f
        state = (quotient << np.uint64(PRECISION_BITS)) + (state - quotient * f) + start[i]
    return state.astype("<u4").tobytes() + words[used].astype("<u2").tobytes()


def decode(data: bytes, freqs: np.ndarray, num_tokens: int) -> np.ndarray:
    """Inverse of encode: uint8 [num_tokens, C]; CorruptedCode when the stream does not end where it began."""
    damaged = CorruptedCode("an entropy-coded section does not end where it should", "restore the bytes from a copy")
    if len(data) < 4 * num_tokens or len(data) % 2:
        raise damaged
    state = np.frombuffer(data, "<u4", num_tokens).astype(np.uint64)
    words = np.append(np.frombuffer(data, "<u2", offset=4 * num_tokens), np.zeros(1, np.uint16)).astype(np.uint64)
    channels = len(freqs)
    starts = (np.cumsum(freqs, 1) - freqs).astype(np.uint64)
    wide = freqs.astype(np.uint64)
    symbols = np.empty((channels, num_tokens), np.uint8)
    position, mask = 0, np.uint64(TOTAL - 1)
    alphabet = np.arange(freqs.shape[1], dtype=np.uint8)
    for i in range(channels):
        slot = state & mask
        symbol = np.repeat(alphabet, freqs[i])[slot]
        symbols[i] = symbol
        state = wide[i][symbol] * (state >> np.uint64(PRECISION_BITS)) + slot - starts[i][symbol]
        need = state < _LOW
        taken = position + np.cumsum(need)
        state = np.where(need, (state << np.uint64(16)) | words[np.minimum(taken - 1, len(words) - 1)], state)
        position = int(taken[-1])
    if position != len(words) - 1 or not (state == _LOW).all():
        raise damaged
    return symbols.T
