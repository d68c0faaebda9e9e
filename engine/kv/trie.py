"""Radix tree over pages of token ids: which prefixes are known, how probable they are, how often requests used them, where their pages lie.

Axes: T tokens, P pages, S tokens a page (T = P * S). An edge of the tree and the node below it are one object, `Node`. A node's pages are
sorted by tier, and along every path tiers only get colder, so the pages that can be restored are always a prefix of a match.

Source: Magarshak, "Sequential KV Cache Compression via Probabilistic Language Tries" (arXiv 2604.15356), its layer 1; docs/trie.md names
what of that paper does not hold. Not safe for use from several threads at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from engine.kv.trie_integrity import check_trie
from engine.kv.trie_nodes import Match, Node, Payload, Tier

__all__ = ["DEFAULT_PAGE_SIZE", "TOKEN_BYTES", "Match", "Node", "Payload", "Tier", "Trie"]

TOKEN_BYTES = 4
DEFAULT_PAGE_SIZE = 64


class Trie:
    """The tree of one process.

    Args:
        page_size: S; only whole pages are kept.
        half_life_s: a request's count halves in this time.
        page_bytes: bytes a page takes in HOT, HOST, DISK and TOKENS where it is kept without a `Payload` (a replay does that).
        hash_page: hash of a page's int32 bytes; a hit is always confirmed by comparing the tokens.

    Attributes:
        pages_in, bytes_in: totals, one a tier; a payload in several places counts its bytes once.
        on_tail: called with (node, tier) when a node's last pages of a tier become the next to leave it.
    """

    def __init__(
        self,
        page_size: int = DEFAULT_PAGE_SIZE,
        *,
        half_life_s: float = 3600.0,
        page_bytes: Sequence[int] | None = None,
        hash_page: Callable[[bytes], int] = hash,
    ) -> None:
        if page_size < 1 or half_life_s <= 0:
            raise ValueError(f"a trie needs pages of tokens and a half-life above 0, not {page_size} and {half_life_s} s")
        self.page_size, self.half_life_s = page_size, half_life_s
        self.page_bytes = list(page_bytes) if page_bytes is not None else [0, 0, 0, page_size * TOKEN_BYTES]
        if len(self.page_bytes) != 4 or min(self.page_bytes) < 0:
            raise ValueError(f"page_bytes holds one size for each of 4 tiers, not {self.page_bytes}")
        self.pages_in, self.bytes_in = [0] * 4, [0] * 4
        self.num_nodes = 0
        self.hash_collisions = 0
        self.handles: set[Match] = set()
        self.on_tail: Callable[[Node, int], None] | None = None
        self.roots: dict[str, Node] = {}
        self._hash = hash_page

    # --- namespaces -----------------------------------------------------------------------------------------------------

    def root(self, namespace: str) -> Node:
        """The namespace's root; made when first asked for."""
        node = self.roots.get(namespace)
        if node is None:
            node = self.roots[namespace] = Node(namespace, np.empty(0, np.int32), 0, None)
        return node

    # --- matching -------------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int] | np.ndarray, namespace: str = "") -> Match:
        """The longest known prefix in whole pages, locked; counts nothing and changes nothing else.

        Args:
            tokens: int [T], ids in [0, 2^31).
        """
        ids = self.token_ids(tokens)
        return Match(self, *self._walk(ids, self.root(namespace)))

    @staticmethod
    def token_ids(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids as int32 [T]; ValueError unless they are integers in [0, 2^31)."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"token ids are one row of integers, not {ids.dtype} of shape {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
            raise ValueError("token ids lie in [0, 2^31)")
        return ids.astype(np.int32, copy=False)

    def _walk(self, ids: np.ndarray, node: Node, inside: int = 0) -> tuple[Node, int]:
        """From `inside` pages into `node`, follow `ids`, which are counted from the root; returns where it ends, in the same form."""
        size = self.page_size
        at, total = node.start_page + inside, len(ids) // size
        if inside < node.num_pages:
            inside += common_tokens(node.tokens[inside * size :], ids[at * size : total * size]) // size
            if inside < node.num_pages:
                return node, inside
            at = node.end_page
        data, width = ids[: total * size].tobytes(), size * ids.itemsize
        while at < total:
            for child in node.children.get(self._hash(data[at * width : (at + 1) * width]), ()):
                if child.tokens.tobytes() == data[at * width : child.end_page * width]:  # nearly always: a conversation has a node a turn
                    common = child.num_pages
                    break
                common = common_tokens(child.tokens, ids[at * size : total * size]) // size
                if common:
                    break
                self.hash_collisions += 1
            else:
                break
            node, at = child, at + common
            if common < child.num_pages:
                return node, common
        return node, node.num_pages

    # --- growing --------------------------------------------------------------------------------------------------------

    def insert(
        self,
        tokens: Sequence[int] | np.ndarray,
        payloads: Sequence[Payload] | None = None,
        *,
        namespace: str = "",
        tier: Tier = Tier.HOT,
        log2_p: Sequence[float] | np.ndarray | None = None,
        kind: str = "user",
        after: Match | None = None,
        first_payload: int = 0,
    ) -> Match:
        """Add a sequence's whole pages; pages already known in this tier or a hotter one keep what they have. Returns all of them, locked.

        Args:
            tokens: int [T]; an unfinished last page is left out.
            payloads: one a whole page, all of `tier`; the trie takes these references and releases those it has no use for. None keeps
                pages without objects, `page_bytes` each. first_payload: number of the page that the first of them is of; pages before it
                lie in the tier or a hotter one.
            log2_p: float [T], log2 P of each token given those before, under the model; known from verification, for prompts from the draft.
            kind: what the new pages hold (`system`, `tool`, `answer`, `user`), for a policy's prior.
            after: a held match of a prefix of `tokens`, so that nothing is compared twice.
        """
        ids = self.token_ids(tokens)
        total = len(ids) // self.page_size
        if payloads is not None and (len(payloads) != total - first_payload or any(p.tier != tier for p in payloads)):
            raise ValueError(f"{total - first_payload} pages need as many payloads of tier {tier.name}, not {len(payloads)}")
        if tier == Tier.GONE or (tier == Tier.TOKENS and payloads is not None):
            raise ValueError(f"nothing can be inserted into tier {tier.name}" + " with payloads" * (tier == Tier.TOKENS))
        bits = None if log2_p is None else np.asarray(log2_p, dtype=np.float32)
        if bits is not None and (bits.shape != ids.shape or not np.isfinite(bits).all() or (bits > 0).any()):
            raise ValueError(f"log2_p holds one finite number of at most 0 for each of {len(ids)} tokens, not shape {bits.shape}")
        if after is not None and after.namespace == namespace:
            after.check()
            node, inside = self._walk(ids, after.node, after.pages_in_node)
        else:
            node, inside = self._walk(ids, self.root(namespace))
        if first_payload and first_payload > _pages_within(node, inside, tier):
            raise ValueError(f"not all pages before number {first_payload} lie in tier {tier.name}")
        if inside < node.num_pages:
            node = self._split(node, inside)
        known = node.end_page
        if known < total:
            node = self._append(node, ids[known * self.page_size : total * self.page_size], kind)
            node.log2_p = None if bits is None else bits[known * self.page_size : total * self.page_size].copy()
        match = Match(self, node, node.num_pages)
        self._hold(match, tier, payloads, first_payload)
        return match

    def promote(self, match: Match, tier: Tier, payloads: Sequence[Payload] | None = None) -> int:
        """Move a match's pages that are colder than `tier` up into it; returns how many moved.

        Args:
            payloads: one a page of the match, all of `tier`; those not needed are released. None: pages kept without objects.
        """
        match.check()
        if payloads is not None and (len(payloads) != match.num_pages or any(p.tier != tier for p in payloads)):
            raise ValueError(f"{match.num_pages} pages need as many payloads of tier {tier.name}, not {len(payloads)}")
        return self._hold(match, tier, payloads)

    def _hold(self, match: Match, tier: Tier, payloads: Sequence[Payload] | None, first: int = 0) -> int:
        """first: number of the page that the first payload is of."""
        moved = 0
        for node, pages in match.path():
            held, start = node.ends[tier], node.start_page - first
            if payloads is not None and (until := start + min(held, pages)) > 0:
                for payload in payloads[max(0, start) : until]:
                    payload.release()
            if held < pages:
                moved += pages - held
                new = None if payloads is None else payloads[start + held : start + pages]
                self._place(node, held, pages, [max(end, pages) if t >= tier else end for t, end in enumerate(node.ends)], new)
                self._announce(node)
        match.num_restorable_pages = match.num_pages if tier < Tier.TOKENS else match.num_restorable_pages
        return moved

    def record_request(self, match: Match, now_s: float) -> None:
        """Count one request on all of a match: once a node, however many pages it has. A match that ends inside a node splits it."""
        match.check()
        if match.pages_in_node < match.node.num_pages and match.pages_in_node:
            self._split(match.node, match.pages_in_node)
        at: Node | None = match.node
        while at is not None:
            at.count = self.decayed_count(at, now_s) + 1.0
            at.count_s = max(at.count_s, now_s)
            at.gap_s = now_s - at.last_s if at.requests else math.inf
            at.requests += 1
            at.last_s = max(at.last_s, now_s)
            at = at.parent

    def decayed_count(self, node: Node, now_s: float) -> float:
        """Requests that used the node, each halved every `half_life_s`; a clock that went back decays nothing."""
        return node.count * 0.5 ** (max(0.0, now_s - node.count_s) / self.half_life_s) if node.count else 0.0

    def _append(self, parent: Node, ids: np.ndarray, kind: str) -> Node:
        node = Node(parent.namespace, ids.copy(), len(ids) // self.page_size, parent)
        node.kind, node.key = kind, self.page_key(node.tokens)
        parent.children.setdefault(node.key, []).append(node)
        parent.children_in[Tier.TOKENS] += 1
        self.num_nodes += 1
        self.pages_in[Tier.TOKENS] += node.num_pages
        self.bytes_in[Tier.TOKENS] += node.num_pages * self.page_bytes[Tier.TOKENS]
        self._announce(node)
        return node

    def _split(self, node: Node, pages: int) -> Node:
        """Put the node's first pages into a new node above it, which is returned; the old object keeps the tail and its place in queues."""
        parent, tokens = node.parent, pages * self.page_size
        assert parent is not None and 0 < pages < node.num_pages, "only inside a node can it be split"
        upper = Node(node.namespace, node.tokens[:tokens], pages, parent)
        upper.key = node.key
        same_hash = parent.children[upper.key]
        same_hash[same_hash.index(node)] = upper
        for name in ("count", "count_s", "requests", "last_s", "gap_s", "kind"):
            setattr(upper, name, getattr(node, name))
        upper.state = list(node.state)
        upper.ends = [min(end, pages) for end in node.ends]
        if node.payloads is not None:
            upper.payloads, node.payloads = node.payloads[:pages], node.payloads[pages:]
        if node.log2_p is not None:
            upper.log2_p, node.log2_p = node.log2_p[:tokens], node.log2_p[tokens:]
        above = {handle for handle in node.handles if handle.pages_in_node <= pages}
        upper.handles, upper.locks = above, node.locks + len(node.handles) - len(above)
        node.handles = node.handles - above
        for handle in above:
            handle.node = upper
        for handle in node.handles:
            handle.pages_in_node -= pages
        node.parent, node.tokens, node.num_pages = upper, node.tokens[tokens:], node.num_pages - pages
        node.start_page += pages
        node.prefix_log2_p = upper.end_log2_p
        node.ends = [max(0, end - pages) for end in node.ends]
        node.key = self.page_key(node.tokens)
        upper.children[node.key] = [node]
        upper.children_in = [int(end > 0) for end in node.ends]
        self.num_nodes += 1
        self._announce(upper)
        return upper

    # --- shrinking ------------------------------------------------------------------------------------------------------

    def demote(self, node: Node, tier: Tier, num_pages: int, destination: Tier, payloads: Sequence[Payload] | None = None) -> None:
        """Move the last `num_pages` of the node's pages in `tier` down to `destination`; GONE forgets them, TOKENS keeps the ids alone.

        Args:
            payloads: the moved pages in their new tier, for HOST and DISK; None: pages kept without objects.

        Raises:
            ValueError: a live match covers the pages, or something behind them is hotter than the destination.
        """
        if not 0 < num_pages <= node.num_unlocked(tier):
            raise ValueError(f"{num_pages} pages cannot leave tier {tier.name}: {node.num_unlocked(tier)} are there and not locked")
        if destination <= tier or node.children_in[destination - 1] or node.ends[destination - 1] != node.ends[tier]:
            raise ValueError(f"pages of tier {tier.name} cannot move to {destination.name} before those behind them")
        if payloads is not None and (len(payloads) != num_pages or any(p.tier != destination for p in payloads)):
            raise ValueError(f"{num_pages} pages need as many payloads of tier {destination.name}, not {len(payloads)}")
        end = node.ends[tier] - num_pages
        ends = [min(held, end) if tier <= t < destination else held for t, held in enumerate(node.ends)]
        self._place(node, end, end + num_pages, ends, payloads)
        parent = node.parent
        if destination == Tier.GONE:
            node.num_pages = end
            node.tokens = node.tokens[: end * self.page_size].copy()
            node.log2_p = None if node.log2_p is None else node.log2_p[: end * self.page_size].copy()
            if node.payloads is not None:
                del node.payloads[end:]
            if not end:
                self._remove(node)
        if node.parent is not None:
            self._announce(node)
        if parent is not None and parent.num_pages:
            self._announce(parent)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None and not node.children and not node.locks
        parent.children[node.key].remove(node)
        if not parent.children[node.key]:
            del parent.children[node.key]
        node.parent = None
        self.num_nodes -= 1

    def _place(self, node: Node, start: int, stop: int, ends: list[int], new: Sequence[Payload] | None) -> None:
        """Give pages [start, stop) of a node other tiers, as `ends` says, and other payloads (None: none)."""
        old_ends, node.ends = node.ends, ends
        for tier in range(4):
            old, now = old_ends[tier], ends[tier]
            if tier:
                self.pages_in[tier] += now - ends[tier - 1] - old + old_ends[tier - 1]
            else:
                self.pages_in[tier] += now - old
            if node.parent is not None:
                node.parent.children_in[tier] += (now > 0) - (old > 0)
        if node.payloads is None and new is None:
            for tier in range(4):
                for held, sign in ((old_ends, -1), (ends, 1)):
                    size = held[tier] - (held[tier - 1] if tier else 0)
                    self.bytes_in[tier] += sign * size * self.page_bytes[tier]
            return
        if node.payloads is None:
            node.payloads = [None] * node.num_pages
        for page in range(start, stop):
            self._count_bytes(node.payloads[page], bisect_right(old_ends, page), -1)
            node.payloads[page] = None if new is None else new[page - start]
            self._count_bytes(node.payloads[page], bisect_right(ends, page), 1)

    def _count_bytes(self, payload: Payload | None, tier: int, sign: int) -> None:
        """Count one place of a page (sign 1), or take it back (-1) with the reference it held."""
        if payload is None:
            if tier < Tier.GONE:
                self.bytes_in[tier] += sign * self.page_bytes[tier]
            return
        if sign > 0:
            self.bytes_in[payload.tier] += 0 if payload.slots else payload.num_bytes
            payload.slots += 1
        else:
            payload.slots -= 1
            self.bytes_in[payload.tier] -= 0 if payload.slots else payload.num_bytes
            payload.release()

    def _announce(self, node: Node) -> None:
        if self.on_tail is not None:
            for tier in range(4):
                if node.is_tail(tier):
                    self.on_tail(node, tier)

    def page_key(self, tokens: np.ndarray) -> int:
        """Hash of the first page of int32 `tokens`."""
        return self._hash(tokens[: self.page_size].tobytes())

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents first; walks the whole tree."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.child_nodes())

    def check_integrity(self) -> None:
        """Recompute everything kept beside the tree from the tree itself; walks all of it.

        Raises:
            AssertionError: something differs; the message names it.
        """
        check_trie(self)


def _pages_within(node: Node, inside: int, tier: Tier) -> int:
    """Of the pages up to `inside` pages into a node, those that lie in a tier or a hotter one."""
    within = node.start_page + min(inside, node.ends[tier])
    while node.parent is not None and within <= node.start_page:
        node = node.parent
        within = node.start_page + node.ends[tier]
    return within


def common_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two rows of token ids."""
    length = min(len(a), len(b))
    if not length:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length
