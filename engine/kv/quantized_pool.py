"""The pool of the quantised formats q4, q3 and q2: keys and values in few bits while they are attended, and attention over them.

A request's first tokens and its last ones are kept exact beside the codes (`kernels.quantized_kv`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.kv.pool import KvPool, KvSequence, LayerAngles
from kernels.kv_write import kv_write
from kernels.quantized_kv import (
    NUM_RECENT,
    NUM_SINKS,
    RING,
    ChannelMeans,
    QuantizedPages,
    new_pages,
    quantized_kv_write,
)
from kernels.quantized_kv.reference import dequantise
from kernels.rope import apply_rope

FIRST_SLOTS = 2  # sequences with room for exact tokens at first; doubles on demand


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer of a quantised pool, views."""

    pages: QuantizedPages
    means: ChannelMeans
    k_sinks: torch.Tensor  # [R, NUM_SINKS, G, d]
    v_sinks: torch.Tensor
    k_ring: torch.Tensor  # [R, RING, G, d]
    v_ring: torch.Tensor


@dataclass(frozen=True)
class ExactTokens:
    """Copies of a text's exact tokens. length: of the text; sinks [L, 2, NUM_SINKS, G, d]; recent [L, 2, up to NUM_RECENT, G, d], the ones before its
    end."""

    length: int
    sinks: torch.Tensor
    recent: torch.Tensor


