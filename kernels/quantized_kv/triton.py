"""Triton kernel of `quantized_kv_write`; `reference.py` says what it means, `attention.py` attends over what it writes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.quantized_kv.reference import ChannelMeans, QuantizedPages, hadamard_signs, levels, thresholds

ROWS = 16


@triton.jit
def times_signs(x, signs, SPLIT: tl.constexpr):
    """x @ signs for a matrix of +-1 in bfloat16, float32. SPLIT: x float32 as the sum of two bfloat16 (error 2^-17), else x is bfloat16."""
    high = x.to(tl.bfloat16)
    product = tl.dot(high, signs)
    if SPLIT:
        product = tl.dot((x - high.to(tl.float32)).to(tl.bfloat16), signs, product)
    return product


@triton.jit
def _write_rows(
    x_ptr,
    mean_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    signs_ptr,
    level_ptr,
    threshold_ptr,
    code_ptr,
    scale_ptr,
    num_rows,
    heads,
    stride_token,
    stride_head,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    ROTATE: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (token, head)
    mask = (row < num_rows)[:, None]
    token, head = (row // heads).to(tl.int64), row % heads
    HALF: tl.constexpr = D // 2
    channel = tl.arange(0, HALF)
    source = x_ptr + token[:, None] * stride_token + head[:, None] * stride_head + channel[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if MEAN:
        mean = mean_ptr + head[:, None] * D + channel[None, :]
        first -= tl.load(mean, mask=mask, other=0.0)
        second -= tl.load(mean + HALF, mask=mask, other=0.0)
    if ROTATE:
        angle = token[:, None] * HALF + channel[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    column = tl.arange(0, D)
    upper = tl.load(signs_ptr + channel[:, None] * D + column[None, :])
    lower = tl.load(signs_ptr + (HALF + channel)[:, None] * D + column[None, :])
    rotated = times_signs(first, upper, True) + times_signs(second, lower, True)  # [ROWS, D], sqrt(D) too long
    norm = tl.sqrt(tl.sum(first * first + second * second, 1))
    unit = rotated / tl.maximum(norm, 1e-20)[:, None]
    code = tl.zeros([ROWS, D], tl.int32)
    for i in tl.static_range((1 << BITS) - 1):
        code += (unit > tl.load(threshold_ptr + i)).to(tl.int32)
    level = tl.load(level_ptr + code).to(tl.float32)
    scale = norm / tl.sqrt(tl.sum(level * level, 1))

    slot = tl.load(slot_ptr + token, mask=row < num_rows, other=0)
    place = ((slot // PAGE) * heads + head) * PAGE + slot % PAGE  # row of [P, G, S]
    tl.store(scale_ptr + place, scale.to(tl.float16), mask=row < num_rows)
    ROW_BYTES: tl.constexpr = D * BITS // 8
    target = code_ptr + place[:, None] * ROW_BYTES
    LOW_BITS: tl.constexpr = 2 if BITS == 3 else BITS
    PER_BYTE: tl.constexpr = 8 // LOW_BITS
    shift = (tl.arange(0, PER_BYTE) * LOW_BITS)[None, None, :]
    low = tl.reshape(code & ((1 << LOW_BITS) - 1), [ROWS, D // PER_BYTE, PER_BYTE])
    byte = tl.arange(0, D // PER_BYTE)
    tl.store(target + byte[None, :], tl.sum(low << shift, 2).to(tl.uint8), mask=mask)
    if BITS == 3:
        high = tl.reshape(code >> 2, [ROWS, D // 8, 8])
        byte = tl.arange(0, D // 8)
        tl.store(target + D // 4 + byte[None, :], tl.sum(high << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8), mask=mask)


@triton.jit
def _quantized_write_kernel(
    k_ptr,
    v_ptr,
    k_mean_ptr,
    v_mean_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    signs_ptr,
    level_ptr,
    threshold_ptr,
    k_code_ptr,
    k_scale_ptr,
    v_code_ptr,
    v_scale_ptr,
    num_rows,
    heads,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    K_MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _write_rows(
            k_ptr,
            k_mean_ptr,
            cos_ptr,
            sin_ptr,
            slot_ptr,
            signs_ptr,
            level_ptr,
            threshold_ptr,
            k_code_ptr,
            k_scale_ptr,
            num_rows,
            heads,
            k_stride_token,
            k_stride_head,
            D,
            PAGE,
            BITS,
            True,
            K_MEAN,
            ROWS,
        )
    else:
        _write_rows(
            v_ptr,
            v_mean_ptr,
            cos_ptr,
            sin_ptr,
            slot_ptr,
            signs_ptr,
            level_ptr,
            threshold_ptr,
            v_code_ptr,
            v_scale_ptr,
            num_rows,
            heads,
            v_stride_token,
            v_stride_head,
            D,
            PAGE,
            BITS,
            False,
            True,
            ROWS,
        )


def quantized_kv_write_bounds(num_tokens: int, heads: int, head_dim: int, bits: int, element_bytes: int) -> tuple[int, int]:
    """(bytes, operations): rows in, codes and scales out; a fast Hadamard transform and a search of the levels."""
    elements = 2 * num_tokens * heads * head_dim
    steps = head_dim.bit_length() - 1 + bits
    return elements * element_bytes + elements * bits // 8 + 4 * num_tokens * heads + num_tokens * head_dim * 4, elements * steps


def quantized_kv_write(
    k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, means: ChannelMeans, pages: QuantizedPages
) -> None:
    """See `reference.quantized_kv_write`. k and v may be slices of a wider row (fused QKV)."""
    tokens, heads, head_dim = k.shape
    if tokens == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    bits, device = pages.bits, k.device
    _quantized_write_kernel[(triton.cdiv(tokens * heads, ROWS), 2)](
        k,
        v,
        means.k_mean if means.k_mean is not None else means.v_mean,
        means.v_mean,
        cos.contiguous(),
        sin.contiguous(),
        slots,
        hadamard_signs(head_dim, device),
        levels(bits, device),
        thresholds(bits, device),
        pages.k_codes,
        pages.k_scale,
        pages.v_codes,
        pages.v_scale,
        tokens * heads,
        heads,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        D=head_dim,
        PAGE=pages.k_scale.shape[2],
        BITS=bits,
        K_MEAN=means.k_mean is not None,
        ROWS=ROWS,
        num_warps=4,
    )
