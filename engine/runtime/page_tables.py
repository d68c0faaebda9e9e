"""Page tables of sequences on a device: what captured steps find their pages by, uploaded where a sequence's pages have changed.

A sequence of a pool with windowed layers has a table of their own for each window (`engine.kv.windowed_pool`), in the same row as its other one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from engine.kv.pool import KvSequence
from kernels.upload import fill, upload_arrays


class StepTables(NamedTuple):
    """The tables of a step's B requests, of P pages each: main [B, P] int32, windows [W, B, P] int32 of the W kinds of windowed layers."""

    main: Tensor
    windows: Tensor


class _Row(NamedTuple):
    """A sequence's row, and what its tables hold: their first pages, and the pages from there on."""

    number: int
    first_pages: list[int]
    pages: list[list[int]]


class _Entries(NamedTuple):
    """Pages that follow one another in a row of a table, from place `first` on."""

    row: int
    first: int
    pages: list[int]


class PageTables:
    """A row for each of so many sequences: tables [rows, P] int32, windows [W, rows, P] int32. Row 0 is padding.

    Entries of pages that a windowed layer has given back stay as they are: pages of the pool, which no token sees there.
    """

    def __init__(self, num_rows: int, max_pages: int, device: torch.device, num_windows: int = 0) -> None:
        self.tables = torch.zeros(num_rows, max_pages, dtype=torch.int32, device=device)
        self.windows = torch.zeros(num_windows, num_rows, max_pages, dtype=torch.int32, device=device)
        self._rows: dict[int, _Row] = {}  # by the identity of the sequence, which leaves it when it ends
        self._free = list(range(num_rows - 1, 0, -1))

    def rows(self, sequences: Sequence[KvSequence]) -> list[int]:
        """The rows of sequences that are run together, fewer than there are rows: each another's, up to date."""
        found = [self._rows.get(id(sequence)) for sequence in sequences]
        if None in found:
            if found.count(None) > len(self._free):
                # every row may be of a sequence that no longer decodes: all are given out anew, never in the middle of a batch
                self._rows, self._free, found = {}, list(range(len(self.tables) - 1, 0, -1)), [None] * len(found)
            found = [self._new_row(sequence) if own is None else own for own, sequence in zip(found, sequences, strict=True)]
        changed: list[list[_Entries]] | None = None
        for own, sequence in zip(cast(list[_Row], found), sequences, strict=True):
            if own.pages[0] != sequence.pages or own.first_pages[0] != sequence.first_page or sequence.windows:
                changed = [[] for _ in range(1 + len(self.windows))] if changed is None else changed
                self._note(own, sequence, changed)
        if changed is not None:
            self._write(changed)
        return [cast(_Row, own).number for own in found]

    def new_step(self, batch: int, pages: int) -> StepTables:
        """Tables of a step of so many requests, of padding until `look_up`."""
        return StepTables(self.tables.new_zeros(batch, pages), self.windows.new_zeros(len(self.windows), batch, pages))

    def look_up(self, rows: Tensor, into: StepTables) -> None:
        """Copy the tables in `rows` [B] int64, as the device has them, into a step's."""
        pages = into.main.shape[1]
        torch.index_select(self.tables[:, :pages], 0, rows, out=into.main)
        if len(self.windows):
            torch.index_select(self.windows[:, :, :pages], 1, rows, out=into.windows)

    def _new_row(self, sequence: KvSequence) -> _Row:
        own = self._rows.get(id(sequence))  # twice in a batch
        if own is None:
            tables = 1 + len(self.windows)
            own = self._rows[id(sequence)] = _Row(self._free.pop(), [0] * tables, [[] for _ in range(tables)])
            weakref.finalize(sequence, self._release, self._rows, id(sequence), own.number)
        return own

    @staticmethod
    def _note(own: _Row, sequence: KvSequence, changed: list[list[_Entries]]) -> None:
        """Append the entries that are others now to their table's."""
        for number, part in enumerate((sequence, *sequence.windows)):
            first, known = own.first_pages[number], own.pages[number]
            if first == part.first_page and known == part.pages:
                continue
            # most often pages were taken behind those it had
            same = len(known) if first == part.first_page and known == part.pages[: len(known)] else 0
            if same < len(part.pages):
                changed[number].append(_Entries(own.number, part.first_page + same, part.pages[same:]))
            own.first_pages[number], own.pages[number] = part.first_page, list(part.pages)

    def _write(self, changed: Sequence[Sequence[_Entries]]) -> None:
        """Each table's entries at once."""
        for table, entries in zip((self.tables, *self.windows), changed, strict=True):
            if len(entries) == 1:
                [(row, first, pages)] = entries
                fill(table[row, first : first + len(pages)], pages)
            elif entries:
                counts = [len(own.pages) for own in entries]
                rows = np.repeat([own.row for own in entries], counts)
                places = np.concatenate([np.arange(own.first, own.first + count) for own, count in zip(entries, counts, strict=True)])
                taken = np.concatenate([np.asarray(own.pages) for own in entries])
                at_rows, at_places, values = upload_arrays([rows, places, taken], table.device).view(3, -1)
                table[at_rows, at_places] = values.to(table.dtype)

    def _release(self, rows: dict[int, _Row], sequence: int, number: int) -> None:
        if rows is self._rows:
            del rows[sequence]
            self._free.append(number)
