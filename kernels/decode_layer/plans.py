"""Launch shapes of a whole decode step, chosen by the model's shape and the number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kernels.decode_attention.config import DecodeAttentionConfig, decode_attention_parts
from kernels.skinny_linear.tiles import Tile, token_block

if TYPE_CHECKING:
    from kernels.decode_layer.tensors import DecodeShape


@dataclass(frozen=True)
class DecodePlan:
    """Launch shapes of a step's kernels. early: each is launched while the one before it runs (programmatic dependent launch)."""

    qkv: Tile = Tile()
    o: Tile = Tile()
    gate_up: Tile = Tile(block_n=32)
    down: Tile = Tile(splits=4)
    head: Tile = Tile(block_n=32)
    attention: DecodeAttentionConfig = DecodeAttentionConfig()
    early: bool = True


class Workspace(NamedTuple):
    """Sizes of a step's shared workspace."""

    square_rows: int
    part_floats: int
    tickets: int


def choose_plan(shape: DecodeShape, rows: int) -> DecodePlan:
    """The plan that measured best for such sizes."""
    return DecodePlan()


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
