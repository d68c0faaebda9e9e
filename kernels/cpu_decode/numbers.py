"""bf16 numbers in `emit`'s language: from memory, and float32 numbers rounded to them."""

from __future__ import annotations

from kernels.cpu_decode.emit import I16, I32, VECTOR, Code, Number, lanes


def load_bf16(c: Code, address: Number) -> Number:
    """16 numbers in memory, as float32."""
    return (c.load(address, lanes(I16)).to("zext", lanes(I32)) << 16).to("bitcast", VECTOR)


def _round_bits(c: Code, x: Number) -> Number:
    """Of float32 numbers, int32 bits whose upper half is the nearest bf16, ties to even."""
    bits = x.bits()
    return x.compare("==", x).choose(bits + 0x7FFF + ((bits >> 16) & 1), c.of(lanes(I32), 0x7FC00000))


def rounded(c: Code, x: Number) -> Number:
    """Float32 numbers as bf16 holds them."""
    return (_round_bits(c, x) & -0x10000).to("bitcast", VECTOR)


def to_bf16(c: Code, x: Number) -> Number:
    """Float32 numbers as bf16, int16."""
    return (_round_bits(c, x) >> 16).to("trunc", lanes(I16))
