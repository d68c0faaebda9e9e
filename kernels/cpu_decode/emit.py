"""A small language over LLVM's IR, for the vector code of the CPU's decode step: numbers with operators, loops, branches and memory.

Numbers are int64, float32, and 16 lanes of float32, int32 or int16, whatever the machine's registers are. Addresses are int64, and nothing about a
number in memory is assumed but its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from kernels.cpu_decode.arguments import ARGUMENTS, REAL

LANES = 16
VOID = ir.VoidType()
I8, I16, I32, I64, F16, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()


def lanes(kind: Any, count: int = LANES) -> Any:
    """The type of a vector."""
    return ir.VectorType(kind, count)


VECTOR = lanes(F32)


def argument_types(name: str) -> list[Any]:
    """LLVM's types of a function's arguments."""
    return [F32 if argument in REAL else I64 for argument in ARGUMENTS[name]]


def _is_real(kind: Any) -> bool:
    return getattr(kind, "element", kind) in (F32, F16)


class Number:
    """A value of a function that is being written. Operators take Python's numbers, too; integers are divided towards zero."""

    def __init__(self, code: Code, value: Any) -> None:
        self.code, self.value = code, value

    @property
    def type(self) -> Any:
        """LLVM's type."""
        return self.value.type

    def _with(self, other: Any, real: str, whole: str, swapped: bool = False) -> Number:
        b, other = self.code.b, self.code.of(self.type, other)
        first, second = (other, self) if swapped else (self, other)
        return Number(self.code, getattr(b, real if _is_real(self.type) else whole)(first.value, second.value))

    def __add__(self, other: Any) -> Number:
        return self._with(other, "fadd", "add")

    def __sub__(self, other: Any) -> Number:
        return self._with(other, "fsub", "sub")

    def __mul__(self, other: Any) -> Number:
        return self._with(other, "fmul", "mul")

    def __floordiv__(self, other: Any) -> Number:
        return self._with(other, "fdiv", "sdiv")

    __truediv__ = __floordiv__

    def __rtruediv__(self, other: Any) -> Number:
        return self._with(other, "fdiv", "sdiv", swapped=True)

    def __mod__(self, other: Any) -> Number:
        return self._with(other, "frem", "srem")

    def __and__(self, other: Any) -> Number:
        return self._with(other, "and_", "and_")

    def __lshift__(self, other: Any) -> Number:
        return self._with(other, "shl", "shl")

    def __rshift__(self, other: Any) -> Number:
        return self._with(other, "lshr", "lshr")

    __radd__, __rmul__ = __add__, __mul__

    def arithmetic_shift(self, count: int) -> Number:
        """Whole numbers shifted right, with their sign."""
        return self._with(count, "ashr", "ashr")

    def magnitude(self) -> Number:
        """Real numbers without their sign."""
        kind = "f32" if not isinstance(self.type, ir.VectorType) else f"v{self.type.count}f32"
        return self.code.intrinsic(f"llvm.fabs.{kind}", self.type, self)

    def compare(self, sign: str, other: Any) -> Number:
        """One bit, or one a lane: false where a number is none (NaN)."""
        b, other = self.code.b, self.code.of(self.type, other)
        how = b.fcmp_ordered if _is_real(self.type) else b.icmp_signed
        return Number(self.code, how(sign, self.value, other.value))

    def at_least(self, other: Any) -> Number:
        """The greater of both; this number where it is none (NaN)."""
        return self.compare("<", other).choose(self.code.of(self.type, other), self)

    def at_most(self, other: Any) -> Number:
        """The smaller of both; this number where it is none (NaN)."""
        return self.compare(">", other).choose(self.code.of(self.type, other), self)

    def choose(self, yes: Number, no: Number) -> Number:
        """Of a comparison: a number where it holds, and another elsewhere."""
        return Number(self.code, self.code.b.select(self.value, yes.value, no.value))

    def spread(self) -> Number:
        """A scalar in every lane."""
        b, kind = self.code.b, lanes(self.type)
        one = b.insert_element(ir.Constant(kind, ir.Undefined), self.value, ir.Constant(I32, 0))
        return Number(self.code, b.shuffle_vector(one, one, ir.Constant(lanes(I32), [0] * LANES)))

    def take(self, where: Sequence[int], other: Number | None = None) -> Number:
        """Lanes of this vector, and of another that follows it."""
        second = self if other is None else other
        return Number(self.code, self.code.b.shuffle_vector(self.value, second.value, ir.Constant(lanes(I32, len(where)), list(where))))

    def lane(self, index: int) -> Number:
        """One lane."""
        return Number(self.code, self.code.b.extract_element(self.value, ir.Constant(I32, index)))

    def to(self, how: str, kind: Any) -> Number:
        """Converted by LLVM's instruction of this name."""
        return Number(self.code, getattr(self.code.b, how)(self.value, kind))

    def bits(self) -> Number:
        """A float32's bits as int32; lane by lane for vectors."""
        return self.to("bitcast", lanes(I32) if isinstance(self.type, ir.VectorType) else I32)

    def total(self) -> Number:
        """The sum of a vector's lanes, halves upon halves."""
        parts = self
        while parts.type.count > 1:
            width = parts.type.count // 2
            parts = parts.take(range(width)) + parts.take(range(width, 2 * width))
        return parts.lane(0)


