"""Memory that the system hands out on a CPU: pages of zeros that take up room as they are written."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

_ALIGNED_BYTES = 64  # a line of the processor's cache


def mapped(num_bytes: int, what: str) -> mmap.mmap:
    """Private memory of zeros. Raises MemoryError, which names what it was for."""
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {num_bytes:,} bytes for {what}") from error


class HugePages:
    """Room for tensors that every step reads from end to end, in pages of 2 MiB where the system has them.

    In pages of 4 KiB a decoding step takes 1.8 times as long (SmolLM2 in bf16, one core): a processor fetches ahead within a page only, and has to
    look up each page's address. The room is given back when none of its tensors is left.

    Args:
        num_bytes: for all tensors, each rounded up to 64 bytes.
    """

    def __init__(self, num_bytes: int) -> None:
        self._memory = mapped(num_bytes, "weights")
        self._used_bytes = 0
        # a system without such pages, or that does not let programs ask for them, has plain ones
        with contextlib.suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)

    @staticmethod
    def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
        """What a tensor takes."""
        return -(-math.prod(shape) * dtype.itemsize // _ALIGNED_BYTES) * _ALIGNED_BYTES

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this room. Raises ValueError where there is too little left."""
        start, size = self._used_bytes, self.num_bytes(shape, dtype)
        if start + size > len(self._memory):
            raise ValueError(f"{size:,} bytes asked of {len(self._memory) - start:,} left")
        self._used_bytes = start + size
        if not size:
            return torch.zeros(tuple(shape), dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=start).view(tuple(shape))
