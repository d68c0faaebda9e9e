"""Token embeddings whose rows stay in a file's quantised blocks, and are unpacked as they are looked up."""

from __future__ import annotations

import torch
from torch import nn

from kernels.cpu_decode.blocks import BlockWeight
from kernels.cpu_decode.tiles import TileWeight


class BlockEmbedding(nn.Module):
    """In place of `nn.Embedding`, where a plain table would take twice the blocks' memory and more, for the few rows that a text looks up.

    blocks: [V, E], or tiles; a tied head multiplies by them as well.
    """

    def __init__(self, blocks: BlockWeight | TileWeight) -> None:
        super().__init__()
        self.blocks = blocks

    @property
    def weight(self) -> torch.Tensor:
        """The plain table [V, E]; a copy is made for the caller."""
        return self.blocks.to_dense()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows [N, E] of token ids [N] int64."""
        if isinstance(self.blocks, TileWeight):
            return self.blocks.rows(token_ids).to(self.blocks.dtype)
        from kernels.cpu_decode.step import unpack  # compiled, as the products by blocks are

        return unpack(BlockWeight(self.blocks.blocks[token_ids], self.blocks.kind, self.blocks.dtype))
