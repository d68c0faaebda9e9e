"""The decode step on a CPU, written in `emit`'s language: a few new tokens through the layers and the head, in float32 beside the weights as stored.

A token's result is the same bits whatever tokens stand beside it: each output is a sum of its own in one order, of 16 lanes that run over a row's
weights and are added up in a tree. How many rows or outputs are computed together changes no bit.

Products with bf16 weights, and of queries with keys, round their inputs to bf16 where the processor multiplies pairs of them (AVX512-bf16), as its
libraries do, or matrices of them (`matrices`); those with `tiles` round them to 8 bits; all other products take float32. Axes as in `step`. All
arguments are int64 (addresses, sizes) but `eps` and `scale`, float32.
"""

from __future__ import annotations

from typing import Any

from kernels.cpu_decode.arguments import ARGUMENTS
from kernels.cpu_decode.attention import write_attention
from kernels.cpu_decode.blocks import BF16, BLOCK, BLOCK_BYTES, NAMES, Q4_0, Q8_0
from kernels.cpu_decode.coding import write_coding
from kernels.cpu_decode.drafting import write_drafting
from kernels.cpu_decode.emit import F16, F32, I8, I32, I64, LANES, VECTOR, Code, Number, Variable, argument_types, lanes
from kernels.cpu_decode.matrices import write_matrix_product
from kernels.cpu_decode.meeting import write_meeting
from kernels.cpu_decode.numbers import exponential, load_bf16, rounded, to_bf16
from kernels.cpu_decode.prefill import write_prefill
from kernels.cpu_decode.tiles import (
    BYTE_CODES,
    GROUP,
    GROUP_BYTES,
    HALVES,
    HEAD_BYTES,
    LEAST,
    MOST_8,
    MOST_16,
    OF_FILES,
    OUTPUTS,
    TILE_FORMATS,
    ZERO,
)
from kernels.cpu_decode.tiling import write_tiling

FORMATS = (BF16, *NAMES.values())
MOST_TOGETHER = 4  # rows whose sums run side by side for one output
# (rows, outputs) whose sums run side by side, for as many rows and for more: 24 sums multiply about as fast as memory gives weights, and fewer rows
# are filled up to that, as a loop that overtakes what it asked for is slower
FEW, MORE = (6, 4), (8, 3)
# weights are asked for so much before they are needed: a row's own for one output, and those behind several, into the second cache
AHEAD_BYTES, FAR_AHEAD_BYTES = 4096, 16384
TILES_TOGETHER = 4  # rows whose sums over a tile run side by side


def write_program(*, pairs: bool, quads: bool, matrices: bool, gives_way: bool) -> Any:
    """The module. pairs: the processor multiplies pairs of bf16; quads: it multiplies and adds four bytes (AVX512-VNNI); matrices: it multiplies
    matrices of bf16 (AMX), too. gives_way: see `meeting`."""
    c = Code()
    write_meeting(c, gives_way=gives_way)
    for kind in FORMATS:
        _write_product(c, kind, pairs and kind == BF16)
    _write_key_product(c, pairs)
    _write_pack(c)
    for wide in (False, True):
        _write_pack_codes(c, wide)
    for kind in TILE_FORMATS:
        _write_tile_product(c, kind, quads)
    if matrices:
        write_matrix_product(c)
    _write_any_product(c, pairs, matrices)
    _write_attend(c, pairs)
    _write_layers(c)
    _write_entries(c)
    write_coding(c)
    write_drafting(c)
    write_prefill(c)
    write_attention(c, pairs)
    write_tiling(c)
    return c.module


# --- numbers ---------------------------------------------------------------------------------------------------------------


def _half(c: Code, address: Number) -> Number:
    """A float16 in memory, in every lane as float32."""
    return c.load(address, F16).to("fpext", F32).spread()


def _unpack(c: Code, kind: int, address: Number) -> tuple[Number, Number]:
    """A block's weights: its first 16 and its last 16."""
    if kind == BF16:
        return load_bf16(c, address), load_bf16(c, address + 32)
    scale = _half(c, address)
    if kind == Q8_0:
        low, high = (c.load(address + at, lanes(I8)).to("sitofp", VECTOR) for at in (2, 18))
        return low * scale, high * scale
    codes = c.load(address + (2 if kind == Q4_0 else 4), lanes(I8)).to("zext", lanes(I32))
    low, high = codes & 15, codes >> 4
    if kind == Q4_0:
        return (low - 8).to("sitofp", VECTOR) * scale, (high - 8).to("sitofp", VECTOR) * scale
    least = _half(c, address + 2)
    return low.to("sitofp", VECTOR) * scale + least, high.to("sitofp", VECTOR) * scale + least


