"""Triton kernel of `greedy_head`; `reference.py` says what it means. The last program to finish compares what all have found."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.skinny_linear.product import admit_next, arrive, await_previous, first_steps, prefetch_rows, skinny_product, sum_squares
from kernels.skinny_linear.tiles import Tile, held_steps, next_power_of_2, token_block


@triton.jit
def _first_best(value, index, NOWHERE: tl.constexpr):
    """([M], [M]): the largest of value [R, M] in each column, and the smallest of its `index` [R, M]."""
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best[None, :], index, NOWHERE), 0)


# one compilation for any number of rows up to the block, with logits and without
@triton.jit(do_not_specialize=["tokens", "parts", "with_logits"])
def _greedy_head_kernel(
    x_ptr,
    squares_ptr,
    w_ptr,
    logits_ptr,
    best_ptr,
    where_ptr,
    token_ptr,
    ticket_ptr,
    tokens,
    parts,
    with_logits,
    eps,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    HELD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    admit_next(EARLY)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < VOCAB
    if LINES:
        prefetch_rows(w_ptr, tl.minimum(row, VOCAB - 1), 0, WIDTH, WIDTH, LINES)
    EVEN_ROWS: tl.constexpr = VOCAB % BLOCK_N == 0
    held = first_steps(w_ptr, row, row_mask, 0, WIDTH, WIDTH, 1, BLOCK_M, BLOCK_K, SLICES, EVEN_ROWS, HELD)
    await_previous(EARLY)
    squares = sum_squares(squares_ptr, tokens, parts, BLOCK_M, PARTS)
    acc = skinny_product(
        held,
        x_ptr,
        w_ptr,
        row,
        row_mask,
        0,
        WIDTH,
        tokens,
        WIDTH,
        1,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SLICES,
        STAGES,
        EVEN_ROWS,
        HELD,
        PRECISION,
    )
    acc *= tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)[None, :]
    acc = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
    token = tl.arange(0, BLOCK_M)
    inside = token < tokens
    if with_logits != 0:
        at = logits_ptr + token.to(tl.int64)[None, :] * VOCAB + row[:, None]
        tl.store(at, acc, mask=row_mask[:, None] & inside[None, :])
    # What is no finite number takes the place of the best, which no finite logit can then have.
    ranked = tl.where(tl.abs(acc) < float("inf"), acc, float("inf"))
    best, where = _first_best(tl.where(row_mask[:, None], ranked, float("-inf")), row[:, None], VOCAB)
    tl.store(best_ptr + tile * tokens + token, best, mask=inside)
    tl.store(where_ptr + tile * tokens + token, where, mask=inside)
    TILES: tl.constexpr = (VOCAB + BLOCK_N - 1) // BLOCK_N
    if arrive(ticket_ptr, TILES):
        near = tl.arange(0, AT_ONCE)[:, None]
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        where = tl.full([BLOCK_M], VOCAB, tl.int32)
        for start in range(0, TILES, AT_ONCE):
            mask = (start + near < TILES) & inside[None, :]
            entry = (start + near) * tokens + token[None, :]
            found = tl.load(best_ptr + entry, mask=mask, other=float("-inf"))
            value, index = _first_best(found, tl.load(where_ptr + entry, mask=mask, other=VOCAB), VOCAB)
            where = tl.where(value > best, index, where)
            best = tl.maximum(best, value)
        tl.store(token_ptr + token, tl.where(best == float("inf"), -1, where).to(tl.int64), mask=inside)


def greedy_head_floors(tokens: int, vocab: int, width: int, element_bytes: int, logits: bool) -> tuple[int, int]:
    """(bytes, operations) that no version can do without."""
    return (vocab * width + tokens * width) * element_bytes + 4 * tokens * vocab * logits, 2 * tokens * vocab * width


def greedy_head(
    scaled: torch.Tensor,
    squares: torch.Tensor,
    parts: int,
    eps: float,
    weight: torch.Tensor,
    logits: torch.Tensor | None,
    tokens: torch.Tensor,
    *,
    tile: Tile,
    part: torch.Tensor,
    tickets: torch.Tensor,
    early: bool = False,
) -> None:
    """See `reference.greedy_head`. part: float32, room for 2 * tiles * N; tickets and `early` as in `skinny_linear.triton.linear_residual`."""
    count, width = scaled.shape
    vocab = weight.shape[0]
    tiles = triton.cdiv(vocab, tile.block_n)
    block_m = token_block(count, tile)
    best, where = part[: tiles * count], part[tiles * count : 2 * tiles * count].view(torch.int32)
    _greedy_head_kernel[(tiles,)](
        scaled,
        squares,
        weight,
        best if logits is None else logits,
        best,
        where,
        tokens,
        tickets,
        count,
        parts,
        int(logits is not None),
        eps,
        VOCAB=vocab,
        WIDTH=width,
        PARTS=next_power_of_2(parts),
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SLICES=tile.slices,
        STAGES=tile.stages,
        LINES=tile.lines if early else 0,
        HELD=held_steps(width, dataclasses.replace(tile, splits=1)),
        AT_ONCE=max(16, 4096 // block_m),
        EARLY=early,
        PRECISION="ieee" if scaled.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        launch_pdl=early,
    )
