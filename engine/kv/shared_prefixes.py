"""Pages that stay in the pool after their request, under the trie, so that another request with the same beginning shares them.

A page of the target's pool and the draft's page of the same tokens are one entry. The cache is one more owner of both; pages that it alone owns count
as free, and are given up when somebody needs pages, those used longest ago and latest in their text first.

Keys and values depend on how sums were ordered when they were computed. What batch-invariant steps wrote lies in a namespace of its own: only that is
shared with requests whose text is promised not to depend on anything but model, prompt, parameters and seed; all others may use both. What was restored
from a store has its code's loss; it lies in a third namespace, which those others may use as well, and keeps its code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.kv.eviction import Lru
from engine.kv.pool import KvPool, KvSequence
from engine.kv.trie import Payload, Tier, Trie

_INVARIANT, _PLAIN, _RESTORED = "invariant:", "plain:", "restored:"  # what the trie's names of a namespace begin with


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
    key: what a listener calls it."""

    target: int
    draft: int | None
    beside: object | None
    code: Code | None = None
    key: int | None = None


class PageListener(Protocol):
    """Told which pages are kept; it must not call the cache."""

    def stored(
        self, namespace: str, token_ids: Sequence[int], entries: Sequence[tuple[int, CachedPage]]
    ) -> None: ...  # (number in the text, page)

    def dropped(self, entry: CachedPage) -> None: ...


