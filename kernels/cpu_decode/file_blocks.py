"""Rows of quantised blocks as GGUF files keep them, in the form in which few rows are multiplied by them fastest here.

Blocks of 32 with a float16 scale (Q8_0, Q4_0, Q4_1) are multiplied as they are, or put into tiles. The others are put into tiles, each group of 32
weights with float16 scales of its own. Q5_0 and Q5_1 keep their numbers. Q4_K, Q5_K and Q6_K have a float16 scale for 256 weights, and whole multiples
of it for 32 or 16: these are rounded to float16, which changes a weight by an eighth of what rounding it to bfloat16 does.
"""

from __future__ import annotations

import torch

from kernels.cpu_decode.blocks import BLOCK, BLOCK_BYTES, NAMES, Q4_0, Q4_1, Q8_0, BlockWeight
from kernels.cpu_decode.machine_code import has_flag
from kernels.cpu_decode.tiles import FILE_4, FILE_4_1, FILE_8, FILE_8_1, FILE_8_2, GROUP, OUTPUTS, TileWeight

Q5_0, Q5_1, Q4_K, Q5_K, Q6_K = range(16, 21)
_NAMES = {"Q5_0": Q5_0, "Q5_1": Q5_1, "Q4_K": Q4_K, "Q5_K": Q5_K, "Q6_K": Q6_K}
_SIZES = {kind: (BLOCK, BLOCK_BYTES[kind]) for kind in NAMES.values()} | {
    Q5_0: (32, 22),
    Q5_1: (32, 24),
    Q4_K: (256, 144),
    Q5_K: (256, 176),
    Q6_K: (256, 210),
}
"""Weights and bytes of a block, by format."""
FILE_FORMATS = {Q8_0: FILE_8, Q4_0: FILE_4, Q4_1: FILE_4_1, Q5_0: FILE_8, Q5_1: FILE_8_1, Q4_K: FILE_4_1, Q5_K: FILE_8_1, Q6_K: FILE_8_2}
"""Formats of blocks -> of the tiles that hold their weights."""
_BYTES_AT_ONCE = 1 << 19  # of blocks that are put into tiles: what is made of them stays in a core's cache
_PRODUCTS = Q4_K, Q5_K, Q6_K  # whose scales of groups are products, rounded to float16
_INFINITE = 0x7C00  # bits of float16

Coded = tuple[torch.Tensor, torch.Tensor]
"""Numbers before a group's codes, float16 [out, groups, 1 or 2], and the bytes of the codes, uint8 [out, groups, 32 or 16]."""


def multiplies_tiles() -> bool:
    """Whether the processor multiplies and adds four bytes at a time (AVX512-VNNI)."""
    return has_flag("avx512_vnni")


def formats() -> dict[str, int]:
    """Numbers of the formats that can be multiplied here, by GGUF's names."""
    return NAMES | _NAMES if multiplies_tiles() else NAMES


def row_bytes(kind: int, inputs: int) -> int:
    """Bytes of a row of `inputs` weights."""
    weights, size = _SIZES[kind]
    return inputs // weights * size


def laid_out(raw: torch.Tensor, kind: int, dtype: torch.dtype) -> BlockWeight | TileWeight | None:
    """Rows of blocks uint8 [out, bytes of a row] for products with numbers of a dtype; None where these formats' tiles cannot hold them: they are no
    sixteens of outputs, or a scale is too large for float16."""
    if multiplies_tiles() and (tiles := in_tiles(raw, kind, dtype)) is not None:
        return tiles
    return BlockWeight(raw, kind, dtype) if kind in NAMES.values() else None


