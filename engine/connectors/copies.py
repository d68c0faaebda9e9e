"""Blocks of an engine's GPU pages copied to the host, without a call that waits for the device.

Blocks of all layers are gathered on the device and copied to page-locked memory on a stream of their own, which has been allocated before the first
request: allocating it takes longer than a copy, and waits for the device. A thread takes them from there to ordinary memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from codec.layouts import PagedKv

_ALIGNMENT_BYTES = 256


class HostBuffer:
    """Page-locked memory that is allocated once and handed out in pieces, in any order. Thread-safe.

    Args:
        size_bytes: of all of it. pinned: False where no GPU is there.
    """

    def __init__(self, size_bytes: int, *, pinned: bool = True) -> None:
        self._memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._free: list[tuple[int, int]] = [(0, size_bytes)]  # sorted, none touches another
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Of all pieces that nobody has."""
        return sum(end - start for start, end in self._free)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory as a tensor of this shape, for `give`; None where no piece is large enough."""
        wanted = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            for n, (start, end) in enumerate(self._free):
                rounded = min(-(-wanted // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES, end - start)
                if wanted <= rounded:
                    self._free[n : n + 1] = [(start + rounded, end)] if start + rounded < end else []
                    return self._memory[start : start + wanted].view(dtype).view(*shape)
        return None

    def give(self, tensor: torch.Tensor) -> None:
        """Take back what `take` handed out."""
        start = tensor.data_ptr() - self._memory.data_ptr()
        end = min(start + -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES, len(self._memory))
        with self._lock:
            joined: list[tuple[int, int]] = []
            for piece in sorted([*self._free, (start, end)]):
                joined[-1:] = [(joined[-1][0], piece[1])] if joined and joined[-1][1] == piece[0] else [*joined[-1:], piece]
            self._free = joined


class BlockCopies:
    """Copies blocks of all layers to the host.

    Args:
        layers: every layer's pages as the engine keeps them, alike in shape, dtype and strides.
        axis: of the blocks in a layer's tensor.
        view: of layers that hold some blocks only, as pages.
        buffer_bytes: page-locked memory.
    """

    def __init__(
        self, layers: Sequence[torch.Tensor], axis: int, view: Callable[[Sequence[torch.Tensor]], PagedKv], buffer_bytes: int
    ) -> None:
        self.layers, self.axis, self._view = list(layers), axis, view
        self.device = layers[0].device
        on_gpu = self.device.type == "cuda"
        self._buffer = HostBuffer(buffer_bytes, pinned=on_gpu)
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._gathered: torch.cuda.Event | None = None
        self._thread = ThreadPoolExecutor(1, "foretold-copier")
        self._block_tokens = view([layer.narrow(axis, 0, 1) for layer in layers]).page_size

    @torch.inference_mode()
    def copy(self, blocks: Sequence[int], first: int, last: int) -> tuple[torch.Tensor, Callable[[], Any]]:
        """Tokens [first, last) of a sequence in these blocks, [T, L, 2, G, d] on the host, and what waits until they are there.

        Nothing may be written to the blocks before `before_writes`.
        """
        shape, size = list(self.layers[0].shape), self._block_tokens
        used = list(blocks[first // size : -(-last // size)])
        shape[self.axis] = len(used)
        dtype = self.layers[0].dtype
        names, host = self._host([len(used)], torch.int64), self._host([len(self.layers), *shape], dtype)
        try:
            copied = self._queue(used, names, host)
            view = self._view(list(host))
            out = torch.empty(last - first, len(self.layers), 2, view.num_kv_heads, view.head_dim, dtype=dtype)
            start = first // size * size
            return out, self._thread.submit(self._finish, names, host, view, first - start, out, copied).result
        except BaseException:  # memory that nobody gives back is lost to all later copies
            self._give_back(names, host)
            raise

    def _queue(self, used: list[int], names: torch.Tensor, host: torch.Tensor) -> torch.cuda.Event | None:
        """Gather the blocks of all layers and copy them to the host, on the copies' own stream. Returns what their arrival records."""
        names.copy_(torch.tensor(used, dtype=torch.int64))
        copied: torch.cuda.Event | None = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            places = names.to(self.device, non_blocking=True)
            staged = torch.empty_like(host, device=self.device)
            for layer, out in zip(self.layers, staged, strict=True):
                torch.index_select(layer, self.axis, places, out=out)
            if self._stream is not None:
                self._gathered = self._stream.record_event()
            host.copy_(staged, non_blocking=True)
            if self._stream is not None:
                copied = self._stream.record_event()
        return copied

    def _host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory: of the buffer, or, where that is full, newly allocated, which takes long."""
        found = self._buffer.take(shape, dtype)
        return torch.empty(list(shape), dtype=dtype, pin_memory=self._stream is not None) if found is None else found

    @torch.inference_mode()
    def _finish(self, names: torch.Tensor, host: torch.Tensor, view: PagedKv, start: int, out: torch.Tensor, copied: Any) -> None:
        """In a thread: when a copy has arrived, bring it into the order of tokens and give its memory back."""
        try:
            if copied is not None:
                copied.synchronize()
            for n, (keys, values) in enumerate(zip(view.keys, view.values, strict=True)):
                for half, pages in enumerate((keys, values)):
                    out[:, n, half] = pages.flatten(0, 1)[start : start + len(out)]
        finally:
            self._give_back(names, host)

    def _give_back(self, *pieces: torch.Tensor) -> None:
        for piece in pieces:
            if 0 <= piece.data_ptr() - self._buffer._memory.data_ptr() < len(self._buffer._memory):
                self._buffer.give(piece)

    def before_writes(self) -> None:
        """Have the device's current stream wait until all blocks have been gathered; the caller does not wait."""
        if self._gathered is not None:
            torch.cuda.current_stream(self.device).wait_event(self._gathered)
            self._gathered = None

    def close(self) -> None:
        """End the thread, after what it has to do."""
        self._thread.shutdown()


__all__ = ["BlockCopies", "HostBuffer"]
