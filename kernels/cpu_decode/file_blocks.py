"""Rows of quantised blocks as GGUF files keep them, in the form in which few rows are multiplied by them fastest here.

Blocks of 32 with a float16 scale (Q8_0, Q4_0, Q4_1) are multiplied as they are, or put into tiles. The others are put into tiles, each group of 32
weights with float16 scales of its own. Q5_0 and Q5_1 keep their numbers. Q4_K, Q5_K and Q6_K have a float16 scale for 256 weights, and whole multiples
of it for 32 or 16: these are rounded to float16, which changes a weight by an eighth of what rounding it to bfloat16 does.
"""

from __future__ import annotations

import torch

from kernels.cpu_decode.blocks import BLOCK, BLOCK_BYTES, NAMES, BlockWeight
from kernels.cpu_decode.machine_code import has_flag
from kernels.cpu_decode.tiles import FILE_4_1, FILE_8, FILE_8_1, FILE_8_2, FILE_FORMATS, GROUP, TileWeight

Q5_0, Q5_1, Q4_K, Q5_K, Q6_K = range(16, 21)
_SIZES = {Q5_0: (32, 22), Q5_1: (32, 24), Q4_K: (256, 144), Q5_K: (256, 176), Q6_K: (256, 210)}  # weights and bytes of a block
_NAMES = {"Q5_0": Q5_0, "Q5_1": Q5_1, "Q4_K": Q4_K, "Q5_K": Q5_K, "Q6_K": Q6_K}
_ROWS = 1 << 9  # that are put into tiles at once

Coded = tuple[int, torch.Tensor, torch.Tensor]
"""Format of tiles; heads float16 [out, groups, 1 or 2]; bytes of codes uint8 [out, groups, 32 or 16]."""


def multiplies_tiles() -> bool:
    """Whether the processor multiplies and adds four bytes at a time (AVX512-VNNI)."""
    return has_flag("avx512_vnni")


def formats() -> dict[str, int]:
    """Numbers of the formats that can be multiplied here, by GGUF's names."""
    return NAMES | _NAMES if multiplies_tiles() else NAMES


def row_bytes(kind: int, inputs: int) -> int:
    """Bytes of a row of `inputs` weights."""
    weights, size = _SIZES.get(kind, (BLOCK, BLOCK_BYTES[kind] if kind < len(BLOCK_BYTES) else 0))
    return inputs // weights * size


def laid_out(raw: torch.Tensor, kind: int, dtype: torch.dtype) -> BlockWeight | TileWeight | None:
    """Rows of blocks uint8 [out, bytes of a row] for products with numbers of a dtype; None where these formats' tiles cannot hold them: they are no
    sixteens of outputs, or a scale is too large for float16."""
    blocks = BlockWeight(raw, kind, dtype) if kind in FILE_FORMATS else None
    weights, size = (BLOCK, BLOCK_BYTES[kind]) if blocks is not None else _SIZES[kind]
    shape = torch.Size((len(raw), raw.shape[1] // size * weights))
    if not multiplies_tiles() or not TileWeight.fits(shape):
        return blocks
    if blocks is not None:
        return TileWeight.of_blocks(blocks)
    tiles: torch.Tensor | None = None
    for start in range(0, len(raw), _ROWS):
        form, heads, codes = _coded(raw[start : start + _ROWS].unflatten(1, (-1, size)), kind)
        if not bool(heads.isfinite().all()):
            return None
        part = TileWeight.assembled(form, heads, codes, dtype).tiles
        if tiles is None:
            tiles = torch.empty(TileWeight.num_bytes(shape, form), dtype=torch.uint8).view(-1, part.shape[1])
        tiles[start // 16 : start // 16 + len(part)] = part
    assert tiles is not None, "a shape that fits has outputs"
    return TileWeight(tiles, form, dtype)


def _half(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes [..., 2 n] as float32 [..., n]."""
    return numbers.contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes below 16, uint8 [..., 32], in bytes [..., 16]: the first 16 in their low halves."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _coded(blocks: torch.Tensor, kind: int) -> Coded:
    """Of blocks uint8 [out, blocks, bytes of one]."""
    if kind in (Q5_0, Q5_1):
        at = 2 if kind == Q5_0 else 4
        low = torch.cat((blocks[..., at + 4 :] & 15, blocks[..., at + 4 :] >> 4), -1)
        codes = low | (_bits(blocks[..., at : at + 4]) << 4)
        heads = blocks[..., :at].contiguous().view(torch.float16)
        return (FILE_8, heads, codes + 112) if kind == Q5_0 else (FILE_8_1, heads, codes)
    if kind == Q6_K:
        return _coded_q6_k(blocks)
    factors = _half(blocks[..., :4])[..., None, :]  # of scales and of least values
    low, middle, top = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((low & 63, (top & 15) | (low >> 6 << 4)), -1)
    least = torch.cat((middle & 63, (top >> 4) | (middle >> 6 << 4)), -1)
    heads = (torch.stack((scales, least), -1).float() * factors * torch.tensor([1.0, -1.0])).half()
    four = blocks[..., -128:].unflatten(-1, (4, 1, GROUP))
    codes = torch.cat((four & 15, four >> 4), -2).flatten(-3, -2)  # [out, blocks, 8, 32]
    if kind == Q4_K:
        return FILE_4_1, heads.flatten(1, 2), _nibbles(codes).flatten(1, 2)
    fifth = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return FILE_8_1, heads.flatten(1, 2), (codes | (fifth << 4)).flatten(1, 2)


def _coded_q6_k(blocks: torch.Tensor) -> Coded:
    low, high = blocks[..., :128].unflatten(-1, (2, 2, GROUP)), blocks[..., 128:192].unflatten(-1, (2, 1, GROUP))
    lower = torch.cat((low & 15, low >> 4), -2)  # [out, blocks, 2, 4, 32]
    upper = high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    codes = (lower | (upper << 4)).flatten(2, 3) + 96
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float() * _half(blocks[..., 208:210])
    return FILE_8_2, scales.half().unflatten(-1, (8, 2)).flatten(1, 2), codes.flatten(1, 2)


def _bits(words: torch.Tensor) -> torch.Tensor:
    """Bits of four bytes [..., 4], the least first, uint8 [..., 32]."""
    return (words[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