# --- products --------------------------------------------------------------------------------------------------------------


def _write_product(c: Code, kind: int, pairs: bool) -> None:
    """Outputs [first, last) of y = x W^T for one format; each weight comes from memory once, whatever the rows.

    x: bf16 rows of pairs for products of pairs, float32 otherwise.
    """
    with c.function(f"product_{kind}", [I64] * 10) as arguments:
        w, w_stride, first, last, x, x_stride, rows, y, y_stride, blocks = arguments

        def dots(output: Number, outputs: int, row: Number, count: int, some: Number | None = None) -> None:
            own, into = w + output * w_stride, y + output * 4 + row * y_stride
            _dots(c, kind, pairs, outputs, count, some, own, w_stride, x + row * x_stride, x_stride, into, y_stride, blocks)

        def one_by_one(start: Number, together: int) -> None:
            with c.loop(start, last) as output:
                whole = rows // together * together
                with c.loop(0, whole, together) as row:
                    dots(output, 1, row, together)
                for count in range(1, together):
                    with c.when((rows - whole).compare("==", count)):
                        dots(output, 1, whole, count)

        if not pairs:
            one_by_one(first, MOST_TOGETHER)
            return
        with c.when(rows.compare("==", 1)):  # waits for memory, which comes fastest in one stream
            one_by_one(first, 1)
        more = rows.compare(">", FEW[0]).choose(rows, c.of(I64, MORE[0] + 1)).compare("<=", MORE[0])
        for (most, outputs), chosen in ((FEW, more.choose(c.of(I64, 1), rows).compare(">", 1)), (MORE, more)):
            with c.when(chosen):
                # a tile stores four sums: of three outputs, one at least is left to be written after it
                middle = first + (last - first - int(outputs < 4)) // outputs * outputs
                groups = (rows + (most - 1)) // most
                with c.loop(first, middle, outputs) as output, c.loop(0, groups) as number:
                    start = rows * number // groups
                    dots(output, outputs, start, most, rows * (number + 1) // groups - start)
                one_by_one(middle, 1)


def _write_key_product(c: Code, pairs: bool) -> None:
    """`product` of queries with keys: few numbers each, which lie apart as other heads' are between them, and often in a cache."""
    outputs = 4 if pairs else 1
    with c.function("product_keys", [I64] * 9) as (w, w_stride, last, x, x_stride, rows, y, y_stride, blocks):

        def rows_of(start: Number, outputs: int) -> None:
            whole = rows // MOST_TOGETHER * MOST_TOGETHER

            def dots(row: Number, count: int) -> None:
                own, into, at = w + start * w_stride, y + start * 4 + row * y_stride, x + row * x_stride
                _dots(c, BF16, pairs, outputs, count, None, own, w_stride, at, x_stride, into, y_stride, blocks, apart=True)

            with c.loop(0, whole, MOST_TOGETHER) as row:
                dots(row, MOST_TOGETHER)
            for count in range(1, MOST_TOGETHER):
                with c.when((rows - whole).compare("==", count)):
                    dots(whole, count)

        middle = last // outputs * outputs
        with c.loop(0, middle, outputs) as output:
            rows_of(output, outputs)
        if outputs > 1:
            with c.loop(middle, last) as output:
                rows_of(output, 1)


def _dots(
    c: Code, kind: int, pairs: bool, outputs: int, count: int, some: Number | None,
    w: Number, w_stride: Number, x: Number, x_stride: Number, y: Number, y_stride: Number, blocks: Number, *, apart: bool = False,
) -> None:  # fmt: skip
    """y[r, o] = sum over k of w[o, k] x[r, k] for `count` rows, or the first `some` of them, and so many outputs; of three a fourth is written."""
    parts = 1 if pairs else 2
    sums = [[[Variable(c, c.of(VECTOR, 0.0)) for _ in range(parts)] for _ in range(outputs)] for _ in range(count)]
    weights = [w + w_stride * o for o in range(outputs)]
    inputs = [x + x_stride * (r if some is None else (some - 1).at_most(r)) for r in range(count)]
    with c.loop(0, blocks) as block:
        at, x_at = block * BLOCK_BYTES[kind], block * (2 * BLOCK if pairs else 4 * BLOCK)
        taken: list[tuple[Number, ...]] = []
        for weight in weights:
            if apart:
                c.prefetch(weight + at + w_stride * (2 * outputs))
            else:  # of several outputs at once the memory behind them all is asked for in its own order
                c.prefetch(weight + at + AHEAD_BYTES if outputs == 1 else w + at * outputs + (2 * BLOCK * len(taken) + FAR_AHEAD_BYTES))
            taken.append((c.load(weight + at, lanes(I32)),) if pairs else _unpack(c, kind, weight + at))
        for r, row in enumerate(inputs):
            for part in range(parts):
                own = c.load(row + x_at + 4 * LANES * part, lanes(I32) if pairs else VECTOR)
                for o in range(outputs):
                    total = sums[r][o][part]
                    total.set(_multiply_pairs(c, taken[o][part], own, total.get()) if pairs else c.fma(taken[o][part], own, total.get()))
    for r in range(count):

        def write(r: int = r) -> None:
            found = [total[0].get() if pairs else total[0].get() + total[1].get() for total in sums[r]]
            c.store(found[0].total() if outputs == 1 else _totals((found + found[:1])[:4]), y + y_stride * r)

        if some is None or not r:
            write()
        else:
            with c.when(some.compare(">", r)):
                write()


def _multiply_pairs(c: Code, x: Number, y: Number, total: Number) -> Number:
    """Each lane's total plus the product of two pairs of bf16."""
    return c.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, total, x, y)


