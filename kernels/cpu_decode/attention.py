"""Causal attention of a prompt's rows in bf16 on a CPU that multiplies pairs of bf16 (AVX512-bf16), in `emit`'s language.

Keys and values are laid out once a KV head so that a lane is a key, or a channel, and a register holds pairs of them. Blocks of keys are then gone
through with running maxima and sums (Milakov and Gimelshein 2018, arXiv 1805.02867; FlashAttention, Dao et al. 2022, arXiv 2205.14135). Blocks begin at
the first key, so a row's result does not depend on the rows beside it. `prompt_attention` is the face; it means what `kernels.paged_attention` says.
"""

from __future__ import annotations

from kernels.cpu_decode.arguments import ARGUMENTS
from kernels.cpu_decode.emit import F32, I16, I32, I64, LANES, VECTOR, Code, Number, Variable, argument_types, counted, lanes
from kernels.cpu_decode.numbers import to_bf16

BLOCK_KEYS = 128
"""Keys whose scores are made at once."""
TILE_ROWS = 6
"""Rows whose sums run side by side: with 64 lanes, 24 registers."""
ROWS_TOGETHER = 96
"""Rows that go through a block of keys while the caches hold it."""
WIDTH = 64
"""Head sizes are multiples of it."""
_LEAST = -1e30  # in place of minus infinity
_WHOLE = 1.5 * 2.0**23


def write_attention(c: Code, pairs: bool) -> None:
    """`prompt_attention`. pairs: the processor multiplies pairs of bf16."""
    _write_keys(c)
    _write_values(c)
    _write_scores(c, pairs)
    _write_weights(c)
    _write_sums(c, pairs)
    _write_prompt(c)


def _multiply(c: Code, pairs: bool, x: Number, y: Number, total: Number) -> Number:
    """Each lane's total plus the product of two pairs of bf16."""
    if pairs:
        return c.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, total, x, y)
    for low in (True, False):
        first, second = ((own << 16 if low else own & -0x10000).to("bitcast", VECTOR) for own in (x, y))
        total = c.fma(first, second, total)
    return total


