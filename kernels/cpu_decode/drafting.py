"""Drafts of a draft head as a program of its own: pass after pass of a target's first layers and the head's, for a few requests at once.

What it calls, `run_layers` and `run_head`, is written by `program`; see `drafts` for its use.
"""

from __future__ import annotations

from kernels.cpu_decode.arguments import ARGUMENTS, MODEL
from kernels.cpu_decode.emit import F32, I32, I64, LANES, VECTOR, Code, Number, Variable, argument_types, lanes
from kernels.cpu_decode.numbers import exponential, load_bf16


def write_drafting(c: Code) -> None:
    """The functions, behind those that they call."""
    _write_likeliest(c)
    _write_draft(c)


def _greatest(c: Code, x: Number, count: Number) -> tuple[Number, Number]:
    """The greatest of `count` numbers at x, a multiple of 16, and the first place that holds it."""
    most, places = Variable(c, c.of(VECTOR, float("-inf"))), Variable(c, c.of(lanes(I32), 0))
    with c.loop(0, count, LANES) as at:
        own = c.load(x + at * 4, VECTOR)
        greater = own.compare(">", most.get())
        places.set(greater.choose(at.to("trunc", I32).spread() + c.numbered(), places.get()))
        most.set(greater.choose(own, most.get()))
    top = most.get()
    for width in (8, 4, 2, 1):
        top = top.take(range(width)).at_least(top.take(range(width, 2 * width)))
    place = most.get().compare("==", top.lane(0).spread()).choose(places.get(), c.of(lanes(I32), 1 << 30))
    for width in (8, 4, 2, 1):
        place = place.take(range(width)).at_most(place.take(range(width, 2 * width)))
    first = place.lane(0).compare("<", 1 << 30).choose(place.lane(0), c.of(I32, 0))  # none where all are NaN
    return top.lane(0), first.to("sext", I64)


def _write_likeliest(c: Code) -> None:
    """The `candidates` likeliest of `count` tokens, a multiple of 16: their ids and their probabilities, descending. The logits are overwritten."""
    with c.function("likeliest", [I64] * 6) as (logits, count, candidates, token_ids, found, chances):
        top, place = _greatest(c, logits, count)
        sums = Variable(c, c.of(VECTOR, 0.0))
        with c.loop(0, count, LANES) as at:
            sums.set(sums.get() + exponential(c, c.load(logits + at * 4, VECTOR) - top.spread()))
        total = sums.get().total()
        value, at_place = Variable(c, top), Variable(c, place)
        with c.loop(0, candidates) as number:
            with c.when(number.compare(">", 0)):
                c.store(c.of(F32, float("-inf")), logits + at_place.get() * 4)
                own, own_place = _greatest(c, logits, count)
                value.set(own)
                at_place.set(own_place)
            c.store(c.load(token_ids + at_place.get() * 8), found + number * 8)
            c.store(exponential(c, (value.get() - top).spread()).lane(0) / total, chances + number * 4)


