"""Norms and rotation of a prompt's rows in bf16 on a CPU, in `emit`'s language: one pass over memory each, where plain PyTorch makes many.

They mean what `kernels.rms_norm.reference` and `kernels.rope.reference` say; `elementwise` is their face. A row's result does not depend on the rows
beside it.
"""

from __future__ import annotations

from kernels.cpu_decode.arguments import ARGUMENTS
from kernels.cpu_decode.emit import F32, LANES, VECTOR, Code, Variable, argument_types
from kernels.cpu_decode.numbers import load_bf16, rounded, to_bf16


def write_prefill(c: Code) -> None:
    """All functions."""
    _write_norm(c)
    _write_turn(c)


def _write_norm(c: Code) -> None:
    """RMS norm of x bf16 [rows, width], to which residual is added first where its address is not 0, the sum going to `total`, by weight bf16 [width]
    -> out. All rows lie in one piece."""
    names = ARGUMENTS["norm_rows"]
    with c.function("norm_rows", argument_types("norm_rows"), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        width = a["width"]
        for adds in (False, True):
            with c.when(a["residual"].compare("!=" if adds else "==", 0)), c.loop(0, a["rows"]) as row:
                place = row * width * 2
                x, squares = a["x"] + place, Variable(c, c.of(VECTOR, 0.0))
                normed = a["total"] + place if adds else x
                with c.loop(0, width, LANES) as at:
                    own = load_bf16(c, x + at * 2)
                    if adds:
                        own = rounded(c, own + load_bf16(c, a["residual"] + place + at * 2))
                        c.store(to_bf16(c, own), normed + at * 2)
                    squares.set(c.fma(own, own, squares.get()))
                mean = squares.get().total() / width.to("sitofp", F32)
                factor = (1.0 / c.intrinsic("llvm.sqrt.f32", F32, mean + a["eps"])).spread()
                with c.loop(0, width, LANES) as at:
                    own = load_bf16(c, normed + at * 2) * factor * load_bf16(c, a["weight"] + at * 2)
                    c.store(to_bf16(c, own), a["out"] + place + at * 2)


def _write_turn(c: Code) -> None:
    """Rotation of x bf16 [rows, heads, head_dim], rows `row_stride` bytes apart, by cos and sin float32 [rows, head_dim / 2] -> out in one piece."""
    names = ARGUMENTS["turn_rows"]
    with c.function("turn_rows", argument_types("turn_rows"), exported=True) as arguments:
        a = dict(zip(names, arguments, strict=True))
        heads, d = a["heads"], a["head_dim"]
        half = d // 2
        with c.loop(0, a["rows"]) as row, c.loop(0, heads) as head:
            x, out = a["x"] + row * a["row_stride"] + head * d * 2, a["out"] + (row * heads + head) * d * 2
            with c.loop(0, half, LANES) as at:
                angle = (row * half + at) * 4
                cos, sin = c.load(a["cos"] + angle, VECTOR), c.load(a["sin"] + angle, VECTOR)
                first, second = load_bf16(c, x + at * 2), load_bf16(c, x + (half + at) * 2)
                c.store(to_bf16(c, first * cos - second * sin), out + at * 2)
                c.store(to_bf16(c, second * cos + first * sin), out + (half + at) * 2)
