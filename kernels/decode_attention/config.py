"""Launch shape of `decode_attention`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeAttentionConfig:
    """Keys of a split and of a step of its loop, programs a (request, KV head) has at most, warps, pipeline stages.

    whole_block: a request's new tokens share a program; else each has its own, and its result is the same bits alone and in a block.
    ahead: splits merged at a time. spread: splits are as long as it takes to give each a program of its own, at least `split` keys; else they have that
    length, and a token's sums have the same order whatever the context's length is in this step.
    """

    split: int = 64
    block_n: int = 64
    programs: int = 64
    warps: int = 4
    stages: int = 2
    whole_block: bool = True
    ahead: int = 8
    spread: bool = False

    def most_splits(self, keys: int) -> int:
        """Of a context of up to `keys` keys."""
        splits = -(-keys // self.split)
        return min(splits, self.programs) if self.spread else splits


def decode_attention_parts(rows: int, heads: int, head_dim: int, keys: int, config: DecodeAttentionConfig) -> int:
    """float32 elements of workspace for contexts of up to `keys` keys: a result and two statistics of each row, head and split."""
    return config.most_splits(keys) * rows * heads * (head_dim + 2)
