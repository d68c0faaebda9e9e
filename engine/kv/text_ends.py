"""What lies beside pages where a known text ends: kept with the page that ends it, at few places of each text, and given up before the pages.

Layers with a window keep their last pages there. A text that grows leaves such ends behind: the last ones stay, and those that others went on from.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from engine.kv.pool import KvPool, KvSequence

ENDS_OF_A_TEXT = 2  # of a growing text that nobody has gone on from, of those where whole chunks end and of the others each


class EndsHere(Protocol):
    """The last page of a text, with what `KvPool.beside` returned."""

    beside: Any


class TextEnds:
    """The known ends of texts in a pool that keeps something beside its pages.

    Where that is pages of other pools, these are given up when somebody needs them: least recently used ones first, those that were gone on from last.

    Args:
        most: ends with pages that are kept, of those that somebody has gone on from and of the others each.
    """

    def __init__(self, pool: KvPool, most: int) -> None:
        self.pool, self.most = pool, most
        self._new: OrderedDict[int, EndsHere] = OrderedDict()  # by id, the least recently used first
        self._used: OrderedDict[int, EndsHere] = OrderedDict()
        self._of_text: WeakKeyDictionary[KvSequence, tuple[deque[EndsHere], deque[EndsHere]]] = WeakKeyDictionary()
        self._owns_pages = len(pool.groups) > 1
        for group in pool.groups[1:]:
            group.reclaim = self._reclaim

    def keep(self, page: EndsHere, beside: Any, text: KvSequence, *, known: bool, whole: bool) -> None:
        """A text ends with this page. known: another text went through it before. whole: a chunk ends here too."""
        page.beside = beside
        if not self._owns_pages:  # copies go with their page
            return
        self.pool.keep_beside(beside)
        places = self._used if known else self._new
        places[id(page)] = page
        if not known:
            own = self._of_text.setdefault(text, (deque(), deque()))[whole]
            own.append(page)
            if len(own) > ENDS_OF_A_TEXT and id(oldest := own.popleft()) in self._new and self._new[id(oldest)] is oldest:
                self.forget(oldest)
        if len(places) > self.most:
            self.forget(next(iter(places.values())))

    def reused(self, page: EndsHere) -> None:
        """A text went on from here."""
        if self._owns_pages:
            self._new.pop(id(page), None)
            self._used[id(page)] = page
            self._used.move_to_end(id(page))

    def forget(self, page: EndsHere) -> None:
        """Nobody goes on from here any more."""
        if page.beside is not None and self._owns_pages:
            self._new.pop(id(page), None)
            self._used.pop(id(page), None)
            self.pool.drop_beside(page.beside)
        page.beside = None

    def _reclaim(self, pool: KvPool, count: int) -> None:
        wanted = pool.num_unowned_pages + count
        for page in self._in_order():
            if pool.num_unowned_pages >= wanted:
                break
            self.forget(page)

    def _in_order(self) -> Iterator[EndsHere]:
        return iter([*chain(self._new.values(), self._used.values())])
