"""Triton kernels of `rans_encode` and `rans_decode`; `reference.py` says what they mean.

One program codes one span, a lane an element. A step is a chain of dependent operations (slot, table, state, word), so it is latency that
counts: tables small enough for L1 are searched, four ways at a time, instead of a slot table that would come from L2, everything that does not
depend on the state is fetched a step ahead, and on a GPU the lanes' ranks come from one ballot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.rans.reference import (
    CLASSES_PER_GAIN,
    GAIN_ZERO,
    INFO_BITS,
    NUM_GAINS,
    PRECISION_BITS,
    STATE_LOW,
    RansDecoded,
    RansStreams,
    RansTables,
    lane_counts,
)

BITS = tl.constexpr(PRECISION_BITS)
LOW = tl.constexpr(STATE_LOW)
SLOT_MASK = tl.constexpr((1 << PRECISION_BITS) - 1)
EMIT_SHIFT = tl.constexpr(32 - PRECISION_BITS)
INFO = tl.constexpr(INFO_BITS)
INFO_MASK = tl.constexpr((1 << INFO_BITS) - 1)
ZERO_GAIN = tl.constexpr(GAIN_ZERO)
GAIN_CLASSES = tl.constexpr(CLASSES_PER_GAIN)
GAIN_LIMIT = tl.constexpr(NUM_GAINS // 2 - 1)


@triton.jit
def _ranks(need, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """(how many lanes before this one need a word, how many do in all); need: int32 0 or 1 a lane."""
    if BALLOT:
        # One warp holds at most one lane a thread; with fewer lanes than threads the upper threads repeat them.
        votes = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "=r,r", [need],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        lane = tl.arange(0, LANES)
        below = votes & ((1 << lane) - 1)
        ours = votes & (-1 if LANES == 32 else (1 << LANES) - 1)
        rank = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [below], dtype=tl.int32, is_pure=True, pack=1)
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [ours], dtype=tl.int32, is_pure=True, pack=1)
        return rank, count
    else:
        return tl.cumsum(need, 0) - need, tl.zeros([LANES], tl.int32) + tl.sum(need, 0)


@triton.jit
def _class_info(info_ptr, base, shift, gain_shift, num_classes):
    """(limit, centre) of each lane's class; base: the component's class."""
    own = tl.minimum(tl.maximum(base + shift, 0), num_classes - 1)
    own = tl.minimum(tl.maximum(own + gain_shift, 0), num_classes - 1)
    info = tl.load(info_ptr + own)
    return info & INFO_MASK, info >> INFO


@triton.jit
def _decode_step(x, active, pointer, packed_ptr, word_ptr, end, limit, centre, bits, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """One symbol a lane: (new states, symbol + limit, moved pointer)."""
    slot = x & SLOT_MASK
    key = ((slot << 16) | 0xFFFF).to(tl.int32)  # an entry that starts at the slot or before is at most this
    begin = centre - limit
    last = centre + limit + 1
    entry = begin
    found = tl.load(packed_ptr + begin)
    # Three entries at a time, whose loads do not wait for each other: a round takes hardly longer than a halving and does two.
    for done in range(0, bits, 2):
        stride = 1 << tl.maximum(bits - 2 - done, 0)
        first = entry
        for i in tl.static_range(1, 4):
            trial = tl.minimum(first + i * stride, last)
            item = tl.load(packed_ptr + trial)
            reached = item <= key
            entry = tl.where(reached, trial, entry)  # entries rise, so the last one reached is the one
            found = tl.where(reached, item, found)
    freq = (found & 0xFFFF).to(tl.uint32)
    start = (found >> 16).to(tl.uint32)
    new = freq * (x >> BITS) + (slot - start)
    need = (active & (new < LOW)).to(tl.int32)
    rank, count = _ranks(need, LANES, BALLOT)
    where = pointer + rank
    word = tl.load(word_ptr + where, mask=(need == 1) & (where < end), other=0).to(tl.int32) & 0xFFFF
    new = tl.where(need == 1, (new << 16) | word.to(tl.uint32), new)
    return tl.where(active, new, x), entry - begin, pointer + count


@triton.jit
def _decode_kernel(
    state_ptr, word_ptr, token_start_ptr, lane_start_ptr, word_start_ptr, packed_ptr, info_ptr, bits_ptr, class_ptr, shift_ptr,
    q_ptr, gain_ptr, intact_ptr, depth, num_classes, tokens_per_lane, stride_token, stride_component,
    LANES: tl.constexpr, SHIFTS: tl.constexpr, BALLOT: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    first = tl.load(token_start_ptr + span)
    size = (tl.load(token_start_ptr + span + 1) - first).to(tl.int32)
    lanes = tl.cdiv(size, tokens_per_lane)
    lane = tl.arange(0, LANES)
    present = lane < lanes
    x = tl.load(state_ptr + tl.load(lane_start_ptr + span) + lane, mask=present, other=LOW).to(tl.uint32, bitcast=True)
    word_start = tl.load(word_start_ptr + span)
    end = (tl.load(word_start_ptr + span + 1) - word_start).to(tl.int32)
    word_ptr += word_start
    pointer = tl.zeros([LANES], tl.int32)
    gain_info = tl.load(info_ptr + num_classes)
    gain_centre = tl.zeros([LANES], tl.int32) + (gain_info >> INFO)
    gain_limit = tl.zeros([LANES], tl.int32) + GAIN_LIMIT
    gain_bits = tl.load(bits_ptr + num_classes)
    for turn in range(tokens_per_lane):
        token = turn * lanes + lane
        active = present & (token < size)
        row = first + token
        x, gain, pointer = _decode_step(
            x, active, pointer, packed_ptr, word_ptr, end, gain_limit, gain_centre, gain_bits, LANES, BALLOT
        )
        tl.store(gain_ptr + row, gain.to(tl.uint8), mask=active)
        gain_shift = GAIN_CLASSES * (gain - ZERO_GAIN)
        shift = tl.zeros([LANES], tl.int32)
        if SHIFTS:
            shift = tl.load(shift_ptr + row, mask=active, other=0)
        # No lane's class exceeds this one's, so its number of halvings serves every lane.
        top_gain = tl.max(tl.where(active, gain_shift, -64), 0)
        top_shift = tl.max(tl.where(active, shift, -1024), 0)
        base = tl.load(class_ptr)
        limit, centre = _class_info(info_ptr, base, shift, gain_shift, num_classes)
        bits = tl.load(bits_ptr + tl.minimum(tl.maximum(tl.maximum(base + top_shift, 0) + top_gain, 0), num_classes - 1))
        out_ptr = q_ptr + row * stride_token
        for step in range(depth):
            base = tl.load(class_ptr + tl.minimum(step + 1, depth - 1))
            next_limit, next_centre = _class_info(info_ptr, base, shift, gain_shift, num_classes)
            next_bits = tl.load(bits_ptr + tl.minimum(tl.maximum(tl.maximum(base + top_shift, 0) + top_gain, 0), num_classes - 1))
            x, symbol, pointer = _decode_step(x, active, pointer, packed_ptr, word_ptr, end, limit, centre, bits, LANES, BALLOT)
            tl.store(out_ptr, (symbol - limit).to(tl.int16), mask=active)
            out_ptr += stride_component
            limit, centre, bits = next_limit, next_centre, next_bits
    wrong = tl.sum((present & (x != LOW)).to(tl.int32), 0) + tl.max((pointer != end).to(tl.int32), 0)
    tl.store(intact_ptr + span, (wrong == 0).to(tl.int8))


@triton.jit
def _encode_step(x, active, pointer, word_ptr, item, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """One symbol a lane, item its packed table entry: (new states, moved pointer). Words fill the region from its end."""
    freq = tl.where(active, item & 0xFFFF, 1).to(tl.uint32)
    start = (item >> 16).to(tl.uint32)
    need = (active & (x >= (freq << EMIT_SHIFT))).to(tl.int32)
    rank, count = _ranks(need, LANES, BALLOT)
    pointer -= count
    tl.store(word_ptr + pointer + rank, (x & 0xFFFF).to(tl.int16), mask=need == 1)
    short = tl.where(need == 1, x >> 16, x)
    quotient = short // freq
    return tl.where(active, (quotient << BITS) + (short - quotient * freq) + start, x), pointer


@triton.jit
def _item(q_ptr, class_ptr, info_ptr, packed_ptr, step, row, active, shift, gain_shift, num_classes, stride_token, stride_component):
    """Packed table entry of component `step` of each lane's token; nothing in it depends on a state."""
    value = tl.load(q_ptr + row * stride_token + step.to(tl.int64) * stride_component, mask=active, other=0).to(tl.int32)
    limit, centre = _class_info(info_ptr, tl.load(class_ptr + step), shift, gain_shift, num_classes)
    symbol = tl.where(tl.abs(value) > limit, limit + 1, value)
    return tl.load(packed_ptr + centre + symbol)