def _write_keys(c: Code) -> None:
    """Keys bf16 [count, d], `stride` bytes apart -> [room / 16, d / 2, 16, 2]; beyond the last one is that again."""
    with c.function("lay_out_keys", [I64] * 6) as (keys, stride, count, room, d, out), c.loop(0, room) as n:
        own = keys + n.at_most(count - 1) * stride
        place = out + n // LANES * (d * 2 * LANES) + n % LANES * 4
        with c.loop(0, d // 2) as pair:
            c.store(c.load(own + pair * 4, I32), place + pair * (4 * LANES))


def _write_values(c: Code) -> None:
    """Values bf16 [count, d], `stride` bytes apart -> [room / 2, d, 2]; as in `_write_keys`."""
    with c.function("lay_out_values", [I64] * 6) as (values, stride, count, room, d, out), c.loop(0, room // 2) as pair:
        first, second = (values + n.at_most(count - 1) * stride for n in (pair * 2, pair * 2 + 1))
        with c.loop(0, d, LANES) as at:
            low, high = (c.load(own + at * 2, lanes(I16)).to("zext", lanes(I32)) for own in (first, second))
            c.store(low + (high << 16), out + (pair * d + at) * 4)


def _write_scores(c: Code, pairs: bool) -> None:
    """Products of TILE_ROWS queries bf16 [d], whose addresses lie at `rows`, with a block's keys -> float32 [TILE_ROWS, BLOCK_KEYS]."""
    with c.function("score_block", [I64] * 4) as (rows, keys, d, out), c.loop(0, BLOCK_KEYS, WIDTH) as first:
        own = keys + first * d * 2
        inputs = [c.load(rows + 8 * r) for r in range(TILE_ROWS)]
        sums = [[Variable(c, c.of(VECTOR, 0.0)) for _ in range(WIDTH // LANES)] for _ in inputs]
        with c.loop(0, d // 2) as pair:
            found = [c.load(own + pair * (4 * LANES) + d * (2 * LANES * part), lanes(I32)) for part in range(WIDTH // LANES)]
            for row, totals in zip(inputs, sums, strict=True):
                x = c.load(row + pair * 4, I32).spread()
                for y, total in zip(found, totals, strict=True):
                    total.set(_multiply(c, pairs, y, x, total.get()))
        for r, totals in enumerate(sums):
            for part, total in enumerate(totals):
                c.store(total.get(), out + (first + BLOCK_KEYS * r + LANES * part) * 4)


def _write_weights(c: Code) -> None:
    """A row's scores float32 [BLOCK_KEYS] -> weights bf16. seen: keys of the block that the row sees. most, total: where its greatest score so far and
    the sum of its weights lie, float32; share: where that goes which earlier weights are multiplied by. scale: of scores to powers of 2."""
    names = ("scores", "seen", "most", "total", "share", "out")
    with c.function("weigh_block", [*[I64] * len(names), F32]) as arguments:
        a = dict(zip((*names, "scale"), arguments, strict=True))
        places = [a["scores"] + 4 * LANES * part for part in range(BLOCK_KEYS // LANES)]
        with c.when(a["seen"].compare("<", BLOCK_KEYS)):
            seen = a["seen"].to("trunc", I32).spread()
            for part, place in enumerate(places):
                c.store(counted(c, LANES * part).compare("<", seen).choose(c.load(place, VECTOR), c.of(VECTOR, _LEAST)), place)
        scale = a["scale"].spread()
        scores = [c.load(place, VECTOR) * scale for place in places]
        greatest = scores[0]
        for own in scores[1:]:
            greatest = greatest.at_least(own)
        for width in (8, 4, 2, 1):
            greatest = greatest.take(range(width)).at_least(greatest.take(range(width, 2 * width)))
        before = c.load(a["most"], F32)
        now = before.at_least(greatest.lane(0))
        c.store(now, a["most"])
        share = _power_of_2(c, (before - now).spread()).lane(0)
        c.store(share, a["share"])
        most, sums = now.spread(), c.of(VECTOR, 0.0)
        for part, own in enumerate(scores):
            weight = _power_of_2(c, own - most)
            sums = sums + weight
            c.store(((weight.bits() + 0x8000) >> 16).to("trunc", lanes(I16)), a["out"] + 2 * LANES * part)
        c.store(c.load(a["total"], F32) * share + sums.total(), a["total"])


def _power_of_2(c: Code, x: Number) -> Number:
    """2^x lane by lane for x <= 0, relative error below 6e-5, a hundredth of what rounding to bf16 adds; by 2^n p(f), p of degree 4 (Taylor's)."""
    bounded = x.at_least(-126.0)  # NaN stays NaN
    moved = bounded + _WHOLE  # whose last bits are the nearest whole number
    f, p = bounded - (moved - _WHOLE), c.of(VECTOR, 9.618129107628477e-3)
    for coefficient in (5.550410866482158e-2, 2.402265069591007e-1, 6.931471805599453e-1, 1.0):
        p = c.fma(p, f, c.of(VECTOR, coefficient))
    return (p.bits() + (moved.bits() << 23)).to("bitcast", VECTOR)


def _write_sums(c: Code, pairs: bool) -> None:
    """Adds to TILE_ROWS rows of float32 [d], times their shares float32, the values of a block by weights bf16 [TILE_ROWS, BLOCK_KEYS]."""
    with c.function("add_block", [I64] * 5) as (weights, shares, values, d, out), c.loop(0, d, WIDTH) as first:
        sums = []
        for r in range(TILE_ROWS):
            share = c.load(shares + 4 * r, F32).spread()
            own = [c.load(out + (d * r + first + LANES * part) * 4, VECTOR) * share for part in range(WIDTH // LANES)]
            sums.append([Variable(c, x) for x in own])
        with c.loop(0, BLOCK_KEYS // 2) as pair:
            found = [c.load(values + (pair * d + first + LANES * part) * 4, lanes(I32)) for part in range(WIDTH // LANES)]
            for r, totals in enumerate(sums):
                x = c.load(weights + pair * 4 + 2 * BLOCK_KEYS * r, I32).spread()
                for y, total in zip(found, totals, strict=True):
                    total.set(_multiply(c, pairs, y, x, total.get()))
        for r, totals in enumerate(sums):
            for part, total in enumerate(totals):
                c.store(total.get(), out + (d * r + first + LANES * part) * 4)


def _write_prompt(c: Code) -> None:
    """See `prompt_attention`; a KV head's rows are its queries of all tokens, those of a token beside each other."""
    names = ARGUMENTS["prompt_attention"]
    with c.function("prompt_attention", argument_types("prompt_attention"), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        d, count, tokens, group = a["head_dim"], a["keys"], a["tokens"], a["heads"] // a["kv_heads"]
        rows, room = tokens * group, (count + (BLOCK_KEYS - 1)) // BLOCK_KEYS * BLOCK_KEYS
        before, head_bytes = count - tokens, d * 2
        laid_values = a["laid_out"] + room * head_bytes
        queries, scores = c.room(8 * TILE_ROWS), c.room(4 * TILE_ROWS * BLOCK_KEYS)
        weights, shares = c.room(2 * TILE_ROWS * BLOCK_KEYS), c.room(4 * LANES)
        mosts, totals = c.room(4 * ROWS_TOGETHER), c.room(4 * ROWS_TOGETHER)

        def last_of(row: Number) -> Number:
            """The last key that a row sees; rows beyond the last one are that again."""
            return before + row.at_most(rows - 1) // group

        with c.loop(0, a["kv_heads"]) as head:
            own_heads = head * head_bytes
            c.call("lay_out_keys", a["k"] + own_heads, a["k_stride"], count, room, d, a["laid_out"])
            c.call("lay_out_values", a["v"] + own_heads, a["v_stride"], count, room, d, laid_values)
            with c.loop(0, rows, ROWS_TOGETHER) as first:
                with c.loop(0, ROWS_TOGETHER) as r:
                    c.store(c.of(F32, _LEAST), mosts + r * 4)
                    c.store(c.of(F32, 0.0), totals + r * 4)
                with c.loop(0, d * ROWS_TOGETHER, LANES) as at:
                    c.store(c.of(VECTOR, 0.0), a["sums"] + at * 4)
                with c.loop(0, last_of(first + (ROWS_TOGETHER - 1)) + 1, BLOCK_KEYS) as key, c.loop(0, ROWS_TOGETHER, TILE_ROWS) as tile:
                    sees = last_of(first + tile + (TILE_ROWS - 1)).compare(">=", key)
                    with c.when(sees), c.when((first + tile).compare("<", rows)):
                        for number in range(TILE_ROWS):
                            own = (first + tile + number).at_most(rows - 1)
                            place = a["q"] + own // group * a["q_stride"] + (head * group + own % group) * head_bytes
                            c.store(place, queries + 8 * number)
                        c.call("score_block", queries, a["laid_out"] + key * head_bytes, d, scores)
                        with c.loop(0, TILE_ROWS) as r:
                            state = (tile + r) * 4
                            seen = last_of(first + tile + r) + 1 - key
                            c.call(
                                "weigh_block", scores + r * (4 * BLOCK_KEYS), seen, mosts + state, totals + state, shares + r * 4,
                                weights + r * (2 * BLOCK_KEYS), a["scale"],
                            )  # fmt: skip
                        c.call("add_block", weights, shares, laid_values + key * head_bytes, d, a["sums"] + tile * d * 4)
                with c.loop(0, ROWS_TOGETHER) as r, c.when((first + r).compare("<", rows)):
                    row = first + r
                    share = (1.0 / c.load(totals + r * 4, F32)).spread()
                    place = a["out"] + ((row // group) * a["heads"] + head * group + row % group) * head_bytes
                    with c.loop(0, d, LANES) as at:
                        c.store(to_bf16(c, c.load(a["sums"] + (r * d + at) * 4, VECTOR) * share), place + at * 2)


__all__ = ["write_attention"]
