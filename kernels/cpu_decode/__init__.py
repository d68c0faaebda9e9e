"""A decode step on a CPU: products of few rows with bf16 or quantised weights, and whole layers in one call. Compiled by llvmlite, if it is there."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re

from kernels.dispatch import VARIABLE

__all__ = ["compiled_available", "compiled_loads", "most_rows"]


_MOST_ROWS, _LEAST_MOST_ROWS = 48, 16
_MOST_ROWS_OF_MATRICES = (
    96  # where the processor multiplies matrices: 64 rows 47 ms and the library's 83, 128 rows 104 and 112 (SmolLM2, one thread)
)
_LEAST_VERSION = (0, 44)  # earlier ones lack LLVM's pass builder; Numba's own may be one


@functools.cache
def _importable() -> bool:
    if importlib.util.find_spec("llvmlite") is None:
        return False
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("llvmlite"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return found is not None and (int(found[1]), int(found[2])) >= _LEAST_VERSION


def most_rows(threads: int, *, plain: bool = True) -> int:
    """Rows up to which compiled products, of one thread, are faster than a library's of so many threads, which multiplies many rows at once.

    plain: with bf16 weights as they are, which a processor may multiply as matrices; else with weights in few bits.
    """
    from kernels.cpu_decode.machine_code import allows_tiles

    return max(_LEAST_MOST_ROWS, (_MOST_ROWS_OF_MATRICES if plain and allows_tiles() else _MOST_ROWS) // threads)


def compiled_available() -> bool:
    """Whether the compiled step can run: llvmlite is installed (0.44 or newer), and FORETOLD_KERNELS does not ask for plain PyTorch."""
    return os.environ.get(VARIABLE, "") != "reference" and _importable()


@functools.cache
def compiled_loads() -> bool:
    """Whether the compiled step could be loaded: compiled in about a second at a machine's first start, later read from the cache folder. Not where
    memory cannot be made executable, or llvmlite is damaged."""
    try:
        import kernels.cpu_decode.step  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True
