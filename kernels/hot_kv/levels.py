"""How `attention.py` turns bytes of codes into levels: three packed operations for two channels where PTX for bfloat16 pairs runs, else a table.

Nothing has to be exchanged between threads or halves of registers on the way, because the rotated channels may come in any order that queries
and outputs know of (`ordered_signs`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.hot_kv.reference import LEVEL_COEFFICIENTS, hadamard_signs


@triton.jit
def load_codes(code_ptr, base, offset, D: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """Bytes of BLOCK_N rows: (those with the lower bits, those with the 3-bit format's upper bits, else the lower again).

    base, offset: where the rows begin, in bytes. FAST: each byte once, else one for each channel, [BLOCK_N, D].
    """
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 4
    column = tl.arange(0, D // PER_BYTE) if FAST else tl.arange(0, D) % (D // PER_BYTE)
    row = code_ptr + base + offset[:, None]
    low = tl.load(row + column[None, :])
    if BITS == 3:
        upper = tl.arange(0, D // 8) if FAST else column // 2
        high = tl.load(row + (D // 4 + upper)[None, :])
        return low, high
    else:
        return low, low


@triton.jit
def _as_fragments(x, PER_BYTE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Levels [BLOCK_N, place in a byte (one axis or two), byte] as [BLOCK_N, D] in the order of `ordered_signs`."""
    BYTES: tl.constexpr = D // PER_BYTE
    if BYTES < 16:
        return tl.reshape(x, [BLOCK_N, D])
    else:
        x = tl.reshape(x, [BLOCK_N, PER_BYTE, 4, BYTES // 16, 2, 2])
        return tl.reshape(tl.permute(x, 0, 1, 3, 4, 2, 5), [BLOCK_N, D])


@triton.jit
def decode_levels(low, high, level_ptr, D: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Levels [BLOCK_N, D], in the order of `ordered_signs`, of what `load_codes` loaded.

    With ASM two at a time in packed arithmetic (sm_90 PTX), else from a table.
    """
    PER_BYTE: tl.constexpr = 2 if BITS == 4 else 4
    if ASM == "":
        column = tl.arange(0, D)
        byte, place = column % (D // PER_BYTE), column // (D // PER_BYTE)
        shift = place * (8 // PER_BYTE)
        code = (low.to(tl.int32) >> shift[None, :]) & (15 if BITS == 4 else 3)
        if BITS == 3:
            code |= ((high.to(tl.int32) >> (byte % 2 * 4 + place)[None, :]) & 1) << 2
        return tl.load(level_ptr + code).to(DTYPE)
    elif BITS == 4:
        p0, p1 = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [low], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
        return _as_fragments(tl.permute(tl.join(p0, p1), 0, 2, 1), 2, D, BLOCK_N)
    else:
        if BITS == 3:
            # beside each byte of lower bits the one whose lowest four bits are its upper bits
            high = tl.reshape(tl.join(high, high >> 4), [BLOCK_N, D // 4])
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [low, high],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [low],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        return _as_fragments(tl.permute(tl.join(tl.join(p0, p1), tl.join(p2, p3)), 0, 3, 2, 1), 4, D, BLOCK_N)


@functools.cache
def ordered_signs(head_dim: int, bits: int, device: torch.device, fragments: bool) -> torch.Tensor:
    """`hadamard_signs` with its columns in the order in which codes come apart: the first code of every byte, then the second, ...

    Neighbours in that order come from neighbouring bytes, so no two halves of a register have to be exchanged. Only queries and outputs know.
    fragments: the bytes themselves so ordered that a thread's columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of every 16 (PTX, wgmma's fragments of
    the first factor) are neighbours in memory: then codes go from wide loads into registers and from there to the product.
    """
    per_byte = 2 if bits == 4 else 4
    row_bytes = head_dim // per_byte
    order = torch.arange(head_dim).view(-1, per_byte).t()  # [per_byte, row_bytes]
    if fragments and row_bytes >= 16:
        order = order.reshape(per_byte, 4, row_bytes // 16, 2, 2).permute(0, 2, 3, 1, 4)
    return hadamard_signs(head_dim, device)[:, order.flatten().to(device)].contiguous()


def level_assembly(bits: int) -> str:
    """PTX that turns four bytes (and for 3 bits the four bytes with their upper bits) into the levels they hold, two at a time.

    Output m of a byte is its m-th code's level, so the bytes may be any four. Two bytes are spread over a word's halves; a code c becomes the
    bfloat16 128 + 2c by writing it into a mantissa, v = 2^-shift (2c - (2^bits - 1)) by one exact operation, and the level is v (v^2 + a) with the
    roundings of `reference.levels`.
    """
    codes, width = (2, 4) if bits == 4 else (4, 2)
    low, high = f"${2 * codes}", f"${2 * codes + 1}"

    def twice(value: float) -> str:
        bits16 = int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
        return f"0x{bits16:04X}{bits16:04X}"

    def moved(source: str, by: int) -> str:
        return f"shl.b32 t, {source}, {by};" if by >= 0 else f"shr.b32 t, {source}, {-by};"

    exponent, a, _ = LEVEL_COEFFICIENTS[bits]
    step = 2.0**-exponent
    mask = ((1 << width) - 1) << 1
    lines = ["{ .reg .b32 t, u, s, x, y, step, low, nil, a;", f"mov.b32 step, {twice(step)};", f"mov.b32 low, {twice(-step * (127 + 2**bits))};"]
    lines += ["mov.b32 nil, 0x80008000;", f"mov.b32 a, {twice(a)};"]
    for half, spread in enumerate(("0x4140", "0x4342")):
        lines.append(f"prmt.b32 x, {low}, 0, {spread};")
        if bits == 3:
            lines.append(f"prmt.b32 y, {high}, 0, {spread};")
        for code in range(codes):
            lines.append(moved("x", 1 - width * code))
            lines.append(f"lop3.b32 u, t, 0x{mask:04X}{mask:04X}, 0x43004300, 0xEA;")
            if bits == 3:
                lines.append(moved("y", 3 - code))
                lines.append("lop3.b32 u, t, 0x00080008, u, 0xEA;")
            lines += ["fma.rn.bf16x2 u, u, step, low;", "fma.rn.bf16x2 s, u, u, a;"]
            lines.append(f"fma.rn.bf16x2 ${2 * code + half}, u, s, nil;")
    return "\n".join([*lines, "}"])
