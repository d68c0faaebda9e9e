"""Weights on a CPU in 8 or 4 bits: tiles of 16 outputs, in the order in which a processor multiplies and adds four bytes at a time. This is their
meaning, in plain PyTorch.

What is multiplied by them is put into whole numbers too, with a scale for every 32. Of copies for drafts these have 8 bits, so that products are a
little wrong: their results may only decide what is proposed. Of a file's own weights (OF_FILES) they have 16, two bytes that are multiplied one after
the other: nearer to the product in float32 than one of bf16 is.

A tile holds all inputs of 16 outputs, in groups of 32: float16 scales [16], in some formats 16 more numbers, then codes uint8 [16, 4] of inputs 4 q to
4 q + 3 for q = 0, 1... A weight is its scale times its code less 128, or less 8 where a byte holds two of them: those of q in its low half, and those
of q + 4 in the high one. The other 16 numbers are least values, to which the scale times the code is added (LEAST), or the scales of a group's last 16
inputs (HALVES).
"""

from __future__ import annotations

import torch

GROUP = 32  # inputs that share a scale
OUTPUTS = 16  # of a tile
TILES_8, TILES_4, FILE_8, FILE_4, FILE_4_1, FILE_8_1, FILE_8_2 = TILE_FORMATS = 4, 5, 6, 7, 8, 9, 10
"""Numbers of formats, beside those of `blocks`: 8 and 4 bits for drafts, and those of a file's weights."""
OF_FILES = FILE_8, FILE_4, FILE_4_1, FILE_8_1, FILE_8_2
BYTE_CODES = TILES_8, FILE_8, FILE_8_1, FILE_8_2  # whose codes take a byte each
LEAST, HALVES = (FILE_4_1, FILE_8_1), (FILE_8_2,)  # what the second numbers of an output are
HEAD_BYTES = {kind: (4 if kind in LEAST + HALVES else 2) * OUTPUTS for kind in TILE_FORMATS}  # of a group, before its codes
GROUP_BYTES = {kind: HEAD_BYTES[kind] + GROUP * OUTPUTS // (1 if kind in BYTE_CODES else 2) for kind in TILE_FORMATS}
ZERO = {
    kind: 0 if kind in LEAST else 128 if kind in BYTE_CODES else 8 for kind in TILE_FORMATS
}  # the code of weight 0, or of the least value
MOST_8, MOST_16 = 127, 127 * 256  # of what is multiplied: the greatest whole number of 8 bits, and of two bytes with signs
SHRINK = (1.0, 0.95, 0.9, 0.85)  # of 4-bit steps: the one with the least squared error is kept
LEAST_SCALE_BITS = 1  # of float16: the least number beside 0
_ROWS = 1 << 9  # of a weight that are put into tiles at once: their numbers in float32 stay in a core's cache


class TileWeight:
    """A weight [out, in] in tiles: uint8 [out / 16, bytes of a tile], in one of the formats; dtype: of the products' inputs and outputs.

    Stands in for a tensor laid out for products, as `blocks.BlockWeight` does.
    """

    is_mkldnn = True
    device = torch.device("cpu")

    def __init__(self, tiles: torch.Tensor, kind: int, dtype: torch.dtype) -> None:
        groups, rest = divmod(tiles.shape[1], GROUP_BYTES[kind])
        if tiles.dtype != torch.uint8 or rest or not tiles.is_contiguous():
            raise ValueError("tiles are contiguous bytes, whole groups of one of the formats in each")
        self.tiles, self.kind, self.dtype = tiles, kind, dtype
        self.shape = torch.Size((tiles.shape[0] * OUTPUTS, groups * GROUP))

    @staticmethod
    def fits(shape: torch.Size) -> bool:
        """Whether a weight of this shape can be put into tiles."""
        return len(shape) == 2 and shape[0] % OUTPUTS == 0 and shape[1] % GROUP == 0 and shape.numel() > 0

    @staticmethod
    def num_bytes(shape: torch.Size, kind: int) -> int:
        """What the tiles of a weight of this shape take."""
        return shape[0] // OUTPUTS * (shape[1] // GROUP) * GROUP_BYTES[kind]

    @classmethod
    def of(cls, weight: torch.Tensor, kind: int, memory: torch.Tensor | None = None) -> TileWeight:
        """A weight [out, in] whose shape `fits`, rounded to the nearest codes of TILES_8 or TILES_4. memory: uint8, where its tiles are put.
        `step.tiled` is faster."""
        outputs = len(weight)
        if not cls.fits(weight.shape):
            raise ValueError(f"a weight of shape {list(weight.shape)} has no whole tiles of {OUTPUTS} outputs and groups of {GROUP} inputs")
        tiles = torch.empty(cls.num_bytes(weight.shape, kind), dtype=torch.uint8) if memory is None else memory
        tiles = tiles.view(outputs // OUTPUTS, -1)
        for start in range(0, outputs, _ROWS):
            parts = weight[start : start + _ROWS].float().unflatten(1, (-1, GROUP))  # [rows, groups, 32]
            scales, codes = _coded(parts, kind)
            rows, groups = codes.shape[:2]
            quads = codes.view(rows // OUTPUTS, OUTPUTS, groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4)  # [tiles, groups, q, 16, 4]
            if kind == TILES_4:
                quads = quads[:, :, : GROUP // 8] | (quads[:, :, GROUP // 8 :] << 4)
            heads = scales.view(-1, OUTPUTS, groups).transpose(1, 2).contiguous().view(torch.uint8)  # [tiles, groups, 32 bytes]
            tiles[start // OUTPUTS : (start + rows) // OUTPUTS] = torch.cat((heads, quads.flatten(2)), -1).flatten(1)
        return cls(tiles, kind, weight.dtype)

    def fill(self, heads: torch.Tensor, codes: torch.Tensor) -> None:
        """Put in the numbers before the codes, float16 [out, groups, 1 or 2], and the bytes of the codes, uint8 [out, groups, 32 or 16], in their
        order."""
        places, head = (-1, OUTPUTS), HEAD_BYTES[self.kind]
        groups = self.tiles.unflatten(1, (-1, GROUP_BYTES[self.kind]))
        own, quads = groups.view(torch.int16)[..., : head // 2], groups.view(torch.int32)[..., head // 4 :]  # quads: four codes each
        own.unflatten(2, places).copy_(heads.view(torch.int16).unflatten(0, places).permute(0, 2, 3, 1))
        quads.unflatten(2, places).copy_(codes.contiguous().view(torch.int32).unflatten(0, places).permute(0, 2, 3, 1))

    def of_outputs(self, outputs: slice) -> TileWeight:
        """That of some outputs, whole tiles of them; a slice that ends beyond the last ends with it."""
        assert outputs.start % OUTPUTS == 0, "tiles begin at every sixteenth output"
        return TileWeight(self.tiles[outputs.start // OUTPUTS : -(-outputs.stop // OUTPUTS)], self.kind, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of the tiles."""
        return self.tiles.nbytes

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in] they stand for, in `dtype`."""
        out = torch.empty(self.shape, dtype=self.dtype)
        for start in range(0, len(out), _ROWS):
            part = out[start : start + _ROWS]
            part.copy_(self.rows(torch.arange(start, start + len(part))))
        return out

    def unpacked(self) -> torch.Tensor:
        """The weight they stand for, float32 [out, in]."""
        return self.rows(torch.arange(self.shape[0]))

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weights of outputs `numbers` [n] int64, float32 [n, in]."""
        groups = self.tiles.unflatten(1, (-1, GROUP_BYTES[self.kind]))
        heads = groups[..., : HEAD_BYTES[self.kind]].unflatten(2, (-1, OUTPUTS, 2))  # [tiles, groups, 1 or 2, 16, 2]
        codes = groups[..., HEAD_BYTES[self.kind] :].unflatten(2, (-1, OUTPUTS, 4))
        tile, own = numbers // OUTPUTS, numbers % OUTPUTS
        scales = heads[tile, :, :, own].contiguous().view(torch.float16).float()  # [n, groups, 1 or 2, 1]
        steps = codes[tile, :, :, own]  # [n, groups, q, 4]
        if self.kind not in BYTE_CODES:
            steps = torch.cat((steps & 15, steps >> 4), 2)
        own = scales.repeat_interleave(GROUP // 8, 2) if self.kind in HALVES else scales[:, :, :1]
        found = (steps.float() - ZERO[self.kind]) * own
        return (found + scales[:, :, 1:] if self.kind in LEAST else found).flatten(1)


def _coded(parts: torch.Tensor, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales float16 [rows, groups] and codes uint8 [rows, groups, 32] of weights float32 [rows, groups, 32]."""
    zero = ZERO[kind]
    if kind == TILES_8:
        scales = _usable(parts.abs().amax(-1) / 127)
        return scales, (parts / scales[..., None].float()).round_().clamp_(-127, 127).add_(zero).to(torch.uint8)
    top, bottom = parts.amax(-1), parts.amin(-1)
    farthest = torch.where(top >= -bottom, top, bottom)  # has code 0, which reaches one step farther than 15
    best, scales, codes = torch.full_like(farthest, float("inf")), torch.empty_like(farthest), torch.empty_like(parts)
    for shrink in SHRINK:
        own = _usable(farthest * (-shrink / zero)).float()
        steps = (parts / own[..., None]).round_().clamp_(-zero, zero - 1)
        error = (steps * own[..., None] - parts).square_().sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, own, scales)
        codes = torch.where(better[..., None], steps, codes)
    return scales.half(), codes.add_(zero).to(torch.uint8)


def _usable(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float16, none of them 0."""
    halves = scales.half()
    return torch.where(halves == 0, torch.full_like(halves, 2.0**-24 * LEAST_SCALE_BITS), halves)


def steps_of(x: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What products take of x float32 [N, in]: whole numbers up to `most`, float32 [N, groups, 32], and a scale [N, groups] of each group."""
    parts = x.float().unflatten(1, (-1, GROUP))
    scales = parts.abs().amax(-1) / most
    return (parts / scales.clamp_min(1e-30)[..., None]).round(), scales


def linear(x: torch.Tensor, weight: TileWeight) -> torch.Tensor:
    """x float32 [N, in] by a weight [out, in] -> float32 [N, out]."""
    steps, scales = steps_of(x, MOST_8 if weight.kind in (TILES_8, TILES_4) else MOST_16)
    return (steps * scales[..., None]).flatten(1) @ weight.unpacked().T
