"""Meaning of `rans_encode` and `rans_decode` in plain PyTorch: interleaved rANS over the lanes of many spans.

Range asymmetric numeral systems (Duda, 2013), interleaved after Giesen (2014); the stream is the one `codec/rans.py` reads and writes.
A lane codes `tokens_per_lane` tokens of its span one after the other: token t belongs to lane t % lanes. A token is its gain symbol, then
its K components. In a step every lane of a span codes one symbol; the lanes that need a 16-bit word take the next ones in lane order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from kernels.rans.lookup import divisors, search_trees

PRECISION_BITS = 14
TOTAL = 1 << PRECISION_BITS
STATE_LOW = 1 << 16
NUM_GAINS = 16
GAIN_ZERO = 8
CLASSES_PER_GAIN = 2
INFO_BITS = 12


class RansTables(NamedTuple):
    """Frequency tables of C scale classes and, as class C, of the gain symbol.

    packed: int32 [entries], start << 16 | frequency, class after class.
    info: int32 [C + 1], centre << 12 | limit: a class holds the symbols -limit .. limit + 1 (the last is the escape);
        its entry is centre + symbol.
    search_bits: int32 [C + 1], halvings that find a slot in any class up to this one (the gain's own for class C).
    nodes: int32 [*, 16], first_child: int32 [C + 1], divisors: int64 [entries]: the same for the kernels, see `lookup.py`.
    """

    packed: torch.Tensor
    info: torch.Tensor
    search_bits: torch.Tensor
    nodes: torch.Tensor
    first_child: torch.Tensor
    divisors: torch.Tensor

    @property
    def num_classes(self) -> int:
        return len(self.info) - 1

    def to(self, device: torch.device | str) -> RansTables:
        return RansTables(*(x.to(device) for x in self))


class RansStreams(NamedTuple):
    """Streams of several spans.

    states: int32 [lanes] (bit patterns of 32-bit states), lanes of span after span; longer than needed where the encoder made it.
    words: int16 [*] (bit patterns), words of span after span.
    word_starts: int64 [spans + 1].
    """

    states: torch.Tensor
    words: torch.Tensor
    word_starts: torch.Tensor


class RansDecoded(NamedTuple):
    """q int16 [T, K] (escape = limit + 1), gains uint8 [T], intact bool [spans]: every state back at its start, every word used."""

    q: torch.Tensor
    gains: torch.Tensor
    intact: torch.Tensor


def build_tables(freqs: torch.Tensor, limits: torch.Tensor, gain_freqs: torch.Tensor) -> RansTables:
    """Tables from frequencies.

    Args:
        freqs: integers [sum(2 limit + 2)], class after class, each class summing to 2^14.
        limits: integers [C], 0 < limit < 4096.
        gain_freqs: integers [16], summing to 2^14.
    """
    sizes = torch.cat([2 * limits.long() + 2, torch.tensor([NUM_GAINS])])
    every = torch.cat([freqs.long(), gain_freqs.long()])
    begins = sizes.cumsum(0) - sizes
    if len(every) != int(sizes.sum()) or len(gain_freqs) != NUM_GAINS:
        raise ValueError("frequencies and limits do not fit together (a class has 2 * limit + 2 entries)")
    before = every.cumsum(0) - every
    if not torch.equal(before[begins], torch.arange(len(begins)) * TOTAL) or int(before[-1] + every[-1]) != len(begins) * TOTAL:
        raise ValueError(f"a class's frequencies do not sum to {TOTAL}")
    start = before - torch.arange(len(begins)).repeat_interleave(sizes) * TOTAL
    all_limits = torch.cat([limits.long(), torch.tensor([NUM_GAINS // 2 - 1])])
    bits = torch.tensor([(int(n) - 1).bit_length() for n in sizes])
    bits[:-1] = bits[:-1].cummax(0).values
    packed = (start << 16 | every).to(torch.int32)
    info = ((begins + all_limits) << INFO_BITS | all_limits).to(torch.int32)
    return RansTables(packed, info, bits.to(torch.int32), *search_trees(every, start, begins, all_limits), divisors(every, start))


def entry_classes(classes: torch.Tensor, shifts: torch.Tensor | None, gains: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Class int64 [T, K] of every symbol: the component's, moved by its token's step (shifts) and by its token's gain."""
    own = classes.long()[None].expand(len(gains), -1)
    if shifts is not None:
        own = (own + shifts.long()[:, None]).clamp(0, num_classes - 1)
    return (own + CLASSES_PER_GAIN * (gains.long() - GAIN_ZERO)[:, None]).clamp(0, num_classes - 1)


def _entries(tables: RansTables, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed = tables.packed[index].long()
    return packed & 0xFFFF, packed >> 16


def lane_counts(token_starts: torch.Tensor, tokens_per_lane: int) -> torch.Tensor:
    """Lanes of each span, int64 [spans]."""
    return (token_starts.diff() + tokens_per_lane - 1) // tokens_per_lane


def rans_encode(
    tables: RansTables,
    q: torch.Tensor,
    classes: torch.Tensor,
    gains: torch.Tensor,
    token_starts: torch.Tensor,
    tokens_per_lane: int,
    *,
    shifts: torch.Tensor | None = None,
) -> RansStreams:
    """Code integers.

    Args:
        tables: of `build_tables`.
        q: [T, K] int16; beyond a class's limit the escape is coded (the caller keeps the remainder).
        classes: [K] int32, each component's class at the usual step and gain.
        gains: [T] uint8, 0 .. 15.
        token_starts: [spans + 1] int64, first token of each span, T last.
        shifts: [T] int32 added to the classes, or None.
    """
    info = tables.info.long()[entry_classes(classes, shifts, gains, tables.num_classes)]
    limit = info & ((1 << INFO_BITS) - 1)
    symbol = torch.where(q.long().abs() > limit, limit + 1, q.long())
    gain_centre = int(tables.info[-1]) >> INFO_BITS
    columns = torch.cat([(gains.long() + gain_centre - (NUM_GAINS // 2 - 1))[:, None], (info >> INFO_BITS) + symbol], 1)  # [T, K + 1]
    states: list[torch.Tensor] = []
    words: list[torch.Tensor] = []
    counts = [0]
    for first, last in pairwise(token_starts.tolist()):
        lanes = -(-(last - first) // tokens_per_lane)
        state = torch.full((lanes,), STATE_LOW, dtype=torch.int64, device=q.device)
        taken: list[torch.Tensor] = []
        for turn in reversed(range(tokens_per_lane)):
            mine = columns[first + turn * lanes : min(first + (turn + 1) * lanes, last)]
            active = len(mine)
            for step in reversed(range(mine.shape[1] if active else 0)):
                freq, start = _entries(tables, mine[:, step])
                x = state[:active]
                emit = x >= freq << (32 - PRECISION_BITS)
                taken.append(x[emit] & 0xFFFF)
                x = torch.where(emit, x >> 16, x)
                state[:active] = (x // freq << PRECISION_BITS) + x % freq + start
        states.append(state)
        words.extend(reversed(taken))
        counts.append(counts[-1] + sum(len(t) for t in taken))
    flat = torch.cat(words) if words else torch.zeros(0, dtype=torch.int64, device=q.device)
    all_states = torch.cat(states) if states else flat
    # Conversion to a narrower integer keeps the low bits: the bit pattern of the unsigned number.
    return RansStreams(all_states.to(torch.int32), flat.to(torch.int16), torch.tensor(counts, device=q.device))


def rans_decode(
    tables: RansTables,
    streams: RansStreams,
    classes: torch.Tensor,
    token_starts: torch.Tensor,
    tokens_per_lane: int,
    *,
    shifts: torch.Tensor | None = None,
) -> RansDecoded:
    """Inverse of `rans_encode` (arguments there). A damaged stream gives some integers and intact = False, never an error."""
    num_tokens, depth = int(token_starts[-1]), len(classes)
    device = tables.packed.device
    q = torch.zeros((num_tokens, depth), dtype=torch.int16, device=device)
    gains = torch.zeros(num_tokens, dtype=torch.uint8, device=device)
    intact = torch.zeros(len(token_starts) - 1, dtype=torch.bool, device=device)
    info = tables.info.long()
    lane_start = 0
    starts = token_starts.tolist()
    bounds = streams.word_starts.tolist()
    for span, (first, last) in enumerate(pairwise(starts)):
        lanes = -(-(last - first) // tokens_per_lane)
        state = streams.states[lane_start : lane_start + lanes].long() & 0xFFFFFFFF
        lane_start += lanes
        words = torch.nn.functional.pad(streams.words[bounds[span] : bounds[span + 1]].long() & 0xFFFF, (0, 1))
        pointer, count = 0, bounds[span + 1] - bounds[span]
        for turn in range(tokens_per_lane):
            rows = slice(first + turn * lanes, min(first + (turn + 1) * lanes, last))
            active = rows.stop - rows.start
            if active <= 0:
                continue
            own = torch.full((active,), tables.num_classes, dtype=torch.int64, device=device)
            own_classes = own
            for step in range(depth + 1):
                if step == 1:
                    own_classes = entry_classes(classes, None if shifts is None else shifts[rows], gains[rows], tables.num_classes)
                item = info[own if step == 0 else own_classes[:, step - 1]]
                limit, centre = item & ((1 << INFO_BITS) - 1), item >> INFO_BITS
                x = state[:active]
                slot = x & (TOTAL - 1)
                entry = _find(tables, centre - limit, 2 * limit + 2, slot)
                freq, start = _entries(tables, entry)
                x = freq * (x >> PRECISION_BITS) + slot - start
                need = x < STATE_LOW
                where = (pointer + need.long().cumsum(0) - 1).clamp(0, count)
                state[:active] = torch.where(need, x << 16 | words[where], x)
                pointer += int(need.sum())
                if step == 0:
                    gains[rows] = (entry - centre + limit).to(torch.uint8)
                else:
                    q[rows, step - 1] = (entry - centre).to(torch.int16)
        intact[span] = pointer == count and bool((state == STATE_LOW).all())
    return RansDecoded(q, gains, intact)


def _find(tables: RansTables, begin: torch.Tensor, size: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Entry whose [start, start + frequency) holds the slot, by halving."""
    entry = begin
    step = 1 << int(size.max() - 1).bit_length()
    while step > 1:
        step >>= 1
        trial = entry + step
        inside = trial < begin + size
        start = tables.packed[torch.where(inside, trial, entry)].long() >> 16
        entry = torch.where(inside & (start <= slot), trial, entry)
    return entry
