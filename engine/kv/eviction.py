"""Which node gives up its last pages first: LRU, T-LRU, LFU, ARC, GDSF, S3-FIFO, a cost rule and value per byte behind one interface.

A policy sees only nodes whose end may leave the tier, so prefixes always outlive what follows them. Requests are counted once a node, not
once a page. No call walks the tree: each costs O(log n) in the queued nodes, amortised.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

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

    def most_pages(self, node: Node) -> int | None:
        """How many pages of a victim may leave before another is asked for; None: as many as have to."""
        return None

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


class TailLru(HeapPolicy):
    """Tail-optimised LRU (T-LRU, Zhang et al., "Tail-Optimized Caching for LLM Inference", 2025, arXiv 2510.15152): what may go without making any
    next request slow goes first, least recently used first; then all others likewise.

    A text's last pages may go while what its next request would have to compute stays below a limit. The paper states the limit in seconds to the
    first token, and expects a next prompt of a known length; here it is a number of pages, the new part of the next prompt left out.

    Args:
        safe_pages: of the end of every text, those that may go first.
    """

    name = "t-lru"

    def __init__(self, *args: Any, safe_pages: int = 16, **options: Any) -> None:
        super().__init__(*args, **options)
        self.safe_pages = safe_pages
        self._above: Node | None = None  # the last victim's parent

    # state of a node: pages that left behind its last one since they were requested, of the text that lost most
    def key(self, node: Node) -> tuple[bool, float]:
        return (node.state[self.tier] or 0) >= self.safe_pages, node.last_s

    def touch(self, node: Node, root: Node) -> None:
        if node.state[self.tier]:
            node.state[self.tier] = 0
            if node in self._queued:  # its key fell: the old entry is found out of date
                self._push(self.key(node), node)

    def most_pages(self, node: Node) -> int | None:
        lost = node.state[self.tier] or 0
        return self.safe_pages - lost if lost < self.safe_pages else None

    def victim(self) -> Node | None:
        node = super().victim()
        self._above = None if node is None else node.parent
        return node

    def evicted(self, node: Node, num_pages: int) -> None:
        lost = node.state[self.tier] = (node.state[self.tier] or 0) + num_pages
        above = node.parent or self._above  # a node without pages has left the tree
        if not node.ends[self.tier] and above is not None:
            above.state[self.tier] = max(above.state[self.tier] or 0, lost)


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


class Decay(HeapPolicy):
    """What `engine.store.index` does in SQL: log2 of (decayed requests x seconds saved a byte), an order that stays as time passes.

    The count halves after `half_life_s`; a short one makes it LRU, a long one LFU.
    """

    name = "decay"

    def key(self, node: Node) -> float:
        return math.log2(max(node.count, 1e-9)) + node.count_s / self.half_life_s + math.log2(max(self.density(node), 1e-30))


class FlopAware(HeapPolicy):
    """Recency plus weighted seconds saved a byte, after Marconi (Pan et al., MLSys 2025), whose utility is recency + alpha x FLOPs saved a byte.

    Both terms are measured against what was seen: recency in the mean age at which nodes were evicted, efficiency in the mean density of nodes that
    were used. alpha is fixed; Marconi searches it by replaying a window of requests.
    """

    name = "marconi"
    alpha = 1.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._now_s, self._mean_age_s, self._mean_density = 0.0, 0.0, 0.0

    def key(self, node: Node) -> float:
        return node.last_s + (node.state[self.tier] or 0.0)

    def touch(self, node: Node, root: Node) -> None:
        self._now_s = max(self._now_s, node.last_s)
        density = self.density(node)
        self._mean_density += 0.01 * (density - self._mean_density) if self._mean_density else density
        share = density / self._mean_density if self._mean_density else 1.0
        # a key never falls: what a node gained once stays
        node.state[self.tier] = max(node.state[self.tier] or 0.0, self.alpha * self._mean_age_s * min(share, 8.0))

    def victim(self) -> Node | None:
        node = super().victim()
        if node is not None:
            self._mean_age_s += 0.05 * (self._now_s - node.last_s - self._mean_age_s)
        return node


class TwoQueuePolicy(EvictionPolicy):
    """Nodes in two queues, each in the order of a number that a node's state holds; the queue that gives one up is chosen anew each time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._queues: tuple[list[tuple[int, int, Node]], list[tuple[int, int, Node]]] = ([], [])
        self._queued: set[Node] = set()
        self._serial = self._entry = 0

    @abstractmethod
    def place(self, node: Node) -> tuple[int, int]:
        """(queue, order in it) of a node."""

    @abstractmethod
    def from_second(self) -> bool:
        """Whether the second queue gives a node up, where neither is empty."""

    def stays(self, node: Node) -> bool:
        """Whether the next node of a queue is given another turn, at the place that its state now says."""
        return False

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def _push(self, node: Node) -> None:
        self._entry += 1
        queue, order = self.place(node)
        heapq.heappush(self._queues[queue], (order, self._entry, node))

    def victim(self) -> Node | None:
        locked: list[Node] = []
        found = None
        first, second = self._queues
        while found is None and (first or second):
            queue = int(not first or (bool(second) and self.from_second()))
            order, _, node = heapq.heappop(self._queues[queue])
            if not self._may_leave(node):
                self._queued.discard(node)
            elif (queue, order) != self.place(node):
                self._push(node)  # it was used since
            elif not node.num_unlocked(self.tier):
                locked.append(node)
            elif self.stays(node):
                self._push(node)
            else:
                self._queued.discard(node)
                found = node
        for node in locked:
            self._push(node)
        return found


