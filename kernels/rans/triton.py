"""Triton kernels of `rans_encode` and `rans_decode`; `reference.py` says what they mean.

One program codes one span, a lane an element. A step is a chain of dependent operations (slot, table, state, word), so it is latency that
counts: tables small enough for L1 are searched, four ways at a time, instead of a slot table that would come from L2, everything that does not
depend on the state is fetched a step ahead, and on a GPU the lanes' ranks come from one ballot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.rans.lookup import ITEM_SHIFT, PLACE_SHIFT
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
CYCLE = tl.constexpr(1 << PRECISION_BITS)
SLOT_MASK = tl.constexpr((1 << PRECISION_BITS) - 1)
ITEM = tl.constexpr(ITEM_SHIFT)
ITEM_MASK = tl.constexpr((1 << ITEM_SHIFT) - 1)
PLACE = tl.constexpr(PLACE_SHIFT)
FREQ_MASK = tl.constexpr((1 << 32) - (1 << ITEM_SHIFT))
INFO = tl.constexpr(INFO_BITS)
INFO_MASK = tl.constexpr((1 << INFO_BITS) - 1)
ZERO_GAIN = tl.constexpr(GAIN_ZERO)
GAIN_CLASSES = tl.constexpr(CLASSES_PER_GAIN)
GAIN_LIMIT = tl.constexpr(NUM_GAINS // 2 - 1)


@triton.jit
def _lane_numbers(LANES: tl.constexpr):
    """0 .. LANES - 1, counted once rather than read anew from the thread's index, which takes long, wherever they are used."""
    return tl.cumsum(tl.zeros([LANES], tl.int32) + 1, 0) - 1


@triton.jit
def _ranks(need, lane, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """(how many lanes before this one need a word, how many do in all); need: int32 0 or 1 a lane."""
    if BALLOT:
        # One warp holds one lane a thread.
        votes = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "=r,r", [need],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        below = votes & ((1 << lane) - 1)
        rank = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [below], dtype=tl.int32, is_pure=True, pack=1)
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [votes], dtype=tl.int32, is_pure=True, pack=1)
        return rank, count
    else:
        return tl.cumsum(need, 0) - need, tl.zeros([LANES], tl.int32) + tl.sum(need, 0)


@triton.jit
def _class_move(shift, gain_shift, num_classes):
    """(moved, low, high): a component's class, moved by shift and then by gain_shift and kept a class each time, is base + moved within [low, high]."""
    low = tl.minimum(tl.maximum(gain_shift, 0), num_classes - 1)
    high = tl.maximum(tl.minimum(gain_shift, 0) + num_classes - 1, 0)
    return shift + gain_shift, low, high


@triton.jit
def _own_class(base, move):
    return tl.minimum(tl.maximum(base + move[0], move[1]), move[2])


@triton.jit
def _node(nodes_ptr, node):
    """A node's sixteen items a lane, four by four: a lane's thread reads four of them at once."""
    item = nodes_ptr + node[:, None] * 16 + tl.arange(0, 4)[None, :]
    return (
        tl.load(item).to(tl.uint32, bitcast=True), tl.load(item + 4).to(tl.uint32, bitcast=True),
        tl.load(item + 8).to(tl.uint32, bitcast=True), tl.load(item + 12).to(tl.uint32, bitcast=True),
    )  # fmt: skip


@triton.jit
def _nearest(key, node):
    """Least difference of the key from a node's items, those above it wrapping around to far away."""
    key = key[:, None]
    least = tl.minimum(key - node[1], key - node[0])
    least = tl.minimum(key - node[2], least)
    return tl.min(tl.minimum(key - node[3], least), 1)


@triton.jit
def _place(found):
    """Place, int32 0 .. 15, of the item found in its node."""
    return ((found >> PLACE) & 15).to(tl.int32) ^ 15


@triton.jit
def _words_at(word_ptr, where, end, wanted):
    """int16 words at `where`; 0 from the span's end on."""
    return tl.load(word_ptr + where, mask=wanted & (where < end), other=0)


@triton.jit
def _unsigned(word):
    return word.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _next_words(words, need, lane, LANES: tl.constexpr, BALLOT: tl.constexpr, WINDOW: tl.constexpr):
    """(each lane's word if it needs one, the words moved on).

    words: (address, end, position, offset, held, later). Without WINDOW the next word is at `position`. With it the lanes hold the words from
    position - 2 LANES on, the lower half of `held` being lane i's i-th and the upper half its LANES + i-th, and the LANES after them in `later`
    (loaded a step before anything looks at them); the next word is at `offset` of these.
    """
    word_ptr, end, position, offset, held, later = words
    rank, count = _ranks(need.to(tl.int32), lane, LANES, BALLOT)
    if WINDOW:
        index = offset + rank
        both = tl.gather(held, index & (LANES - 1), 0)
        word = tl.where(index >= LANES, both >> 16, both & 0xFFFF)
        offset += count
        passed = offset >= LANES
        held = tl.where(passed, (held >> 16) | (_unsigned(later) << 16), held)
        offset = tl.where(passed, offset - LANES, offset)
        position = tl.where(passed, position + LANES, position)
        later = _words_at(word_ptr, position + lane, end, lane >= 0)
    else:
        word = _unsigned(_words_at(word_ptr, position + rank, end, need))
        position += count
    return word, (word_ptr, end, position, offset, held, later)


