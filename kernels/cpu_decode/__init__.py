"""A decode step on a CPU: products of few rows with bf16 or quantised weights, and whole layers in one call. Compiled by Numba, an optional package."""

from __future__ import annotations

import functools
import importlib.util
import os

from kernels.dispatch import VARIABLE

__all__ = ["MOST_ROWS", "compiled_available"]

MOST_ROWS = 16  # up to which the compiled products are as fast as a library's, which multiply many rows at once


@functools.cache
def _importable() -> bool:
    return importlib.util.find_spec("numba") is not None


def compiled_available() -> bool:
    """Whether the compiled step can run: Numba is installed, and FORETOLD_KERNELS does not ask for plain PyTorch."""
    return os.environ.get(VARIABLE, "") != "reference" and _importable()
