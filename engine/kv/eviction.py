"""Which node gives up its last pages first: LRU, LFU, GDSF, S3-FIFO and value per byte behind one interface.

A policy sees only nodes whose end may leave the tier, so prefixes always outlive what follows them. Requests are counted once a node, not
once a page. No call walks the tree: each costs O(log n) in the queued nodes, amortised.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from engine.kv.trie_nodes import Node, Tier

Density = Callable[[Node], float]


class EvictionPolicy(ABC):
    """Orders the nodes of one tier.

    Args:
        tier: whose pages leave.
        density: restore seconds that the node's pages in this tier save, a byte; None counts all bytes alike.
        half_life_s: the trie's, in which a request's count halves.
        capacity_pages: about how many pages the tier holds.
    """

    name = ""

    def __init__(self, tier: Tier, density: Density | None = None, half_life_s: float = 3600.0, capacity_pages: int = 0) -> None:
        self.tier, self.half_life_s, self.capacity_pages = tier, half_life_s, capacity_pages
        self.density: Density = density or (lambda node: 1.0)

    @abstractmethod
    def add(self, node: Node) -> None:
        """The node's last pages in the tier may leave from now on; harmless when it is queued already."""

    @abstractmethod
    def victim(self) -> Node | None:
        """Take the node that gives up pages next out of the queue; None when everything is locked or nothing is there."""

    def touch(self, node: Node, root: Node) -> None:  # noqa: B027 (most policies read what they need from the node)
        """A request used the node; its counts are up to date. `root` is its namespace's."""

    def evicted(self, node: Node, num_pages: int) -> None:  # noqa: B027
        """`num_pages` of the node left the tier."""

    def _may_leave(self, node: Node) -> bool:
        return node.parent is not None and node.is_tail(self.tier)


