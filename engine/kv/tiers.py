"""Where stored pages lie: byte budgets of hot, host, disk and tokens, what moves down when one is exceeded, what a hit saved.

Bookkeeping only: pages are moved by a function of the caller, a few at a time behind decoding, and restore times are tables it measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from engine.errors import InvalidOption
from engine.kv.eviction import POLICIES, EvictionPolicy, Lru
from engine.kv.trie import Match, Node, Payload, Tier, Trie

Mover = Callable[[list[Payload], Tier, Tier], list[Payload] | None]
STORED_TIERS = (Tier.HOST, Tier.DISK)


class Curve:
    """Seconds that the first n tokens of a context take, linear between measured points, the last slope beyond them.

    Args:
        points: (tokens, seconds), tokens above 0 and rising, seconds not falling.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        rows = sorted((float(tokens), float(seconds)) for tokens, seconds in points)
        steps = zip([(0.0, 0.0), *rows], rows, strict=False)
        if not rows or any(b[0] <= a[0] or b[1] < a[1] for a, b in steps):
            raise ValueError(f"a curve needs measured (tokens, seconds) that rise from (0, 0), not {list(points)}")
        self.tokens = [0.0, *(tokens for tokens, _ in rows)]
        self.total_s = [0.0, *(seconds for _, seconds in rows)]

    def first(self, tokens: float) -> float:
        """Seconds for tokens [0, n)."""
        i = min(max(bisect_right(self.tokens, tokens), 1), len(self.tokens) - 1)
        slope = (self.total_s[i] - self.total_s[i - 1]) / (self.tokens[i] - self.tokens[i - 1])
        return self.total_s[i - 1] + slope * (tokens - self.tokens[i - 1])

    def between(self, start: float, stop: float) -> float:
        """Seconds for tokens [start, stop) after those before them."""
        return self.first(stop) - self.first(start)


