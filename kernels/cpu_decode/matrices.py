"""Products with bf16 weights on a processor that multiplies matrices (AMX), in `emit`'s language: up to 16 rows take as long as one.

A tile register holds 16 lines of 64 bytes. Weights are taken as they lie, 32 inputs of 16 outputs; the rows' inputs are put into pairs, one above the
other, 16 rows beside each other; the sums come out as 16 outputs of 16 rows, and are turned. An output's sum for a row is made in one order, whatever
rows stand beside it: those that are missing are columns of a tile whose numbers nobody reads.
"""

from __future__ import annotations

from kernels.cpu_decode.blocks import BLOCK
from kernels.cpu_decode.emit import I8, I32, I64, LANES, VECTOR, VOID, Code, Number, lanes
from kernels.cpu_decode.numbers import to_bf16

ROWS = 16  # that stand beside each other
_OUTPUTS, _LINE_BYTES, _TILE_BYTES = 16, 64, 1024
_AHEAD_BYTES = 32768  # weights are asked for so much before they are needed
_SUMS, _INPUTS, _WEIGHTS = (0, 1), (2, 3), 4  # registers


def write_matrix_product(c: Code) -> None:
    """`pack_pairs` and `matrix_product`."""
    _write_pack_pairs(c)
    _write_product(c)


def _write_pack_pairs(c: Code) -> None:
    """Rows of float32 [rows, columns] as bf16: for each 16 rows pairs [columns / 2, 16, 2]; those of missing rows stay what they are."""
    with c.function("pack_pairs", [I64] * 5) as (x, x_stride, rows, columns, out), c.loop(0, rows) as row:
        place = out + row // ROWS * columns * (2 * ROWS) + row % ROWS * 4
        with c.loop(0, columns, LANES) as column:
            pairs = to_bf16(c, c.load(x + row * x_stride + column * 4, VECTOR)).to("bitcast", lanes(I32, LANES // 2))
            for pair in range(LANES // 2):
                c.store(pairs.lane(pair), place + column * (_LINE_BYTES // 2) + pair * _LINE_BYTES)


def _write_product(c: Code) -> None:
    """Outputs [0, outputs), whole sixteens, of y = x W^T. w: bf16 [outputs, columns]; x: as `pack_pairs` leaves it."""
    with c.function("matrix_product", [I64] * 7) as (w, outputs, columns, x, rows, y, y_stride):
        shapes, sums = c.room(_LINE_BYTES), c.room(_TILE_BYTES)
        for at, bytes_of in ((0, [1, *[0] * 15]), (16, [_LINE_BYTES, 0] * 8), (32, [0] * 16), (48, [16] * 8 + [0] * 8)):
            for i, value in enumerate(bytes_of):  # eight registers of 16 lines of 64 bytes
                c.store(c.of(I8, value), shapes + (at + i))
        c.intrinsic("llvm.x86.ldtilecfg", VOID, c.pointer(shapes))
        w_stride, blocks, groups = columns * 2, columns // BLOCK, (rows + (ROWS - 1)) // ROWS

        def tiles(output: Number, group: Number, count: int) -> None:
            """16 outputs of so many times 16 rows."""
            own_w, own_x = w + output * w_stride, [x + (group + i) * columns * (2 * ROWS) for i in range(count)]
            for i in range(count):
                c.intrinsic("llvm.x86.tilezero", VOID, c.of(I8, _SUMS[i]))
            with c.loop(0, blocks) as block:
                for line in range(_OUTPUTS):  # the memory behind is asked for in its own order
                    c.prefetch(own_w + block * _TILE_BYTES + (_AHEAD_BYTES + _LINE_BYTES * line))
                _load_tile(c, _WEIGHTS, own_w + block * _LINE_BYTES, w_stride)
                for i in range(count):
                    _load_tile(c, _INPUTS[i], own_x[i] + block * _TILE_BYTES, c.of(I64, _LINE_BYTES))
                    c.intrinsic("llvm.x86.tdpbf16ps", VOID, *(c.of(I8, tile) for tile in (_SUMS[i], _WEIGHTS, _INPUTS[i])))
            for i in range(count):
                first = (group + i) * ROWS
                c.intrinsic("llvm.x86.tilestored64", VOID, c.of(I8, _SUMS[i]), c.pointer(sums), c.of(I64, _LINE_BYTES))
                _store_turned(c, sums, y + first * y_stride + output * 4, y_stride, rows - first)

        with c.loop(0, outputs, _OUTPUTS) as output:
            both = groups // 2 * 2
            with c.loop(0, both, 2) as group:
                tiles(output, group, 2)
            with c.when(both.compare("<", groups)):
                tiles(output, both, 1)
        c.intrinsic("llvm.x86.tilerelease", VOID)


def _load_tile(c: Code, tile: int, address: Number, stride: Number) -> None:
    c.intrinsic("llvm.x86.tileloadd64", VOID, c.of(I8, tile), c.pointer(address), stride)


def _store_turned(c: Code, sums: Number, y: Number, y_stride: Number, rows: Number) -> None:
    """Sums [16 outputs, 16 rows] to as many rows of y as there are, 16 outputs each."""
    vectors = [c.load(sums + _LINE_BYTES * i, VECTOR) for i in range(_OUTPUTS)]
    halves = [[lane + half for pair in range(LANES // 2) for lane in (pair, LANES + pair)] for half in (0, LANES // 2)]
    for _ in range(4):  # each time those 8 apart are put between each other: four times turn the square
        vectors = [vectors[i].take(half, vectors[i + 8]) for i in range(8) for half in halves]
    c.store(vectors[0], y)
    for row in range(1, ROWS):
        with c.when(rows.compare(">", row)):
            c.store(vectors[row], y + y_stride * row)