class HeapPolicy(EvictionPolicy):
    """Lowest key first. A key may rise while a node is queued, never fall: it is looked at again when it comes to the top."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._heap: list[tuple[Any, int, Node]] = []
        self._queued: set[Node] = set()
        self._serial = 0

    @abstractmethod
    def key(self, node: Node) -> Any:
        """What orders the nodes."""

    def add(self, node: Node) -> None:
        if node not in self._queued:
            self._queued.add(node)
            self._push(self.key(node), node)

    def _push(self, key: Any, node: Node) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (key, self._serial, node))

    def victim(self) -> Node | None:
        locked = []
        found = None
        while self._heap:
            key, _, node = heapq.heappop(self._heap)
            if not self._may_leave(node):
                self._queued.discard(node)
                continue
            now = self.key(node)
            if now > key:
                self._push(now, node)
            elif not node.num_unlocked(self.tier):
                locked.append((now, node))
            else:
                self._queued.discard(node)
                found = node
                break
        for key, node in locked:
            self._push(key, node)
        return found


class Lru(HeapPolicy):
    """Least recently used."""

    name = "lru"

    def key(self, node: Node) -> float:
        return node.last_s


class Lfu(HeapPolicy):
    """Fewest requests ever, the older among equals."""

    name = "lfu"

    def key(self, node: Node) -> tuple[int, float]:
        return node.requests, node.last_s


class Gdsf(HeapPolicy):
    """Greedy-Dual-Size-Frequency (Cherkasova 1998): requests x seconds saved a byte, plus the age of the cache when last used."""

    name = "gdsf"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._age = 0.0

    def key(self, node: Node) -> float:
        return (node.state[self.tier] or 0.0) + node.requests * self.density(node)

    def touch(self, node: Node, root: Node) -> None:
        node.state[self.tier] = self._age

    def victim(self) -> Node | None:
        node = super().victim()
        if node is not None:
            self._age = max(self._age, self.key(node))
        return node


class Value(HeapPolicy):
    """P(reuse) x restore seconds saved / bytes.

    P(reuse) is taken proportional to the decayed count of requests plus what is expected before any was seen: the share of nodes of the
    same kind that were used again so far, and the model's own probability of the whole prefix times the namespace's recent requests. All
    of it decays at one rate, so the order of two nodes changes only when one of them is used, and a heap holds it: the key is the
    logarithm of the value at time 0.
    """

    name = "value"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seen: dict[str, int] = {}
        self._reused: dict[str, int] = {}

    def key(self, node: Node) -> float:
        expected = node.count + (node.state[self.tier] or 0.0)
        density = self.density(node)
        if expected <= 0 or density <= 0:
            return -math.inf
        return math.log2(expected) + math.log2(density) + node.count_s / self.half_life_s

    def touch(self, node: Node, root: Node) -> None:
        first = node.requests <= 1
        self._seen[node.kind] = self._seen.get(node.kind, 0) + first
        self._reused[node.kind] = self._reused.get(node.kind, 0) + (node.requests == 2)
        # a kind never seen before starts at one half
        prior = (self._reused[node.kind] + 1) / (self._seen[node.kind] + 2)
        log2_p = node.end_log2_p
        if log2_p is not None:
            prior += root.count * 2.0 ** max(log2_p, -1000.0)
        node.state[self.tier] = prior


class S3Fifo(EvictionPolicy):
    """S3-FIFO (Yang et al., SOSP 2023): a small queue for what is new, a main queue for what was used again, a memory of what left.

    The memory is the TOKENS tier: a node that comes back from there goes to the main queue at once.
    """

    name = "s3-fifo"
    small_share = 0.1
    max_frequency = 3

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # state of a node: (frequency, is in the main queue, serial, pages it kept when others left or None)
        self._queues: tuple[list[tuple[int, int, Node]], list[tuple[int, int, Node]]] = ([], [])
        self._queued: set[Node] = set()
        self._small_pages = 0
        self._serial = 0
        self._entry = 0

    def add(self, node: Node) -> None:
        if node in self._queued:
            return
        state = node.state[self.tier]
        if state is None:
            state = (0, False, self._next(), None)
            self._small_pages += node.size(self.tier)
        frequency, main, serial, kept = state
        if kept is not None and node.size(self.tier) > kept:
            self._small_pages -= 0 if main else kept
            frequency, main, serial, kept = 0, True, self._next(), None
        node.state[self.tier] = (frequency, main, serial, kept)
        self._queued.add(node)
        self._push(node)

    def touch(self, node: Node, root: Node) -> None:
        state = node.state[self.tier]
        if state is not None and node.requests > 1:
            node.state[self.tier] = (min(self.max_frequency, state[0] + 1), *state[1:])

    def evicted(self, node: Node, num_pages: int) -> None:
        frequency, main, serial, _ = node.state[self.tier]
        self._small_pages -= 0 if main else num_pages
        node.state[self.tier] = (frequency, main, serial, node.size(self.tier))

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def _push(self, node: Node) -> None:
        self._entry += 1
        _, main, serial, _ = node.state[self.tier]
        heapq.heappush(self._queues[main], (serial, self._entry, node))

    def victim(self) -> Node | None:
        locked: list[Node] = []
        found = None
        small, main = self._queues
        while found is None and (small or main):
            from_main = not small or (bool(main) and self._small_pages <= self.small_share * self.capacity_pages)
            _, _, node = heapq.heappop(self._queues[from_main])
            if not self._may_leave(node):
                self._queued.discard(node)
                continue
            frequency, _, _, kept = node.state[self.tier]
            if not node.num_unlocked(self.tier):
                locked.append(node)
            elif frequency and from_main:
                node.state[self.tier] = (frequency - 1, True, self._next(), kept)
                self._push(node)
            elif frequency > 1:
                self._small_pages -= node.size(self.tier)
                node.state[self.tier] = (0, True, self._next(), kept)
                self._push(node)
            else:
                self._queued.discard(node)
                found = node
        for node in locked:
            self._push(node)
        return found


POLICIES: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (Lru, Lfu, Gdsf, S3Fifo, Value)}
