"""Quantised weights as GGUF files keep them: blocks of 32 weights of a row, with float16 scales. Their meaning, in plain PyTorch."""

from __future__ import annotations

import torch

BLOCK = 32  # weights of a row that share a scale
BF16, Q8_0, Q4_0, Q4_1 = range(4)
"""Formats: plain bf16; 8 bits (scale, 32 int8); 4 bits less 8 (scale, 16 bytes: weights 0 to 15 in their low halves, the others in the high ones);
4 bits over a least value (scale, least value, 16 bytes)."""
BLOCK_BYTES = (64, 34, 18, 20)  # of 32 weights, by format
_ELEMENTS_AT_ONCE = 1 << 17  # of a weight that is put into blocks: its numbers in float32 stay in a core's cache
NAMES = {"Q8_0": Q8_0, "Q4_0": Q4_0, "Q4_1": Q4_1}


class BlockWeight:
    """A quantised weight [out, in]: its blocks, uint8 [out, bytes of a row], in one of the formats; dtype: of the products' inputs and outputs.

    Stands in for a tensor laid out for products: among products only those of `engine.model.linear` meet one.
    """

    is_mkldnn = True  # laid out for products: `to_dense` gives the plain tensor
    device = torch.device("cpu")

    def __init__(self, blocks: torch.Tensor, kind: int, dtype: torch.dtype) -> None:
        rows, row_bytes = blocks.shape
        if blocks.dtype != torch.uint8 or kind not in NAMES.values() or row_bytes % BLOCK_BYTES[kind] or not blocks.is_contiguous():
            raise ValueError("blocks are contiguous bytes, whole blocks of one of the quantised formats in each row")
        self.blocks, self.kind, self.dtype = blocks, kind, dtype
        self.shape = torch.Size((rows, row_bytes // BLOCK_BYTES[kind] * BLOCK))

    @classmethod
    def of_bytes(cls, weight: torch.Tensor) -> BlockWeight:
        """A weight [out, in] in 8 bits (Q8_0), rounded to the nearest steps; in a multiple of 32."""
        outputs, inputs = weight.shape
        blocks = torch.empty(outputs, inputs // BLOCK * BLOCK_BYTES[Q8_0], dtype=torch.uint8)
        rows = max(1, _ELEMENTS_AT_ONCE // max(1, inputs))
        for start in range(0, outputs, rows):
            parts = weight[start : start + rows].float().unflatten(1, (-1, BLOCK))
            scales = (parts.abs().amax(-1, keepdim=True) / 127).half()
            steps = (parts / scales.float().clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8)
            blocks[start : start + rows] = torch.cat((scales.view(torch.uint8), steps.view(torch.uint8)), -1).flatten(1)
        return cls(blocks, Q8_0, weight.dtype)

    def of_outputs(self, outputs: slice) -> BlockWeight:
        """That of some outputs."""
        return BlockWeight(self.blocks[outputs], self.kind, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of the blocks."""
        return self.blocks.nbytes

    def to_dense(self) -> torch.Tensor:
        """The weight [out, in] they stand for, in `dtype`."""
        return unpack_blocks(self.blocks, self.kind).to(self.dtype)


def unpack_blocks(blocks: torch.Tensor, kind: int) -> torch.Tensor:
    """Rows of blocks uint8 [out, bytes of a row] -> float32 [out, in]."""
    parts = blocks.unflatten(1, (-1, BLOCK_BYTES[kind]))
    scales = parts[..., :2].contiguous().view(torch.float16).float()
    if kind == Q8_0:
        return (parts[..., 2:].contiguous().view(torch.int8).float() * scales).flatten(1)
    codes = parts[..., 4 if kind == Q4_1 else 2 :]
    steps = torch.cat((codes & 15, codes >> 4), -1).float()
    if kind == Q4_0:
        return ((steps - 8) * scales).flatten(1)
    return (steps * scales + parts[..., 2:4].contiguous().view(torch.float16).float()).flatten(1)


def linear(x: torch.Tensor, weight: torch.Tensor | BlockWeight) -> torch.Tensor:
    """x float32 [N, in] by weight [out, in], bf16 or quantised -> float32 [N, out]."""
    dense = unpack_blocks(weight.blocks, weight.kind) if isinstance(weight, BlockWeight) else weight.float()
    return x @ dense.T
