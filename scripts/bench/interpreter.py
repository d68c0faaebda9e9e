"""Runs kernels in Triton's interpreter with a GPU's arithmetic, for tests and for trying benchmarks without one."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any


def compute_like_hardware() -> None:
    """Mend two gaps of Triton's interpreter, and its slowness (`_patch_once`, `_skip_needless_work`).

    float32 is rounded to bfloat16 to nearest even (the interpreter cuts the low bits off), and a product of bfloat16 tiles multiplies their
    values (the interpreter multiplies their bit patterns). Products are summed in float64, so that a row's result does not depend on its
    place in the tile, as it does not on a GPU.
    """
    import numpy as np
    from triton.runtime import interpreter

    if getattr(interpreter, "computes_like_hardware", False):
        return
    interpreter.computes_like_hardware = True
    convert = interpreter._convert_float

    def rounded(source: Any, source_type: Any, target_type: Any, rounding_mode: Any) -> Any:
        if source_type.name == "fp32" and target_type.name == "bf16":
            bits = np.frombuffer(np.asarray(source).tobytes(), dtype=np.uint32)
            nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            not_a_number = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(not_a_number, np.uint16(0x7FC0), nearest).reshape(np.asarray(source).shape)
        return convert(source, source_type, target_type, rounding_mode)

    def values(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle.data.astype(np.float64)
        return (np.asarray(handle.data).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if not a.dtype.scalar.is_floating():
            return multiply(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(values(a), values(b)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    _patch_once(interpreter)
    _skip_needless_work()
    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = create_dot


def _patch_once(interpreter: Any) -> None:
    """Let a running kernel's calls of other functions find `triton.language` as its launch has patched it.

    The interpreter looks through every member of the language at each such call and patches it anew, which takes longer than most functions
    themselves; the launch's own patch is undone at its end either way. NumPy's type of a Triton type is kept, too. A member that the interpreter
    replaced is one call instead of three.
    """
    import triton.language as tl

    patch = interpreter._patch_lang

    @cache
    def languages_of(function: Any) -> list[Any]:
        names = {id(value) for value in function.__globals__.values()}
        return [language for language in (tl, tl.core) if id(language) in names]

    def patch_lang(function: Any) -> Any:
        languages = languages_of(function)
        if languages and all(language.range.__module__ == interpreter.__name__ for language in languages):
            return interpreter._LangPatchScope()  # nothing was changed, so nothing is to be restored
        return patch(function)

    interpreter._patch_lang = patch_lang
    checked = tl.core.builtin(lambda: None).__code__  # asks whether there is a `_semantic`, then calls what it wraps

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = member.__wrapped__ if getattr(member, "__code__", None) is checked else member
        semantic = interpreter.interpreter_semantic

        def replaced(*args: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return inner(*args, **options)

        scope.set_attr(owner, name, replaced)

    interpreter._patch_attr = patch_attr
    of_any, of_scalar = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def numpy_type(kind: Any) -> Any:
        scalar = kind.element_ty if type(kind) is tl.block_type else kind
        return of_scalar(scalar) if type(scalar) is tl.dtype else of_any(kind)

    interpreter._get_np_dtype = numpy_type


def _skip_needless_work() -> None:
    """Let blocks of one shape share their shape's constants, and let operands of one shape pass without being broadcast.

    The interpreter makes a type and a handful of constants for every value of every program; they take longer than NumPy's arithmetic. For every
    sum and product of integers it also computes whether they overflow, as nine operations of the language, and drops the answer (it is asserted
    with `debug` only, which the interpreter's options leave off): that is not computed.
    """
    import triton.language as tl
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    known: dict[tuple[int, ...], tuple[Any, int, Any, Any]] = {}

    def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        given = shape.values if type(shape) is core.tuple else core._unwrap_if_constexpr(shape)
        sizes = tuple([size.value if type(size) is core.constexpr else size for size in given])
        if sizes not in known:
            if not sizes:
                raise TypeError("0d block_type is forbidden")
            constants = core.tuple([core.constexpr(size) for size in sizes])
            known[sizes] = core.tuple(sizes), core.validate_block_shape(sizes), constants, core.constexpr(prod(sizes))
        self.element_ty, self.sizes = element_ty, sizes
        self.shape, self.numel, self.constants, self.count = known[sizes]

    nothing, one = core.tuple([]), core.constexpr(1)

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = (type.constants, type.count) if type.is_block() else (nothing, one)

    broadcast, equal = TritonSemantic.broadcast_impl_value, core.dtype.__eq__

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        if getattr(lhs.type, "sizes", ()) == getattr(rhs.type, "sizes", ()):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__ = make_block_type
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    tl.tensor.__init__ = make_tensor
    TritonSemantic.broadcast_impl_value = broadcast_values
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, binary_op: None
