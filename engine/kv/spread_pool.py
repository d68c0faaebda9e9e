"""A KV pool whose layers lie on several devices, as the model's do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.kv.pool import KvPool, KvSequence, LayerAngles, PagedPool


class SpreadPool(KvPool):
    """Plain pages whose layers lie on several devices, in a `PagedPool` each: a page has the same number in all of them.

    Args:
        parts: (first layer, pool of the layers from there on), in order, all of one size. Who owns a page is known here alone.
        device: of what is read, and where sequences' page tables go.
    """

    def __init__(self, parts: Sequence[tuple[int, PagedPool]], device: torch.device) -> None:
        one = parts[0][1]
        super().__init__(one.num_pages, one.page_size, one.max_pages)
        self.parts, self._device = tuple(parts), device

    @property
    def device(self) -> torch.device:
        """Where what is read goes."""
        return self._device

    @property
    def bytes(self) -> int:
        """On all devices."""
        return sum(part.bytes for _, part in self.parts)

    @property
    def page_bytes(self) -> int:
        """On all devices."""
        return sum(part.kv.nbytes // part.kv.shape[2] for _, part in self.parts)

    def part_of(self, layer: int) -> tuple[int, PagedPool]:
        """The pool of a layer, and the number of its first layer."""
        return next((first, part) for first, part in reversed(self.parts) if first <= layer)

    def layer(self, index: int) -> Any:
        """Key pages and value pages of a layer, on its device."""
        first, part = self.part_of(index)
        return part.layer(index - first)

    def _from(self, first_layer: int, angles: LayerAngles) -> list[tuple[PagedPool, int, int, LayerAngles]]:
        """Of the parts with layers from first_layer on: the pool, its first such layer by its own count, how many there are, and their angles."""
        found = []
        for first, part in self.parts:
            count = part.kv.shape[0]
            skipped = max(0, first_layer - first)
            if skipped < count:
                tables = tuple((cos.to(part.device), sin.to(part.device)) for cos, sin in angles.tables)
                found.append((part, skipped, count - skipped, LayerAngles(tables, angles.which[first : first + count])))
        return found

    def read(self, sequence: KvSequence, start: int, end: int, first_layer: int, inverse: LayerAngles) -> torch.Tensor:
        """See `KvPool.read`; on `device`."""
        parts = self._from(first_layer, inverse)
        return torch.cat([part.read(sequence, start, end, skipped, own).to(self._device) for part, skipped, _, own in parts], 1)

    def write(self, sequence: KvSequence, start: int, kv: torch.Tensor, first_layer: int, angles: LayerAngles) -> None:
        """See `KvPool.write`."""
        parts = self._from(first_layer, angles)
        for (part, skipped, _, own), rows in zip(parts, kv.split([count for _, _, count, _ in parts], 1), strict=True):
            part.write(sequence, start, rows.to(part.device), skipped, own)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """See `KvPool.copy_pages`."""
        for _, part in self.parts:
            part.copy_pages(sources, targets)

    @property
    def takes_tree_positions(self) -> bool:
        """As plain pages do."""
        return True

    def move(self, sequence: KvSequence, source: int, target: int) -> None:
        """See `KvPool.move`."""
        for _, part in self.parts:
            part.move(sequence, source, target)

    def check_contents(self, sequences: Sequence[KvSequence]) -> None:
        """See `KvPool.check_contents`."""
        assert all(part.kv.shape[2] == self.num_pages for _, part in self.parts), "a part has another page count"

    def _extend(self, num_pages: int) -> None:
        for _, part in self.parts:
            part.resize(num_pages)
