"""Coded keys and values on a CPU, written in `emit`'s language: rANS over a span's lanes, integers to components, products to keys and values; and of
the encoder rANS and its choices by rate.

They give the bits of `codec.rans`, `codec.codec.KvCodec.components_of` and `codec.pages.LayerRows.layer` with `kernels.rope.reference`, of
`codec.layouts.PackedKv.writer`, and of `codec.choice.RateChoice`; `coded` is their face.
"""

from __future__ import annotations

from typing import Any

from kernels.cpu_decode.arguments import ARGUMENTS
from kernels.cpu_decode.emit import F32, I8, I16, I32, I64, LANES, VECTOR, Code, Number, Variable
from kernels.cpu_decode.numbers import load_bf16, to_bf16

PRECISION_BITS = 14
STATE_LOW = 1 << 16
EMIT_SHIFT = 32 - PRECISION_BITS
GAIN_ZERO, CLASSES_PER_GAIN, NUM_GAINS = 8, 2, 16
LAST_POINT = 3  # a class has a reconstruction point for 0, 1, 2 and for all integers from here on


def write_coding(c: Code) -> None:
    """All functions."""
    _write_rans(c)
    _write_rans_encoder(c)
    _write_components(c)
    _write_gains(c)
    _write_refined(c)
    _write_rotated(c)
    _write_scattered(c)


def _load_unsigned(c: Code, address: Number, kind: Any) -> Number:
    return c.load(address, kind).to("zext", I64)


def _load_signed(c: Code, address: Number, kind: Any) -> Number:
    return c.load(address, kind).to("sext", I64)


def _gained(own: Number, gain: Number, classes: Number) -> Number:
    """The class of a component's integer after its token's gain."""
    return (own + (gain - GAIN_ZERO) * CLASSES_PER_GAIN).at_least(0).at_most(classes - 1)