@triton.jit
def _decode_step(x, found, active, words, lane, LANES: tl.constexpr, BALLOT: tl.constexpr, WINDOW: tl.constexpr):
    """The states after the symbol `found`, and the words moved on; an inactive lane's state becomes anything."""
    new = ((found & SLOT_MASK) ^ SLOT_MASK) * (x >> BITS) + (found >> ITEM)
    need = active & (new < LOW)
    word, words = _next_words(words, need, lane, LANES, BALLOT, WINDOW)
    return tl.where(need, (new << 16) | word, new), words


@triton.jit
def _decode_kernel(
    state_ptr, word_ptr, token_start_ptr, lane_start_ptr, word_start_ptr, nodes_ptr, first_child_ptr, bits_ptr, class_ptr, shift_ptr,
    q_ptr, gain_ptr, intact_ptr, depth, num_classes, tokens_per_lane, stride_token, stride_component,
    LANES: tl.constexpr, SHIFTS: tl.constexpr, BALLOT: tl.constexpr, WINDOW: tl.constexpr,
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
    none = tl.zeros([LANES], tl.int32)
    fixed = _lane_numbers(LANES)
    held, later, position = none.to(tl.uint32), none.to(tl.int16), none
    if WINDOW:
        held = _unsigned(_words_at(word_ptr, lane, end, lane >= 0)) | (_unsigned(_words_at(word_ptr, LANES + lane, end, lane >= 0)) << 16)
        position += 2 * LANES
        later = _words_at(word_ptr, position + lane, end, lane >= 0)
    words = (word_ptr, end, position, none, held, later)
    gain_node = _node(nodes_ptr, none + num_classes)
    for turn in range(tokens_per_lane):
        token = turn * lanes + lane
        active = present & (token < size)
        row = first + token
        before = x
        found = _nearest((x << ITEM) | ITEM_MASK, gain_node)
        gain = _place(found)
        x, words = _decode_step(x, found, active, words, fixed, LANES, BALLOT, WINDOW)
        tl.store(gain_ptr + row, gain.to(tl.uint8), mask=active)
        gain_shift = GAIN_CLASSES * (gain - ZERO_GAIN)
        shift = none
        if SHIFTS:
            shift = tl.load(shift_ptr + row, mask=active, other=0)
        move = _class_move(shift, gain_shift, num_classes)
        # No lane's class exceeds the one of these, so its tree's depth serves every lane.
        top_gain = tl.max(tl.where(active, gain_shift, -64), 0)
        top_shift = tl.max(tl.where(active, shift, -1024), 0)
        top = _class_move(top_shift, top_gain, num_classes)
        # A component's node is fetched a step ahead of the state that is looked up in it, and its class a step before that.
        base = tl.load(class_ptr)
        own = _own_class(base, move)
        node = _node(nodes_ptr, own)
        child = tl.load(first_child_ptr + own)
        bits = tl.load(bits_ptr + _own_class(base, top))
        base = tl.load(class_ptr + tl.minimum(1, depth - 1))
        out_ptr = q_ptr + row * stride_token
        for step in range(depth):
            key = (x << ITEM) | ITEM_MASK
            found = _nearest(key, node)
            symbol = _place(found) - 7
            next_own = _own_class(base, move)
            next_bits = tl.load(bits_ptr + _own_class(base, top))
            base = tl.load(class_ptr + tl.minimum(step + 2, depth - 1))
            node = _node(nodes_ptr, next_own)
            next_child = tl.load(first_child_ptr + next_own)
            # Written here, and again where it is not the symbol yet: the compiler would move the loads above, which nothing needs until the next
            # step, to the end of this one, but not past a store.
            tl.store(out_ptr, symbol.to(tl.int16), mask=active)
            front = 7
            for done in range(4, bits, 4):
                # The comparison is always true: Triton 3.6 takes a value that a loop carries for its first one if its only use is an inner loop's bound.
                inner = ((found & SLOT_MASK) == SLOT_MASK) & (none + done < bits)
                below = _nearest(key, _node(nodes_ptr, tl.where(inner, child + front + symbol, own)))
                symbol = tl.where(inner, symbol * 16 + _place(below) - 15, symbol)
                found = tl.where(inner, below, found)
                front = 16 * front + 31
                tl.store(out_ptr, symbol.to(tl.int16), mask=active)
            x, words = _decode_step(x, found, active, words, fixed, LANES, BALLOT, WINDOW)
            out_ptr += stride_component
            own, child, bits = next_own, next_child, next_bits
        x = tl.where(active, x, before)
    used = words[2] + words[3] - 2 * LANES if WINDOW else words[2]
    wrong = tl.sum((present & (x != LOW)).to(tl.int32), 0) + tl.max((used != end).to(tl.int32), 0)
    tl.store(intact_ptr + span, (wrong == 0).to(tl.int8))


@triton.jit
def _encode_step(x, active, pointer, word_ptr, entry, lane, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """One symbol a lane, entry its divisor (see `lookup.py`): (new states, moved pointer). Words fill the region from its end."""
    low = entry.to(tl.uint32)
    high = (entry >> 32).to(tl.uint32)
    emits = active & (x >= (low & FREQ_MASK))
    short = tl.where(emits, x >> 16, x)
    quotient = tl.umulhi(short + (high >> 31), high | 0x80000000) >> (low & 15)
    new = short + ((low >> 4) & SLOT_MASK) + quotient * (CYCLE - (low >> ITEM))
    rank, count = _ranks(emits.to(tl.int32), lane, LANES, BALLOT)
    pointer -= count
    tl.store(word_ptr + pointer + rank, (x & 0xFFFF).to(tl.int16), mask=emits)
    return tl.where(active, new, x), pointer


@triton.jit
def _values(q_ptr, last, stride_component, active, CHUNK: tl.constexpr):
    """A chunk's integers, from component `last` down."""
    values = ()
    for i in tl.static_range(CHUNK):
        values = values + (tl.load(q_ptr + tl.maximum(last - i, 0).to(tl.int64) * stride_component, mask=active, other=0),)
    return values


@triton.jit
def _bases(class_ptr, last, CHUNK: tl.constexpr):
    bases = ()
    for i in tl.static_range(CHUNK):
        bases = bases + (tl.load(class_ptr + tl.maximum(last - i, 0)),)
    return bases


@triton.jit
def _infos(info_ptr, bases, move, CHUNK: tl.constexpr):
    infos = ()
    for i in tl.static_range(CHUNK):
        infos = infos + (tl.load(info_ptr + _own_class(bases[i], move)),)
    return infos


@triton.jit
def _entries(divisors_ptr, values, infos, CHUNK: tl.constexpr):
    """Divisors of a chunk's integers, info << 12 | limit being their classes'."""
    entries = ()
    for i in tl.static_range(CHUNK):
        limit = infos[i] & INFO_MASK
        value = values[i].to(tl.int32)
        symbol = tl.where(tl.abs(value) > limit, limit + 1, value)
        entries = entries + (tl.load(divisors_ptr + (infos[i] >> INFO) + symbol),)
    return entries


@triton.jit
def _encode_kernel(
    q_ptr, gain_ptr, token_start_ptr, lane_start_ptr, divisors_ptr, info_ptr, class_ptr, shift_ptr, state_ptr, word_ptr, count_ptr,
    depth, num_classes, tokens_per_lane, stride_token, stride_component,
    LANES: tl.constexpr, SHIFTS: tl.constexpr, BALLOT: tl.constexpr, CHUNK: tl.constexpr,
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
    fixed = _lane_numbers(LANES)
    gain_begin = (tl.load(info_ptr + num_classes) >> INFO) - GAIN_LIMIT
    for back in range(tokens_per_lane):
        token = (tokens_per_lane - 1 - back) * lanes + lane
        active = present & (token < size)
        row = first + token
        gain = tl.load(gain_ptr + row, mask=active, other=0).to(tl.int32)
        shift = tl.zeros([LANES], tl.int32)
        if SHIFTS:
            shift = tl.load(shift_ptr + row, mask=active, other=0)
        move = _class_move(shift, GAIN_CLASSES * (gain - ZERO_GAIN), num_classes)
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
    # A whole warp's lanes at least, so that a thread has one lane and reads a node's items for that one alone.
    lanes = max(32, triton.next_power_of_2(triton.cdiv(max_span_tokens, tokens_per_lane)))
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
    chunk: int | None = None,
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
            q, gains, token_starts, lane_starts, tables.divisors, tables.info, classes, shifts if shifts is not None else classes,
            states, loose, counts, depth, tables.num_classes, tokens_per_lane, q.stride(0), q.stride(1),
            LANES=lanes, SHIFTS=shifts is not None, BALLOT=use_ballot, CHUNK=chunk or (8 if lanes <= 64 else 2), num_warps=warps,
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
    window: bool | None = None,
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
            tables.nodes, tables.first_child, tables.search_bits, classes, shifts if shifts is not None else classes, q, gains, intact,
            depth, tables.num_classes, tokens_per_lane, q.stride(0), q.stride(1),
            LANES=lanes, SHIFTS=shifts is not None, BALLOT=use_ballot, WINDOW=lanes <= 32 if window is None else window and lanes <= 32,
            num_warps=warps,
        )  # fmt: skip
    return RansDecoded(q, gains, intact.bool())
