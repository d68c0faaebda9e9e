"""Pages that stay in the pool after their request, under the trie, so that another request with the same beginning shares them.

A page of the target's pool and the draft's page of the same tokens are one entry. The cache is one more owner of both; pages that it alone owns count
as free, and are given up when somebody needs pages, those used longest ago and latest in their text first.

Keys and values depend on how sums were ordered when they were computed. What batch-invariant steps wrote lies in a namespace of its own: only that is
shared with requests whose text is promised not to depend on anything but model, prompt, parameters and seed (`Use.INVARIANT`). Of the other pages those
are marked whose tokens ran in whole chunks of a prompt, cut at absolute positions, each alone in its pass: a prompt that is computed has the same
chunks, so a text that goes on from them is the same as without sharing (`Use.CHUNKS`). What was restored from a store has its code's loss; it lies in a
third namespace and keeps its code. Texts that are drawn at random may use all of it (`Use.ANY`).

A greedy request that was interrupted goes on from the pages it wrote itself, as far as they are still there, or from whole chunks (`Use.OWN`): what
others or a store wrote of the same tokens holds other numbers than those it has spoken from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, cast

import numpy as np

from engine.kv.eviction import Lru
from engine.kv.pool import KvPool, KvSequence
from engine.kv.text_ends import TextEnds
from engine.kv.trie import Match, Payload, Tier, Trie

_INVARIANT, _PLAIN, _RESTORED = "invariant:", "plain:", "restored:"  # what the trie's names of a namespace begin with


class Use(Enum):
    """Which pages a request may begin with, by what its text may depend on; the value: of which kinds, the best first."""

    INVARIANT = (_INVARIANT,)
    CHUNKS = (_PLAIN, _RESTORED)
    OWN = (_PLAIN,)
    COMPUTED = (_PLAIN, _INVARIANT)
    ANY = (_PLAIN, _INVARIANT, _RESTORED)


class Code(Protocol):
    """A coded span of tokens [start, end) of a text; `engine.sessions.file.Span`."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


@dataclass
class CachedPage:
    """Pages of the same S tokens: the target's, the draft's (None: it never ran them), and what the target's pool keeps beside pages (`KvPool.beside`)
    where a text that ends with this page goes on. code: the coded span that the page was restored from, of some pages; None: it was computed.
    chunked: whole chunks alone wrote it and all before it. key: what a listener calls it."""

    target: int
    draft: int | None
    beside: object | None
    code: Code | None = None
    chunked: bool = False
    key: int | None = None


class OwnPage(NamedTuple):
    """A kept page that holds what a request wrote, and the target's page that it had then."""

    entry: CachedPage
    target: int

    def holds(self, page: CachedPage) -> bool:
        """Whether a page of the request's text is still that one, and nobody's whole chunks took its place."""
        return page is self.entry and page.target == self.target


class PageListener(Protocol):
    """Told which pages are kept; it must not call the cache."""

    # pages: of the whole text; those from number `first` on are new
    def stored(self, namespace: str, token_ids: np.ndarray, pages: Sequence[CachedPage], first: int) -> None: ...

    def dropped(self, entry: CachedPage) -> None: ...


@dataclass(frozen=True)
class SharedPages:
    """What a request shares. codes: those that its pages were restored from, in order; empty where they were computed. chunked_tokens: of the first
    ones, those that whole chunks alone wrote."""

    tokens: int = 0
    codes: Sequence[Code] = ()
    chunked_tokens: int = 0


@dataclass
class SharingMetrics:
    """requests that were looked up; hits: those that shared pages; hit_tokens: of these, out of lookup_tokens in all prompts; evicted_pages.
    restored_*: those of the hits that shared what a store had given back."""

    requests: int = 0
    hits: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0
    restored_hits: int = 0
    restored_tokens: int = 0