def _totals(vectors: list[Number]) -> Number:
    """`Number.total` of four vectors, in four lanes: the same sums, side by side."""

    def halves(x: Number, y: Number, width: int) -> Number:
        """Of vectors that hold parts of 2 `width` lanes: their halves added up, x's parts before y's."""
        count = 2 * LANES // (2 * width)
        low = [2 * width * part + lane for part in range(count) for lane in range(width)]
        return x.take(low, y) + x.take([at + width for at in low], y)

    pairs = halves(vectors[0], vectors[1], 8), halves(vectors[2], vectors[3], 8)
    parts = halves(pairs[0], pairs[1], 4)  # 4 lanes of each
    for width in (2, 1):
        low = [2 * width * part + lane for part in range(4) for lane in range(width)]
        parts = parts.take(low) + parts.take([at + width for at in low])
    return parts


def _write_pack(c: Code) -> None:
    """Rows of float32 [rows, columns] as bf16, one after the other."""
    with c.function("pack", [I64] * 5) as (x, x_stride, rows, columns, out), c.loop(0, rows) as row, c.loop(0, columns, LANES) as column:
        c.store(to_bf16(c, c.load(x + row * x_stride + column * 4, VECTOR)), out + (row * columns + column) * 2)


def _row_bytes(columns: Number, wide: bool) -> Number:
    """Of a row that `pack_8` or `pack_16` leaves."""
    return columns * (2 if wide else 1) + columns // GROUP * (12 if wide else 8)


