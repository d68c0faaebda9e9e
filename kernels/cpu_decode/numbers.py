"""Formulas in `emit`'s language: bf16 numbers from memory, float32 numbers rounded to them, and powers of e."""

from __future__ import annotations

from kernels.cpu_decode.emit import I16, I32, LANES, VECTOR, Code, Number, lanes


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


def exponential(c: Code, x: Number) -> Number:
    """e^x lane by lane for x <= 80, relative error below 3e-7 + 4e-8 |x|; by 2^n p(f), p of degree 6 (Cephes' coefficients in base 2)."""
    scaled = (x * 1.4426950408889634).at_least(-126.0)  # NaN stays NaN
    whole = c.intrinsic(f"llvm.floor.v{LANES}f32", VECTOR, scaled + 0.5)
    f, p = scaled - whole, c.of(VECTOR, 1.535336188319500e-4)
    for coefficient in (1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1, 6.931472028550421e-1, 1.0):
        p = c.fma(p, f, c.of(VECTOR, coefficient))
    number = c.intrinsic(f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", lanes(I32), whole)
    return p * ((number + 127) << 23).to("bitcast", VECTOR)
