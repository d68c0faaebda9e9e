"""Launch shapes of a whole decode step, chosen by the model's shape and the number of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from kernels.decode_attention.config import DecodeAttentionConfig, decode_attention_parts
from kernels.skinny_linear.tiles import Tile, next_power_of_2, token_block


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

    early: each is launched while the one before it runs (programmatic dependent launch). in_pieces: every layer's first norm is taken from the
    residual stream anew, so that layers run in pieces (an early exit, and what goes on from it) give the same bits as in one.
    """

    qkv: Tile
    o: Tile
    gate_up: Tile
    down: Tile
    head: Tile
    attention: DecodeAttentionConfig
    early: bool = True
    in_pieces: bool = False


class Workspace(NamedTuple):
    """Sizes of a step's shared workspace."""

    square_rows: int
    part_floats: int
    tickets: int


MOST_SKINNY = 8  # rows that fill the narrow side of one matrix instruction
_CHANNELS = 32_768  # of all programs of an attention together, at which a device is full
_ALONE = 192  # (request, KV head) pairs that fill a device with a program each
NARROW = 1024  # hidden sizes below it have too few channels to give every multiprocessor a wide tile


def choose_plan(shape: DecodeShape, rows: int, *, batch: int | None = None, deterministic: bool = False) -> DecodePlan:
    """The plan that measured best on an H200 at that many rows (`scripts/bench/decode_tune.py`), for the 1.5B shape (28 layers, hidden 1,536) and for
    SmolLM2-135M's (30 layers, hidden 576).

    batch: requests the rows belong to (default: one each). deterministic: one plan for every number of rows up to 8, and attention a token at a
    time, so that a token's result is the same bits alone, in a batch, in a block, and through layers in pieces. A single row's own plan is faster:
    it uses no matrix instructions, and most of its kernels have all their weights in registers before the kernel before them ends.

    Raises:
        ValueError: deterministic, and more than 8 rows.
    """
    if deterministic and rows > MOST_SKINNY:
        raise ValueError(f"a deterministic decode step takes up to {MOST_SKINNY} rows, not {rows} (split the batch)")
    narrow = shape.hidden < NARROW
    units = (rows if batch is None else batch) * shape.kv_heads
    attention = spread_attention(units, shape.head_dim)
    widest = max((n for n in (16, 8, 4) if shape.head_dim % n == 0), default=2)
    if rows == 1 and not deterministic:
        few = Tile(block_n=min(4, widest), block_k=512, slices=1, stages=3, scalar=True, held=3)
        return DecodePlan(
            qkv=few,
            o=few,
            gate_up=replace(few, block_n=8, stages=4, held=0),
            down=replace(few, block_k=1024, splits=2, held=2),
            head=Tile(block_n=64, block_k=128, slices=1, stages=5),
            attention=attention,
        )
    if rows <= MOST_SKINNY:
        skinny = Tile(block_n=16, block_k=128, slices=4, stages=3, lines=8)
        short = Tile(block_n=16, block_k=64, slices=4, lines=8)
        return DecodePlan(
            qkv=replace(short, block_n=widest, stages=5),
            o=skinny,
            gate_up=replace(short, stages=5) if narrow else short,
            down=replace(skinny, splits=2) if narrow else replace(skinny, splits=2, stages=5, held=1),
            head=Tile(block_n=64, block_k=128, slices=1, stages=5),
            attention=DecodeAttentionConfig(whole_block=False) if deterministic else attention,
            in_pieces=deterministic,
        )
    many = min(64, shape.head_dim & -shape.head_dim)  # a power of two that divides a head
    if units >= _ALONE:
        attention = DecodeAttentionConfig(split=4096, stages=3)
    if rows <= 64:
        deep = 128 if rows <= 32 else 64
        return DecodePlan(
            qkv=Tile(block_n=many, block_k=deep, slices=1, splits=1 if rows <= 32 else 4, warps=4 if rows <= 32 else 8, lines=8),
            o=Tile(block_n=64, block_k=128, slices=1, splits=4, lines=8),
            gate_up=Tile(block_n=128 if rows <= 32 else 64, block_k=64, slices=1, lines=8),
            down=Tile(block_n=32, block_k=deep, slices=1, splits=3, lines=8)
            if narrow
            else Tile(block_n=64, block_k=128, slices=1, splits=5),
            head=Tile(block_n=128, block_k=64, slices=1),
            attention=attention,
        )
    # Results of 128 rows by 128 channels need eight warps; three stages let several programs share a multiprocessor.
    full = Tile(block_n=128, block_k=64, slices=1, warps=8, stages=3, lines=8)
    return DecodePlan(
        qkv=replace(full, block_n=many, stages=4),
        o=replace(full, block_n=64, splits=2, warps=4) if narrow else replace(full, block_n=64, splits=4, stages=4),
        gate_up=replace(full, block_n=64, warps=8 if narrow else 4),
        down=Tile(block_n=32 if narrow else 64, block_k=64, slices=1, splits=3 if narrow else 7, lines=8),
        head=full,
        attention=attention,
    )


def spread_attention(units: int, head_dim: int) -> DecodeAttentionConfig:
    """For so many (request, KV head) pairs: enough programs to fill the device, and no more, as each costs its start even if it has no keys."""
    programs = next_power_of_2(-(-_CHANNELS // (head_dim * units)))
    return DecodeAttentionConfig(programs=min(64, max(4, programs)), spread=True)


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