@triton.jit
def _encode_kernel(
    q_ptr, gain_ptr, token_start_ptr, lane_start_ptr, packed_ptr, info_ptr, class_ptr, shift_ptr, state_ptr, word_ptr, count_ptr,
    depth, num_classes, tokens_per_lane, stride_token, stride_component,
    LANES: tl.constexpr, SHIFTS: tl.constexpr, BALLOT: tl.constexpr,
):  # fmt: skip
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
    gain_begin = (tl.load(info_ptr + num_classes) >> INFO) - GAIN_LIMIT
    for back in range(tokens_per_lane):
        token = (tokens_per_lane - 1 - back) * lanes + lane
        active = present & (token < size)
        row = first + token
        gain = tl.load(gain_ptr + row, mask=active, other=0).to(tl.int32)
        gain_shift = GAIN_CLASSES * (gain - ZERO_GAIN)
        shift = tl.zeros([LANES], tl.int32)
        if SHIFTS:
            shift = tl.load(shift_ptr + row, mask=active, other=0)
        # Table entries are looked up two steps ahead of the state that needs them.
        ahead = tl.zeros([1], tl.int32) + depth
        item = _item(
            q_ptr, class_ptr, info_ptr, packed_ptr, tl.maximum(ahead - 1, 0), row, active, shift, gain_shift, num_classes,
            stride_token, stride_component,
        )  # fmt: skip
        next_item = _item(
            q_ptr, class_ptr, info_ptr, packed_ptr, tl.maximum(ahead - 2, 0), row, active, shift, gain_shift, num_classes,
            stride_token, stride_component,
        )  # fmt: skip
        for done in range(depth):
            later = _item(
                q_ptr, class_ptr, info_ptr, packed_ptr, tl.maximum(ahead - 3 - done, 0), row, active, shift, gain_shift, num_classes,
                stride_token, stride_component,
            )  # fmt: skip
            x, pointer = _encode_step(x, active, pointer, word_ptr, item, LANES, BALLOT)
            item = next_item
            next_item = later
        x, pointer = _encode_step(x, active, pointer, word_ptr, tl.load(packed_ptr + gain_begin + gain), LANES, BALLOT)
    tl.store(state_ptr + tl.load(lane_start_ptr + span) + lane, x.to(tl.int32, bitcast=True), mask=present)
    tl.store(count_ptr + span, tl.max(room - pointer, 0).to(tl.int64))


