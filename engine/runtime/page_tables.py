"""Page tables of sequences on a device: what captured steps find their pages by, uploaded where a sequence's pages have changed.

A sequence of a pool with windowed layers has a table of their own for each window (`engine.kv.windowed_pool`), in the same row as its other one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kv.pool import KvSequence
from kernels.upload import fill


class StepTables(NamedTuple):
    """The tables of a step's B requests, of P pages each: main [B, P] int32, windows [W, B, P] int32 of the W kinds of windowed layers."""

    main: Tensor
    windows: Tensor


class PageTables:
    """A row for each of so many sequences: tables [rows, P] int32, windows [W, rows, P] int32. Row 0 is padding.

    Entries of pages that a windowed layer has given back stay as they are: pages of the pool, which no token sees there.
    """

    def __init__(self, num_rows: int, max_pages: int, device: torch.device, num_windows: int = 0) -> None:
        self.tables = torch.zeros(num_rows, max_pages, dtype=torch.int32, device=device)
        self.windows = torch.zeros(num_windows, num_rows, max_pages, dtype=torch.int32, device=device)
        self._rows: weakref.WeakKeyDictionary[KvSequence, int] = weakref.WeakKeyDictionary()
        self._known: dict[int, list[tuple[int, list[int]]]] = {}  # of each row's tables: first page, and the pages from there on
        self._free = list(range(num_rows - 1, 0, -1))

    def rows(self, sequences: Sequence[KvSequence]) -> list[int]:
        """The rows of sequences that are run together, fewer than there are rows: each another's, up to date."""
        if sum(sequence not in self._rows for sequence in sequences) > len(self._free):
            # every row may be of a sequence that no longer decodes: all are given out anew, never in the middle of a batch
            self._rows, self._free = weakref.WeakKeyDictionary(), list(range(len(self.tables) - 1, 0, -1))
            self._known.clear()
        return [self._row(sequence) for sequence in sequences]

    def new_step(self, batch: int, pages: int) -> StepTables:
        """Tables of a step of so many requests, of padding until `look_up`."""
        return StepTables(self.tables.new_zeros(batch, pages), self.windows.new_zeros(len(self.windows), batch, pages))

    def look_up(self, rows: Tensor, into: StepTables) -> None:
        """Copy the tables in `rows` [B] int64, as the device has them, into a step's."""
        pages = into.main.shape[1]
        torch.index_select(self.tables[:, :pages], 0, rows, out=into.main)
        if len(self.windows):
            torch.index_select(self.windows[:, :, :pages], 1, rows, out=into.windows)

    def _row(self, sequence: KvSequence) -> int:
        row = self._rows.get(sequence)
        if row is None:
            row = self._rows[sequence] = self._free.pop()
            self._known.pop(row, None)
            weakref.finalize(sequence, self._release, self._rows, row)
        known = self._known.setdefault(row, [(0, []) for _ in range(1 + len(self.windows))])
        for number, own in enumerate((sequence, *sequence.windows)):
            first, pages = known[number]
            if first != own.first_page or pages != own.pages:
                known[number] = own.first_page, list(own.pages)
                table = self.windows[number - 1] if number else self.tables
                fill(table[row, own.first_page : own.first_page + len(own.pages)], own.pages)
        return row

    def _release(self, rows: weakref.WeakKeyDictionary[KvSequence, int], row: int) -> None:
        if rows is self._rows:
            self._free.append(row)
