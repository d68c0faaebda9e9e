"""The pool of the hot formats q4, q3 and q2: keys and values in few bits while they are attended, and attention over them.

A request's first tokens are kept exact beside the codes (`kernels.hot_kv`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.pool import KvPool, KvSequence
from kernels.hot_kv import NUM_SINKS, HotMeans, HotPages, HotSinks, hot_kv_write, hot_paged_attention, new_pages
from kernels.hot_kv.reference import dequantise
from kernels.kv_write import kv_write
from kernels.rope import apply_rope


class HotBatch(NamedTuple):
    """What all layers of one forward pass over a hot pool share: tensors on the device."""

    cos: torch.Tensor  # [N, d/2] float32
    sin: torch.Tensor  # [N, d/2] float32
    slots: torch.Tensor  # [N] int64
    page_table: torch.Tensor  # [B, max_pages] int32
    query_lens: torch.Tensor  # [B] int32
    context_lens: torch.Tensor  # [B] int32, the new tokens included
    max_query_len: int
    tables: tuple[torch.Tensor, torch.Tensor]  # cos and sin [positions, d/2] float32 of all positions up to the longest context
    sink_rows: torch.Tensor  # [B] int32, where each request's first tokens lie
    new_sinks: tuple[torch.Tensor, torch.Tensor] | None  # of the N tokens those that are first ones, [M] int64, and their sink slots


@dataclass(frozen=True)
class HotLayer:
    """One layer of a hot pool, views."""

    pages: HotPages
    means: HotMeans
    k_sinks: torch.Tensor  # [R, NUM_SINKS, G, d]
    v_sinks: torch.Tensor

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: HotBatch, scale: float, *, deterministic: bool
    ) -> torch.Tensor:
        """Write new keys [N, G, d] and values, then attend: queries [N, H, d], neither rotated yet -> [N, H, d]."""
        hot_kv_write(k, v, batch.cos, batch.sin, batch.slots, self.means, self.pages)
        if batch.new_sinks is not None:
            rows, slots = batch.new_sinks
            kv_write(k[rows], v[rows], batch.cos[rows], batch.sin[rows], slots, self.k_sinks, self.v_sinks)
        rotated = apply_rope(q, batch.cos, batch.sin)
        return hot_paged_attention(
            rotated, self.pages, self.means, *batch.tables, batch.page_table, batch.query_lens, batch.context_lens, scale,
            sinks=HotSinks(self.k_sinks, self.v_sinks, batch.sink_rows), deterministic=deterministic, max_query_len=batch.max_query_len,
        )  # fmt: skip


class HotPool(KvPool):
    """Pages of codes and scales, one `HotPages` a layer, and a slot of exact first tokens for each first page in use.

    Args:
        bits: of a code, 4, 3 or 2.
        means: [L, 2, G, d] float32, calibrated means of keys before rotation and of values.
        num_pages, page_size, max_pages: see `KvPool`.
        dtype: of the exact first tokens.

    Raises:
        ValueError: the head size is not one that the formats take.
    """

    def __init__(
        self, bits: int, means: torch.Tensor, num_pages: int, page_size: int = 64, *, dtype: torch.dtype, max_pages: int | None = None
    ) -> None:
        super().__init__(num_pages, page_size, max_pages)
        self.bits = bits
        self._heads, self._head_dim = means.shape[2:]
        self._means = [HotMeans(layer[0].contiguous(), layer[1].contiguous()) for layer in means]
        self._pages = [new_pages(bits, num_pages, page_size, self._heads, self._head_dim, means.device) for _ in means]
        self._sinks = torch.zeros(len(means), 2, 4, NUM_SINKS, self._heads, self._head_dim, dtype=dtype, device=means.device)
        self._slot_of_page: dict[int, int] = {}
        self._free_slots = list(range(self._sinks.shape[2]))

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._sinks.device

    @property
    def page_bytes(self) -> int:
        """Size of one page over all layers, in bytes; exact first tokens are beside it."""
        return sum(t.numel() * t.element_size() for pages in self._pages for t in pages[1:]) // self.num_pages

    @property
    def bytes(self) -> int:
        """Size of codes, scales and exact first tokens in bytes."""
        return self.page_bytes * self.num_pages + self._sinks.numel() * self._sinks.element_size()

    def bytes_of(self, sequence: KvSequence) -> int:
        """Its pages, and its exact first tokens."""
        slot = self._sinks.numel() * self._sinks.element_size() // self._sinks.shape[2]
        return super().bytes_of(sequence) + slot * any(page in self._slot_of_page for page in sequence.pages[:1])

    def layer(self, index: int) -> HotLayer:
        """What a layer's attention reads and writes."""
        return HotLayer(self._pages[index], self._means[index], self._sinks[index, 0], self._sinks[index, 1])

    def sink_row(self, sequence: KvSequence) -> int:
        """Slot of the exact first tokens of a sequence that owns a page; taken at first use, given back with the page."""
        first = sequence.pages[0]
        if first not in self._slot_of_page:
            if not self._free_slots:
                count = self._sinks.shape[2]
                self._sinks = torch.cat((self._sinks, torch.zeros_like(self._sinks)), 2)
                self._free_slots = list(range(count, 2 * count))
            self._slot_of_page[first] = self._free_slots.pop()
        return self._slot_of_page[first]

    def release(self, pages: list[int]) -> None:
        """Take one owner off each page; those without owner are free, and their exact first tokens are forgotten."""
        super().release(pages)
        self._free_slots += [self._slot_of_page.pop(page) for page in pages if page in self._slot_of_page and self.is_free(page)]

    def _extend(self, num_pages: int) -> None:
        for number, old in enumerate(self._pages):
            new = new_pages(self.bits, num_pages, self.page_size, self._heads, self._head_dim, self.device)
            for ours, theirs in zip(new[1:], old[1:], strict=True):
                ours[: len(theirs)] = theirs
            self._pages[number] = new

    def read(
        self, sequence: KvSequence, start: int, end: int, first_layer: int, inverse: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """See `PagedPool.read`: the codes' values, the exact ones of first tokens."""
        pages, offsets = sequence.addresses(start, end)
        sinks = max(0, min(end, NUM_SINKS) - start)
        kv = torch.empty(end - start, len(self._pages) - first_layer, 2, self._heads, self._head_dim, device=self.device)
        for number in range(first_layer, len(self._pages)):
            layer = self.layer(number)
            hot, out = layer.pages, kv[:, number - first_layer]
            keys = dequantise(hot.k_codes[pages, :, offsets], hot.k_scale[pages, :, offsets], self.bits, self._head_dim)
            values = dequantise(hot.v_codes[pages, :, offsets], hot.v_scale[pages, :, offsets], self.bits, self._head_dim)
            out[:, 0] = apply_rope(keys, *inverse)
            if layer.means.k_mean is not None:
                out[:, 0] += layer.means.k_mean
            out[:, 1] = values + layer.means.v_mean
            if sinks:
                slot = self.sink_row(sequence)
                keys = layer.k_sinks[slot, start : start + sinks].float()
                out[:sinks, 0] = apply_rope(keys, inverse[0][:sinks], inverse[1][:sinks])
                out[:sinks, 1] = layer.v_sinks[slot, start : start + sinks].float()
        return kv

    def write(
        self, sequence: KvSequence, start: int, kv: torch.Tensor, first_layer: int, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """See `PagedPool.write`."""
        pages, offsets = sequence.addresses(start, start + len(kv))
        if not len(kv):
            return
        slots, sinks = pages * self.page_size + offsets, max(0, min(start + len(kv), NUM_SINKS) - start)
        for number in range(first_layer, len(self._pages)):
            layer, rows = self.layer(number), kv[:, number - first_layer]
            hot_kv_write(rows[:, 0], rows[:, 1], *angles, slots, layer.means, layer.pages)
            if sinks:
                first = self.sink_row(sequence) * NUM_SINKS + torch.arange(start, start + sinks, device=self.device)
                few = [t[:sinks] for t in (rows[:, 0], rows[:, 1], *angles)]
                kv_write(few[0], few[1], few[2], few[3], first, layer.k_sinks, layer.v_sinks)
