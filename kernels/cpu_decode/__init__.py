"""A decode step on a CPU: products of few rows with bf16 or quantised weights, and whole layers in one call. Compiled by Numba, an optional package."""

from __future__ import annotations

import functools
import importlib.util
import os

from kernels.dispatch import VARIABLE

__all__ = ["MOST_ROWS", "compiled_available", "compiled_loads"]

MOST_ROWS = 16  # up to which the compiled products are as fast as a library's, which multiply many rows at once


@functools.cache
def _importable() -> bool:
    return importlib.util.find_spec("numba") is not None


def compiled_available() -> bool:
    """Whether the compiled step can run: Numba is installed, and FORETOLD_KERNELS does not ask for plain PyTorch."""
    return os.environ.get(VARIABLE, "") != "reference" and _importable()


@functools.cache
def compiled_loads() -> bool:
    """Whether the compiled step could be loaded, which takes most of a second. Not where neither the package's folder nor the user's cache folder can
    be written: Numba has nowhere to keep what it compiles, and every start would compile for some 10 seconds."""
    try:
        import kernels.cpu_decode.compiled  # noqa: F401
    except (RuntimeError, OSError):
        return False
    return True