class QuantizedPool(KvPool):
    """Pages of codes and scales, one `QuantizedPages` a layer, and for each sequence a slot of exact first and last tokens, never shared.

    Args:
        bits: of a code, 4, 3 or 2.
        means: [L, 2, G, d] float32, calibrated means of keys before rotation and of values.
        num_pages, page_size, max_pages: see `KvPool`.
        dtype: of the exact tokens.

    Raises:
        ValueError: the head size is not one that the formats take.
    """

    def __init__(
        self, bits: int, means: torch.Tensor, num_pages: int, page_size: int = 64, *, dtype: torch.dtype, max_pages: int | None = None
    ) -> None:
        super().__init__(num_pages, page_size, max_pages)
        self.bits = bits
        self._heads, self._head_dim = means.shape[2:]
        self._means = [ChannelMeans(layer[0].contiguous(), layer[1].contiguous()) for layer in means]
        self._pages = [new_pages(bits, num_pages, page_size, self._heads, self._head_dim, means.device) for _ in means]
        shape = len(means), 2, FIRST_SLOTS, NUM_SINKS, self._heads, self._head_dim
        self._sinks = torch.zeros(shape, dtype=dtype, device=means.device)
        self._rings = torch.zeros((*shape[:3], RING, *shape[4:]), dtype=dtype, device=means.device)
        self._slot_of: dict[KvSequence, int] = {}
        self._free_slots = list(range(FIRST_SLOTS))
        self._spare: int | None = None
        self._held_from = [0] * FIRST_SLOTS  # first position of which a slot's ring holds the row

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self._sinks.device

    @property
    def page_bytes(self) -> int:
        """Size of one page over all layers, in bytes; exact tokens are beside it."""
        return sum(t.numel() * t.element_size() for pages in self._pages for t in pages[1:]) // self.num_pages

    @property
    def bytes(self) -> int:
        """Size of codes, scales and exact tokens in bytes."""
        return self.page_bytes * self.num_pages + self.slot_bytes * len(self._held_from)

    @property
    def slot_bytes(self) -> int:
        """Size of one sequence's exact tokens over all layers, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self._sinks, self._rings)) // len(self._held_from)

    def bytes_of(self, sequence: KvSequence) -> int:
        """Its pages, and its exact tokens."""
        return super().bytes_of(sequence) + self.slot_bytes * (sequence in self._slot_of)

    def layer(self, index: int) -> QuantizedLayer:
        """What a layer's attention reads and writes."""
        exact = (tensor[index, part] for tensor in (self._sinks, self._rings) for part in (0, 1))
        return QuantizedLayer(self._pages[index], self._means[index], *exact)

    def exact_row(self, sequence: KvSequence) -> int:
        """Slot of the exact tokens of a sequence; taken at first use, given back with its last page. Slots double when they run out, which replaces the
        tensors that hold them."""
        if sequence not in self._slot_of:
            slot = self._slot_of[sequence] = self._take_slot()
            self._held_from[slot] = sys.maxsize
        return self._slot_of[sequence]

    def spare_row(self) -> int:
        """A slot that no sequence owns, for rows that nobody reads; the same one every time."""
        if self._spare is None:
            self._spare = self._take_slot()
        return self._spare

    @torch.inference_mode(False)  # outlives the step that asked for it, and is written outside of steps too
    def _take_slot(self) -> int:
        if not self._free_slots:
            count = len(self._held_from)
            self._sinks, self._rings = (torch.cat((t, torch.zeros_like(t)), 2) for t in (self._sinks, self._rings))
            self._free_slots = list(range(count, 2 * count))
            self._held_from += [0] * count
        return self._free_slots.pop()

    def note_written(self, sequence: KvSequence, start: int, end: int) -> int:
        """Tokens [start, end) are about to be written; returns the first position before them whose exact row is held (start: none is)."""
        slot = self.exact_row(sequence)
        since = min(self._held_from[slot], start)
        self._held_from[slot] = max(since, end - RING)
        return since

    def emptied(self, sequence: KvSequence) -> None:
        """Its exact tokens are forgotten."""
        slot = self._slot_of.pop(sequence, None)
        if slot is not None:
            self._free_slots.append(slot)

    def forked(self, source: KvSequence, copy: KvSequence) -> None:
        """The copy gets exact tokens of its own: the first ones, and of the last ones before its end those that are still held."""
        if source in self._slot_of and copy.length:
            old, new = self.exact_row(source), self.exact_row(copy)
            for tensor in (self._sinks, self._rings):
                tensor[:, :, new] = tensor[:, :, old]
            self._held_from[new] = self._held_from[old]

    @property
    def keeps_beside(self) -> bool:
        """Exact tokens are."""
        return True

    def beside(self, sequence: KvSequence, length: int) -> ExactTokens | None:
        """Copies of the first tokens, and of the last ones before `length`; None where some of these are no longer held exactly."""
        slot = self._slot_of.get(sequence)
        first = max(0, length - NUM_RECENT)
        if slot is None or self._held_from[slot] > first:
            return None
        places = torch.arange(first, length, device=self.device) % RING
        return ExactTokens(length, self._sinks[:, :, slot].clone(), self._rings[:, :, slot, places])

    def restore_beside(self, sequence: KvSequence, beside: ExactTokens) -> None:
        """See `KvPool.restore_beside`."""
        assert sequence.length == beside.length, "exact tokens belong to a text of one length"
        slot, first = self.exact_row(sequence), max(0, beside.length - NUM_RECENT)
        self._sinks[:, :, slot] = beside.sinks
        self._rings[:, :, slot, torch.arange(first, beside.length, device=self.device) % RING] = beside.recent
        self._held_from[slot] = first

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """See `KvPool.copy_pages`."""
        for layer in self._pages:
            for tensor in layer[1:]:
                tensor[targets] = tensor[sources]

    def check_contents(self, sequences: Sequence[KvSequence]) -> None:
        """See `KvPool.check_contents`: every slot of exact tokens is one sequence's own or free."""
        spare = [] if self._spare is None else [self._spare]
        slots = sorted([*self._slot_of.values(), *self._free_slots, *spare])
        assert slots == list(range(len(self._held_from))), "a slot of exact tokens is lost, or is two sequences'"
        assert set(self._slot_of) <= set(sequences), "a sequence that was freed keeps exact tokens"

    @torch.inference_mode(False)  # outlives the step that asked for it, and is written outside of steps too
    def _extend(self, num_pages: int) -> None:
        for number, old in enumerate(self._pages):
            new = new_pages(self.bits, num_pages, self.page_size, self._heads, self._head_dim, self.device)
            for ours, theirs in zip(new[1:], old[1:], strict=True):
                ours[: len(theirs)] = theirs
            self._pages[number] = new

    def read(self, sequence: KvSequence, start: int, end: int, first_layer: int, inverse: LayerAngles) -> torch.Tensor:
        """See `PagedPool.read`: the codes' values, the exact ones of first tokens."""
        pages, offsets = sequence.addresses(start, end)
        sinks = max(0, min(end, NUM_SINKS) - start)
        kv = torch.empty(
            end - start, len(self._pages) - first_layer, 2, self._heads, self._head_dim, dtype=torch.float32, device=self.device
        )
        for number in range(first_layer, len(self._pages)):
            layer = self.layer(number)
            codes, out = layer.pages, kv[:, number - first_layer]
            keys = dequantise(codes.k_codes[pages, :, offsets], codes.k_scale[pages, :, offsets], self.bits, self._head_dim)
            values = dequantise(codes.v_codes[pages, :, offsets], codes.v_scale[pages, :, offsets], self.bits, self._head_dim)
            cos, sin = inverse.of(number)
            out[:, 0] = apply_rope(keys, cos, sin)
            if layer.means.k_mean is not None:
                out[:, 0] += layer.means.k_mean
            out[:, 1] = values + layer.means.v_mean
            if sinks:
                slot = self.exact_row(sequence)
                keys = layer.k_sinks[slot, start : start + sinks].float()
                out[:sinks, 0] = apply_rope(keys, cos[:sinks], sin[:sinks])
                out[:sinks, 1] = layer.v_sinks[slot, start : start + sinks].float()
        return kv

    def write(self, sequence: KvSequence, start: int, kv: torch.Tensor, first_layer: int, angles: LayerAngles) -> None:
        """See `PagedPool.write`."""
        pages, offsets = sequence.addresses(start, start + len(kv))
        if not len(kv):
            return
        slots, end, row = pages * self.page_size + offsets, start + len(kv), self.exact_row(sequence)
        self.note_written(sequence, start, end)
        sinks, recent = max(0, min(end, NUM_SINKS) - start), max(0, len(kv) - RING)
        sink_slots = row * NUM_SINKS + torch.arange(start, start + sinks, device=self.device)
        ring_slots = row * RING + torch.arange(start + recent, end, device=self.device) % RING
        for number in range(first_layer, len(self._pages)):
            layer, rows, own = self.layer(number), kv[:, number - first_layer], angles.of(number)
            quantized_kv_write(rows[:, 0], rows[:, 1], *own, slots, layer.means, layer.pages)
            if sinks:
                few = [t[:sinks] for t in (rows[:, 0], rows[:, 1], *own)]
                kv_write(few[0], few[1], few[2], few[3], sink_slots, layer.k_sinks, layer.v_sinks)
            last = [t[recent:] for t in (rows[:, 0], rows[:, 1], *own)]
            kv_write(last[0], last[1], last[2], last[3], ring_slots, layer.k_ring, layer.v_ring)
