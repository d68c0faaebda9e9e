"""Weights in bf16 put into tiles of 8 or 4 bits, in `emit`'s language: `tiles` says what they mean, and its plain PyTorch is the twin.

Scales and codes are the twin's; where two 4-bit scales have the same squared error up to the order of its sum, either may be taken.
"""

from __future__ import annotations

from kernels.cpu_decode.arguments import ARGUMENTS
from kernels.cpu_decode.emit import F16, F32, I8, I16, I32, LANES, VECTOR, Code, Number, Variable, argument_types, lanes
from kernels.cpu_decode.numbers import load_bf16
from kernels.cpu_decode.tiles import GROUP, GROUP_BYTES, LEAST_SCALE_BITS, OUTPUTS, SHRINK, TILES_4, TILES_8, ZERO

_LINE_BYTES = 4 * OUTPUTS  # four codes of every output


def write_tiling(c: Code) -> None:
    """`tiles_coded`: a weight bf16 [outputs, columns] in one piece, whole tiles and groups -> its tiles."""
    with c.function("tiles_coded", argument_types("tiles_coded"), exported=True) as arguments:
        a = dict(zip(ARGUMENTS["tiles_coded"], arguments, strict=True))
        for kind in (TILES_8, TILES_4):
            groups = a["columns"] // GROUP
            with c.when(a["kind"].compare("==", kind)), c.loop(0, a["outputs"]) as output, c.loop(0, groups) as group:
                place = a["address"] + (output * a["columns"] + group * GROUP) * 2
                numbers = load_bf16(c, place), load_bf16(c, place + 2 * LANES)
                tile = a["tiles"] + (output // OUTPUTS * groups + group) * GROUP_BYTES[kind]
                own = output % OUTPUTS
                scale, codes = _eight_bits(c, numbers) if kind == TILES_8 else _four_bits(c, numbers)
                c.store(scale, tile + own * 2)
                for number, quads in enumerate(codes):
                    words = quads.to("trunc", lanes(I8)).to("bitcast", lanes(I32, LANES // 4))
                    for q in range(LANES // 4):
                        c.store(words.lane(q), tile + (number * (LANES // 4) + q) * _LINE_BYTES + own * 4 + 2 * OUTPUTS)


def _top(parts: Number) -> Number:
    """The greatest lane."""
    for width in (8, 4, 2, 1):
        parts = parts.take(range(width)).at_least(parts.take(range(width, 2 * width)))
    return parts.lane(0)


def _usable(c: Code, scale: Number) -> tuple[Number, Number]:
    """A scale as float16, none of them 0, and in every lane as float32."""
    half = scale.to("fptrunc", F16)
    nothing = (half.to("bitcast", I16) & 0x7FFF).compare("==", 0)
    half = nothing.choose(c.of(I16, LEAST_SCALE_BITS).to("bitcast", F16), half)
    return half, half.to("fpext", F32).spread()


def _steps(c: Code, x: Number, scale: Number, least: int, most: int) -> Number:
    return c.intrinsic(f"llvm.rint.v{LANES}f32", VECTOR, x / scale).at_least(float(least)).at_most(float(most))


def _coded(c: Code, steps: Number, zero: int) -> Number:
    return c.intrinsic(f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", lanes(I32), steps) + zero


def _eight_bits(c: Code, numbers: tuple[Number, Number]) -> tuple[Number, list[Number]]:
    half, scale = _usable(c, _top(numbers[0].magnitude().at_least(numbers[1].magnitude())) / 127.0)
    return half, [_coded(c, _steps(c, x, scale, -127, 127), ZERO[TILES_8]) for x in numbers]


def _four_bits(c: Code, numbers: tuple[Number, Number]) -> tuple[Number, list[Number]]:
    zero, (low, high) = ZERO[TILES_4], numbers
    top, bottom = _top(low.at_least(high)), _top((low * -1.0).at_least(high * -1.0))
    farthest = top.compare(">=", bottom).choose(top, bottom * -1.0)
    least = Variable(c, c.of(F32, float("inf")))
    kept = [Variable(c, c.of(VECTOR, 0.0)) for _ in numbers]
    chosen = Variable(c, c.of(F16, 0.0))
    for shrink in SHRINK:
        half, scale = _usable(c, farthest * (-shrink / zero))
        steps = [_steps(c, x, scale, -zero, zero - 1) for x in numbers]
        off = [own * scale - x for own, x in zip(steps, numbers, strict=True)]
        error = (off[0] * off[0] + off[1] * off[1]).total()
        with c.when(error.compare("<", least.get())):
            least.set(error)
            chosen.set(half)
            for variable, own in zip(kept, steps, strict=True):
                variable.set(own)
    codes = [_coded(c, variable.get(), zero) for variable in kept]
    return chosen.get(), [codes[0] + (codes[1] << 4)]
