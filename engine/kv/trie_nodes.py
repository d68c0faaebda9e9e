"""What the trie is made of: tiers, payloads shared by reference, nodes, locked matches. Axes as in `engine.kv.trie`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, Protocol

import numpy as np


class Tier(IntEnum):
    """Where a page's KV lies, hottest first; `GONE` is only a destination."""

    HOT = 0
    HOST = 1
    DISK = 2
    TOKENS = 3
    GONE = 4


class Payload:
    """One page's KV in one tier, shared by reference: whoever wants to write into it calls `writable` first.

    Args:
        data: whatever the owner of the tier understands (a page number, code bytes, a file's offset); the trie never looks inside.
        tier: HOT, HOST or DISK; it never changes, since moving a page makes another payload.
        num_bytes: size counted against the tier's budget.
        on_free: called with `data` when the last reference is released.
    """

    __slots__ = ("_on_free", "data", "num_bytes", "references", "slots", "tier")

    def __init__(self, data: Any, tier: Tier, num_bytes: int, on_free: Callable[[Any], None] | None = None) -> None:
        if not Tier.HOT <= tier <= Tier.DISK:
            raise ValueError(f"a payload lies in HOT, HOST or DISK, not in {tier!r}")
        if num_bytes < 0:
            raise ValueError(f"a payload of {num_bytes} bytes")
        self.data, self.tier, self.num_bytes, self._on_free = data, tier, num_bytes, on_free
        self.references = 1
        self.slots = 0  # how many of the references are places in a trie: bytes are counted once

    def share(self) -> Payload:
        """One more reference to the same data."""
        if self.references < 1:
            raise ValueError("the payload was already freed")
        self.references += 1
        return self

    def release(self) -> None:
        """Give a reference back; the last one frees the data."""
        if self.references < 1:
            raise ValueError("a payload was released more often than shared")
        self.references -= 1
        if not self.references and self._on_free is not None:
            self._on_free(self.data)

    def writable(self, copy: Callable[[Any], Any]) -> Payload:
        """This payload if nobody else refers to it, else a private copy; the caller's reference moves to what is returned."""
        if self.references == 1:
            return self
        private = Payload(copy(self.data), self.tier, self.num_bytes, self._on_free)
        self.release()
        return private


class Node:
    """An edge: a run of pages that every request so far entered at its first and left at its last page.

    `ends[t]` is the number of pages in tier t or hotter; `children_in[t]` counts the children that have any such page.
    """

    __slots__ = (
        "children",
        "children_in",
        "count",
        "count_s",
        "ends",
        "gap_s",
        "handles",
        "key",
        "kind",
        "last_s",
        "locks",
        "log2_p",
        "namespace",
        "num_pages",
        "parent",
        "payloads",
        "prefix_log2_p",
        "requests",
        "start_page",
        "state",
        "tokens",
    )

    def __init__(self, namespace: str, tokens: np.ndarray, num_pages: int, parent: Node | None) -> None:
        self.namespace, self.tokens, self.num_pages, self.parent = namespace, tokens, num_pages, parent
        self.children: dict[int, list[Node]] = {}
        self.start_page: int = 0 if parent is None else parent.start_page + parent.num_pages
        self.ends = [0, 0, 0, num_pages]
        self.children_in = [0, 0, 0, 0]
        self.payloads: list[Payload | None] | None = None
        self.log2_p: np.ndarray | None = None  # float32 [T]
        self.prefix_log2_p: float | None = 0.0 if parent is None else parent.end_log2_p
        self.count, self.count_s, self.requests, self.last_s = 0.0, 0.0, 0, 0.0
        self.gap_s = math.inf  # between the last two requests
        self.kind = "user"
        self.key = 0  # hash of the first page
        self.locks = 0  # handles that end below this node
        self.handles: set[Match] = set()  # handles that end inside it
        self.state: list[Any] = [None, None, None, None]  # an eviction policy's own, one a tier

    @property
    def end_page(self) -> int:
        """Pages from the root to the end of this node."""
        return self.start_page + self.num_pages

    @property
    def end_log2_p(self) -> float | None:
        """log2 P of everything from the root to the end of this node, None where a part of it was never given."""
        if self.parent is None:
            return 0.0
        if self.prefix_log2_p is None or self.log2_p is None:
            return None
        return self.prefix_log2_p + float(self.log2_p.sum(dtype=np.float64))

    def log2_p_inside(self, num_tokens: int) -> float | None:
        """log2 P of everything from the root to `num_tokens` tokens into this node, None where unknown."""
        if self.prefix_log2_p is None or (num_tokens and self.log2_p is None):
            return None
        return self.prefix_log2_p + (float(self.log2_p[:num_tokens].sum(dtype=np.float64)) if self.log2_p is not None else 0.0)

    def size(self, tier: int) -> int:
        """Pages that lie in this very tier."""
        return self.ends[tier] - (self.ends[tier - 1] if tier else 0)

    def is_tail(self, tier: int) -> bool:
        """Whether this node's last pages of the tier may leave it: nothing below lies in the tier or a hotter one."""
        return self.children_in[tier] == 0 and self.size(tier) > 0

    def num_unlocked(self, tier: int) -> int:
        """Pages at the end of the tier's part that no live match covers."""
        if self.locks:
            return 0
        held = max((handle.pages_in_node for handle in self.handles), default=0)
        return min(self.size(tier), max(0, self.ends[tier] - held))

    def child_nodes(self) -> Iterator[Node]:
        """All children, in the order they came."""
        for same_hash in self.children.values():
            yield from same_hash


