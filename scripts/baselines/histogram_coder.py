"""Arithmetic coding with one stored histogram per channel: interleaved rANS, a token a lane, a channel a step.

rANS after Duda (2013), interleaved over lanes after Giesen (2014): 32-bit states, 16-bit words, 12-bit frequencies. All lanes of all sequences code the
same channel in a step, so a step is a few tensor operations, on a GPU as well. codec/rans.py is the project's own coder for scale classes; this one
serves CacheGen's free-form histograms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from codec.errors import CorruptedCode

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS
_LOW = 1 << 16
_BLOCK = 256  # channels whose frequencies are looked up together: bounds memory


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


def encode(symbols: Sequence[torch.Tensor], freqs: torch.Tensor) -> list[bytes]:
    """Codes several sequences at once.

    Args:
        symbols: uint8 [T, C] of each sequence, on the device of freqs.
        freqs: int32 [C, A].

    Returns:
        for each sequence its T final states (4 bytes each), then its words (2 bytes each) in decoding order.
    """
    if not symbols:
        return []
    ends = np.cumsum([len(s) for s in symbols]).tolist()
    columns = torch.cat(list(symbols)).T
    freqs = freqs.long()
    starts = freqs.cumsum(1) - freqs
    channels, lanes = columns.shape
    state = torch.full((lanes,), _LOW, dtype=torch.int64, device=freqs.device)
    pieces: list[list[np.ndarray]] = [[] for _ in symbols]
    for low in reversed(range(0, channels, _BLOCK)):
        some = columns[low : low + _BLOCK].long()
        freq, start = freqs[low : low + _BLOCK].gather(1, some), starts[low : low + _BLOCK].gather(1, some)
        limit = freq << (32 - PRECISION_BITS)
        before = torch.empty_like(some)
        used = torch.empty(some.shape, dtype=torch.bool, device=freqs.device)
        for i in reversed(range(len(some))):
            torch.ge(state, limit[i], out=used[i])
            before[i] = state
            state = torch.where(used[i], state >> 16, state)
            quotient = state // freq[i]
            state = state + quotient * (TOTAL - freq[i]) + start[i]
        for n, end in enumerate(ends):
            own = slice(end - len(symbols[n]), end)
            pieces[n].append((before[:, own][used[:, own]] & 0xFFFF).cpu().numpy().astype("<u2"))
    final = state.cpu().numpy().astype("<u4")
    return [
        final[end - len(s) : end].tobytes() + np.concatenate(words[::-1]).tobytes()
        for s, end, words in zip(symbols, ends, pieces, strict=True)
    ]


def decode(streams: Sequence[bytes], freqs: torch.Tensor, num_tokens: Sequence[int]) -> list[torch.Tensor]:
    """Inverse of encode: uint8 [T, C] of each sequence; CorruptedCode when a stream does not end where it began."""
    damaged = CorruptedCode("an entropy-coded section does not end where it should", "restore the bytes from a copy")
    if not streams:
        return []
    device, longest = freqs.device, max(num_tokens)
    states = np.full((len(streams), longest), _LOW, np.int64)
    counts = [(len(data) - 4 * n) // 2 for data, n in zip(streams, num_tokens, strict=True)]
    pool = np.zeros((len(streams), max(0, *counts) + 1), np.int64)
    for row, (data, n) in enumerate(zip(streams, num_tokens, strict=True)):
        if len(data) < 4 * n or len(data) % 2:
            raise damaged
        states[row, :n] = np.frombuffer(data, "<u4", n)
        pool[row, : counts[row]] = np.frombuffer(data, "<u2", offset=4 * n)
    state, words = torch.from_numpy(states).to(device), torch.from_numpy(pool).to(device)
    active = torch.arange(longest, device=device) < torch.tensor(num_tokens, device=device)[:, None]
    channels, alphabet = freqs.shape
    freqs = freqs.long()
    starts = freqs.cumsum(1) - freqs
    names = torch.arange(alphabet, dtype=torch.uint8, device=device).repeat(channels)
    slots = names.repeat_interleave(freqs.flatten()).reshape(channels, TOTAL)
    symbols = torch.empty((channels, *state.shape), dtype=torch.uint8, device=device)
    used = torch.full((len(streams), 1), -1, dtype=torch.int64, device=device)  # the last word taken
    for i in range(channels):
        slot = state & (TOTAL - 1)
        symbols[i] = slots[i][slot]
        symbol = symbols[i].long()
        state = torch.where(active, freqs[i][symbol] * (state >> PRECISION_BITS) + slot - starts[i][symbol], _LOW)
        need = state < _LOW
        taken = used + need.cumsum(1)
        word = words.gather(1, taken.clamp(0, words.shape[1] - 1))
        state = torch.where(need, (state << 16) | word, state)
        used = taken[:, -1:]
    if (used[:, 0] + 1).tolist() != counts or not bool((state == _LOW).all()):
        raise damaged
    return [symbols[:, row, :n].T for row, n in enumerate(num_tokens)]
