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
def weight_step(
    w_ptr,
    row,
    row_mask,
    k,
    last,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One step's weights: [BLOCK_N, STEP] for a single token or slice, else [SLICES, BLOCK_N, BLOCK_K]."""
    if BLOCK_M == 1 or SLICES == 1:
        column = k + tl.arange(0, BLOCK_K * SLICES)[None, :]
        at = w_ptr + row.to(tl.int64)[:, None] * WIDTH + column
        mask = row_mask[:, None] & (column < last)
    else:
        column = k + tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        at = w_ptr + row.to(tl.int64)[None, :, None] * WIDTH + column
        mask = row_mask[None, :, None] & (column < last)
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def add_step(
    acc,
    w,
    x_ptr,
    k,
    last,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one step's weights times the tokens' columns."""
    token = tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        column = k + tl.arange(0, BLOCK_K * SLICES)[None, :]
        at = x_ptr + column
        mask = column < WIDTH
    elif SLICES == 1:
        column = k + tl.arange(0, BLOCK_K)[:, None]
        at = x_ptr + token[None, :] * WIDTH + column
        mask = (token < tokens)[None, :]
    else:
        column = k + tl.arange(0, SLICES)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :, None]
        at = x_ptr + token[None, None, :] * WIDTH + column
        mask = (token < tokens)[None, None, :]
    if not EVEN:
        mask = mask & (column < last)
    if EVEN and BLOCK_M == 1:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=mask, other=0.0)
    if BLOCK_M == 1:
        return acc + w.to(tl.float32) * x.to(tl.float32)
    else:
        return tl.dot(w, x, acc, input_precision=PRECISION)


@triton.jit
def first_steps(
    w_ptr,
    row,
    row_mask,
    first,
    last,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    HELD: tl.constexpr,
):
    """Weights of the first HELD steps (up to 3), to be asked for before the tokens are there. What is not held is a placeholder."""
    STEP: tl.constexpr = BLOCK_K * SLICES
    EVEN: tl.constexpr = EVEN_ROWS and WIDTH % (STEP * SPLITS) == 0
    w0 = tl.full([1], 0, tl.int32)
    w1 = w0
    w2 = w0
    if HELD > 0:
        w0 = weight_step(w_ptr, row, row_mask, first, last, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN)
    if HELD > 1:
        w1 = weight_step(w_ptr, row, row_mask, first + STEP, last, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN)
    if HELD > 2:
        w2 = weight_step(w_ptr, row, row_mask, first + 2 * STEP, last, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN)
    return w0, w1, w2


@triton.jit
def skinny_product(
    held,
    x_ptr,
    w_ptr,
    row,
    row_mask,
    first,
    last,
    tokens,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    HELD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32: rows `row` of w [*, WIDTH] times rows 0 .. tokens - 1 of x [tokens, WIDTH], over columns [first, last).

    held: what `first_steps` returned. BLOCK_M 1 multiplies and adds on the ordinary units; more uses matrix instructions.
    """
    STEP: tl.constexpr = BLOCK_K * SLICES
    EVEN: tl.constexpr = EVEN_ROWS and WIDTH % (STEP * SPLITS) == 0
    if BLOCK_M == 1:
        acc = tl.zeros([BLOCK_N, STEP], tl.float32)
    elif SLICES == 1:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    if HELD > 0:
        acc = add_step(acc, held[0], x_ptr, first, last, tokens, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN, PRECISION)
    if HELD > 1:
        acc = add_step(acc, held[1], x_ptr, first + STEP, last, tokens, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN, PRECISION)
    if HELD > 2:
        acc = add_step(acc, held[2], x_ptr, first + 2 * STEP, last, tokens, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN, PRECISION)
    if HELD * STEP * SPLITS < WIDTH:
        for k in tl.range(first + HELD * STEP, last, STEP, num_stages=STAGES):
            w = weight_step(w_ptr, row, row_mask, k, last, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN)
            acc = add_step(acc, w, x_ptr, k, last, tokens, WIDTH, BLOCK_M, BLOCK_K, SLICES, EVEN, PRECISION)
    if BLOCK_M == 1:
        return tl.sum(acc, 1)[:, None]
    elif SLICES == 1:
        return acc
    else:
        return tl.sum(acc, 0)


@triton.jit
def sum_squares(squares_ptr, tokens, parts, BLOCK_M: tl.constexpr, PARTS: tl.constexpr):
    """[PARTS, BLOCK_M] float32: the partial sums of squares [parts, tokens] that the residual stream's writers left."""
    token = tl.arange(0, BLOCK_M)
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & (token < tokens)[None, :]
    return tl.load(squares_ptr + part[:, None] * tokens + token[None, :], mask=mask, other=0.0)


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