def in_tiles(raw: torch.Tensor, kind: int, dtype: torch.dtype) -> TileWeight | None:
    """Rows of blocks uint8 [out, bytes of a row] in tiles; None where they are no sixteens of outputs, or a scale of a group is
    too large for float16."""
    (weights, size), form = _SIZES[kind], FILE_FORMATS[kind]
    shape = torch.Size((len(raw), raw.shape[1] // size * weights))
    if not TileWeight.fits(shape):
        return None
    tiles = torch.empty(TileWeight.num_bytes(shape, form), dtype=torch.uint8).view(len(raw) // OUTPUTS, -1)
    step = max(1, _BYTES_AT_ONCE // (raw.shape[1] * OUTPUTS))
    for own, part in zip(tiles.split(step), raw.split(step * OUTPUTS), strict=True):
        heads, codes = _coded(part.unflatten(1, (-1, size)), kind)
        if kind in _PRODUCTS and int((heads.view(torch.int16) & 0x7FFF).amax()) >= _INFINITE:
            return None
        TileWeight(own, form, dtype).fill(heads, codes)
    return TileWeight(tiles, form, dtype)


def _coded(blocks: torch.Tensor, kind: int) -> Coded:
    """Of blocks uint8 [out, blocks, bytes of one]."""
    if kind == Q6_K:
        return _coded_q6_k(blocks)
    if kind in (Q4_K, Q5_K):
        return _coded_k(blocks, kind)
    head = 2 * (2 if kind in (Q4_1, Q5_1) else 1)
    heads, codes = blocks[..., :head].contiguous().view(torch.float16), blocks[..., head:]
    if kind == Q8_0:
        return heads, codes ^ 128  # int8 as its distance from -128
    if kind in (Q4_0, Q4_1):
        return heads, codes
    low = torch.cat((codes[..., 4:] & 15, codes[..., 4:] >> 4), -1) | (_bits(codes[..., :4]) << 4)
    return heads, low + 112 if kind == Q5_0 else low  # 16 has code 128


def _coded_k(blocks: torch.Tensor, kind: int) -> Coded:
    """Of Q4_K or Q5_K: two float16 factors, eight scales and eight least values of 6 bits, of Q5_K the fifth bits of eight groups in 32 bytes, and
    the low bits of two groups in 32 bytes, four times."""
    factors = _half(blocks[..., :4])[..., None, :]  # of scales and of least values
    low, middle, top = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((low & 63, (top & 15) | (low >> 6 << 4)), -1)
    least = torch.cat((middle & 63, (top >> 4) | (middle >> 6 << 4)), -1)
    heads = (torch.stack((scales, least), -1).float() * factors * torch.tensor([1.0, -1.0])).half().flatten(1, 2)
    four = _words(blocks[..., -128:]).unflatten(-1, (4, 4))  # words of 32 bytes
    if kind == Q4_K:
        first, last = four[..., :2], four[..., 2:]  # 16 weights each of two groups, the first group's in the low halves
        groups = (first & _every(15)) | ((last & _every(15)) << 4), (first >> 4 & _every(15)) | (last & ~_every(15))
        return heads, _bytes(torch.stack(groups, -2), GROUP // 2)
    codes = torch.stack((four & _every(15), four >> 4 & _every(15)), -2).flatten(-3, -2)  # [out, blocks, 8, words]
    fifth = _words(blocks[..., 16:48])[..., None, :] >> torch.arange(8)[:, None] & _every(1)
    return heads, _bytes(codes | (fifth << 4), GROUP)


def _coded_q6_k(blocks: torch.Tensor) -> Coded:
    """Low bits of 128 weights in 64 bytes and high ones in 32, each twice; 16 scales int8, and a float16 factor of them."""
    low, high = _words(blocks[..., :128]).unflatten(-1, (2, 2, 4)), _words(blocks[..., 128:192]).unflatten(-1, (2, 1, 4))
    lower = torch.cat((low & _every(15), low >> 4 & _every(15)), -2)  # [out, blocks, 2, 4, words]
    upper = high >> torch.tensor([0, 2, 4, 6])[:, None] & _every(3)
    codes = (lower | (upper << 4)) + _every(96)  # 32 has code 128
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float() * _half(blocks[..., 208:210])
    return scales.half().unflatten(-1, (8, 2)).flatten(1, 2), _bytes(codes, GROUP)


def _half(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes [..., 2 n] as float32 [..., n]."""
    return numbers.contiguous().view(torch.float16).float()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [..., 8 n] as int64 [..., n]: operations on eight at a time."""
    return codes.contiguous().view(torch.int64)


def _bytes(words: torch.Tensor, count: int) -> torch.Tensor:
    """Words int64 [out, ...] as so many bytes of each group, uint8 [out, groups, count]."""
    return words.flatten(1).view(torch.uint8).unflatten(1, (-1, count))


def _every(number: int) -> int:
    """A byte below 128, eight times."""
    return number * 0x0101010101010101


def _bits(words: torch.Tensor) -> torch.Tensor:
    """Bits of four bytes [..., 4], the least first, uint8 [..., 32]."""
    return (words[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