class Variable:
    """A number that changes from one turn of a loop to the next."""

    def __init__(self, code: Code, start: Number) -> None:
        self._code = code
        with code.b.goto_entry_block():
            self._slot = code.b.alloca(start.type)
        self.set(start)

    def get(self) -> Number:
        """Its number now."""
        return Number(self._code, self._code.b.load(self._slot, typ=self._slot.allocated_type))

    def set(self, number: Number) -> None:
        """Give it a number."""
        self._code.b.store(number.value, self._slot)


class Code:
    """A module of functions, and the one that is being written."""

    def __init__(self) -> None:
        self.module = ir.Module("cpu_decode")
        self.b: Any = None
        self._functions: dict[str, Any] = {}

    @contextmanager
    def function(self, name: str, kinds: Sequence[Any], *, exported: bool = False) -> Iterator[list[Number]]:
        """Write a function of this name without a result; gives its arguments."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), kinds), name)
        if not exported:
            function.linkage = "internal"
            function.attributes.add("noinline")
        function.attributes.add("nounwind")
        set.add(function.attributes, '"no-builtins"')  # loops stay loops: a call of memset would need a library
        self._functions[name] = function
        before, self.b = self.b, ir.IRBuilder(function.append_basic_block())
        yield [Number(self, argument) for argument in function.args]
        self.b.ret_void()
        self.b = before

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function written before; Python's integers are int64."""
        self.b.call(self._functions[name], [self.of(I64, argument).value for argument in arguments])

    def of(self, kind: Any, value: Any) -> Number:
        """A Python number as a constant of a type, in every lane; numbers stay as they are."""
        if isinstance(value, Number):
            return value
        count = getattr(kind, "count", None)
        return Number(self, ir.Constant(kind, value if count is None else [value] * count))

    def numbered(self) -> Number:
        """0, 1, 2... in the lanes, int32."""
        return Number(self, ir.Constant(lanes(I32), list(range(LANES))))

    def load(self, address: Number, kind: Any = I64) -> Number:
        """A number in memory."""
        return Number(self, self.b.load(self.b.inttoptr(address.value, kind.as_pointer()), align=1, typ=kind))

    def store(self, number: Number, address: Number) -> None:
        """Put a number into memory."""
        self.b.store(number.value, self.b.inttoptr(address.value, number.type.as_pointer()), align=1)

    def intrinsic(self, name: str, kind: Any, *arguments: Number) -> Number:
        """Call one of LLVM's functions."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [argument.type for argument in arguments]), name)
        return Number(self, self.b.call(function, [argument.value for argument in arguments]))

    def fma(self, x: Number, y: Number, z: Number) -> Number:
        """x y + z, rounded once."""
        return self.intrinsic(f"llvm.fma.v{LANES}f32", VECTOR, x, y, z)

    def room(self, num_bytes: int) -> Number:
        """Address of memory of the function's own, at a line's begin."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(ir.ArrayType(I8, num_bytes))
            slot.align = 64
        return Number(self, self.b.ptrtoint(slot, I64))

    def pointer(self, address: Number) -> Number:
        """An address as LLVM's functions take one."""
        return Number(self, self.b.inttoptr(address.value, I8.as_pointer()))

    def prefetch(self, address: Number) -> None:
        """Ask for memory, for reading, into the second cache."""
        options = [self.of(I32, value) for value in (0, 2, 1)]
        self.intrinsic("llvm.prefetch.p0", VOID, self.pointer(address), *options)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Number]:
        """For i in range(start, stop, step)."""
        first, last = self.of(I64, start), self.of(I64, stop)
        index = Variable(self, first)
        head, body, after = (self.b.append_basic_block(name) for name in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        self.b.cbranch(index.get().compare("<", last).value, body, after)
        self.b.position_at_end(body)
        yield index.get()
        index.set(index.get() + step)
        self.b.branch(head)
        self.b.position_at_end(after)

    @contextmanager
    def when(self, condition: Number) -> Iterator[None]:
        """Only where a comparison holds."""
        with self.b.if_then(condition.value):
            yield


def counted(code: Code, first: int) -> Number:
    """first, first + 1, ... as int32, one a lane."""
    return Number(code, ir.Constant(lanes(I32), list(range(first, first + LANES))))
