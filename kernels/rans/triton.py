"""Triton kernels of `rans_decode`, and both launchers; `reference.py` says what they mean, `encode.py` has the other kernels.

One program codes one span, a lane an element. 16,384 tokens are 256 spans of 16 lanes, fewer warps than the GPU has schedulers, so what counts is
how long a step's chain of dependent operations is (state, slot, symbol, state, rank, word), and how little of it waits for memory:
- a symbol is found by subtracting sixteen items, fetched a step ahead, from the slot (`lookup.py`); only classes of more than sixteen entries need
  a second, dependent fetch;
- the lanes of one warp count their ranks by one ballot, and read their words where L1 holds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.rans.encode import compact_kernel, encode_kernel
from kernels.rans.reference import RansDecoded, RansStreams, RansTables, lane_counts
from kernels.rans.shared import (
    BITS,
    GAIN_CLASSES,
    ITEM,
    ITEM_MASK,
    LOW,
    PLACE,
    SLOT_MASK,
    ZERO_GAIN,
    class_move,
    lane_numbers,
    own_class,
    ranks,
)


@triton.jit
def _node(node_ptr):
    """The sixteen items of each lane's node, four by four: a lane's thread reads four of them at once."""
    item = node_ptr[:, None] + tl.arange(0, 4)[None, :]
    return (
        tl.load(item).to(tl.uint32, bitcast=True),
        tl.load(item + 4).to(tl.uint32, bitcast=True),
        tl.load(item + 8).to(tl.uint32, bitcast=True),
        tl.load(item + 12).to(tl.uint32, bitcast=True),
    )


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
def _decode_step(x, found, active, word_ptr, position, end, lane, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """(states after the symbol `found`, the next word's position); an inactive lane's state becomes anything. Words behind `end` read as 0."""
    new = ((found & SLOT_MASK) ^ SLOT_MASK) * (x >> BITS) + (found >> ITEM)
    need = active & (new < LOW)
    rank, count = ranks(need.to(tl.int32), lane, LANES, BALLOT)
    where = position + rank
    word = tl.load(word_ptr + where, mask=need & (where < end), other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    return tl.where(need, (new << 16) | word, new), position + count


@triton.jit
def _decode_kernel(
    state_ptr,
    word_ptr,
    token_start_ptr,
    lane_start_ptr,
    word_start_ptr,
    nodes_ptr,
    first_child_ptr,
    bits_ptr,
    class_ptr,
    shift_ptr,
    q_ptr,
    gain_ptr,
    intact_ptr,
    depth,
    num_classes,
    tokens_per_lane,
    stride_token,
    stride_component,
    LANES: tl.constexpr,
    SHIFTS: tl.constexpr,
    BALLOT: tl.constexpr,
):
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
    fixed = lane_numbers(LANES)
    position = none
    gain_node = _node(nodes_ptr + (none + num_classes) * 16)
    for turn in range(tokens_per_lane):
        token = turn * lanes + lane
        active = present & (token < size)
        row = first + token
        before = x
        found = _nearest((x << ITEM) | ITEM_MASK, gain_node)
        gain = _place(found)
        x, position = _decode_step(x, found, active, word_ptr, position, end, fixed, LANES, BALLOT)
        tl.store(gain_ptr + row, gain.to(tl.uint8), mask=active)
        gain_shift = GAIN_CLASSES * (gain - ZERO_GAIN)
        shift = none
        if SHIFTS:
            shift = tl.load(shift_ptr + row, mask=active, other=0)
        move = class_move(shift, gain_shift, num_classes)
        # No lane's class exceeds the one of these, so its tree's depth serves every lane.
        top_gain = tl.max(tl.where(active, gain_shift, -64), 0)
        top_shift = tl.max(tl.where(active, shift, -1024), 0)
        top = class_move(top_shift, top_gain, num_classes)
        # A component's node is fetched a step ahead of the state that is looked up in it, and its class two steps before that.
        base = tl.load(class_ptr)
        own = own_class(base, move)
        node = _node(nodes_ptr + own * 16)
        child = tl.load(first_child_ptr + own)
        bits = tl.load(bits_ptr + own_class(base, top))
        base = tl.load(class_ptr + tl.minimum(1, depth - 1))
        next_own = own_class(base, move)
        next_base = tl.load(class_ptr + tl.minimum(2, depth - 1))
        out_ptr = q_ptr + row * stride_token
        for step in range(depth):
            key = (x << ITEM) | ITEM_MASK
            found = _nearest(key, node)
            symbol = _place(found) - 7
            node = _node(nodes_ptr + next_own * 16)
            next_child = tl.load(first_child_ptr + next_own)
            next_bits = tl.load(bits_ptr + own_class(base, top))
            base = next_base
            next_base = tl.load(class_ptr + tl.minimum(step + 3, depth - 1))
            # Written here, and again where it is not the symbol yet: the compiler would move the loads above, which nothing needs until the next
            # step, to the end of this one, but not past a store.
            tl.store(out_ptr, symbol.to(tl.int16), mask=active)
            front = 7
            for done in range(4, bits, 4):
                # The comparison is always true. Triton 3.6 takes what a loop carries for its first value where only an inner loop's bound uses it.
                inner = ((found & SLOT_MASK) == SLOT_MASK) & (none + done < bits)
                below = _nearest(key, _node(nodes_ptr + tl.where(inner, child + front + symbol, own) * 16))
                symbol = tl.where(inner, symbol * 16 + _place(below) - 15, symbol)
                found = tl.where(inner, below, found)
                front = 16 * front + 31
                tl.store(out_ptr, symbol.to(tl.int16), mask=active)
            x, position = _decode_step(x, found, active, word_ptr, position, end, fixed, LANES, BALLOT)
            out_ptr += stride_component
            own, child, bits = next_own, next_child, next_bits
            next_own = own_class(base, move)
        x = tl.where(active, x, before)
    wrong = tl.sum((present & (x != LOW)).to(tl.int32), 0) + tl.max((position != end).to(tl.int32), 0)
    tl.store(intact_ptr + span, (wrong == 0).to(tl.int8))


def rans_bounds(num_tokens: int, num_components: int, num_words: int) -> tuple[int, int]:
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
        encode_kernel[(spans,)](
            q,
            gains,
            token_starts,
            lane_starts,
            tables.divisors,
            tables.info,
            classes,
            shifts if shifts is not None else classes,
            states,
            loose,
            counts,
            depth,
            tables.num_classes,
            tokens_per_lane,
            q.stride(0),
            q.stride(1),
            LANES=lanes,
            SHIFTS=shifts is not None,
            BALLOT=use_ballot,
            CHUNK=8 if lanes <= 64 else 2,
            num_warps=warps,
        )
    word_starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if spans:
        compact_kernel[(spans, 4)](loose, dense, token_starts, word_starts, depth, BLOCK=1024, num_warps=4)
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
    """See `reference.rans_decode`; q comes laid out with tokens adjacent, as `residual_decode` reads it fastest.

    ballot: as in `rans_encode`.
    """
    spans, depth, device = len(token_starts) - 1, len(classes), streams.states.device
    q = torch.empty((depth, num_tokens), dtype=torch.int16, device=device).t()
    gains = torch.empty(num_tokens, dtype=torch.uint8, device=device)
    intact = torch.empty(spans, dtype=torch.int8, device=device)
    lane_starts = torch.nn.functional.pad(lane_counts(token_starts, tokens_per_lane).cumsum(0), (1, 0))
    lanes, warps, use_ballot = _shape(max_span_tokens, tokens_per_lane, device, ballot)
    if spans:
        _decode_kernel[(spans,)](
            streams.states,
            streams.words,
            token_starts,
            lane_starts,
            streams.word_starts,
            tables.nodes,
            tables.first_child,
            tables.search_bits,
            classes,
            shifts if shifts is not None else classes,
            q,
            gains,
            intact,
            depth,
            tables.num_classes,
            tokens_per_lane,
            q.stride(0),
            q.stride(1),
            LANES=lanes,
            SHIFTS=shifts is not None,
            BALLOT=use_ballot,
            num_warps=warps,
            maxnreg=96,  # 4% faster than what the compiler chooses
        )
    return RansDecoded(q, gains, intact.bool())
