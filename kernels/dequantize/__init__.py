"""Quantised blocks of GGUF files as bf16, compiled for this processor: some ten times as fast as array operations, which make several passes.

The plain twin is the gguf package's, rounded to bf16 (`engine.hub.gguf.dequantize_rows`): the same bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from kernels.cpu_decode import compiled_available

__all__ = ["BLOCKS", "dequantize_available", "dequantize_to_bf16"]

BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""Formats that are read here, by GGUF's names: numbers and bytes of a block."""


def dequantize_available(kind: str) -> bool:
    """Whether blocks of a format can be turned into numbers here: it is one of `BLOCKS`, llvmlite is installed and loads, and compiled code is not
    switched off. The format's code, if so, is compiled from now on."""
    if kind not in BLOCKS or not compiled_available():
        return False
    try:
        _function(kind)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def dequantize_to_bf16(raw: np.ndarray, kind: str) -> tuple[np.ndarray, float]:
    """Whole blocks of one of `BLOCKS`, contiguous uint8 of any shape, as bf16 numbers and the greatest magnitude before rounding.

    Returns:
        uint16 [numbers] in the order of the blocks, each the nearest bf16 (ties to even) of the float32 that the format defines; the greatest
        magnitude, which is infinite or NaN where a number is.

    Raises:
        ValueError: no contiguous bytes, or no whole blocks.
        KeyError: another format.
    """
    elements, size = BLOCKS[kind]
    if raw.dtype != np.uint8 or not raw.flags.c_contiguous or raw.size % size:
        raise ValueError(f"blocks of {kind} are contiguous bytes, {size} each")
    blocks = raw.size // size
    out, greatest = np.empty(blocks * elements, np.uint16), np.zeros(16, np.int32)
    _function(kind)(raw.ctypes.data, blocks, out.ctypes.data, greatest.ctypes.data)
    return out, float(greatest.max().view(np.float32))  # of bits without signs: in the order of the numbers, NaN above all


@functools.cache
def _function(kind: str) -> Callable[..., None]:
    """Of (blocks' address, their number, address of the numbers, address of 16 greatest), without the interpreter's lock. Compiled in some 60 ms."""
    from kernels.cpu_decode.machine_code import compiled_here
    from kernels.dequantize.program import write_program

    addresses, kept = compiled_here(lambda has: write_program(kind, *BLOCKS[kind]), [kind])
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(addresses[kind])
    function.memory = kept  # type: ignore[attr-defined]
    return function