def _write_pack_codes(c: Code, wide: bool) -> None:
    """Rows of float32 [rows, columns] for products with tiles, of 16 or 8 bits: int8 codes (wide: of the upper bytes, and then of the lower ones), and
    for each group its scale float32 and the sum of its numbers int32, or of the first 16 and of the others."""
    limit = MOST_16 if wide else MOST_8
    with (
        c.function("pack_16" if wide else "pack_8", [I64] * 5) as (x, x_stride, rows, columns, out),
        c.loop(0, rows) as row,
        c.loop(0, columns // GROUP) as group,
    ):
        numbers = [c.load(x + row * x_stride + group * (4 * GROUP) + 4 * LANES * part, VECTOR) for part in range(2)]
        # bits without a sign are in the numbers' order, and above infinity's are those of NaN, which no comparison of numbers would keep
        most = numbers[0].magnitude().bits().at_least(numbers[1].magnitude().bits())
        for width in (8, 4, 2, 1):
            most = most.take(range(width)).at_least(most.take(range(width, 2 * width)))
        scale = most.lane(0).to("bitcast", F32) * (1 / limit)
        share = (1.0 / scale.at_least(1e-30)).spread()
        own, sums = out + row * _row_bytes(columns, wide), list[Number]()
        for part, own_numbers in enumerate(numbers):
            nearest = c.intrinsic(f"llvm.rint.v{LANES}f32", VECTOR, own_numbers * share)
            codes = c.intrinsic(f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", lanes(I32), nearest).at_least(-limit).at_most(limit)
            place = own + group * GROUP + LANES * part
            sums.append(codes)
            if wide:
                low = (codes << 24).arithmetic_shift(24)  # with its sign
                c.store(low.to("trunc", lanes(I8)), place + columns)
                codes = (codes - low).arithmetic_shift(8)
            c.store(codes.to("trunc", lanes(I8)), place)
        told = own + columns * (2 if wide else 1) + group * (12 if wide else 8)
        c.store(scale, told)
        for number, some in enumerate(sums if wide else [sums[0] + sums[1]]):
            c.store(some.total(), told + 4 + 4 * number)


def _write_tile_product(c: Code, kind: int, quads: bool) -> None:
    """y = x W^T for weights in tiles. x: rows as `pack_8` or, of a file's weights, `pack_16` leaves them, x_stride bytes apart. A row's result does not
    depend on the others."""
    size, head, wide = GROUP_BYTES[kind], HEAD_BYTES[kind], kind in OF_FILES
    with c.function(f"tiles_{kind}", [I64] * 8) as (w, outputs, x, x_stride, rows, y, y_stride, groups):

        def sums(output: Number, row: Number, count: int) -> None:
            tile, inputs = w + output // OUTPUTS * groups * size, [x + (row + r) * x_stride for r in range(count)]
            totals = [Variable(c, c.of(VECTOR, 0.0)) for _ in range(count)]
            with c.loop(0, groups) as group:
                own = tile + group * size
                heads = [c.load(own + at, lanes(F16)).to("fpext", VECTOR) for at in range(0, head, 2 * OUTPUTS)]
                codes, parts = own + head, 2 if kind in HALVES else 1  # of a group, each with a scale
                weights: list[Number] = []
                for at in range(0, size - head, 4 * LANES):
                    c.prefetch(codes + at + FAR_AHEAD_BYTES)
                    weights.append(c.load(codes + at, lanes(I32)))
                if kind not in BYTE_CODES:
                    weights = [both & 0x0F0F0F0F for both in (*weights, *(both >> 4 for both in weights))]
                for total, own_x in zip(totals, inputs, strict=True):
                    told = own_x + groups * (GROUP * (2 if wide else 1)) + group * (12 if wide else 8)
                    share, sums_of = c.load(told, F32).spread(), [c.load(told + 4 + 4 * n, I32) for n in range(2 if wide else 1)]
                    if parts < len(sums_of):
                        sums_of = [sums_of[0] + sums_of[1]]
                    place, count_of = own_x + group * GROUP, len(weights) // parts
                    for part, (scale, codes_sum) in enumerate(zip(heads, sums_of, strict=False)):
                        found, upper = (codes_sum * -ZERO[kind]).spread(), c.of(lanes(I32), 0)
                        for q in range(part * count_of, (part + 1) * count_of):
                            if wide:
                                upper = _multiply_quads(c, quads, weights[q], c.load(place + 4 * q, I32).spread(), upper)
                            lower = place + groups * GROUP if wide else place
                            found = _multiply_quads(c, quads, weights[q], c.load(lower + 4 * q, I32).spread(), found)
                        found = found + (upper << 8) if wide else found
                        total.set(c.fma(found.to("sitofp", VECTOR), scale * share, total.get()))
                    if kind in LEAST:
                        total.set(c.fma(sums_of[0].to("sitofp", F32).spread() * share, heads[1], total.get()))
            for r, total in enumerate(totals):
                c.store(total.get(), y + (row + r) * y_stride + output * 4)

        with c.loop(0, outputs, OUTPUTS) as output:
            whole = rows // TILES_TOGETHER * TILES_TOGETHER
            with c.loop(0, whole, TILES_TOGETHER) as row:
                sums(output, row, TILES_TOGETHER)
            # what is left as two and one: three at once would be a fourth body to compile for each format
            with c.when((rows % TILES_TOGETHER).compare(">=", 2)):
                sums(output, whole, 2)
            with c.when((rows % 2).compare("==", 1)):
                sums(output, rows - 1, 1)


def _unpack_group(c: Code, kind: int, address: Number, out: Number, stride: Number) -> None:
    """Weights of a group of a tile, bf16 [16, 32] in rows `stride` bytes apart."""
    heads = [c.load(address + at, lanes(F16)).to("fpext", VECTOR) for at in range(0, HEAD_BYTES[kind], 2 * OUTPUTS)]
    least, words = heads[1] if kind in LEAST else c.of(VECTOR, 0.0), (GROUP_BYTES[kind] - HEAD_BYTES[kind]) // (4 * LANES)
    with c.loop(0, words) as q:  # unrolled, this would take a second to compile
        word, scale = c.load(address + HEAD_BYTES[kind] + q * (4 * LANES), lanes(I32)), heads[0]
        if kind in HALVES:
            scale = c.load(address + q // (words // 2) * (2 * OUTPUTS), lanes(F16)).to("fpext", VECTOR)
        for shift in (0,) if kind in BYTE_CODES else (0, 4):
            codes = [(word >> 8 * byte + shift) & (255 if kind in BYTE_CODES else 15) for byte in range(4)]
            numbers = [c.fma((own - ZERO[kind]).to("sitofp", VECTOR), scale, least) for own in codes]
            bits = [to_bf16(c, own).to("zext", lanes(I32)) for own in numbers]
            pairs = bits[0] + (bits[1] << 16), bits[2] + (bits[3] << 16)
            for lane in range(LANES):
                for number, pair in enumerate(pairs):
                    c.store(pair.lane(lane), out + stride * lane + q * 8 + (GROUP if shift else 0) + 4 * number)


def _multiply_quads(c: Code, quads: bool, codes: Number, x: Number, total: Number) -> Number:
    """Each lane's total plus the product of four codes without a sign and four with one."""
    if quads:
        return c.intrinsic("llvm.x86.avx512.vpdpbusd.512", lanes(I32), total, codes, x)
    for byte in range(4):
        signed = (x << 24 - 8 * byte).to("bitcast", lanes(I32)).arithmetic_shift(24)
        total = total + ((codes >> 8 * byte) & 255) * signed
    return total


def _write_any_product(c: Code, pairs: bool, matrices: bool) -> None:
    """Outputs [start, outputs) of a product with weights of a format known at run time, start a multiple of 16. packed: workspace, bf16 [rows, columns]
    for whole sixteens of rows.

    Where the processor multiplies matrices, outputs beyond the last whole sixteen alone are multiplied in pairs.
    """
    with c.function("product", [I64] * 11) as (kind, w, start, outputs, columns, x, x_stride, rows, packed, y, y_stride):
        for form in FORMATS:
            with c.when(kind.compare("==", form)):
                own, stride, first = x, x_stride, start
                if matrices and form == BF16:
                    whole = (outputs - start) // LANES * LANES
                    first = start + whole
                    c.call("pack_pairs", x, x_stride, rows, columns, packed)
                    c.call("matrix_product", w + start * columns * 2, whole, columns, packed, rows, y + start * 4, y_stride)
                with c.when(first.compare("<", outputs)):
                    if pairs and form == BF16:
                        c.call("pack", x, x_stride, rows, columns, packed)
                        own, stride = packed, columns * 2
                    w_stride = columns // BLOCK * BLOCK_BYTES[form]
                    c.call(f"product_{form}", w, w_stride, first, outputs, own, stride, rows, y, y_stride, columns // BLOCK)
        for form in TILE_FORMATS:
            with c.when(kind.compare("==", form)):
                wide, groups = form in OF_FILES, columns // GROUP
                c.call("pack_16" if wide else "pack_8", x, x_stride, rows, columns, packed)
                own = w + start // OUTPUTS * groups * GROUP_BYTES[form]
                c.call(f"tiles_{form}", own, outputs - start, packed, _row_bytes(columns, wide), rows, y + start * 4, y_stride, groups)


# --- layers ----------------------------------------------------------------------------------------------------------------


def _rms(c: Code, x: Number, width: Number, eps: Number) -> Number:
    """1 / sqrt(mean of squares + eps) of numbers at x, in every lane."""
    squares = Variable(c, c.of(VECTOR, 0.0))
    with c.loop(0, width, LANES) as at:
        own = c.load(x + at * 4, VECTOR)
        squares.set(c.fma(own, own, squares.get()))
    mean = squares.get().total() / width.to("sitofp", F32)
    return (1.0 / c.intrinsic("llvm.sqrt.f32", F32, mean + eps)).spread()


def _norm(c: Code, x: Number, width: Number, weight: Number, eps: Number, out: Number) -> None:
    """RMS norm of one row."""
    factor = _rms(c, x, width, eps)
    with c.loop(0, width, LANES) as at:
        c.store(c.load(x + at * 4, VECTOR) * factor * c.load(weight + at * 4, VECTOR), out + at * 4)


def _turn(c: Code, x: Number, d: Number, cos: Number, sin: Number) -> None:
    """Rotate one head in place by angles [d/2]."""
    half = d // 2
    with c.loop(0, half, LANES) as at:
        low, high = x + at * 4, x + (at + half) * 4
        a, b, own_cos, own_sin = (c.load(address, VECTOR) for address in (low, high, cos + at * 4, sin + at * 4))
        c.store(a * own_cos - b * own_sin, low)
        c.store(b * own_cos + a * own_sin, high)


def _write(c: Code, x: Number, count: Number, out: Number) -> None:
    """Float32 numbers as bf16."""
    with c.loop(0, count, LANES) as at:
        c.store(to_bf16(c, c.load(x + at * 4, VECTOR)), out + at * 2)


def _part(count: Number, unit: int, part: Number, parts: Number) -> tuple[Number, Number]:
    """A part's share of `count` things, whole `unit`s of them, and the last part's with what is left."""
    units = count // unit
    end = (part + 1).compare("==", parts).choose(count, units * (part + 1) // parts * unit)
    return units * part // parts * unit, end


def _add(c: Code, stream: Number, rows: Number, width: Number, columns: tuple[Number, Number], update: Number, bias: Number | None) -> None:
    """Add columns of an update [N, E], and of a bias [E] where there is one, to the residual stream [N, E], which keeps what bf16 holds."""
    with c.loop(0, rows) as row, c.loop(*columns, LANES) as column:
        at = (row * width + column) * 4
        added = Variable(c, c.load(update + at, VECTOR))
        if bias is not None:
            with c.when(bias.compare("!=", 0)):
                added.set(added.get() + c.load(bias + column * 4, VECTOR))
        c.store(rounded(c, c.load(stream + at, VECTOR) + added.get()), stream + at)


def _softmax(c: Code, scores: Number, count: Number, scale: Number) -> Number:
    """Scores to e^(scale (score - greatest)), in place; up to 15 numbers behind them are overwritten. Returns the sum, in every lane."""
    with c.loop(count, (count + (LANES - 1)) // LANES * LANES) as at:
        c.store(c.of(F32, float("-inf")), scores + at * 4)
    most = Variable(c, c.of(VECTOR, float("-inf")))
    with c.loop(0, count, LANES) as at:
        most.set(most.get().at_least(c.load(scores + at * 4, VECTOR)))
    greatest = most.get()
    for width in (8, 4, 2, 1):
        greatest = greatest.take(range(width)).at_least(greatest.take(range(width, 2 * width)))
    own_scale = scale.spread()
    top = greatest.lane(0).spread() * own_scale
    sums = Variable(c, c.of(VECTOR, 0.0))
    with c.loop(0, count, LANES) as at:
        shares = exponential(c, c.load(scores + at * 4, VECTOR) * own_scale - top)
        sums.set(sums.get() + shares)
        c.store(shares, scores + at * 4)
    return sums.get().total().spread()


def _weighted(c: Code, parts: int, v: Number, v_stride: Number, p: Number, count: Number | int, out: Number) -> None:
    """out[16 parts] += sum over i < count of p[i] v[i]; v: rows of bf16, p and out float32."""
    sums = [Variable(c, c.load(out + 64 * part, VECTOR)) for part in range(parts)]
    with c.loop(0, count) as i:
        weight, row = c.load(p + i * 4, F32).spread(), v + i * v_stride
        for part, own in enumerate(sums):
            own.set(c.fma(load_bf16(c, row + 32 * part), weight, own.get()))
    for part, own in enumerate(sums):
        c.store(own.get(), out + 64 * part)


def _write_attend(c: Code, pairs: bool) -> None:
    """One row's heads of one KV head: q [group, d] over places [0, position) and its `own` place -> out [group, d].

    keys, values: the KV head's numbers in place 0 of page 0, places row_bytes apart. scores [group, score_width]: workspace of at least position + 16
    places. packed: workspace, bf16 [group, d].
    """
    names = [I64] * 14 + [F32]
    with c.function("attend", names) as arguments:
        (q, group, d, keys, values, row_bytes, page_size, pages, position, own, scores, score_width, packed, out, scale) = arguments
        x, x_stride, blocks, s_stride = q, d * 4, d // BLOCK, score_width * 4
        if pairs:
            c.call("pack", q, d * 4, group, d, packed)
            x, x_stride = packed, d * 2

        def page(number: Number) -> Number:
            return c.load(pages + number * 8)

        at = (page(own // page_size) * page_size + own % page_size) * row_bytes
        for_pages = (position + page_size - 1) // page_size
        with c.loop(0, for_pages) as number:
            start = number * page_size
            count, base = (position - start).at_most(page_size), keys + page(number) * page_size * row_bytes
            c.call("product_keys", base, row_bytes, count, x, x_stride, group, scores + start * 4, s_stride, blocks)
        # the place's key alone, as its neighbours may lie outside of the pool
        c.call("product_keys", keys + at, row_bytes, 1, x, x_stride, group, scores + position * 4, s_stride, blocks)
        with c.loop(0, group) as head:
            own_scores, own_out = scores + head * s_stride, out + head * d * 4
            total = _softmax(c, own_scores, position + 1, scale)
            with c.loop(0, d, LANES) as column:
                c.store(c.of(VECTOR, 0.0), own_out + column * 4)

            def columns(start: Number, parts: int, own_scores: Number = own_scores, own_out: Number = own_out) -> None:
                into, column = own_out + start * 4, values + start * 2
                with c.loop(0, for_pages) as number:
                    first = number * page_size
                    count, base = (position - first).at_most(page_size), column + page(number) * page_size * row_bytes
                    _weighted(c, parts, base, row_bytes, own_scores + first * 4, count, into)
                _weighted(c, parts, column + at, row_bytes, own_scores + position * 4, 1, into)

            whole = d // 64 * 64
            with c.loop(0, whole, 64) as start:
                columns(start, 4)
            with c.when(whole.compare("<", d)):
                columns(whole, 2)
            with c.loop(0, d, LANES) as column:
                c.store(c.load(own_out + column * 4, VECTOR) / total, own_out + column * 4)


def _write_layers(c: Code) -> None:
    """Layers [first, last) over the residual stream [N, E], in place; see `step.CompiledLayers.run`.

    addresses, kinds int64 [L, 4]: of qkv, o, gate_up, down. norms [L, 2, E]; qkv_bias, o_bias, qk_norm [L, ...]: address 0 where there are none.
    pool int64 [L, 2]: addresses of keys and values, bf16 [P, S, G, d]. requests int64 [N]: rows of tables int64 [B, table_width].
    normed [N, E], wide [N, wide_width >= max(qkv rows, 2 I)], attended [N, H d], scores [H / G, score_width >= places + 16],
    packed bf16 [N, max(E, H d, I)], for whole sixteens of rows: workspace.
    part, parts, counter: one of so many threads that run the same layers over the same stream at the same time, each with a share of every product's
    outputs and of the KV heads, and with a normed, scores and packed of its own; they meet at `counter`. No sum is made in another order.
    """
    with c.function("run_layers", argument_types("run_layers"), exported=True) as arguments:
        a = dict(zip(ARGUMENTS["run_layers"], arguments, strict=True))
        stream, rows, width, wide, normed, attended = (a[name] for name in ("stream", "rows", "width", "wide", "normed", "attended"))
        heads, kv_heads, d, inner, eps, packed = (a[name] for name in ("heads", "kv_heads", "head_dim", "inner", "eps", "packed"))
        group, qkv_rows, y_stride = heads // kv_heads, (heads + kv_heads * 2) * d, a["wide_width"] * 4
        row_bytes = kv_heads * d * 2
        part, parts = a["part"], a["parts"]
        own_rows, own_columns, own_inner = (_part(count, LANES, part, parts) for count in (qkv_rows, width, inner))
        first_head, last_head = _part(kv_heads, 1, part, parts)

        def meet() -> None:
            c.call("meet", a["counter"], parts)

        with c.loop(a["first"], a["last"]) as layer:

            def product(
                number: int, outputs: tuple[Number, Number], columns: Number, x: Number, x_stride: Number, y: Number, stride: Number
            ) -> None:
                at = (layer * 4 + number) * 8
                kind, w = c.load(a["kinds"] + at), c.load(a["addresses"] + at)
                c.call("product", kind, w, *outputs, columns, x, x_stride, rows, packed, y, stride)

            def normalise(number: int) -> None:
                weight = a["norms"] + (layer * 2 + number) * width * 4
                with c.loop(0, rows) as row:
                    _norm(c, stream + row * width * 4, width, weight, eps, normed + row * width * 4)

            def of_layer(name: str, count: Number) -> Number:
                return a[name].compare("!=", 0).choose(a[name] + layer * count * 4, a[name])

            keys, values = (c.load(a["pool"] + (layer * 2 + number) * 8) for number in (0, 1))
            qkv_bias, o_bias, qk_norm = of_layer("qkv_bias", qkv_rows), of_layer("o_bias", width), of_layer("qk_norm", d * 2)
            normalise(0)
            product(0, own_rows, width, normed, width * 4, wide, y_stride)
            meet()
            with c.loop(0, rows) as row, c.loop(first_head, last_head) as g:
                own, angle = wide + row * y_stride, row * (d // 2) * 4

                def biased(start: Number, count: Number, own: Number = own, qkv_bias: Number = qkv_bias) -> None:
                    with c.when(qkv_bias.compare("!=", 0)), c.loop(start * d, (start + count) * d, LANES) as at:
                        c.store(c.load(own + at * 4, VECTOR) + c.load(qkv_bias + at * 4, VECTOR), own + at * 4)

                def turned(head: Number, weight: Number, own: Number = own, angle: Number = angle) -> None:
                    numbers = own + head * d * 4
                    with c.when(weight.compare("!=", 0)):
                        _norm(c, numbers, d, weight, eps, numbers)
                    _turn(c, numbers, d, a["cos"] + angle, a["sin"] + angle)

                key, value = heads + g, heads + kv_heads + g
                biased(g * group, group)
                biased(key, c.of(I64, 1))
                biased(value, c.of(I64, 1))
                with c.loop(g * group, (g + 1) * group) as head:
                    turned(head, qk_norm)
                turned(key, qk_norm.compare("!=", 0).choose(qk_norm + d * 4, qk_norm))
                place = c.load(a["places"] + row * 8)
                table = a["tables"] + c.load(a["requests"] + row * 8) * a["table_width"] * 8
                slot = c.load(table + place // a["page_size"] * 8) * a["page_size"] + place % a["page_size"]
                into = slot * row_bytes + g * d * 2
                _write(c, own + key * d * 4, d, keys + into)
                _write(c, own + value * d * 4, d, values + into)
            with c.loop(0, rows) as row:
                table = a["tables"] + c.load(a["requests"] + row * 8) * a["table_width"] * 8
                position, place = c.load(a["positions"] + row * 8), c.load(a["places"] + row * 8)
                with c.loop(first_head, last_head) as g:
                    q, out = wide + row * y_stride + g * group * d * 4, attended + (row * heads + g * group) * d * 4
                    own_keys, own_values = keys + g * d * 2, values + g * d * 2
                    c.call(
                        "attend", q, group, d, own_keys, own_values, row_bytes, a["page_size"], table, position, place,
                        a["scores"], a["score_width"], packed, out, a["scale"],
                    )  # fmt: skip
            meet()
            product(1, own_columns, heads * d, attended, heads * d * 4, normed, width * 4)
            _add(c, stream, rows, width, own_columns, normed, o_bias)
            meet()
            normalise(1)
            for half in (c.of(I64, 0), inner):
                product(2, (own_inner[0] + half, own_inner[1] + half), width, normed, width * 4, wide, y_stride)
            with c.loop(0, rows) as row, c.loop(*own_inner, LANES) as at:
                place = wide + row * y_stride + at * 4
                gate = c.load(place, VECTOR)
                negative = (gate * -1.0).at_most(80.0)
                c.store(gate / (exponential(c, negative) + 1.0) * c.load(place + inner * 4, VECTOR), place)
            meet()
            product(3, own_columns, inner, wide, y_stride, normed, width * 4)
            _add(c, stream, rows, width, own_columns, normed, None)
            meet()


def _write_entries(c: Code) -> None:
    """The other functions that can be called."""
    with c.function("run_head", argument_types("run_head"), exported=True) as arguments:
        # final norm of the residual stream [N, E] and the product with the head's weight -> logits [N, outputs]
        stream, rows, width, norm, address, kind, outputs, normed, packed, logits, eps, part, parts = arguments
        with c.loop(0, rows) as row:
            _norm(c, stream + row * width * 4, width, norm, eps, normed + row * width * 4)
        c.call("product", kind, address, *_part(outputs, LANES, part, parts), width, normed, width * 4, rows, packed, logits, outputs * 4)
    with c.function("linear", argument_types("linear"), exported=True) as arguments:
        # x [N, inputs] float32 by a weight of so many outputs -> y [N, outputs] float32
        address, kind, outputs, inputs, x, rows, packed, y = arguments
        c.call("product", kind, address, 0, outputs, inputs, x, inputs * 4, rows, packed, y, outputs * 4)
    with c.function("tiles_unpacked", argument_types("tiles_unpacked"), exported=True) as (address, kind, tiles, groups, out):
        # the weights of tiles of a file's blocks, bf16 [16 tiles, 32 groups]
        for form in OF_FILES:
            with c.when(kind.compare("==", form)), c.loop(0, tiles) as tile, c.loop(0, groups) as group:
                place = out + (tile * OUTPUTS * groups + group) * (2 * GROUP)
                _unpack_group(c, form, address + (tile * groups + group) * GROUP_BYTES[form], place, groups * (2 * GROUP))
    with c.function("unpacked", argument_types("unpacked"), exported=True) as (address, kind, blocks, out):
        # the weights of whole blocks, float32
        for form in FORMATS:
            with c.when(kind.compare("==", form)), c.loop(0, blocks) as block:
                for number, numbers in enumerate(_unpack(c, form, address + block * BLOCK_BYTES[form])):
                    c.store(numbers, out + block * (4 * BLOCK) + 4 * LANES * number)
    for name, formula in (("exponentials", exponential), ("rounded", rounded)):  # of 16 `vectors` numbers, in place: what the tests look at
        with c.function(name, argument_types(name), exported=True) as (x, vectors), c.loop(0, vectors * LANES, LANES) as at:
            c.store(formula(c, c.load(x + at * 4, VECTOR)), x + at * 4)