@triton.jit
def _compact_kernel(loose_ptr, dense_ptr, token_start_ptr, word_start_ptr, depth, BLOCK: tl.constexpr):
    span = tl.program_id(0)
    to = tl.load(word_start_ptr + span)
    count = tl.load(word_start_ptr + span + 1) - to
    source = tl.load(token_start_ptr + span + 1) * (depth + 1) - count
    for at in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        index = at + tl.arange(0, BLOCK)
        tl.store(dense_ptr + to + index, tl.load(loose_ptr + source + index, mask=index < count, other=0), mask=index < count)


def rans_floors(num_tokens: int, num_components: int, num_words: int) -> tuple[int, int]:
    """(bytes, operations) of either direction: 16-bit integers and words once each, about twenty operations a symbol."""
    return 2 * num_tokens * num_components + 2 * num_words, 20 * num_tokens * num_components


def _shape(max_span_tokens: int, tokens_per_lane: int, device: torch.device, ballot: bool | None) -> tuple[int, int, bool]:
    """(lanes a program holds, warps, whether ranks come from a ballot)."""
    lanes = triton.next_power_of_2(triton.cdiv(max_span_tokens, tokens_per_lane))
    fits = lanes <= 32 and device.type == "cuda"
    return lanes, max(1, min(lanes // 64, 8)), fits if ballot is None else ballot and fits


def rans_encode(
    tables: RansTables,
    q: torch.Tensor,
    classes: torch.Tensor,
    gains: torch.Tensor,
    token_starts: torch.Tensor,
    tokens_per_lane: int,
    *,
    shifts: torch.Tensor | None = None,
    max_span_tokens: int = 64,
    ballot: bool | None = None,
) -> RansStreams:
    """See `reference.rans_encode`; q is read fastest with tokens adjacent (the transpose of a [K, T] tensor).

    Nothing is read back: states and words are longer than needed, word_starts (on the device) says how many words are meant.
    max_span_tokens: at least the longest span. ballot: None for wherever a span's lanes fit one warp.
    """
    spans, (num_tokens, depth) = len(token_starts) - 1, q.shape
    lane_starts = lane_counts(token_starts, tokens_per_lane).cumsum(0)
    lane_starts = torch.nn.functional.pad(lane_starts, (1, 0))
    states = torch.empty(num_tokens, dtype=torch.int32, device=q.device)
    loose = torch.empty(num_tokens * (depth + 1), dtype=torch.int16, device=q.device)
    dense = torch.empty(num_tokens * (depth + 1), dtype=torch.int16, device=q.device)
    counts = torch.empty(spans, dtype=torch.int64, device=q.device)
    lanes, warps, use_ballot = _shape(max_span_tokens, tokens_per_lane, q.device, ballot)
    if spans:
        _encode_kernel[(spans,)](
            q, gains, token_starts, lane_starts, tables.packed, tables.info, classes, shifts if shifts is not None else classes,
            states, loose, counts, depth, tables.num_classes, tokens_per_lane, q.stride(0), q.stride(1),
            LANES=lanes, SHIFTS=shifts is not None, BALLOT=use_ballot, num_warps=warps,
        )  # fmt: skip
    word_starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if spans:
        _compact_kernel[(spans, 4)](loose, dense, token_starts, word_starts, depth, BLOCK=1024, num_warps=4)
    return RansStreams(states, dense, word_starts)


def rans_decode(
    tables: RansTables,
    streams: RansStreams,
    classes: torch.Tensor,
    token_starts: torch.Tensor,
    tokens_per_lane: int,
    *,
    num_tokens: int,
    shifts: torch.Tensor | None = None,
    max_span_tokens: int = 64,
    ballot: bool | None = None,
) -> RansDecoded:
    """See `reference.rans_decode`; q comes laid out with tokens adjacent, as `residual_decode` reads it fastest."""
    spans, depth, device = len(token_starts) - 1, len(classes), streams.states.device
    q = torch.empty((depth, num_tokens), dtype=torch.int16, device=device).t()
    gains = torch.empty(num_tokens, dtype=torch.uint8, device=device)
    intact = torch.empty(spans, dtype=torch.int8, device=device)
    lane_starts = torch.nn.functional.pad(lane_counts(token_starts, tokens_per_lane).cumsum(0), (1, 0))
    lanes, warps, use_ballot = _shape(max_span_tokens, tokens_per_lane, device, ballot)
    if spans:
        _decode_kernel[(spans,)](
            streams.states, streams.words, token_starts, lane_starts, streams.word_starts,
            tables.packed, tables.info, tables.search_bits, classes, shifts if shifts is not None else classes, q, gains, intact,
            depth, tables.num_classes, tokens_per_lane, q.stride(0), q.stride(1),
            LANES=lanes, SHIFTS=shifts is not None, BALLOT=use_ballot, num_warps=warps,
        )  # fmt: skip
    return RansDecoded(q, gains, intact.bool())