class Arc(TwoQueuePolicy):
    """ARC (Megiddo and Modha, FAST 2003): nodes requested once and nodes requested again, each in order of use; the share of the first adapts to
    which of the two what comes back had been evicted from.

    The memory of what left is the TOKENS tier, as for S3-FIFO. Sizes are in pages.
    """

    name = "arc"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # state of a node: (requested again, when it was used, pages it kept when others left or None)
        self._sizes = [0, 0]  # pages held, by queue
        self._ghosts = [0, 0]  # pages that left, by the queue they were in
        self._target_once = 0.0  # pages that nodes requested once should have

    def place(self, node: Node) -> tuple[int, int]:
        again, used, _ = node.state[self.tier]
        return int(again), used

    def from_second(self) -> bool:
        return self._sizes[0] <= self._target_once

    def add(self, node: Node) -> None:
        state = node.state[self.tier]
        size = node.size(self.tier)
        if state is None:
            state = (False, self._next(), None)
            self._sizes[0] += size
        again, used, kept = state
        if kept is not None and size > kept:
            back = size - kept
            step = max(1.0, self._ghosts[not again] / max(1, self._ghosts[again])) * back
            self._target_once += -step if again else step
            self._target_once = min(max(0.0, self._target_once), float(self.capacity_pages))
            self._ghosts[again] = max(0, self._ghosts[again] - back)
            self._sizes[again] -= kept
            self._sizes[1] += size
            again, used, kept = True, self._next(), None
        node.state[self.tier] = (again, used, kept)
        if node not in self._queued:
            self._queued.add(node)
            self._push(node)

    def touch(self, node: Node, root: Node) -> None:
        state = node.state[self.tier]
        if state is None:
            return
        again, _, kept = state
        if not again and node.requests > 1:
            size = node.size(self.tier)
            self._sizes[0] -= size
            self._sizes[1] += size
            again = True
        node.state[self.tier] = (again, self._next(), kept)

    def evicted(self, node: Node, num_pages: int) -> None:
        again, used, _ = node.state[self.tier]
        self._sizes[again] -= num_pages
        self._ghosts[again] += num_pages
        node.state[self.tier] = (again, used, node.size(self.tier))


