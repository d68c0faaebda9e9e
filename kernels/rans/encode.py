"""Triton kernels of `rans_encode`; `reference.py` says what they mean, `triton.py` launches them.

The chain from a state to the next is short (compare, shift, multiply high, shift, multiply); what takes time is memory: a span reads 32 bytes of
integers a component, from anywhere in a large tensor, and its entries follow from them. So all of that is fetched chunks ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.rans.shared import (
    CYCLE,
    FREQ_MASK,
    GAIN_CLASSES,
    GAIN_LIMIT,
    INFO,
    INFO_MASK,
    ITEM,
    LOW,
    SLOT_MASK,
    ZERO_GAIN,
    class_move,
    lane_numbers,
    own_class,
    ranks,
)


@triton.jit
def _encode_step(x, active, pointer, word_ptr, entry, lane, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """One symbol a lane, entry its divisor (see `lookup.py`): (new states, moved pointer). Words fill the region from its end."""
    low = entry.to(tl.uint32)
    high = (entry >> 32).to(tl.uint32)
    emits = active & (x >= (low & FREQ_MASK))
    short = tl.where(emits, x >> 16, x)
    quotient = tl.umulhi(short + (high >> 31), high | 0x80000000) >> (low & 15)
    new = short + ((low >> 4) & SLOT_MASK) + quotient * (CYCLE - (low >> ITEM))
    rank, count = ranks(emits.to(tl.int32), lane, LANES, BALLOT)
    pointer -= count
    tl.store(word_ptr + pointer + rank, (x & 0xFFFF).to(tl.int16), mask=emits)
    return tl.where(active, new, x), pointer


@triton.jit
def _values(q_ptr, last, stride_component, active, CHUNK: tl.constexpr):
    """A chunk's integers, from component `last` down."""
    values = ()
    for i in tl.static_range(CHUNK):
        values += (tl.load(q_ptr + tl.maximum(last - i, 0).to(tl.int64) * stride_component, mask=active, other=0),)  # type: ignore[assignment]
    return values


@triton.jit
def _bases(class_ptr, last, CHUNK: tl.constexpr):
    bases = ()
    for i in tl.static_range(CHUNK):
        bases += (tl.load(class_ptr + tl.maximum(last - i, 0)),)  # type: ignore[assignment]
    return bases


@triton.jit
def _infos(info_ptr, bases, move, CHUNK: tl.constexpr):
    infos = ()
    for i in tl.static_range(CHUNK):
        infos += (tl.load(info_ptr + own_class(bases[i], move)),)  # type: ignore[assignment]
    return infos


@triton.jit
def _entries(divisors_ptr, values, infos, CHUNK: tl.constexpr):
    """Divisors of a chunk's integers, info << 12 | limit being their classes'."""
    entries = ()
    for i in tl.static_range(CHUNK):
        limit = infos[i] & INFO_MASK
        value = values[i].to(tl.int32)
        symbol = tl.where(tl.abs(value) > limit, limit + 1, value)
        entries += (tl.load(divisors_ptr + (infos[i] >> INFO) + symbol),)  # type: ignore[assignment]
    return entries


@triton.jit
def encode_kernel(
    q_ptr,
    gain_ptr,
    token_start_ptr,
    lane_start_ptr,
    divisors_ptr,
    info_ptr,
    class_ptr,
    shift_ptr,
    state_ptr,
    word_ptr,
    count_ptr,
    depth,
    num_classes,
    tokens_per_lane,
    stride_token,
    stride_component,
    LANES: tl.constexpr,
    SHIFTS: tl.constexpr,
    BALLOT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    span = tl.program_id(0)
    first = tl.load(token_start_ptr + span)
    size = (tl.load(token_start_ptr + span + 1) - first).to(tl.int32)
    lanes = tl.cdiv(size, tokens_per_lane)
    lane = tl.arange(0, LANES)
    present = lane < lanes
    room = size * (depth + 1)
    word_ptr += first * (depth + 1)
    pointer = tl.zeros([LANES], tl.int32) + room
    x = (tl.zeros([LANES], tl.int32) + LOW).to(tl.uint32)
    fixed = lane_numbers(LANES)
    gain_begin = (tl.load(info_ptr + num_classes) >> INFO) - GAIN_LIMIT
    for back in range(tokens_per_lane):
        token = (tokens_per_lane - 1 - back) * lanes + lane
        active = present & (token < size)
        row = first + token
        gain = tl.load(gain_ptr + row, mask=active, other=0).to(tl.int32)
        shift = tl.zeros([LANES], tl.int32)
        if SHIFTS:
            shift = tl.load(shift_ptr + row, mask=active, other=0)
        move = class_move(shift, GAIN_CLASSES * (gain - ZERO_GAIN), num_classes)
        own_q = q_ptr + row * stride_token
        # None of these depends on a state, and each is fetched while a chunk is coded whose steps hide the time it takes: classes three chunks
        # ahead, integers and limits two, divisors one.
        last = tl.full((), -1, tl.int32) + depth
        values = _values(own_q, last, stride_component, active, CHUNK)
        entries = _entries(divisors_ptr, values, _infos(info_ptr, _bases(class_ptr, last, CHUNK), move, CHUNK), CHUNK)
        values = _values(own_q, last - CHUNK, stride_component, active, CHUNK)
        infos = _infos(info_ptr, _bases(class_ptr, last - CHUNK, CHUNK), move, CHUNK)
        bases = _bases(class_ptr, last - 2 * CHUNK, CHUNK)
        for _ in range(0, depth, CHUNK):
            next_entries = _entries(divisors_ptr, values, infos, CHUNK)
            next_values = _values(own_q, last - 2 * CHUNK, stride_component, active, CHUNK)
            next_infos = _infos(info_ptr, bases, move, CHUNK)
            next_bases = _bases(class_ptr, last - 3 * CHUNK, CHUNK)
            # A loop of one round, which the compiler does not know: it would move the loads behind the steps that are to hide them.
            for _ in range(0, last + 1, depth):
                reach = tl.where(active, last, -1)
                for i in tl.static_range(CHUNK):
                    x, pointer = _encode_step(x, reach >= i, pointer, word_ptr, entries[i], fixed, LANES, BALLOT)
            entries, values, infos, bases = next_entries, next_values, next_infos, next_bases
            last -= CHUNK
        x, pointer = _encode_step(x, active, pointer, word_ptr, tl.load(divisors_ptr + gain_begin + gain), fixed, LANES, BALLOT)
    tl.store(state_ptr + tl.load(lane_start_ptr + span) + lane, x.to(tl.int32, bitcast=True), mask=present)
    tl.store(count_ptr + span, tl.max(room - pointer, 0).to(tl.int64))


@triton.jit
def compact_kernel(loose_ptr, dense_ptr, token_start_ptr, word_start_ptr, depth, BLOCK: tl.constexpr):
    span = tl.program_id(0)
    to = tl.load(word_start_ptr + span)
    count = tl.load(word_start_ptr + span + 1) - to
    source = tl.load(token_start_ptr + span + 1) * (depth + 1) - count
    for at in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        index = at + tl.arange(0, BLOCK)
        tl.store(dense_ptr + to + index, tl.load(loose_ptr + source + index, mask=index < count, other=0), mask=index < count)