class TrieState(Protocol):
    """What handles and checks look at of a trie; `engine.kv.trie.Trie`."""

    page_size: int
    page_bytes: Any  # [4], bytes a page takes in each tier where it has no payload
    pages_in: list[int]
    bytes_in: list[int]
    num_nodes: int
    handles: set[Match]
    roots: dict[str, Node]

    def nodes(self) -> Iterator[Node]: ...

    def page_key(self, tokens: np.ndarray) -> int: ...


class Match:
    """A known prefix of a request, locked until `release`: its pages and payloads are valid only while this handle is held.

    Attributes:
        num_pages: known pages; `num_restorable_pages` of them lie in a tier above TOKENS.
    """

    __slots__ = ("_trie", "node", "num_pages", "num_restorable_pages", "pages_in_node", "released")

    def __init__(self, trie: TrieState, node: Node, pages_in_node: int) -> None:
        self._trie, self.node, self.pages_in_node = trie, node, pages_in_node
        self.num_pages = node.start_page + pages_in_node
        self.released = False
        unrestorable = 0
        at: Node | None = node
        inside = pages_in_node
        while at is not None:
            unrestorable += max(0, inside - at.ends[Tier.DISK])
            at = at.parent
            if at is not None:
                at.locks += 1
                inside = at.num_pages
        self.num_restorable_pages = self.num_pages - unrestorable
        node.handles.add(self)
        trie.handles.add(self)

    @property
    def num_tokens(self) -> int:
        """Known tokens, whole pages only."""
        return self.num_pages * self._trie.page_size

    @property
    def namespace(self) -> str:
        """Whose pages these are: the request's own namespace or one that shares with it."""
        return self.node.namespace

    def path(self) -> list[tuple[Node, int]]:
        """Nodes from the root's child down, each with how many of its pages the match covers."""
        self.check()
        nodes = []
        at, inside = self.node, self.pages_in_node
        while at.parent is not None:
            nodes.append((at, inside))
            at = at.parent
            inside = at.num_pages
        nodes.reverse()
        return nodes

    def payloads(self) -> list[Payload | None]:
        """One payload a page, None for pages in the TOKENS tier or kept without objects; `share` those that must outlive the handle."""
        found: list[Payload | None] = []
        for node, pages in self.path():
            found += [None] * pages if node.payloads is None else node.payloads[:pages]
        return found

    def log2_p(self) -> float | None:
        """log2 P of the matched tokens under the model, None where unknown."""
        self.check()
        return self.node.log2_p_inside(self.pages_in_node * self._trie.page_size)

    def release(self) -> None:
        """Unlock the pages; a second call does nothing."""
        if self.released:
            return
        self.released = True
        self.node.handles.discard(self)
        self._trie.handles.discard(self)
        at = self.node.parent
        while at is not None:
            at.locks -= 1
            at = at.parent

    def check(self) -> None:
        """Raise ValueError once released."""
        if self.released:
            raise ValueError("the match was released: its pages may have been evicted")

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
