"""Counter-based uniform random numbers (Philox4x32-10), keyed by seed, position and counter."""

from __future__ import annotations

from torch import Tensor

from kernels.dispatch import use_triton
from kernels.philox import reference


def philox_uniform(seed: Tensor, position: Tensor, counter: int) -> Tensor:
    """Uniform float32 numbers in [0, 1), a pure function of (seed, position, counter). seed, position: int64, broadcastable.

    See `reference`.
    """
    if use_triton(seed, position):
        from kernels.philox.triton import philox_uniform as launch

        return launch(seed, position, counter)
    return reference.philox_uniform(seed, position, counter)
