"""Vector code of the CPU's decode step: LLVM IR that Numba compiles, of 16 float32 lanes whatever the machine's registers are.

Every sum has one order: 16 lanes run over a row's weights and are added up in a tree. How many rows or outputs are computed together changes no bit.
Addresses are int64; strides are bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.cpu_decode.blocks import BF16, BLOCK, BLOCK_BYTES, Q4_0, Q8_0

LANES = 16

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)


def _lanes(kind: ir.Type) -> ir.VectorType:
    return ir.VectorType(kind, LANES)


def _load(b: Any, address: Any, kind: ir.Type) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1, typ=kind)


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def _at(b: Any, address: Any, offset: int) -> Any:
    return b.add(address, ir.Constant(_I64, offset)) if offset else address


def _prefetch(b: Any, address: Any) -> None:
    """Ask for memory, for reading, into the first cache."""
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = b.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    b.call(function, [b.inttoptr(address, pointer), ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


def _spread(b: Any, value: Any) -> Any:
    """A scalar in every lane."""
    one = b.insert_element(ir.Constant(_lanes(value.type), ir.Undefined), value, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(_lanes(_I32), [0] * LANES))


def _constant(kind: ir.Type, value: float) -> Any:
    return ir.Constant(_lanes(kind), [value] * LANES)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    function = b.module.declare_intrinsic(f"llvm.fma.v{LANES}f32", (), ir.FunctionType(_VECTOR, [_VECTOR] * 3))
    return b.call(function, [x, y, z])


def _total(b: Any, lanes: Any) -> Any:
    """The sum of 16 lanes, halves upon halves."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (ir.Constant(ir.VectorType(_I32, width), list(range(at, at + width))) for at in (0, width))
        lanes = b.fadd(b.shuffle_vector(lanes, lanes, low), b.shuffle_vector(lanes, lanes, high))
    return b.extract_element(lanes, ir.Constant(_I32, 0))


def _half(b: Any, address: Any) -> Any:
    """A float16 in memory, in every lane as float32."""
    return _spread(b, b.fpext(_load(b, address, ir.HalfType()), _F32))


def _bf16(b: Any, address: Any) -> Any:
    bits = b.shl(b.zext(_load(b, address, _lanes(_I16)), _lanes(_I32)), _constant(_I32, 16))
    return b.bitcast(bits, _VECTOR)


def _numbers(b: Any, codes: Any, offset: int) -> Any:
    return b.sitofp(b.sub(codes, _constant(_I32, offset)) if offset else codes, _VECTOR)


def _unpack(b: Any, kind: int, address: Any) -> tuple[Any, Any]:
    """A block's weights: its first 16 and its last 16."""
    if kind == BF16:
        return _bf16(b, address), _bf16(b, _at(b, address, 32))
    scale = _half(b, address)
    if kind == Q8_0:
        halves = [b.sitofp(_load(b, _at(b, address, at), _lanes(_I8)), _VECTOR) for at in (2, 18)]
        return b.fmul(halves[0], scale), b.fmul(halves[1], scale)
    codes = b.zext(_load(b, _at(b, address, 2 if kind == Q4_0 else 4), _lanes(_I8)), _lanes(_I32))
    low, high = b.and_(codes, _constant(_I32, 15)), b.lshr(codes, _constant(_I32, 4))
    if kind == Q4_0:
        return b.fmul(_numbers(b, low, 8), scale), b.fmul(_numbers(b, high, 8), scale)
    least = _half(b, _at(b, address, 2))
    return tuple(b.fadd(b.fmul(_numbers(b, part, 0), scale), least) for part in (low, high))  # type: ignore[return-value]


