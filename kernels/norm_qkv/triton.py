"""Triton kernel of `norm_qkv`; `reference.py` says what it means.

A program takes the same stretch of a head's two halves, so that it can rotate what it multiplied. Where a head must be seen whole (a norm
of queries and keys) or the columns are split, the last of the head's programs does the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.skinny_linear.product import (
    admit_next,
    arrive,
    await_previous,
    first_steps,
    halves,
    prefetch_rows,
    skinny_product,
    split_columns,
    sum_squares,
)
from kernels.skinny_linear.tiles import Tile, held_steps, next_power_of_2, token_block


@triton.jit
def _inputs(
    head,
    channel,
    channel_mask,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    tokens,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BIAS: tl.constexpr,
):
    """What `_finish` needs besides the product, none of it written in a step: both halves' bias, cosines, sines, slots."""
    token = tl.arange(0, BLOCK_M)
    mask = channel_mask[:, None] & (token < tokens)[None, :]
    low_bias = tl.zeros_like(channel).to(tl.float32)
    high_bias = low_bias
    if BIAS:
        bias_at = bias_ptr + head * 2 * HALF + channel
        low_bias = tl.load(bias_at, mask=channel_mask, other=0.0).to(tl.float32)
        high_bias = tl.load(bias_at + HALF, mask=channel_mask, other=0.0).to(tl.float32)
    # A padded row's position may be negative: it is turned by any angle.
    position = tl.maximum(tl.load(position_ptr + token, mask=token < tokens, other=0).to(tl.int64), 0)
    angle = position[None, :] * HALF + channel[:, None]
    slot = tl.load(slot_ptr + token, mask=token < tokens, other=-1).to(tl.int64)
    return low_bias, high_bias, tl.load(cos_ptr + angle, mask=mask, other=1.0), tl.load(sin_ptr + angle, mask=mask, other=0.0), slot