def _write_rans(c: Code) -> None:
    """Spans' streams to integers.

    states uint32 [lanes of all spans], in place; words uint16 [*], one more than belongs to any span; word_starts int64 [spans + 1]; sizes int64
    [spans], tokens; own int32 [T or 1, K], classes before the gain, rows `own_stride` apart (0: the same for all tokens); symbols int16
    [classes, 2^14]; entries int32, start << 16 | frequency; centres int32 [classes], the entry of symbol 0; gain_symbols uint8 [2^14] and gain_entries
    int32 [16]. Written: q int16 [T, K], gains uint8 [T], intact int64 [spans], 1 where a span ended as it should.
    """
    names = ARGUMENTS["rans_decoded"]
    with c.function("rans_decoded", [I64] * len(names), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        count, words, states = a["count"], a["words"], a["states"]
        first, lane_start = Variable(c, c.of(I64, 0)), Variable(c, c.of(I64, 0))
        with c.loop(0, a["spans"]) as span:
            size = c.load(a["sizes"] + span * 8)
            lanes = (size + (a["lane_tokens"] - 1)) // a["lane_tokens"]
            end = c.load(a["word_starts"] + span * 8 + 8)
            at = Variable(c, c.load(a["word_starts"] + span * 8))

            def decoded(lane: Number, entry: Number, slot: Number, at: Variable = at, end: Number = end) -> None:
                """Take a symbol off a lane's state, and a word where that is needed."""
                place = states + (lane_start.get() + lane) * 4
                x = (_load_unsigned(c, place, I32) >> PRECISION_BITS) * (entry & 0xFFFF) + slot - (entry >> 16)
                word = _load_unsigned(c, words + at.get().at_most(end) * 2, I16)
                short = x.compare("<", STATE_LOW)
                c.store(short.choose((x << 16) + word, x).to("trunc", I32), place)
                at.set(at.get() + short.to("zext", I64))

            with c.loop(0, a["lane_tokens"]) as turn:
                base = first.get() + turn * lanes
                active = (size - turn * lanes).at_most(lanes)
                with c.loop(0, active) as lane:
                    slot = _load_unsigned(c, states + (lane_start.get() + lane) * 4, I32) & ((1 << PRECISION_BITS) - 1)
                    gain = _load_unsigned(c, a["gain_symbols"] + slot, I8)
                    c.store(gain.to("trunc", I8), a["gains"] + base + lane)
                    decoded(lane, _load_unsigned(c, a["gain_entries"] + gain * 4, I32), slot)
                with c.loop(0, count) as component, c.loop(0, active) as lane:
                    token = base + lane
                    own = _load_signed(c, a["own"] + (token * a["own_stride"] + component) * 4, I32)
                    kind = _gained(own, _load_unsigned(c, a["gains"] + token, I8), a["classes"])
                    slot = _load_unsigned(c, states + (lane_start.get() + lane) * 4, I32) & ((1 << PRECISION_BITS) - 1)
                    symbol = c.load(a["symbols"] + ((kind << PRECISION_BITS) + slot) * 2, I16)
                    c.store(symbol, a["q"] + (token * count + component) * 2)
                    entry = _load_signed(c, a["centres"] + kind * 4, I32) + symbol.to("sext", I64)
                    decoded(lane, _load_unsigned(c, a["entries"] + entry * 4, I32), slot)
            whole = Variable(c, at.get().compare("==", end).to("zext", I64))
            with c.loop(0, lanes) as lane:
                x = _load_unsigned(c, states + (lane_start.get() + lane) * 4, I32)
                whole.set(whole.get() & x.compare("==", STATE_LOW).to("zext", I64))
            c.store(whole.get(), a["intact"] + span * 8)
            first.set(first.get() + size)
            lane_start.set(lane_start.get() + lanes)


def _write_rans_encoder(c: Code) -> None:
    """Integers to spans' streams, the last symbol first, so that a span's words are written from their end on.

    q int32 [T, K], beyond its class's limit the escape; other inputs as for `rans_decoded`; limits int32 [classes]. Written: states uint32 [lanes of
    all spans]; words uint16 [T (K + 1)], of which each span's own end where the tokens' room ends, and begin at word_starts int64 [spans].
    """
    names = ARGUMENTS["rans_encoded"]
    with c.function("rans_encoded", [I64] * len(names), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        count, words, states = a["count"], a["words"], a["states"]
        first, lane_start = Variable(c, c.of(I64, 0)), Variable(c, c.of(I64, 0))
        with c.loop(0, a["spans"]) as span:
            size = c.load(a["sizes"] + span * 8)
            lanes = (size + (a["lane_tokens"] - 1)) // a["lane_tokens"]
            at = Variable(c, (first.get() + size) * (count + 1))
            with c.loop(0, lanes) as lane:
                c.store(c.of(I32, STATE_LOW), states + (lane_start.get() + lane) * 4)

            def code(lane: Number, entry: Number, at: Variable = at) -> None:
                """Put a symbol onto a lane's state, and a word out where there is no room for it."""
                place = states + (lane_start.get() + lane) * 4
                x, frequency = Variable(c, _load_unsigned(c, place, I32)), entry & 0xFFFF
                with c.when((x.get() >> EMIT_SHIFT).compare(">=", frequency)):
                    at.set(at.get() - 1)
                    c.store(x.get().to("trunc", I16), words + at.get() * 2)
                    x.set(x.get() >> 16)
                whole = x.get() // frequency
                c.store((x.get() + whole * (c.of(I64, 1 << PRECISION_BITS) - frequency) + (entry >> 16)).to("trunc", I32), place)

            with c.loop(0, a["lane_tokens"]) as done:
                turn = a["lane_tokens"] - 1 - done
                base = first.get() + turn * lanes
                active = (size - turn * lanes).at_most(lanes)
                with c.loop(0, count) as later, c.loop(0, active) as behind:
                    component, lane = count - 1 - later, active - 1 - behind
                    token = base + lane
                    own = _load_signed(c, a["own"] + (token * a["own_stride"] + component) * 4, I32)
                    kind = _gained(own, _load_unsigned(c, a["gains"] + token, I8), a["classes"])
                    limit, q = _load_signed(c, a["limits"] + kind * 4, I32), _load_signed(c, a["q"] + (token * count + component) * 4, I32)
                    symbol = _size(c, q).compare(">", limit).choose(limit + 1, q)
                    entry = _load_signed(c, a["centres"] + kind * 4, I32) + symbol
                    code(lane, _load_unsigned(c, a["entries"] + entry * 4, I32))
                with c.loop(0, active) as behind:
                    lane = active - 1 - behind
                    code(lane, _load_unsigned(c, a["gain_entries"] + _load_unsigned(c, a["gains"] + base + lane, I8) * 4, I32))
            c.store(at.get(), a["word_starts"] + span * 8)
            first.set(first.get() + size)
            lane_start.set(lane_start.get() + lanes)


def _write_components(c: Code) -> None:
    """Integers to components, (q + sign(q) point) step.

    q int16 [T, K]; own and own_stride as above; gains uint8 [T]; steps float32 [T]; limits int32 [classes]; points float32 [classes, 4]. Written: out
    float32 [T, K]; escapes int64 [room], the places t K + k of integers beyond their class's limit, and in `found` int64 how many there are, which may
    be more than there is room for.
    """
    names = ARGUMENTS["components"]
    with c.function("components", [I64] * len(names), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        count, found = a["count"], Variable(c, c.of(I64, 0))
        with c.loop(0, a["tokens"]) as token:
            gain, step = _load_unsigned(c, a["gains"] + token, I8), c.load(a["steps"] + token * 4, F32)
            with c.loop(0, count) as component:
                place = token * count + component
                kind = _gained(_load_signed(c, a["own"] + (token * a["own_stride"] + component) * 4, I32), gain, a["classes"])
                q = _load_signed(c, a["q"] + place * 2, I16)
                size = q.compare("<", 0).choose(c.of(I64, 0) - q, q)
                point = c.load(a["points"] + (kind * (LAST_POINT + 1) + size.at_most(LAST_POINT)) * 4, F32)
                value = size.to("sitofp", F32) + point
                c.store(q.compare("<", 0).choose(value * -1.0, value) * step, a["out"] + place * 4)
                with c.when(size.compare(">", _load_signed(c, a["limits"] + kind * 4, I32))):
                    with c.when(found.get().compare("<", a["room"])):
                        c.store(place, a["escapes"] + found.get() * 8)
                    found.set(found.get() + 1)
        c.store(found.get(), a["found"])


def _own(c: Code, a: dict[str, Number], token: Number, component: Number) -> Number:
    """The class of a token's component before its gain."""
    moved = _load_signed(c, a["base"] + component * 4, I32) + _load_signed(c, a["shifts"] + token * 4, I32)
    return moved.at_least(0).at_most(a["classes"] - 1)


def _size(c: Code, q: Number) -> Number:
    return q.compare("<", 0).choose(c.of(I64, 0) - q, q)


def _write_gains(c: Code) -> None:
    """Each token's gain with the shortest code: all are tried on every `sample`-th component, the best one and its neighbours on all.

    q int32 [T, K]; base int32 [K], the components' classes; shifts int32 [T], what a token's step moves them by; limits and centres int32 [classes];
    excess int32 [entries], what a size takes beyond a 0. sampled_zeros and zeros int64 [T, 16]: what a token of zeros takes under each gain, the
    gain's symbol included. Written: gains uint8 [T], the lower one of two that are as good.
    """
    names = ARGUMENTS["gains_chosen"]
    with c.function("gains_chosen", [I64] * len(names), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        count, costs = a["count"], c.room(NUM_GAINS * 8)

        def add(token: Number, component: Number, first: Number, gains: Number | int) -> None:
            """What a component that is not 0 takes beyond a 0, under gains from `first` on."""
            q = _load_signed(c, a["q"] + (token * count + component) * 4, I32)
            with c.when(q.compare("!=", 0)):
                own, size = _own(c, a, token, component), _size(c, q)
                with c.loop(0, gains) as n:
                    kind = _gained(own, first + n, a["classes"])
                    entry = _load_signed(c, a["centres"] + kind * 4, I32) + size.at_most(_load_signed(c, a["limits"] + kind * 4, I32) + 1)
                    c.store(c.load(costs + n * 8) + _load_signed(c, a["excess"] + entry * 4, I32), costs + n * 8)

        def least(gains: Number | int) -> Number:
            """The first of so many costs that no other is below."""
            best, cost = Variable(c, c.of(I64, 0)), Variable(c, c.load(costs))
            with c.loop(1, gains) as n, c.when(c.load(costs + n * 8).compare("<", cost.get())):
                cost.set(c.load(costs + n * 8))
                best.set(n)
            return best.get()

        with c.loop(0, a["tokens"]) as token:
            with c.loop(0, NUM_GAINS) as gain:
                c.store(c.load(a["sampled_zeros"] + (token * NUM_GAINS + gain) * 8), costs + gain * 8)
            with c.loop(0, (count + (a["sample"] - 1)) // a["sample"]) as n:
                add(token, n * a["sample"], c.of(I64, 0), NUM_GAINS)
            best = least(NUM_GAINS)
            first = (best - 1).at_least(0)
            near = (best + 2).at_most(NUM_GAINS) - first
            with c.loop(0, near) as n:
                c.store(c.load(a["zeros"] + (token * NUM_GAINS + first + n) * 8), costs + n * 8)
            with c.loop(0, count) as component:
                add(token, component, first, near)
            c.store((first + least(near)).to("trunc", I8), a["gains"] + token)


def _write_refined(c: Code) -> None:
    """Integers of the least squared error + bit_price * bits among the nearest one, the next one towards zero, and zero; escapes stay as they are.

    x float32 [T, K], in steps; q int32 [T, K]; base, shifts, gains, limits and centres as above; points float32 [classes, 4]; bits float32 [entries].
    Written: out int32 [T, K].
    """
    names = ARGUMENTS["refined"]
    with c.function("refined", [F32 if name == "bit_price" else I64 for name in names], exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        count = a["count"]
        with c.loop(0, a["tokens"]) as token:
            gain = _load_unsigned(c, a["gains"] + token, I8)
            with c.loop(0, count) as component:
                place = (token * count + component) * 4
                x, result = c.load(a["x"] + place, F32), Variable(c, c.of(I64, 0))
                size = x.compare("<", 0.0).choose(x * -1.0, x)
                with c.when(size.compare(">=", 0.5)):
                    kind, old = _gained(_own(c, a, token, component), gain, a["classes"]), _load_signed(c, a["q"] + place, I32)
                    limit = _load_signed(c, a["limits"] + kind * 4, I32)
                    entries = a["bits"] + _load_signed(c, a["centres"] + kind * 4, I32) * 4
                    nearest = (size + 0.5).at_most(limit.to("sitofp", F32)).to("fptosi", I64)
                    best, chosen = Variable(c, c.of(F32, float("inf"))), Variable(c, nearest)
                    for candidate in (nearest, (nearest - 1).at_least(0), c.of(I64, 0)):
                        point = c.load(a["points"] + (kind * (LAST_POINT + 1) + candidate.at_most(LAST_POINT)) * 4, F32)
                        error = size - (candidate.to("sitofp", F32) + point)
                        cost = error * error + a["bit_price"] * c.load(entries + candidate * 4, F32)
                        with c.when(cost.compare("<", best.get())):
                            best.set(cost)
                            chosen.set(candidate)
                    found = x.compare("<", 0.0).choose(c.of(I64, 0) - chosen.get(), chosen.get())
                    result.set(_size(c, old).compare(">", limit).choose(old, found))
                c.store(result.get().to("trunc", I32), a["out"] + place)


def _write_rotated(c: Code) -> None:
    """Products to keys and values: y bf16 [rows, layers 2 G d], keys before values in each layer, plus mu float32 [layers 2 G d], plus rest
    float32 [rows, layers 2 G d] unless its address is 0. Keys are rotated by cos and sin float32 [rows, d / 2], all is written as bf16.

    slots int64 [rows]: where a row is written, or 0 for one row behind another. Strides are bytes: of rest between rows, and of what is written between
    layers, between keys and values, and between slots.
    """
    names = ARGUMENTS["rotated"]
    with c.function("rotated", [I64] * len(names), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        heads, d = a["heads"], a["head_dim"]
        half, width = d // 2, heads * d
        with c.loop(0, a["layers"]) as layer, c.loop(0, a["rows"]) as row:
            first = layer * width * 2
            y, mu, rest = (
                a["y"] + (row * a["layers"] * width * 2 + first) * 2,
                a["mu"] + first * 4,
                a["rest"] + row * a["rest_stride"] + first * 4,
            )
            slot = Variable(c, row)
            with c.when(a["slots"].compare("!=", 0)):
                slot.set(c.load(a["slots"] + row * 8))
            out = a["out"] + layer * a["layer_stride"] + slot.get() * a["slot_stride"]

            def number(at: Number, y: Number = y, mu: Number = mu, rest: Number = rest) -> Number:
                found = Variable(c, load_bf16(c, y + at * 2) + c.load(mu + at * 4, VECTOR))
                with c.when(a["rest"].compare("!=", 0)):
                    found.set(found.get() + c.load(rest + at * 4, VECTOR))
                return found.get()

            with c.loop(0, heads) as head, c.loop(0, half, LANES) as at:
                low, angle = head * d + at, (row * half + at) * 4
                one, other = number(low), number(low + half)
                cos, sin = c.load(a["cos"] + angle, VECTOR), c.load(a["sin"] + angle, VECTOR)
                c.store(to_bf16(c, one * cos - other * sin), out + low * 2)
                c.store(to_bf16(c, other * cos + one * sin), out + (low + half) * 2)
            with c.loop(0, width, LANES) as at:
                c.store(to_bf16(c, number(width + at)), out + a["half_stride"] + at * 2)


def _write_scattered(c: Code) -> None:
    """Rows [tokens, heads, head_dim] of 16 bits into pages: number i of token t's head goes to order[places[t] head_dim + i] of page pages[t]'s head.

    pages, places int64 [tokens]; order int32 [page size x head_dim]; strides in bytes, of rows between tokens.
    """
    names = ARGUMENTS["scattered"]
    with c.function("scattered", [I64] * len(names), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        d = a["head_dim"]
        with c.loop(0, a["tokens"]) as token:
            page = a["out"] + c.load(a["pages"] + token * 8) * a["page_stride"]
            order = a["order"] + c.load(a["places"] + token * 8) * d * 4
            with c.loop(0, a["heads"]) as head:
                row, out = a["rows"] + token * a["row_stride"] + head * d * 2, page + head * a["head_stride"]
                with c.loop(0, d) as number:
                    place = _load_unsigned(c, order + number * 4, I32)
                    c.store(c.load(row + number * 2, I16), out + place * 2)
