"""Runs kernels in Triton's interpreter with a GPU's arithmetic, for tests and for trying benchmarks without one."""

from __future__ import annotations

from functools import cache
from typing import Any


def compute_like_hardware() -> None:
    """Mend two gaps of Triton's interpreter, and a slowness (`_patch_once`).

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
    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = create_dot


def _patch_once(interpreter: Any) -> None:
    """Let a running kernel's calls of other functions find `triton.language` as its launch has patched it.

    The interpreter looks through every member of the language at each such call and patches it anew, which takes longer than most functions
    themselves; the launch's own patch is undone at its end either way. NumPy's type of a Triton type is kept, too.
    """
    import triton.language as tl

    patch = interpreter._patch_lang

    def patch_lang(function: Any) -> Any:
        names = {id(value) for value in function.__globals__.values()}
        languages = [language for language in (tl, tl.core) if id(language) in names]
        if languages and all(language.range.__module__ == interpreter.__name__ for language in languages):
            return interpreter._LangPatchScope()  # nothing was changed, so nothing is to be restored
        return patch(function)

    interpreter._patch_lang = patch_lang
    of_any, of_scalar = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)

    def numpy_type(kind: Any) -> Any:
        scalar = kind.element_ty if type(kind) is tl.block_type else kind
        return of_scalar(scalar) if type(scalar) is tl.dtype else of_any(kind)

    interpreter._get_np_dtype = numpy_type