class Value(EvictionPolicy):
    """Restore seconds expected to be saved a byte and second of keeping it: P(reuse) x seconds saved / bytes, at the best horizon.

    Nodes of one kind with about the same decayed count and the same last gap between requests form a class. For each class the policy
    learns how long after a request the next one comes, or whether none does. From that the reuse rate at an age is
    max over T of P(reuse within T) / E[seconds kept until reuse or T], Gittins' index of a job that ends at its reuse; a class seen too
    little is pulled towards its kind, a kind towards a prior. The model's own probability of the node's text behind the nearest node above it that
    enough requests used, times the rate of these requests, is added: that many a second would go on so if the model wrote them.

    Inside a class the least recently used node goes first. Classes are ordered once a request, by the value of their oldest node.
    """

    name = "value"
    num_ages = 36
    refresh_requests = 256
    counted_requests = 4.0  # a decayed count from which on it says more than the model

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._heaps: dict[tuple[str, int, int], list[tuple[float, int, Node]]] = {}
        self._queued: set[Node] = set()
        self._serial = 0
        self._now_s = 0.0
        self._touches = 0
        # seconds after a request; the last edge also stands for never
        self._edges = np.concatenate([[0.0], 2.0 ** (np.arange(1, self.num_ages) / 2 - 0.5)])
        self._ends: dict[Any, np.ndarray] = {}  # pages whose next request came in an age bucket, by class and by kind
        self._starts: dict[Any, float] = {}  # pages that were requested
        self._rates: dict[Any, list[float]] = {}
        self._order: list[tuple[float, tuple[str, int, int]]] = []  # of the classes, by the value of their oldest node
        self._ordered = False

    def _class(self, node: Node) -> tuple[str, int, int]:
        count = min(5, int(math.log2(node.count))) if node.count >= 1 else 0
        gap = -1 if node.gap_s == math.inf else int(math.log2(max(1.0, node.gap_s)))
        return node.kind, count, min(gap, 13)

    def _age(self, seconds: float) -> int:
        return 0 if seconds < 1.0 else min(self.num_ages - 1, int(2 * math.log2(seconds) + 1))

    def touch(self, node: Node, root: Node) -> None:
        self._now_s = max(self._now_s, node.last_s)
        self._ordered = False
        before = node.state[self.tier]
        pages = node.num_pages
        if before is not None and node.gap_s != math.inf:
            age = self._age(node.gap_s)
            for key in (before, before[0]):
                self._ends[key][age] += pages
        now = self._class(node)
        for key in (now, now[0]):
            if key not in self._starts:
                self._starts[key], self._ends[key] = 0.0, np.zeros(self.num_ages)
            self._starts[key] += pages
        node.state[self.tier] = now
        self._touches += node.parent is root
        if self._touches >= self.refresh_requests:
            self._touches = 0
            self._rates.clear()

    def _rates_of(self, key: tuple[str, int, int]) -> list[float]:
        """Reuses a second at each age, for nodes of a class."""
        rates = self._rates.get(key)
        if rates is None:
            prior = 0.5 / self.num_ages * np.ones(self.num_ages)
            kind = (self._ends.get(key[0], 0.0) + 4 * prior) / (self._starts.get(key[0], 0.0) + 4)
            # before a class was seen, each doubling of the count halves the chance that no request follows
            ever = kind.sum()
            kind = kind * (1.0 - (1.0 - ever) / 2.0 ** key[1]) / ever
            weight = 50.0
            share = (self._ends.get(key, 0.0) + weight * kind) / (self._starts.get(key, 0.0) + weight)
            ended = np.concatenate([[0.0], np.cumsum(share)])  # reused before each edge, and ever
            alive = np.maximum(1.0 - ended[:-1], 1e-9)
            width = np.diff(np.append(self._edges, 2 * self._edges[-1]))
            kept = np.concatenate([[0.0], np.cumsum(width * (alive + np.maximum(1.0 - ended[1:], 0.0)) / 2)])
            hits = ended[None, 1:] - ended[:-1, None]
            seconds = np.maximum(kept[None, 1:] - kept[:-1, None], 1e-9)
            rates = np.where(seconds > 1e-9, hits / seconds, 0.0).max(axis=1).tolist()
            self._rates[key] = rates
        return rates

    def value(self, node: Node) -> float:
        """Seconds saved a byte and second of keeping the node's pages, as expected now."""
        rate = self._rates_of(node.state[self.tier] or self._class(node))[self._age(self._now_s - node.last_s)]
        return (rate + self._foretold_rate(node)) * self.density(node)

    def _foretold_rate(self, node: Node) -> float:
        """Requests a second that the model expects at the node; 0 where its probability is not known."""
        log2_p = node.end_log2_p
        if log2_p is None or node.parent is None:
            return 0.0
        above = node.parent
        while above.parent is not None and above.count < self.counted_requests:
            above = above.parent
        before = above.end_log2_p
        assert before is not None, "what is before a known probability is known"
        return above.count * math.log(2) / self.half_life_s * 2.0 ** max(log2_p - before, -1000.0)

    def add(self, node: Node) -> None:
        if node not in self._queued:
            self._queued.add(node)
            self._push(node)

    def _push(self, node: Node) -> None:
        self._serial += 1
        key = node.state[self.tier] or self._class(node)
        heap = self._heaps.setdefault(key, [])
        heapq.heappush(heap, (node.last_s, self._serial, node))
        if self._ordered and heap[0][2] is node:
            heapq.heappush(self._order, (self.value(node), key))

    def victim(self) -> Node | None:
        if not self._ordered:
            # values move with the clock and the counts, so the classes are ordered anew after a request, not at every eviction
            self._order, self._ordered = [], True
            for key in list(self._heaps):
                self._order_class(key)
        locked: list[Node] = []
        found = None
        while self._order and found is None:
            value, key = heapq.heappop(self._order)
            heap = self._heaps[key]
            if not heap:
                continue
            last_s, _, node = heap[0]
            if not self._may_leave(node) or node.last_s != last_s or self.value(node) > value:
                self._order_class(key)
                continue
            heapq.heappop(heap)
            self._order_class(key)
            if node.num_unlocked(self.tier):
                self._queued.discard(node)
                found = node
            else:
                locked.append(node)
        for node in locked:
            self._push(node)
        return found

    def _order_class(self, key: tuple[str, int, int]) -> None:
        """Put a class where its oldest node belongs, once nodes that left or were used again are out of the way."""
        heap = self._heaps[key]
        while heap:
            last_s, _, node = heap[0]
            if self._may_leave(node) and node.last_s == last_s:
                heapq.heappush(self._order, (self.value(node), key))
                return
            heapq.heappop(heap)
            if self._may_leave(node):
                self._push(node)
            else:
                self._queued.discard(node)


class S3Fifo(TwoQueuePolicy):
    """S3-FIFO (Yang et al., SOSP 2023): a small queue for what is new, a main queue for what was used again, a memory of what left.

    The memory is the TOKENS tier: a node that comes back from there goes to the main queue at once.
    """

    name = "s3-fifo"
    small_share = 0.1
    max_frequency = 3

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # state of a node: (frequency, is in the main queue, serial, pages it kept when others left or None)
        self._small_pages = 0

    def place(self, node: Node) -> tuple[int, int]:
        _, main, serial, _ = node.state[self.tier]
        return int(main), serial

    def from_second(self) -> bool:
        return self._small_pages <= self.small_share * self.capacity_pages

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

    def stays(self, node: Node) -> bool:
        frequency, main, _, kept = node.state[self.tier]
        if not frequency or (frequency == 1 and not main):
            return False
        if not main:
            self._small_pages -= node.size(self.tier)
        node.state[self.tier] = (frequency - 1 if main else 0, True, self._next(), kept)
        return True


POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy for policy in (Lru, TailLru, Lfu, Arc, Gdsf, FlopAware, Decay, S3Fifo, Value)
}