def _loop(b: Any, count: Any, values: list[Any], body: Any) -> list[Any]:
    """`count` times (at least once) values = body(i, values)."""
    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    number = b.phi(_I64)
    number.add_incoming(ir.Constant(_I64, 0), before)
    held = []
    for value in values:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        held.append(phi)
    found = body(number, held)
    following = b.add(number, ir.Constant(_I64, 1))
    number.add_incoming(following, b.block)
    for phi, value in zip(held, found, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    return found


def _zero() -> Any:
    return ir.Constant(_VECTOR, [0.0] * LANES)


AHEAD_BYTES = 512  # of a row's weights are asked for before they are needed


@intrinsic(prefer_literal=True)
def dot(typingctx, kind, rows, w, x, x_stride, y, y_stride, blocks):
    """y[r] = sum over k of w[k] x[r, k] for `rows` rows (a literal) and one output; x and y float32, w in format `kind` (a literal).

    One output at a time reads memory in one stream, which prefetchers follow best.
    """
    form, count = kind.literal_value, rows.literal_value

    def generate(context, b, signature, arguments):
        _, _, w, x, x_stride, y, y_stride, blocks = arguments
        inputs = [x]
        for _ in range(count - 1):
            inputs.append(b.add(inputs[-1], x_stride))

        def body(number, sums):
            at = b.add(w, b.mul(number, ir.Constant(_I64, BLOCK_BYTES[form])))
            x_at = b.mul(number, ir.Constant(_I64, 4 * BLOCK))
            _prefetch(b, _at(b, at, AHEAD_BYTES))
            halves = _unpack(b, form, at)
            found = []
            for r, row in enumerate(inputs):
                for part, half in enumerate(halves):
                    own = _load(b, _at(b, b.add(row, x_at), 4 * LANES * part), _VECTOR)
                    found.append(_fma(b, half, own, sums[2 * r + part]))
            return found

        sums = _loop(b, blocks, [_zero()] * (2 * count), body)
        for r in range(count):
            _store(b, _total(b, b.fadd(sums[2 * r], sums[2 * r + 1])), y)
            y = b.add(y, y_stride)
        return context.get_dummy_value()

    return types.void(kind, rows, *[types.int64] * 6), generate


@intrinsic(prefer_literal=True)
def weighted_sum(typingctx, parts, v, v_stride, p, count, out):
    """out[16 parts] += sum over i < count of p[i] v[i]; v bf16 rows, p and out float32; parts (a literal): vectors of 16 at once."""
    width = parts.literal_value

    def generate(context, b, signature, arguments):
        _, v, v_stride, p, count, out = arguments

        def body(number, sums):
            row, weight = b.add(v, b.mul(number, v_stride)), _spread(b, _load(b, b.add(p, b.mul(number, ir.Constant(_I64, 4))), _F32))
            return [_fma(b, _bf16(b, _at(b, row, 32 * at)), weight, own) for at, own in enumerate(sums)]

        sums = _loop(b, count, [_load(b, _at(b, out, 64 * at), _VECTOR) for at in range(width)], body)
        for at, own in enumerate(sums):
            _store(b, own, _at(b, out, 64 * at))
        return context.get_dummy_value()

    return types.void(parts, *[types.int64] * 5), generate


@intrinsic
def sum_of_squares(typingctx, x, vectors):
    """Of 16 `vectors` float32 numbers at x."""

    def generate(context, b, signature, arguments):
        x, vectors = arguments

        def body(number, sums):
            own = _load(b, b.add(x, b.mul(number, ir.Constant(_I64, 64))), _VECTOR)
            return [_fma(b, own, own, sums[0])]

        return _total(b, _loop(b, vectors, [_zero()], body)[0])

    return types.float32(types.int64, types.int64), generate


@intrinsic
def bits_of(typingctx, x):
    """A float32's bits, uint32."""
    return types.uint32(types.float32), lambda context, b, signature, arguments: b.bitcast(arguments[0], _I32)


@intrinsic
def from_bits(typingctx, bits):
    """The float32 of these bits, uint32."""
    return types.float32(types.uint32), lambda context, b, signature, arguments: b.bitcast(arguments[0], _F32)


@intrinsic(prefer_literal=True)
def unpack(typingctx, kind, w, out, blocks):
    """The weights of consecutive blocks in format `kind` (a literal) at w, float32, to out."""
    form = kind.literal_value

    def generate(context, b, signature, arguments):
        _, w, out, blocks = arguments

        def body(number, _):
            at, into = b.mul(number, ir.Constant(_I64, BLOCK_BYTES[form])), b.add(out, b.mul(number, ir.Constant(_I64, 4 * BLOCK)))
            for part, value in enumerate(_unpack(b, form, b.add(w, at))):
                _store(b, value, _at(b, into, 64 * part))
            return []

        _loop(b, blocks, [], body)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3), generate


@intrinsic
def pointer(typingctx, address):
    """An address as a pointer to uint16."""
    kind = types.CPointer(types.uint16)

    def generate(context, b, signature, arguments):
        return b.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64), generate