class SharedPrefixes:
    """Known beginnings over a target's pool and the pool of a draft (None: there is none).

    Args:
        pool, draft_pool: of one page size.
        max_pages: most pages of the target's pool that are kept. max_ends: see `TextEnds`.
        computed: whether pages that requests computed are kept, and not only what was restored.
        chunk_tokens: of a whole chunk.
        whole_chunks: whether greedy text goes on from numbers of whole chunks or its own alone, in what lies beside pages too.
        with_drafts: whether a text begins with no more of the target's pages than the draft knows too: a draft that rests on layers which keep a window
            alone could not compute the rest.
    """

    def __init__(
        self,
        pool: KvPool,
        draft_pool: KvPool | None = None,
        *,
        max_pages: int | None = None,
        computed: bool = True,
        chunk_tokens: int = 1,
        with_drafts: bool = False,
        max_ends: int = 1,
        whole_chunks: bool = False,
    ) -> None:
        self.pool, self.draft_pool, self.computed, self.with_drafts = pool, draft_pool, computed, with_drafts
        self.max_pages = pool.max_pages if max_pages is None else max_pages
        self._chunk_pages = math.lcm(chunk_tokens, pool.page_size) // pool.page_size  # after which both a page and a chunk end
        self.metrics = SharingMetrics()
        self.listener: PageListener | None = None
        self.trie = Trie(pool.page_size)
        self._policy = Lru(Tier.HOT)
        self.trie.on_tail = lambda node, tier: self._policy.add(node) if tier == Tier.HOT else None
        self._ends, self.whole_chunks = TextEnds(pool, max_ends), whole_chunks
        pool.reclaim = self._reclaim
        if draft_pool is not None:
            assert draft_pool.page_size == pool.page_size, "both pools have pages of as many tokens"
            draft_pool.reclaim = self._reclaim

    @property
    def num_pages(self) -> int:
        """Pages of the target's pool that are kept, those that requests use as well included."""
        return self.trie.pages_in[Tier.HOT]

    def share(
        self,
        token_ids: Sequence[int] | np.ndarray,
        namespace: str,
        use: Use,
        sequence: KvSequence,
        draft: KvSequence | None,
        own: Sequence[OwnPage] = (),
    ) -> SharedPages:
        """Begin an empty sequence, and that of a draft, with what is known of token_ids, in whole pages and whole codes; returns what is shared.

        At least one token is left to run. The draft's sequence may end up shorter. own: of `Use.OWN`, the pages that the request itself wrote.
        """
        self.metrics.requests += 1
        self.metrics.lookup_tokens += len(token_ids)
        ids = self.trie.token_ids(token_ids[: len(token_ids) - 1])
        found: list[CachedPage] = []
        best: Match | None = None
        for kind in use.value:
            match = self.trie.match(ids, kind + namespace)
            pages = self._usable([payload.data for payload in match.payloads() if payload is not None], use, own)
            if len(pages) > len(found):
                found, best, match = pages, match, best
            if match is not None:
                match.release()
        if best is None:
            return SharedPages()
        with best:
            self.trie.record_request(best, time.monotonic())
            tokens = len(found) * self.pool.page_size
            sequence.share([page.target for page in found], tokens)
            if found[-1].beside is not None:
                self.pool.restore_beside(sequence, found[-1].beside)
                self._ends.reused(found[-1])
            if draft is not None:
                known = [page.draft for page in found]
                drafts = known[: known.index(None)] if None in known else known
                draft.share(cast(list[int], drafts), len(drafts) * self.pool.page_size)
        codes: list[Code] = []
        for page in found:
            if page.code is not None and (not codes or codes[-1] is not page.code):
                codes.append(page.code)
        self.metrics.hits += 1
        self.metrics.hit_tokens += tokens
        self.metrics.restored_hits += bool(codes)
        self.metrics.restored_tokens += tokens * bool(codes)
        return SharedPages(tokens, codes, sum(page.chunked for page in found) * self.pool.page_size)

    def _usable(self, pages: list[CachedPage], use: Use, own: Sequence[OwnPage]) -> list[CachedPage]:
        """The first of these pages of a text that a request may begin with."""
        if self.with_drafts and self.draft_pool is not None:
            pages = pages[: _first(page.draft is None for page in pages)]
        kept, step = len(pages), 1
        if use in (Use.CHUNKS, Use.OWN):
            chunked = _first(not page.chunked for page in pages)
            whole = (
                pages[: chunked // self._chunk_pages * self._chunk_pages] if chunked else pages[: _first(not page.code for page in pages)]
            )
            kept = _first(not mine.holds(page) for mine, page in zip(own, pages, strict=False))
            pages, step = pages[: max(len(whole), kept)], self._chunk_pages if chunked else 1
        while pages and ((len(pages) > kept and len(pages) % step) or (self.pool.keeps_beside and pages[-1].beside is None)):
            pages.pop()
        while pages and (code := pages[-1].code) is not None and code.end > len(pages) * self.pool.page_size:  # a code is used whole
            pages = pages[: code.start // self.pool.page_size] if not self.pool.keeps_beside else []
        return pages

    def insert_restored(
        self, token_ids: Sequence[int], namespace: str, sequence: KvSequence, draft: KvSequence | None, codes: Sequence[Code]
    ) -> None:
        """Keep what a store gave back: all tokens up to the last code's end. Codes must end where pages end; else nothing is kept."""
        size = self.pool.page_size
        if any(code.end % size for code in codes):
            return
        by_page = [code for code in codes for _ in range(code.start // size, code.end // size)]
        self._insert(token_ids, _RESTORED + namespace, sequence, draft, by_page)

    def insert(
        self,
        token_ids: Sequence[int] | np.ndarray,
        namespace: str,
        invariant: bool,
        sequence: KvSequence,
        draft: KvSequence | None,
        *,
        chunked_tokens: int = 0,
    ) -> list[CachedPage]:
        """Keep the whole pages of a sequence's committed tokens, and the draft's pages of the same tokens as far as it has run them.

        invariant: only batch-invariant steps wrote them. chunked_tokens: of the first ones, those that whole chunks alone wrote.
        Returns what is known of these pages now.
        """
        if not self.computed:
            return []
        name = (_INVARIANT if invariant else _PLAIN) + namespace
        return self._insert(token_ids, name, sequence, draft, num_chunked=chunked_tokens // self.pool.page_size)

    def _insert(
        self,
        token_ids: Sequence[int] | np.ndarray,
        name: str,
        sequence: KvSequence,
        draft: KvSequence | None,
        codes: Sequence[Code] | None = None,
        num_chunked: int = 0,
    ) -> list[CachedPage]:
        """codes: one a page, as many as pages are kept; None keeps all whole ones. Returns what is known of these pages now."""
        size = self.pool.page_size
        count = sequence.length // size if codes is None else len(codes)
        if not count:
            return []
        ids = self.trie.token_ids(token_ids[: count * size])
        own: list[int] = [] if draft is None or self.draft_pool is None else draft.pages[: draft.length // size]
        beside = self.pool.beside(sequence, count * size)
        with self.trie.match(ids, name) as known:
            first = known.num_pages
            new = [
                CachedPage(sequence.pages[i], own[i] if i < len(own) else None, None, None if codes is None else codes[i], i < num_chunked)
                for i in range(first, count)
            ]
            self._keep(new)
            page_bytes = self.pool.page_bytes
            payloads = [Payload(entry, Tier.HOT, page_bytes, self._drop) for entry in new]
            match = self.trie.insert(ids, payloads, namespace=name, tier=Tier.HOT, after=known, first_payload=first)
        with match:
            kept = [payload.data for payload in match.payloads() if payload is not None]
            for entry, page in zip(kept[: min(first, num_chunked)], sequence.pages, strict=False):
                if not entry.chunked:  # a whole chunk's page takes the place of what others would not begin with
                    self.pool.keep([page])
                    self.pool.drop([entry.target])
                    self._ends.forget(entry)
                    entry.target, entry.chunked = page, True
            if self.draft_pool is not None:
                for entry, page in zip(kept[:first], own, strict=False):
                    if entry.draft is None:
                        entry.draft = page
                        self.draft_pool.keep([page])
            last, added = kept[-1], count > first
            same = added or name.startswith(_INVARIANT) or (num_chunked >= count and count % self._chunk_pages == 0)
            if last.beside is None and beside is not None and (same or not self.whole_chunks):
                self._ends.keep(last, beside, sequence, known=not added, whole=count % self._chunk_pages == 0)
            self.trie.record_request(match, time.monotonic())
            if self.listener is not None and added:
                self.listener.stored(name.split(":", 1)[1], ids, kept, first)
        self._evict(self.num_pages - self.max_pages)
        return kept

    @staticmethod
    def own_pages(kept: Sequence[CachedPage], sequence: KvSequence) -> list[OwnPage]:
        """The first ones of a text's kept pages that hold what a sequence has, up to one whose tokens were known otherwise."""
        until = _first(entry.target != page for entry, page in zip(kept, sequence.pages, strict=False))
        return [OwnPage(entry, entry.target) for entry in kept[:until]]

    def clear(self) -> None:
        """Forget everything."""
        self._evict(self.num_pages)

    def _keep(self, entries: Sequence[CachedPage]) -> None:
        self.pool.keep([entry.target for entry in entries])
        if self.draft_pool is not None:
            self.draft_pool.keep([entry.draft for entry in entries if entry.draft is not None])

    def _drop(self, entry: CachedPage) -> None:
        if self.listener is not None:
            self.listener.dropped(entry)
        self._ends.forget(entry)
        self.pool.drop([entry.target])
        if entry.draft is not None and self.draft_pool is not None:
            self.draft_pool.drop([entry.draft])

    def _reclaim(self, pool: KvPool, count: int) -> None:
        """Give up pages until `count` more of the pool have no owner, or nothing is left to give up."""
        wanted = pool.num_unowned_pages + count
        while pool.num_unowned_pages < wanted and self._evict(wanted - pool.num_unowned_pages):
            pass

    def _evict(self, count: int) -> int:
        """Forget up to `count` pages; returns how many."""
        left = count
        while left > 0 and (node := self._policy.victim()) is not None:
            pages = min(left, node.num_unlocked(Tier.HOT))
            self.trie.demote(node, Tier.HOT, pages, Tier.GONE)
            left -= pages
        self.metrics.evicted_pages += max(0, count - max(left, 0))
        return max(0, count - max(left, 0))


def _first(marks: Iterable[bool]) -> int:
    """Number of the first that is true; how many there are where none is."""
    number = 0
    for mark in marks:
        if mark:
            break
        number += 1
    return number