def _write_draft(c: Code) -> None:
    """Drafts of a draft head, each the likeliest token after the one before, for `count` requests at once; see `drafts.draft`.

    first, own: as arguments.MODEL says. tokens, positions int64 [B]: of the last token of each, which is not in a cache; overwritten. own_stream
    float32 [own_rows, E]: what the own layers run in the first pass, each request's row own_last[b] to be filled. A request goes on from a draft while
    its chance times its rate is above `row`, and all that go on together while the sum of what is above is more than passes[so many].
    """
    with c.function("draft", argument_types("draft"), exported=True) as arguments:
        a = dict(zip(ARGUMENTS["draft"], arguments, strict=True))
        width, d, stream, index, outputs = (a[name] for name in ("width", "head_dim", "stream", "index", "outputs"))
        models = [{name: c.load(a[which] + 8 * at) for at, name in enumerate(MODEL)} for which in ("first", "own")]

        def copy(source: Number, target: Number, count: Number, *, halves: bool = False) -> None:
            with c.loop(0, count, LANES) as at:
                own = load_bf16(c, source + at * 2) if halves else c.load(source + at * 4, VECTOR)
                c.store(own, target + at * 4)

        def turn(model: dict[str, Number], positions: Number, rows: Number) -> None:
            half = d // 2
            with c.loop(0, rows) as row:
                position = c.load(positions + row * 8)
                for name in ("cos", "sin"):
                    copy(model[name] + position * half * 4, a[name] + row * half * 4, half)

        def layers(number: int, x: Number, rows: Number, positions: Number, requests: Number) -> None:
            m, name = models[number], ("first", "own")[number]
            turn(m, positions, rows)
            c.call(
                "run_layers", m["addresses"], m["kinds"], m["norms"], m["qkv_bias"], m["o_bias"], m["qk_norm"], m["pool"], 0, m["layers"],
                x, rows, width, a["cos"], a["sin"], positions, positions, requests, a[f"{name}_tables"], a[f"{name}_width"],
                a["heads"], a["kv_heads"], d, a["inner"], m["page_size"],
                a["normed"], a["wide"], a["wide_width"], a["attended"], a["scores"], a["score_width"], a["packed"], a["eps"], a["scale"],
                0, 1, 0,
            )  # fmt: skip

        with c.loop(0, a["count"]) as b:
            c.store(b, index + b * 8)
            c.store(c.of(F32, 1.0), a["before"] + b * 4)
        active = Variable(c, a["count"])
        with c.loop(0, a["longest"]) as depth, c.when(active.get().compare(">", 0)):
            rows = active.get()
            with c.loop(0, rows) as i:
                b = c.load(index + i * 8)
                c.store(c.load(a["positions"] + b * 8), a["row_positions"] + i * 8)
                copy(a["embeddings"] + c.load(a["tokens"] + b * 8) * width * 2, stream + i * width * 4, width, halves=True)
            layers(0, stream, rows, a["row_positions"], index)
            with c.when(depth.compare("==", 0)):  # all requests, in their order
                with c.loop(0, rows) as i:
                    copy(stream + i * width * 4, a["own_stream"] + c.load(a["own_last"] + i * 8) * width * 4, width)
                layers(1, a["own_stream"], a["own_rows"], a["own_positions"], a["own_requests"])
                with c.loop(0, rows) as i:
                    copy(a["own_stream"] + c.load(a["own_last"] + i * 8) * width * 4, stream + i * width * 4, width)
            with c.when(depth.compare(">", 0)):
                layers(1, stream, rows, a["row_positions"], index)
            c.call(
                "run_head",
                stream,
                rows,
                width,
                a["norm"],
                a["address"],
                a["kind"],
                outputs,
                a["normed"],
                a["packed"],
                a["logits"],
                a["eps"],
                0,
                1,
            )
            kept, worth = Variable(c, c.of(I64, 0)), Variable(c, c.of(F32, 0.0))
            with c.loop(0, rows) as i:
                b = c.load(index + i * 8)
                place = (b * a["longest"] + depth) * a["candidates"]
                found, chances = a["found"] + place * 8, a["chances"] + place * 4
                c.call("likeliest", a["logits"] + i * outputs * 4, outputs, a["candidates"], a["token_ids"], found, chances)
                c.store(depth + 1, a["counts"] + b * 8)
                c.store(c.load(found), a["tokens"] + b * 8)
                c.store(c.load(a["positions"] + b * 8) + 1, a["positions"] + b * 8)
                line = c.load(a["heights"] + b * 4, F32) + c.load(a["slopes"] + b * 4, F32) * c.load(chances, F32)
                chance = c.load(a["before"] + b * 4, F32) * line.at_least(0.0).at_most(1.0)
                c.store(chance, a["before"] + b * 4)
                gain = chance * c.load(a["rates"] + b * 4, F32)
                within = (depth + 1).compare("<", c.load(a["lengths"] + b * 8))
                with c.when(within), c.when(gain.compare(">", a["row"])):
                    c.store(b, index + kept.get() * 8)
                    kept.set(kept.get() + 1)
                    worth.set(worth.get() + gain - a["row"])
            pays = worth.get().compare(">", c.load(a["passes"] + kept.get() * 4, F32))
            active.set(pays.choose(kept.get(), c.of(I64, 0)))
