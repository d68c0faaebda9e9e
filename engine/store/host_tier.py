"""Coded pages in host memory, between the pools and the files of a store: a hit reads no file. Bounded in bytes, worth a byte decides who stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from engine.kv.tiers import Curve, RestoreTimes, TierManager
from engine.kv.trie import Payload, Tier, Trie
from engine.sessions.stages import Rates
from engine.store.index import HALF_LIFE_S
from engine.store.runs import PAGE_TOKENS, RUN_PAGES
from engine.store.store import Borrowed, StoredPrefix

_LENGTHS = (64, 256, 1024, 4096, 16384)
_PAGE_BYTES = 256  # what a page takes beside its span, about: token ids as int64 would be 512, shared by all pages of a node


@dataclass
class HitMetrics:
    """Requests that got something from a tier, the tokens, and the seconds that computing them was measured to take, less their restore."""

    hits: int = 0
    hit_tokens: int = 0
    saved_s: float = 0.0

    def add(self, tokens: int, saved_s: float) -> None:
        """One request's."""
        if tokens > 0:
            self.hits += 1
            self.hit_tokens += tokens
            self.saved_s += saved_s


class _Page(NamedTuple):
    """A page's span, and what its run's spans need of others (None: its own needs nothing)."""

    data: bytes
    borrowed: Borrowed | None


def times_of(rates: Rates) -> RestoreTimes:
    """A pair's measured rates as tables."""
    restore = Curve([(n, rates.restoring(n)) for n in _LENGTHS])
    return RestoreTimes(Curve([(n, rates.recomputing(n)) for n in _LENGTHS]), {Tier.HOST: restore}, "measured on this machine")


class HostTier:
    """Pages of texts that were restored or kept, under a trie. Thread-safe; nothing in it is lost with it, as all of it lies in files as well.

    Args:
        budget_bytes: of spans and of what they refer to. Over it, the pages of least value a byte leave, the last of their text first
            (`engine.kv.eviction.Value`).
        rates: of the pair on this machine. Where restoring never pays, nothing is kept, and `report` says so.
    """

    def __init__(self, budget_bytes: int, rates: Rates) -> None:
        self.trie = Trie(PAGE_TOKENS, half_life_s=HALF_LIFE_S)
        self.manager = TierManager(self.trie, {Tier.HOST: budget_bytes}, times_of(rates))
        self.metrics = HitMetrics()
        self._lock = threading.Lock()

    def lookup(self, root: bytes, token_ids: Sequence[int], start_page: int = 0) -> StoredPrefix:
        """The pages of a text that are here, from `start_page` on; as `RunStore.lookup`, without keys."""
        with self._lock:
            match = self.manager.match(token_ids, root.hex())
            pages: list[_Page] = [payload.data for payload in match.payloads() if payload is not None]
            self.manager.finish(match, time.monotonic())
        spans: list[bytes] = []
        borrowed: dict[int, Borrowed] = {}
        for number in range(start_page, len(pages)):
            page, at = pages[number], number - number % RUN_PAGES
            if page.borrowed is not None and borrowed.setdefault(at, page.borrowed).donors != page.borrowed.donors:
                break  # its run was coded twice, with other donors
            spans.append(page.data)
        return StoredPrefix(start_page, start_page + len(spans), spans, [], borrowed)

    def known_pages(self, root: bytes, token_ids: Sequence[int]) -> int:
        """How many pages of a text are here, from its beginning."""
        with self._lock, self.manager.match(token_ids, root.hex()) as match:
            return match.num_pages

    def insert(self, root: bytes, token_ids: Sequence[int], found: StoredPrefix) -> bool:
        """Keep what was found of a text (its pages up to `found.end_page`); False where pages before `found.start_page` are not here."""
        with self._lock:
            if not self.manager.tiers:
                return True
            ids = token_ids[: found.num_tokens]
            with self.manager.match(ids, root.hex()) as known:
                if known.num_pages < found.start_page:
                    return False
                payloads = [payload.share() for payload in known.payloads() if payload is not None][: found.start_page]
            for number, data in enumerate(found.spans, found.start_page):
                borrowed = found.borrowed.get(number - number % RUN_PAGES)
                page = number % RUN_PAGES
                own = borrowed if borrowed is not None and borrowed.needs[page] else None
                payloads.append(Payload(_Page(data, own), Tier.HOST, _PAGE_BYTES + len(data) + _lent_bytes(own, page)))
            self.manager.insert(ids, payloads, namespace=root.hex(), tier=Tier.HOST).release()
            self.manager.rebalance()
            return True

    def report(self) -> dict[str, Any]:
        """budget_bytes, bytes, pages, pages_left (evicted), skipped (why nothing is kept), hits, hit_tokens, saved_s."""
        with self._lock:
            tier: Mapping[str, Any] = self.manager.report()["host"]
        return {name: tier[name] for name in ("budget_bytes", "bytes", "pages", "pages_left", "skipped")} | asdict(self.metrics)


def _lent_bytes(borrowed: Borrowed | None, page: int) -> int:
    """A page's share of the donors that it keeps in memory, each divided among the pages that need it."""
    if borrowed is None:
        return 0
    total = 0
    for number, run in borrowed.runs.items():
        if borrowed.needs[page] >> number & 1:
            users = sum(need >> number & 1 for need in borrowed.needs)
            total += (len(run.ids) + sum(map(len, run.spans or ()))) // users
    return total
