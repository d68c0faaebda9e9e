"""Parts that the kernels of a decode step share: a product of a few rows with a weight matrix, read once, and how its splits are joined.

A program takes BLOCK_N rows of the weight matrix (output channels) and all tokens: the weights are the product's left operand, so that a
few tokens fill the narrow side of a matrix instruction. The columns of a step are cut into SLICES, each multiplied by warps of its own (a
product with a batch axis), because 16 rows alone would have every warp do the same work.
"""

from __future__ import annotations

import triton
import triton.language as tl

LINE = tl.constexpr(64)  # elements of a cache line of 128 bytes, for two-byte weights


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """Nothing that an earlier kernel of the step writes may be read, and nothing written, before this. No-op unless launched early."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def admit_next(EARLY: tl.constexpr):
    """Lets the next kernel's programs start; what they may touch is bounded by their own `await_previous`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines at these addresses, into the second-level cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_rows(w_ptr, row, first, last, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """Prefetch the first LINES cache lines of columns [first, last) of each row."""
    column = tl.minimum(first + tl.arange(0, LINES) * LINE, last - 1)
    prefetch(w_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :])


@triton.jit
def split_columns(split, WIDTH: tl.constexpr, STEP: tl.constexpr, SPLITS: tl.constexpr):
    """Columns [first, last) of a split, in whole steps but for the matrix's end."""
    length: tl.constexpr = (WIDTH + STEP * SPLITS - 1) // (STEP * SPLITS) * STEP
    first = split * length
    return first, tl.minimum(first + length, WIDTH)


@triton.jit
def skinny_product(
    x_ptr, w_ptr, row, row_mask, first, last, tokens,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, EVEN_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] float32: rows `row` of w [*, WIDTH] times rows 0 .. tokens - 1 of x [tokens, WIDTH], over columns [first, last).

    BLOCK_M 1 multiplies and adds on the ordinary units; more uses matrix instructions.
    """
    STEP: tl.constexpr = BLOCK_K * SLICES
    EVEN: tl.constexpr = WIDTH % (STEP * SPLITS) == 0
    row = row.to(tl.int64)
    if BLOCK_M == 1:
        near = tl.arange(0, STEP)
        w_at = w_ptr + row[:, None] * WIDTH + near[None, :]
        acc = tl.zeros([BLOCK_N, STEP], tl.float32)
        for k in tl.range(first, last, STEP, num_stages=STAGES):
            if EVEN and EVEN_ROWS:
                w = tl.load(w_at + k, eviction_policy="evict_first")
                x = tl.load(x_ptr + k + near)
            else:
                inside = k + near < last
                w = tl.load(w_at + k, mask=row_mask[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
                x = tl.load(x_ptr + k + near, mask=inside, other=0.0)
            acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        return tl.sum(acc, 1)[:, None]
    token = tl.arange(0, BLOCK_M)
    if SLICES == 1:
        near = tl.arange(0, BLOCK_K)
        w_at = w_ptr + row[:, None] * WIDTH + near[None, :]
        x_at = x_ptr + token[None, :] * WIDTH + near[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in tl.range(first, last, STEP, num_stages=STAGES):
            if EVEN and EVEN_ROWS:
                w = tl.load(w_at + k, eviction_policy="evict_first")
                x = tl.load(x_at + k, mask=(token < tokens)[None, :], other=0.0)
            else:
                inside = k + near < last
                w = tl.load(w_at + k, mask=row_mask[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
                x = tl.load(x_at + k, mask=(token < tokens)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        return acc
    near = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    w_at = w_ptr + row[None, :, None] * WIDTH + near[:, None, :]
    x_at = x_ptr + token[None, None, :] * WIDTH + near[:, :, None]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(first, last, STEP, num_stages=STAGES):
        if EVEN and EVEN_ROWS:
            w = tl.load(w_at + k, eviction_policy="evict_first")
            x = tl.load(x_at + k, mask=(token < tokens)[None, None, :], other=0.0)
        else:
            inside = k + near < last
            w = tl.load(w_at + k, mask=row_mask[None, :, None] & inside[:, None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at + k, mask=(token < tokens)[None, None, :] & inside[:, :, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return tl.sum(acc, 0)


@triton.jit
def inverse_rms(squares_ptr, tokens, parts, eps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr):
    """[BLOCK_M] float32: 1 / rms of each token's residual stream, from the partial sums of squares [parts, tokens] its writers left."""
    token = tl.arange(0, BLOCK_M)
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & (token < tokens)[None, :]
    squares = tl.load(squares_ptr + part[:, None] * tokens + token[None, :], mask=mask, other=0.0)
    return tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)


@triton.jit
def arrive(ticket_ptr, count):
    """True in the last of `count` programs to get here, which then sees what all of them stored. The ticket is left at zero."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(ticket_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def halves(block, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """[2 * ROWS, BLOCK_M] -> its upper and its lower half."""
    return tl.split(tl.permute(tl.reshape(block, (2, ROWS, BLOCK_M)), (1, 2, 0)))
