"""What the Triton kernels of both directions share: constants, the ranks of lanes, and the class of a component."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.rans.lookup import ITEM_SHIFT, PLACE_SHIFT
from kernels.rans.reference import CLASSES_PER_GAIN, GAIN_ZERO, INFO_BITS, NUM_GAINS, PRECISION_BITS, STATE_LOW

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
def lane_numbers(LANES: tl.constexpr):
    """0 .. LANES - 1, counted once rather than read anew from the thread's index, which takes long, wherever they are used."""
    return tl.cumsum(tl.zeros([LANES], tl.int32) + 1, 0) - 1


@triton.jit
def ranks(need, lane, LANES: tl.constexpr, BALLOT: tl.constexpr):
    """(how many lanes before this one need a word, how many do in all); need: int32 0 or 1 a lane."""
    if BALLOT:
        # One warp holds one lane a thread.
        votes = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
            "=r,r",
            [need],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        below = votes & ((1 << lane) - 1)
        rank = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [below], dtype=tl.int32, is_pure=True, pack=1)
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [votes], dtype=tl.int32, is_pure=True, pack=1)
        return rank, count
    else:
        return tl.cumsum(need, 0) - need, tl.zeros([LANES], tl.int32) + tl.sum(need, 0)


@triton.jit
def class_move(shift, gain_shift, num_classes):
    """(moved, low, high): a class moved by shift and then by gain_shift, and kept a class each time, is base + moved within [low, high]."""
    low = tl.minimum(tl.maximum(gain_shift, 0), num_classes - 1)
    high = tl.maximum(tl.minimum(gain_shift, 0) + num_classes - 1, 0)
    return shift + gain_shift, low, high


@triton.jit
def own_class(base, move):
    return tl.minimum(tl.maximum(base + move[0], move[1]), move[2])
