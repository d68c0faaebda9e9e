"""The layers of any family over a captured step's buffers, operation by operation.

The fused kernels of a decode step (`kernels.decode_layer`) are those of Llama's layers. Windows, soft caps, norms of results, experts and heads of
other sizes run through the decoder's own operations and kernels, as its forward pass does; captured, they are one launch as well. Each row is a
request of its own to the attention: a step's rows know their positions, and padded ones have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.kv.pool import KvPool
from engine.model.attention import AttentionBackend, DeviceBatch, TritonBackend, WindowedBackend
from engine.model.decoder import Decoder
from kernels.decode_layer import DecodeBuffers


class FamilyLayers:
    """Runs a decoder's layers over the buffers of captured steps.

    Args:
        decoder: of any family, on one device.
        pool: its pool of plain pages. num_positions: tokens of the longest context.
    """

    def __init__(self, decoder: Decoder, pool: KvPool, num_positions: int) -> None:
        self.decoder, self.pool = decoder, pool
        locals_ = (False,) if decoder.config.local_rope is None else (False, True)
        self._angles = [decoder.rope_table(local=local).table(num_positions) for local in locals_]  # (cos, sin) [T, d/2] of each RoPE
        self._backends: dict[bool, AttentionBackend] = {}

    def run(
        self,
        buffers: DecodeBuffers,
        layers: range,
        taps: Mapping[int, Tensor],
        windows: tuple[Tensor, Tensor],
        *,
        embed: bool,
        head: bool,
        deterministic: bool,
    ) -> None:
        """Run layers over positions, slots, page tables and token ids (embed) or the residual stream in the buffers.

        windows: page tables [W, B, P] int32 and slots [W, N] int64 of the W kinds of layers that keep their window alone.

        Writes the new tokens' keys and values, buffers.stream, taps[i] [N, E] (the residual stream after i layers), and with `head` buffers.next_tokens
        (-1 where logits are not finite) and buffers.logits where there are some. A padded row (slot and position -1) writes no page; its results mean
        nothing.
        """
        b, decoder = buffers, self.decoder
        backend = self._backend(deterministic)
        rows = len(b.positions)
        at = b.positions.clamp_min(0)
        angles = tuple((cos.index_select(0, at), sin.index_select(0, at)) for cos, sin in self._angles)
        ones = torch.ones(rows, dtype=torch.int32, device=at.device)
        batch = DeviceBatch(angles, b.slots, _of_rows(b.page_table, rows), ones, (at + 1).to(torch.int32), 1)
        own = [replace(batch, page_table=_of_rows(table, rows), slots=slots) for table, slots in zip(*windows, strict=True)]
        set_batches(backend, batch, own)
        # -1 follows logits that are not finite
        stream = decoder.embed(b.token_ids.clamp_min(0)) if embed else b.stream
        stream, taken = decoder.run_layers(stream, backend, layers, tuple(taps))
        b.stream.copy_(stream)
        for tap, into in taps.items():
            into.copy_(taken[tap])
        if head:
            logits = decoder.head(stream, deterministic=deterministic)
            if b.logits is not None:
                b.logits.copy_(logits)
            finite = torch.isfinite(logits).all(-1)
            b.next_tokens.copy_(torch.where(finite, logits.argmax(-1), -1))

    def _backend(self, deterministic: bool) -> AttentionBackend:
        backend = self._backends.get(deterministic)
        if backend is None:
            backend = self._backends[deterministic] = self.decoder.attention_backend(self.pool, deterministic=deterministic, kernels=True)
        return backend


def _of_rows(page_table: Tensor, rows: int) -> Tensor:
    """A table [B, P] for each of the requests' rows, [N, P]."""
    return page_table.repeat_interleave(rows // len(page_table), 0)


def set_batches(backend: AttentionBackend, batch: DeviceBatch, windows: Sequence[DeviceBatch]) -> None:
    """Have the layers of a backend over plain pages read `batch` where they attend to everything, and their own one of `windows` where they have
    pages of their own."""
    backends, batches = [backend], [batch]
    if isinstance(backend, WindowedBackend):
        backends, batches = list(backend.backends), [*([batch] if backend.whole else []), *windows]
    for part, own in zip(backends, batches, strict=True):
        assert isinstance(part, TritonBackend)
        part.batch = own
