"""Times of the trie's operations at so many nodes: lookups, insertions, counting, donors, eviction."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.call_times import timed
from engine.kv.donors import nearest_donor
from engine.kv.tiers import RestoreTimes, TierManager
from engine.kv.trie import DEFAULT_PAGE_SIZE, Tier, Trie

TEXT_PAGES, KEPT = 16, 4096
PAGE_BYTES = 1 << 20
MOST_CHECKED = 200_000  # nodes; the check walks all of them, some 80 us each
VOCABULARY = 49_152
LINEAR = {"recompute": [[1, 1e-4], [2, 2e-4]]}  # as good as any: it only gives the policy something to weigh


class _Texts:
    """Texts of 16 pages; each but the first goes on from inside one of the last KEPT before it, which can be had again."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self.kept: list[np.ndarray] = []
        self._count = 0

    def grow(self) -> np.ndarray:
        """One more."""
        shared = int(self._draw.integers(TEXT_PAGES)) * DEFAULT_PAGE_SIZE if self.kept else 0
        tokens = self._draw.integers(0, VOCABULARY, TEXT_PAGES * DEFAULT_PAGE_SIZE, dtype=np.int32)
        if shared:
            tokens[:shared] = self.kept[int(self._draw.integers(len(self.kept)))][:shared]
        if len(self.kept) < KEPT:
            self.kept.append(tokens)
        else:
            self.kept[self._count % KEPT] = tokens
        self._count += 1
        return tokens


def measure(num_nodes: int, calls: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows `{"nodes", "pages", "op", "us", "p95_us"}` of one size: medians, microseconds."""
    trie = Trie(page_bytes=[PAGE_BYTES, 0, 0, 0])
    manager = TierManager(trie, {Tier.HOT: 1 << 60}, RestoreTimes.from_json(LINEAR), "value")
    texts, clock = _Texts(seed), itertools.count()
    while trie.num_nodes < num_nodes:
        manager.finish(manager.insert(texts.grow(), tier=Tier.HOT), float(next(clock)))
    draw = random.Random(seed + 1)
    known = [draw.choice(texts.kept) for _ in range(calls)]
    fresh = [np.random.default_rng((1 << 40) + n).integers(0, VOCABULARY, len(known[n]), dtype=np.int32) for n in range(calls)]
    nodes, pages = trie.num_nodes, sum(trie.pages_in)
    rows: list[dict[str, Any]] = []

    def row(op: str, call: Callable[[int], object]) -> None:
        median, p95 = timed(calls, call)
        rows.append({"nodes": nodes, "pages": pages, "op": op, "us": round(1e6 * median, 2), "p95_us": round(1e6 * p95, 2)})

    def found(number: int, pages: int, tokens: np.ndarray) -> None:
        with manager.match(tokens) as match:
            if match.num_pages != pages:
                raise SystemExit(f"text {number} is known to {match.num_pages} pages instead of {pages}")

    row("match, hit of 1,024 tokens", lambda n: found(n, TEXT_PAGES, known[n]))
    row("match, hit of 256 tokens", lambda n: found(n, 4, known[n][: 4 * DEFAULT_PAGE_SIZE]))
    row("match, miss", lambda n: found(n, 0, fresh[n]))
    row("count a request", lambda n: manager.finish(manager.match(known[n]), float(next(clock))))
    row("nearest donor of 1,024 tokens", lambda n: nearest_donor(trie, known[n]).match.release())
    row("insert 1,024 tokens, 512 of them known", lambda n: manager.insert(_branch(known[n], fresh[n]), tier=Tier.HOT).release())

    def evict(_: int) -> None:
        manager.metrics[Tier.HOT].budget_bytes = trie.bytes_in[Tier.HOT] - TEXT_PAGES * PAGE_BYTES
        if manager.rebalance() < TEXT_PAGES:
            raise SystemExit("an eviction took less than was asked for")

    row("evict 16 pages by value", evict)
    if nodes < MOST_CHECKED:
        began = time.perf_counter()
        trie.check_integrity()
        rows.append({"nodes": nodes, "pages": pages, "op": "check_integrity", "us": round(1e6 * (time.perf_counter() - began), 2)})
    return rows


def _branch(known: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    half = len(known) // 2
    return np.concatenate([known[:half], fresh[half:]])
