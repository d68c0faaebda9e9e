"""How `attention.py` turns bytes of codes into levels: three packed operations for two channels where PTX for bfloat16 pairs runs, else a table.

Nothing has to be exchanged between threads or halves of registers on the way, because the rotated channels may come in any order that queries
and outputs know of (`ordered_signs`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.paged_attention.triton import page_rows
from kernels.quantized_kv.reference import LEVEL_COEFFICIENTS, hadamard_signs


@triton.jit
def block_rows(page, block, stride_page, stride_token, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """`page_rows`, which looks for the block's place in its page even where that has only one."""
    if PAGE == BLOCK_N:
        return page * stride_page, tl.arange(0, BLOCK_N) * stride_token
    else:
        return page_rows(page, block, stride_page, stride_token, PAGE, BLOCK_N)


@triton.jit
def load_codes(
    code_ptr,
    place,
    block,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Codes of keys block .. block + BLOCK_N - 1 of one head. 4 bits: words of four codes, 16-bit pointers (not ROWS: in pairs of keys,
    [BLOCK_N / 2, 2, D / 4]). Else (bytes with the lower bits, those with the 3-bit format's upper bits), each byte once if FAST, else once a channel.

    place: page and head as a number of [P, G], or each key's. Rows behind the last key are read like any other, for wide loads: their page is
    there, whatever they hold.
    """
    ROW: tl.constexpr = D // 4 if BITS == 4 else D * BITS // 8
    # Offsets from the start of all: a product taken later than the remainder in them would pass for better aligned than it is.
    start, offset = block_rows(place, block, PAGE * ROW, ROW, PAGE, BLOCK_N)
    if BITS == 4:
        column = tl.arange(0, D // 4)
        if ROWS:
            words = tl.load(code_ptr + start + (offset[:, None] + column[None, :]))
        else:
            # The compiler copies pairs, not single keys, ahead into shared memory, though it reads both transposed on the way to the product.
            if PAGE % BLOCK_N == 0:
                pairs = (tl.arange(0, BLOCK_N // 2) * (2 * ROW))[:, None] + (tl.arange(0, 2) * ROW)[None, :]
            else:
                pairs = tl.reshape(offset, [BLOCK_N // 2, 2])
            words = tl.load(code_ptr + start + (pairs[:, :, None] + column[None, None, :]))
        return words, words
    else:
        column = tl.arange(0, D // 4) if FAST else tl.arange(0, D) % (D // 4)
        row = code_ptr + start + offset[:, None]
        low = tl.load(row + column[None, :])
        if BITS == 3:
            upper = tl.arange(0, D // 8) if FAST else column // 2
            high = tl.load(row + (D // 4 + upper)[None, :])
            return low, high
        else:
            return low, low


@triton.jit
def _as_fragments(x, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Levels [BLOCK_N, place in a byte (two axes), byte] as [BLOCK_N, D] in the order of `ordered_signs`."""
    BYTES: tl.constexpr = D // 4
    if BYTES < 16:
        return tl.reshape(x, [BLOCK_N, D])
    else:
        x = tl.reshape(x, [BLOCK_N, 4, 4, BYTES // 16, 2, 2])
        return tl.reshape(tl.permute(x, 0, 1, 3, 4, 2, 5), [BLOCK_N, D])


@triton.jit
def _fours(words, level_ptr, D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Levels [BLOCK_N, D] of words of four 4-bit codes: to multiply from the left (ROWS: keys), or from the left when transposed (values)."""
    if ASM == "":
        word = words.to(tl.int32)
        p0, p1 = tl.load(level_ptr + (word & 15)).to(DTYPE), tl.load(level_ptr + (word >> 4 & 15)).to(DTYPE)
        p2, p3 = tl.load(level_ptr + (word >> 8 & 15)).to(DTYPE), tl.load(level_ptr + (word >> 12 & 15)).to(DTYPE)
    else:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    x = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # [BLOCK_N, D // 4, 2, 2]: a word's codes in their order
    if ROWS:
        # A thread's columns are 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of every 16: neighbouring words, which lie in one wide load.
        x = tl.reshape(x, [BLOCK_N, 4, D // 32, 2, 2, 2])
        return tl.reshape(tl.permute(x, 0, 4, 5, 2, 1, 3), [BLOCK_N, D])
    else:
        # A thread's rows are g and g + 8 of every 64, a warp's 16: all four codes of a word, whose column is the warp's and g.
        x = tl.reshape(x, [BLOCK_N, D // 32, 8, 2, 2])
        return tl.reshape(tl.permute(x, 0, 3, 1, 4, 2), [BLOCK_N, D])


@triton.jit
def decode_levels(
    low,
    high,
    level_ptr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Levels [BLOCK_N, D], in the order of `ordered_signs`, of what `load_codes` loaded.

    With ASM two at a time in packed arithmetic (sm_90 PTX), else from a table. ROWS: as for `ordered_signs`.
    """
    if BITS == 4:
        return _fours(low, level_ptr, D, BLOCK_N, ROWS, ASM, DTYPE)
    elif ASM == "":
        column = tl.arange(0, D)
        byte, place = column % (D // 4), column // (D // 4)
        code = (low.to(tl.int32) >> (place * 2)[None, :]) & 3
        if BITS == 3:
            code |= ((high.to(tl.int32) >> (byte % 2 * 4 + place)[None, :]) & 1) << 2
        return tl.load(level_ptr + code).to(DTYPE)
    else:
        if BITS == 3:
            # beside each byte of lower bits the one whose lowest four bits are its upper bits
            high = tl.reshape(tl.join(high, high >> 4), [BLOCK_N, D // 4])
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                ASM,
                "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
                [low, high],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                ASM,
                "=r,=r,=r,=r,=r,=r,=r,=r,r",
                [low],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        return _as_fragments(tl.permute(tl.join(tl.join(p0, p1), tl.join(p2, p3)), 0, 3, 2, 1), D, BLOCK_N)


@functools.cache
def ordered_signs(head_dim: int, bits: int, device: torch.device, fragments: bool, rows: bool) -> torch.Tensor:
    """`hadamard_signs` with its columns in the order in which codes come apart, chosen so that a thread that takes a word apart holds what it
    multiplies (PTX, wgmma's fragments of the first factor): codes go from memory into registers and from there to the product.

    Only queries (rows: keys are the first factor's rows) and outputs (not rows: values are its columns) know.
    fragments: whether 3- and 2-bit codes come apart that way too.
    """
    order = torch.arange(head_dim)
    if bits == 4:
        order = order.view(4, -1, 2, 2, 2).permute(3, 4, 1, 0, 2) if rows else order.view(-1, 8, 2, 2).permute(2, 0, 3, 1)
    else:
        row_bytes = head_dim // 4
        order = order.view(-1, 4).t()  # [place in a byte, byte]
        if fragments and row_bytes >= 16:
            order = order.reshape(4, 4, row_bytes // 16, 2, 2).permute(0, 2, 3, 1, 4)
    return hadamard_signs(head_dim, device)[:, order.flatten().to(device)].contiguous()


def level_assembly(bits: int) -> str:
    """PTX that turns a register of codes (3 bits: and one of upper bits) into the levels they hold, two at a time.

    4 bits: two words of four codes become four registers, the m-th the words' m-th codes. Else four bytes become two registers for each place in
    a byte. A code c becomes the bfloat16 128 + 2c by writing it into a mantissa, v = 2^-shift (2c - (2^bits - 1)) by one exact operation, and the
    level is v (v^2 + a) with the roundings of `reference.levels`.
    """

    def twice(value: float) -> str:
        bits16 = int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
        return f"0x{bits16:04X}{bits16:04X}"

    def moved(source: str, by: int) -> str:
        return f"shl.b32 t, {source}, {by};" if by >= 0 else f"shr.b32 t, {source}, {-by};"

    exponent, a, _ = LEVEL_COEFFICIENTS[bits]
    step = 2.0**-exponent
    lines = [
        "{ .reg .b32 t, u, s, x, y, step, low, nil, a;",
        f"mov.b32 step, {twice(step)};",
        f"mov.b32 low, {twice(-step * (127 + 2**bits))};",
    ]
    lines += ["mov.b32 nil, 0x80008000;", f"mov.b32 a, {twice(a)};"]

    def level(output: int) -> list[str]:
        return ["fma.rn.bf16x2 u, u, step, low;", "fma.rn.bf16x2 s, u, u, a;", f"fma.rn.bf16x2 ${output}, u, s, nil;"]

    if bits == 4:
        for code in range(4):
            lines += [moved("$4", 1 - 4 * code), "lop3.b32 u, t, 0x001E001E, 0x43004300, 0xEA;", *level(code)]
        return "\n".join([*lines, "}"])
    for half, spread in enumerate(("0x4140", "0x4342")):
        lines.append(f"prmt.b32 x, $8, 0, {spread};")
        if bits == 3:
            lines.append(f"prmt.b32 y, $9, 0, {spread};")
        for code in range(4):
            lines += [moved("x", 1 - 2 * code), "lop3.b32 u, t, 0x00060006, 0x43004300, 0xEA;"]
            if bits == 3:
                lines += [moved("y", 3 - code), "lop3.b32 u, t, 0x00080008, u, 0xEA;"]
            lines += level(2 * code + half)
    return "\n".join([*lines, "}"])