@dataclass(frozen=True)
class SharedPages:
    """What a request shares. codes: those that its pages were restored from, in order; empty where they were computed."""

    tokens: int = 0
    codes: Sequence[Code] = ()


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
        max_pages: most pages of the target's pool that are kept.
        computed: whether pages that requests computed are kept, and not only what was restored.
    """

    def __init__(self, pool: KvPool, draft_pool: KvPool | None = None, *, max_pages: int | None = None, computed: bool = True) -> None:
        self.pool, self.draft_pool, self.computed = pool, draft_pool, computed
        self.max_pages = pool.max_pages if max_pages is None else max_pages
        self.metrics = SharingMetrics()
        self.listener: PageListener | None = None
        self.trie = Trie(pool.page_size)
        self._policy = Lru(Tier.HOT)
        self.trie.on_tail = lambda node, tier: self._policy.add(node) if tier == Tier.HOT else None
        pool.reclaim = self._reclaim
        if draft_pool is not None:
            assert draft_pool.page_size == pool.page_size, "both pools have pages of as many tokens"
            draft_pool.reclaim = self._reclaim

    @property
    def num_pages(self) -> int:
        """Pages of the target's pool that are kept, those that requests use as well included."""
        return self.trie.pages_in[Tier.HOT]

    def share(
        self, token_ids: Sequence[int], namespace: str, invariant: bool, sequence: KvSequence, draft: KvSequence | None
    ) -> SharedPages:
        """Begin an empty sequence, and that of a draft, with what is known of token_ids, in whole pages and whole codes; returns what is shared.

        At least one token is left to run. The draft's sequence may end up shorter. invariant: use only what batch-invariant steps wrote.
        """
        self.metrics.requests += 1
        self.metrics.lookup_tokens += len(token_ids)
        name = (_INVARIANT if invariant else _PLAIN) + namespace
        if not invariant:
            self.trie.share_namespace(name, _INVARIANT + namespace)
            self.trie.share_namespace(name, _RESTORED + namespace)
        with self.trie.match(token_ids[: len(token_ids) - 1], name) as match:
            found = [payload.data for payload in match.payloads() if payload is not None]
            while found and self.pool.keeps_beside and found[-1].beside is None:
                found.pop()
            codes: list[Code] = []
            for page in found:
                if page.code is not None and (not codes or codes[-1] is not page.code):
                    codes.append(page.code)
            while codes and codes[-1].end > len(found) * self.pool.page_size:  # a code is used whole
                codes.pop()
                found = found[: codes[-1].end // self.pool.page_size] if codes and not self.pool.keeps_beside else []
            if not found:
                return SharedPages()
            self.trie.record_request(match, time.monotonic())
            tokens = len(found) * self.pool.page_size
            sequence.share([page.target for page in found], tokens)
            if found[-1].beside is not None:
                self.pool.restore_beside(sequence, found[-1].beside)
            if draft is not None:
                pages = []
                for page in found:
                    if page.draft is None:
                        break
                    pages.append(page.draft)
                draft.share(pages, len(pages) * self.pool.page_size)
        self.metrics.hits += 1
        self.metrics.hit_tokens += tokens
        self.metrics.restored_hits += bool(codes)
        self.metrics.restored_tokens += tokens * bool(codes)
        return SharedPages(tokens, codes)

    def insert_restored(
        self, token_ids: Sequence[int], namespace: str, sequence: KvSequence, draft: KvSequence | None, codes: Sequence[Code]
    ) -> None:
        """Keep what a store gave back: all tokens up to the last code's end. Codes must end where pages end; else nothing is kept."""
        size = self.pool.page_size
        if any(code.end % size for code in codes):
            return
        by_page = [code for code in codes for _ in range(code.start // size, code.end // size)]
        self._insert(token_ids, _RESTORED + namespace, sequence, draft, by_page)

    def insert(self, token_ids: Sequence[int], namespace: str, invariant: bool, sequence: KvSequence, draft: KvSequence | None) -> None:
        """Keep the whole pages of a sequence's committed tokens, and the draft's pages of the same tokens as far as it has run them.

        invariant: only batch-invariant steps wrote them.
        """
        if self.computed:
            self._insert(token_ids, (_INVARIANT if invariant else _PLAIN) + namespace, sequence, draft)

    def _insert(
        self, token_ids: Sequence[int], name: str, sequence: KvSequence, draft: KvSequence | None, codes: Sequence[Code] | None = None
    ) -> None:
        """codes: one a page, as many as pages are kept; None keeps all whole ones."""
        size = self.pool.page_size
        count = sequence.length // size if codes is None else len(codes)
        if not count:
            return
        own = [] if draft is None or self.draft_pool is None else draft.pages[: draft.length // size]
        beside = self.pool.beside(sequence, count * size)
        payloads = []
        for i, page in enumerate(sequence.pages[:count]):
            entry = CachedPage(
                page, own[i] if i < len(own) else None, beside if i == count - 1 else None, None if codes is None else codes[i]
            )
            payloads.append(Payload(entry, Tier.HOT, self.pool.page_bytes, self._drop))
            self._keep(entry)
        with self.trie.insert(token_ids[: count * size], payloads, namespace=name, tier=Tier.HOT) as match:
            for payload, page in zip(match.payloads(), own, strict=False):
                if payload is not None and payload.data.draft is None and self.draft_pool is not None:
                    payload.data.draft = page
                    self.draft_pool.keep([page])
            last = match.payloads()[-1]
            if last is not None and last.data.beside is None:
                last.data.beside = beside
            self.trie.record_request(match, time.monotonic())
            if self.listener is not None:
                kept = [(i, payload.data) for i, payload in enumerate(match.payloads()[:count]) if payload is not None]
                new = [(i, entry) for i, entry in kept if entry is payloads[i].data]
                self.listener.stored(name.split(":", 1)[1], token_ids[: count * size], new)
        self._evict(self.num_pages - self.max_pages)

    def clear(self) -> None:
        """Forget everything."""
        self._evict(self.num_pages)

    def _keep(self, entry: CachedPage) -> None:
        self.pool.keep([entry.target])
        if entry.draft is not None and self.draft_pool is not None:
            self.draft_pool.keep([entry.draft])

    def _drop(self, entry: CachedPage) -> None:
        if self.listener is not None:
            self.listener.dropped(entry)
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
