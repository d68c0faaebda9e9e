"""Launch shapes of a whole decode step, chosen by the model's shape and the number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kernels.decode_attention.config import DecodeAttentionConfig, decode_attention_parts
from kernels.skinny_linear.tiles import Tile, token_block


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of a Llama-like model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float = 1e-6

    @property
    def qkv_rows(self) -> int:
        """Rows of the QKV matrix."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class DecodePlan:
    """Launch shapes of a step's kernels.

    early: each is launched while the one before it runs (programmatic dependent launch).
    ahead_mb: megabytes of later weights that kernels bring into the cache: of gate_up's during QKV, attention and the output projection, of
    down's during gate_up, and of the next layer's QKV during down.
    """

    qkv: Tile
    o: Tile
    gate_up: Tile
    down: Tile
    head: Tile
    attention: DecodeAttentionConfig
    early: bool = True
    ahead_mb: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)


class Workspace(NamedTuple):
    """Sizes of a step's shared workspace."""

    square_rows: int
    part_floats: int
    tickets: int


def choose_plan(shape: DecodeShape, rows: int) -> DecodePlan:
    """The plan that measured best for such sizes."""
    if rows <= 8:
        skinny = Tile(block_n=16, block_k=128, slices=4, stages=3, lines=8)
        return DecodePlan(
            qkv=skinny,
            o=skinny,
            gate_up=Tile(block_n=16, block_k=64, slices=4, stages=4, lines=8),
            down=Tile(block_n=16, block_k=64, slices=4, splits=4, stages=6, held=1),
            head=Tile(block_n=64, block_k=128, slices=1, stages=5),
            attention=DecodeAttentionConfig(),
        )
    return DecodePlan(
        qkv=Tile(block_n=64, block_k=128, slices=1, splits=2, lines=16),
        o=Tile(block_n=64, block_k=64, slices=1, splits=6, stages=5, lines=8),
        gate_up=Tile(block_n=128, block_k=64, slices=1, stages=4, lines=16),
        down=Tile(block_n=64, block_k=128, slices=1, splits=7, stages=4),
        head=Tile(block_n=128, block_k=64, slices=1, stages=4),
        attention=DecodeAttentionConfig(),
    )


def _tiles(rows: int, tile: Tile) -> int:
    return -(-rows // tile.block_n)


def workspace(shape: DecodeShape, plan: DecodePlan, rows: int, batch: int, keys: int) -> Workspace:
    """What the kernels of a step need at most; they run one after another and share it."""
    hidden = max(_tiles(shape.hidden, plan.o), _tiles(shape.hidden, plan.down))
    sums = [
        plan.qkv.splits * shape.qkv_rows * token_block(rows, plan.qkv),
        *(_tiles(shape.hidden, t) * t.block_n * t.splits * token_block(rows, t) for t in (plan.o, plan.down)),
        2 * _tiles(shape.vocab, plan.head) * rows,
        decode_attention_parts(rows, shape.heads, shape.head_dim, keys, plan.attention),
    ]
    tickets = max(shape.heads + 2 * shape.kv_heads, hidden, rows * shape.kv_heads)
    return Workspace(hidden, max(sums), tickets)
