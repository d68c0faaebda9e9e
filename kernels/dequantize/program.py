"""What each block format means, written in `cpu_decode.emit`'s language: float32 numbers in the order of operations that the gguf package has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kernels.cpu_decode.emit import F16, F32, I8, I16, I32, I64, LANES, VECTOR, Code, Number, Variable, counted, lanes

Vectors = Iterator[Number]  # a block's numbers in order, 16 at a time


def write_program(kind: str, elements: int, size: int) -> Any:
    """The module with one function, of the format's name and of (blocks, count, out, greatest): `count` blocks as bf16, and in 16 lanes the greatest
    bits of their magnitudes. elements, size: numbers and bytes of a block."""
    c = Code()
    with c.function(kind, [I64] * 4, exported=True) as (blocks, count, out, greatest):
        most = Variable(c, c.of(lanes(I32), 0))
        with c.loop(0, count) as block:
            for number, values in enumerate(_FORMATS[kind](c, blocks + block * size)):
                bits = values.bits()
                magnitude = bits & 0x7FFFFFFF
                most.set(most.get().at_least(magnitude))
                rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to("trunc", lanes(I16))
                c.store(rounded, out + (block * elements + number * LANES) * 2)
        c.store(most.get(), greatest)
    return c.module


def _half(c: Code, address: Number) -> Number:
    """A float16 as float32."""
    return c.load(address, F16).to("fpext", F32)


def _byte(c: Code, address: Number) -> Number:
    """A byte as int32."""
    return c.load(address, I8).to("zext", I32)


def _bytes(c: Code, address: Number) -> Number:
    """16 bytes as int32."""
    return c.load(address, lanes(I8)).to("zext", lanes(I32))


def _real(numbers: Number) -> Number:
    return numbers.to("sitofp", VECTOR)


def _q8_0(c: Code, block: Number) -> Vectors:
    scale = _half(c, block).spread()
    for at in (2, 18):
        yield c.load(block + at, lanes(I8)).to("sitofp", VECTOR) * scale


def _small(bits: int, *, least: bool) -> Callable[[Code, Number], Vectors]:
    """32 numbers of 4 bits, or of 4 in one place and the highest of 5 in another: signed ones, or those above a least value."""

    def vectors(c: Code, block: Number) -> Vectors:
        scale = _half(c, block).spread()
        above = _half(c, block + 2).spread() if least else None
        at = 4 if least else 2
        high = c.load(block + at, I32).spread() if bits == 5 else None
        codes = _bytes(c, block + at + (4 if bits == 5 else 0))
        for first, nibbles in ((0, codes & 15), (16, codes >> 4)):
            steps = nibbles
            if high is not None:
                steps = steps + (((high >> counted(c, first)) & 1) << 4)
            yield _real(steps - (1 << bits - 1)) * scale if above is None else _real(steps) * scale + above

    return vectors


def _scale_and_least(c: Code, block: Number, part: int) -> tuple[Number, Number]:
    """Of the `part`-th of eight parts of a block of Q4_K or Q5_K: 6 bits each, times the block's own."""
    scale, least = _half(c, block), _half(c, block + 2)
    packed = block + 4
    if part < 4:
        steps = [_byte(c, packed + part + at) & 63 for at in (0, 4)]
    else:
        low = _byte(c, packed + part + 4)
        steps = [(low & 15) + ((_byte(c, packed + part - 4) >> 2) & 48), (low >> 4) + ((_byte(c, packed + part) >> 2) & 48)]
    first, second = (number.to("sitofp", F32) for number in steps)
    return (scale * first).spread(), (least * second).spread()


def _large(bits: int) -> Callable[[Code, Number], Vectors]:
    """Q4_K and Q5_K: 256 numbers in eight parts, each above a least value of its own."""

    def vectors(c: Code, block: Number) -> Vectors:
        for part in range(8):
            scale, least = _scale_and_least(c, block, part)
            for half in (0, 16):
                codes = _bytes(c, block + (16 if bits == 4 else 48) + part // 2 * 32 + half)
                steps = codes >> 4 if part % 2 else codes & 15
                if bits == 5:
                    steps = steps + (((_bytes(c, block + 16 + half) >> part) & 1) << 4)
                yield _real(steps) * scale - least

    return vectors


def _q6_k(c: Code, block: Number) -> Vectors:
    scale = _half(c, block + 208)
    for part in range(8):  # of 32 numbers; four have their highest 2 bits in the same bytes
        group = part % 4
        for half in (0, 16):
            codes = _bytes(c, block + part // 4 * 64 + group % 2 * 32 + half)
            highest = (_bytes(c, block + 128 + part // 4 * 32 + half) >> 2 * group) & 3
            steps = (codes >> 4 if group >= 2 else codes & 15) + (highest << 4) - 32
            own = c.load(block + 192 + part * 2 + half // 16, I8).to("sitofp", F32)
            yield _real(steps) * (scale * own).spread()


_FORMATS: dict[str, Callable[[Code, Number], Vectors]] = {
    "Q4_0": _small(4, least=False),
    "Q4_1": _small(4, least=True),
    "Q5_0": _small(5, least=False),
    "Q5_1": _small(5, least=True),
    "Q8_0": _q8_0,
    "Q4_K": _large(4),
    "Q5_K": _large(5),
    "Q6_K": _q6_k,
}