@dataclass(frozen=True)
class RestoreTimes:
    """Measured seconds: to compute tokens anew, and to bring them back from a tier (HOT: nothing to do).

    Args:
        recompute: prefill of the first n tokens.
        restore: for HOST and DISK, restoring the first n tokens, the draft's pass included.
        source: where it was measured.
    """

    recompute: Curve
    restore: Mapping[Tier, Curve] = field(default_factory=dict)
    source: str = ""

    def restore_s(self, tier: Tier, start: float, stop: float) -> float:
        """Seconds to bring tokens [start, stop) back from the tier; from TOKENS that is their prefill."""
        if tier == Tier.HOT:
            return 0.0
        if tier >= Tier.TOKENS:
            return self.recompute.between(start, stop)
        return self.restore[tier].between(start, stop) if tier in self.restore else 0.0

    def saved_s(self, tier: Tier, start: float, stop: float) -> float:
        """Seconds less than computing tokens [start, stop) anew; below 0 where restoring takes longer."""
        return self.recompute.between(start, stop) - self.restore_s(tier, start, stop)

    def why_skip(self, tier: Tier) -> str | None:
        """Why the tier is of no use: at every measured length computing anew is at least as fast. None if it is of use."""
        if tier not in self.restore:
            return None
        curve = self.restore[tier]
        lengths = sorted({*self.recompute.tokens[1:], *curve.tokens[1:]})
        if any(curve.first(n) < self.recompute.first(n) for n in lengths):
            return None
        n = lengths[-1]
        return (
            f"restoring {n:.0f} tokens from {tier.name.lower()} takes {curve.first(n):.3g} s, "
            f"computing them {self.recompute.first(n):.3g} s: the tier is skipped"
        )

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> RestoreTimes:
        """From `{"source": str, "recompute": [[tokens, s], ...], "restore": {"host": [...], "disk": [...]}}`.

        Raises:
            InvalidOption: the table has another form.
        """
        try:
            restore = {Tier[name.upper()]: Curve(points) for name, points in table.get("restore", {}).items()}
            if not set(restore) <= set(STORED_TIERS):
                raise ValueError(f"restore times belong to host and disk, not to {sorted(tier.name.lower() for tier in restore)}")
            return cls(Curve(table["recompute"]), restore, str(table.get("source", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            remedy = 'give {"recompute": [[tokens, seconds], ...], "restore": {"host": [[tokens, seconds], ...]}}'
            raise InvalidOption(f"the table of restore times is not usable: {error}", remedy) from error


@dataclass
class TierMetrics:
    """What a tier holds and did so far."""

    budget_bytes: int
    bytes: int = 0
    pages: int = 0
    hits: int = 0  # requests that found pages here
    hit_tokens: int = 0
    restore_s: float = 0.0
    saved_s: float = 0.0
    pages_left: int = 0  # moved down or forgotten
    failed_moves: int = 0  # times pages lost their KV because they could not be moved
    skipped: str | None = None  # why the tier is not used


class TierManager:
    """Keeps a trie within its tiers' budgets.

    A tier without a budget is not used; one whose restore takes longer than computing anew is skipped, and its metrics say so. Under
    pressure a tier's worst node gives up its last pages to the next tier in use, and what leaves the last one is forgotten.

    Args:
        trie: its pages; the manager takes its `on_tail` call.
        budgets: bytes for each of HOT, HOST, DISK and TOKENS in use.
        times: measured restore times.
        policy: a name in `POLICIES`; the TOKENS tier, which saves no seconds, is always LRU.
        move: called with (payloads, from, to); returns the payloads in their new tier, or None when it cannot (a full disk): their KV is
            then dropped. Needed as soon as pages have payloads.
        skip_unprofitable: False keeps tiers that save nothing, for studies.
        options: of the policy.
    """

    def __init__(
        self,
        trie: Trie,
        budgets: Mapping[Tier, int],
        times: RestoreTimes,
        policy: str = "value",
        move: Mover | None = None,
        skip_unprofitable: bool = True,
        **options: Any,
    ) -> None:
        if policy not in POLICIES:
            raise InvalidOption(f"there is no eviction policy {policy!r}", f"use one of {', '.join(POLICIES)}")
        if not set(budgets) <= {Tier.HOT, *STORED_TIERS, Tier.TOKENS} or min(budgets.values(), default=0) < 0:
            raise InvalidOption(f"tier budgets {dict(budgets)} are not usable", "give bytes of at least 0 for HOT, HOST, DISK and TOKENS")
        self.trie, self.times, self._move = trie, times, move
        self.metrics = {tier: TierMetrics(budgets[tier]) for tier in sorted(budgets)}
        if skip_unprofitable:
            for tier in STORED_TIERS:
                if tier in self.metrics:
                    self.metrics[tier].skipped = times.why_skip(tier)
        self.tiers = [tier for tier, metrics in self.metrics.items() if metrics.skipped is None]
        self._policies: dict[int, EvictionPolicy] = {}
        for tier in self.tiers:
            kind = Lru if tier == Tier.TOKENS else POLICIES[policy]
            pages = self.metrics[tier].budget_bytes // max(1, trie.page_bytes[tier])
            own = {} if tier == Tier.TOKENS else options
            self._policies[tier] = kind(tier, self._density_in(tier), trie.half_life_s, pages, **own)
        self._touched = [p for p in self._policies.values() if type(p).touch is not EvictionPolicy.touch]
        trie.on_tail = self._on_tail

    # --- requests -------------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int] | np.ndarray, namespace: str = "") -> Match:
        """The longest known prefix, locked; counts nothing."""
        return self.trie.match(tokens, namespace)

    def hit(self, match: Match, max_tokens: int | None = None) -> int:
        """Account for restoring a match, of which a request needs at most `max_tokens`; returns the tokens restored."""
        size = self.trie.page_size
        limit = match.num_tokens if max_tokens is None else max_tokens
        ends = [0, 0, 0]
        for node, pages in match.path():
            for tier in range(3):
                ends[tier] += min(node.ends[tier], pages)
        start = 0
        for tier in (Tier.HOT, *STORED_TIERS):
            stop = min(ends[tier] * size, limit)
            if stop > start:
                metrics = self.metrics.get(tier)
                if metrics is not None:
                    metrics.hits += 1
                    metrics.hit_tokens += stop - start
                    metrics.restore_s += self.times.restore_s(tier, start, stop)
                    metrics.saved_s += self.times.saved_s(tier, start, stop)
                start = stop
        return start

    def insert(self, tokens: Sequence[int] | np.ndarray, payloads: Sequence[Payload] | None = None, **options: Any) -> Match:
        """`Trie.insert` into the hottest tier in use; the budgets are kept by `rebalance`. Without any tier in use nothing is kept."""
        if not self.tiers:
            for payload in payloads or ():
                payload.release()
            return self.trie.match(tokens, options.get("namespace", ""))
        tier = options.pop("tier", self.tiers[0])
        return self.trie.insert(tokens, payloads, tier=tier, **options)

    def finish(self, match: Match, now_s: float) -> None:
        """Count a request on everything it used, then unlock it."""
        self.trie.record_request(match, now_s)
        if self._touched:
            root = self.trie.root(match.namespace)
            for node, _ in match.path():
                for policy in self._touched:
                    policy.touch(node, root)
        match.release()

    # --- pressure -------------------------------------------------------------------------------------------------------

    def rebalance(self, max_pages: int | None = None) -> int:
        """Move pages down until every tier keeps its budget, at most `max_pages` of them; returns how many moved.

        Locked pages stay, so a tier may remain over its budget until their matches are released.
        """
        moved = 0
        for tier in self.tiers:
            while self.trie.bytes_in[tier] > self.metrics[tier].budget_bytes and (max_pages is None or moved < max_pages):
                node = self._policies[tier].victim()
                if node is None:
                    break
                left = self._leave(node, tier, None if max_pages is None else max_pages - moved)
                if not left:
                    self._policies[tier].add(node)
                    break
                moved += left
        return moved

    def report(self) -> dict[str, dict[str, Any]]:
        """Metrics of each tier by its name, bytes and pages brought up to date."""
        for tier, metrics in self.metrics.items():
            metrics.bytes, metrics.pages = self.trie.bytes_in[tier], self.trie.pages_in[tier]
        return {tier.name.lower(): asdict(metrics) for tier, metrics in self.metrics.items()}

    def _leave(self, node: Node, tier: Tier, max_pages: int | None) -> int:
        """Move some of the node's last pages down, as many as the budget asks for."""
        excess = self.trie.bytes_in[tier] - self.metrics[tier].budget_bytes
        available = node.num_unlocked(tier)
        for most in (max_pages, self._policies[tier].most_pages(node)):
            if most is not None:
                available = min(available, most)
        payloads = None if node.payloads is None else node.payloads[: node.ends[tier]]
        page_bytes = self.trie.page_bytes[tier]
        if payloads is None:
            pages = min(available, -(-excess // page_bytes)) if page_bytes else available
        else:
            pages, freed = 0, 0
            while pages < available and freed < excess:
                pages += 1
                payload = payloads[-pages]
                freed += page_bytes if payload is None else payload.num_bytes
        lower = [t for t in self.tiers if t > tier]
        destination = lower[0] if lower else Tier.GONE
        moved = None
        if destination <= Tier.DISK and payloads is not None:
            moved = self._moved(payloads[-pages:], tier, destination)
            if moved is None:
                self.metrics[tier].failed_moves += 1
                destination = Tier.TOKENS if Tier.TOKENS in self.tiers else Tier.GONE
                if not self._drop_behind(node, tier, destination):
                    return 0
        self.trie.demote(node, tier, pages, destination, moved)
        self._policies[tier].evicted(node, pages)
        self.metrics[tier].pages_left += pages
        return pages

    def _drop_behind(self, top: Node, tier: Tier, destination: Tier) -> bool:
        """Take the KV of everything colder than `tier` in and below a node down to `destination`; False where a live match prevents it."""
        below = [top]
        for node in below:
            below.extend(node.child_nodes())
        for node in reversed(below):
            for colder in range(destination - 1, tier, -1):
                pages = node.size(colder)
                if pages > node.num_unlocked(colder):
                    return False
                if pages:
                    self.trie.demote(node, Tier(colder), pages, destination)
                    if colder in self._policies:
                        self._policies[colder].evicted(node, pages)
                        self.metrics[Tier(colder)].pages_left += pages
        return True

    def _moved(self, payloads: list[Payload | None], tier: Tier, destination: Tier) -> list[Payload] | None:
        if self._move is None:
            raise ValueError("pages with payloads need a function that moves them")
        return self._move([payload for payload in payloads if payload is not None], tier, destination)

    def _on_tail(self, node: Node, tier: int) -> None:
        policy = self._policies.get(tier)
        if policy is not None:
            policy.add(node)

    def _density_in(self, tier: Tier) -> Callable[[Node], float]:
        """Restore seconds that the node's pages in a tier save, a byte."""
        size, page_bytes = self.trie.page_size, max(1, self.trie.page_bytes[tier])

        def density(node: Node) -> float:
            start = node.ends[tier - 1] if tier else 0
            pages = max(1, node.ends[tier] - start)
            first = (node.start_page + start) * size
            held = None if node.payloads is None else node.payloads[start : node.ends[tier]]
            num_bytes = pages * page_bytes if not held else sum(page_bytes if p is None else p.num_bytes for p in held)
            return max(0.0, self.times.saved_s(tier, first, first + pages * size)) / max(1, num_bytes)

        return density