@triton.jit
def _finish(
    low,
    high,
    inputs,
    head,
    channel,
    channel_mask,
    qk_norm_ptr,
    k_ptr,
    v_ptr,
    q_ptr,
    tokens,
    eps,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    """low, high: [C, BLOCK_M] float32, `channel` [C] of a head's two halves, normalised but for the bias."""
    dtype = q_ptr.dtype.element_ty
    token = tl.arange(0, BLOCK_M)
    mask = channel_mask[:, None] & (token < tokens)[None, :]
    low_bias, high_bias, cos, sin, slot = inputs
    # Rounded where separate operations would round.
    low = (low + low_bias[:, None]).to(dtype).to(tl.float32)
    high = (high + high_bias[:, None]).to(dtype).to(tl.float32)
    if head < HEADS + GROUPS:
        if QK_NORM:
            norm_at = qk_norm_ptr + tl.where(head < HEADS, 0, 2 * HALF) + channel
            squares = tl.sum(tl.where(mask, low * low + high * high, 0.0), 0)
            factor = tl.rsqrt(squares / (2 * HALF) + eps)[None, :]
            low = low * factor * tl.load(norm_at, mask=channel_mask, other=0.0).to(tl.float32)[:, None]
            high = high * factor * tl.load(norm_at + HALF, mask=channel_mask, other=0.0).to(tl.float32)[:, None]
            low = low.to(dtype).to(tl.float32)
            high = high.to(dtype).to(tl.float32)
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned
    if head < HEADS:
        at = q_ptr + (token * HEADS + head)[None, :] * 2 * HALF + channel[:, None]
        tl.store(at, low.to(dtype), mask=mask)
        tl.store(at + HALF, high.to(dtype), mask=mask)
    else:
        mask = mask & (slot >= 0)[None, :]
        kept = k_ptr.dtype.element_ty
        if head < HEADS + GROUPS:
            at = k_ptr + (slot * GROUPS + (head - HEADS))[None, :] * 2 * HALF + channel[:, None]
            tl.store(at, low.to(kept), mask=mask)
            tl.store(at + HALF, high.to(kept), mask=mask)
        else:
            at = v_ptr + (slot * GROUPS + (head - HEADS - GROUPS))[None, :] * 2 * HALF + channel[:, None]
            tl.store(at, low.to(kept), mask=mask)
            tl.store(at + HALF, high.to(kept), mask=mask)


@triton.jit(do_not_specialize=["tokens", "parts"])  # one compilation for any number of rows up to the block
def _norm_qkv_kernel(
    x_ptr,
    squares_ptr,
    w_ptr,
    bias_ptr,
    qk_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    k_ptr,
    v_ptr,
    q_ptr,
    part_ptr,
    ticket_ptr,
    tokens,
    parts,
    eps,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    HELD: tl.constexpr,
    BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    STRETCH: tl.constexpr = BLOCK_N // 2
    STRETCHES: tl.constexpr = HALF // STRETCH
    head = tl.program_id(0) // STRETCHES
    stretch = tl.program_id(0) % STRETCHES
    split = tl.program_id(1)
    admit_next(EARLY)
    near = tl.arange(0, BLOCK_N)
    row = head * 2 * HALF + near // STRETCH * HALF + stretch * STRETCH + near % STRETCH
    first, last = split_columns(split, WIDTH, BLOCK_K * SLICES, SPLITS)
    if LINES:
        prefetch_rows(w_ptr, row, first, last, WIDTH, LINES)
    held = first_steps(w_ptr, row, near >= 0, first, last, WIDTH, SPLITS, BLOCK_M, BLOCK_K, SLICES, True, HELD)
    WHOLE: tl.constexpr = SPLITS > 1 or QK_NORM
    if WHOLE:
        channel = tl.arange(0, BLOCK_H)
    else:
        channel = stretch * STRETCH + tl.arange(0, STRETCH)
    inputs = _inputs(head, channel, channel < HALF, bias_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, tokens, HALF, BLOCK_M, BIAS)
    await_previous(EARLY)
    squares = sum_squares(squares_ptr, tokens, parts, BLOCK_M, PARTS)
    acc = skinny_product(
        held,
        x_ptr,
        w_ptr,
        row,
        near >= 0,
        first,
        last,
        tokens,
        WIDTH,
        SPLITS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SLICES,
        STAGES,
        True,
        HELD,
        PRECISION,
    )
    if WHOLE:
        ROWS: tl.constexpr = (HEADS + 2 * GROUPS) * 2 * HALF
        token = tl.arange(0, BLOCK_M)
        tl.store(part_ptr + (split * ROWS + row)[:, None] * BLOCK_M + token[None, :], acc)
        if not arrive(ticket_ptr + head, STRETCHES * SPLITS):
            return
        mask = (channel < HALF)[:, None] & (token >= 0)[None, :]
        low = tl.zeros([BLOCK_H, BLOCK_M], tl.float32)
        high = tl.zeros([BLOCK_H, BLOCK_M], tl.float32)
        for other in tl.static_range(SPLITS):
            at = part_ptr + (other * ROWS + head * 2 * HALF + channel)[:, None] * BLOCK_M + token[None, :]
            low += tl.load(at, mask=mask, other=0.0)
            high += tl.load(at + HALF * BLOCK_M, mask=mask, other=0.0)
    else:
        low, high = halves(acc, STRETCH, BLOCK_M)
    factor = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)[None, :]
    _finish(
        low * factor,
        high * factor,
        inputs,
        head,
        channel,
        channel < HALF,
        qk_norm_ptr,
        k_ptr,
        v_ptr,
        q_ptr,
        tokens,
        eps,
        HEADS,
        GROUPS,
        HALF,
        BLOCK_M,
        QK_NORM,
    )


def norm_qkv_floors(tokens: int, rows: int, width: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations) that no version can do without; rows are those of the QKV matrix."""
    return (rows * width + tokens * (width + rows)) * element_bytes, 2 * tokens * rows * width


def norm_qkv(
    scaled: torch.Tensor,
    squares: torch.Tensor,
    parts: int,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    qk_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    q: torch.Tensor,
    *,
    tile: Tile,
    part: torch.Tensor,
    tickets: torch.Tensor,
    early: bool = False,
) -> None:
    """See `reference.norm_qkv`; workspace and `early` as in `skinny_linear.triton.linear_residual` (one ticket a head).

    Raises:
        ValueError: the tile's rows do not divide a head, or the pages are not contiguous.
    """
    tokens, width = scaled.shape
    heads, head_dim = q.shape[1:]
    groups = k_pages.shape[2]
    if head_dim % tile.block_n:
        raise ValueError(
            f"norm_qkv takes {tile.block_n} rows of a head at a time, and a head has {head_dim} (use a block_n that divides it)"
        )
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("norm_qkv needs contiguous pages (pass one layer's keys and values of the pool, not a permuted view)")
    tiles = (heads + 2 * groups) * (head_dim // tile.block_n)
    _norm_qkv_kernel[(tiles, tile.splits)](
        scaled,
        squares,
        weight,
        weight if bias is None else bias,
        weight if qk_norm is None else qk_norm,
        cos,
        sin,
        positions,
        slots,
        k_pages,
        v_pages,
        q,
        part,
        tickets,
        tokens,
        parts,
        eps,
        WIDTH=width,
        HEADS=heads,
        GROUPS=groups,
        HALF=head_dim // 2,
        BLOCK_H=next_power_of_2(head_dim // 2),
        PARTS=next_power_of_2(len(squares)),  # the same for the first layer, whose squares come in one part
        SPLITS=tile.splits,
        BLOCK_M=token_block(tokens, tile),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SLICES=tile.slices,
        STAGES=tile.stages,
        LINES=tile.lines if early else 0,
        HELD=held_steps(width, tile),
        BIAS=bias is not None,
        QK_NORM=qk_norm is not None,
        EARLY=early,
        PRECISION="ieee" if scaled.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        launch_pdl=early,
    )
