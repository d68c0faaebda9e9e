"""Checks of a whole trie against itself, for tests and idle moments."""

from __future__ import annotations

from bisect import bisect_right

from engine.kv.trie_nodes import Node, Payload, Tier, TrieState


def check_trie(trie: TrieState) -> None:
    """Raise AssertionError, naming what differs, unless everything kept beside the tree follows from the tree."""
    pages_in, bytes_in, num_nodes = [0] * 4, [0] * 4, 0
    slots: dict[int, int] = {}
    payloads: dict[int, Payload] = {}
    for node in trie.nodes():
        num_nodes += 1
        parent = node.parent
        assert parent is not None and node.namespace == parent.namespace, "a node hangs below another namespace"
        assert node.num_pages > 0 and len(node.tokens) == node.num_pages * trie.page_size, "tokens do not fill the node's pages"
        assert node.start_page == parent.end_page and node.key == trie.page_key(node.tokens), "a node is not where it says"
        assert node in parent.children[node.key], "a node is not among its parent's children"
        assert node.ends == sorted(node.ends) and node.ends[0] >= 0, "tiers of a node are out of order"
        assert node.ends[Tier.TOKENS] == node.num_pages, "a page without tokens"
        for tier in range(4):
            hotter_below = node.ends[tier] > 0 and parent.parent is not None and parent.ends[tier] < parent.num_pages
            assert not hotter_below, f"a page is hotter than the one before it, tier {tier}"
            pages_in[tier] += node.size(tier)
        assert node.log2_p is None or node.log2_p.shape == node.tokens.shape, "log2 P and tokens differ in length"
        expected = parent.end_log2_p
        assert (node.prefix_log2_p is None) == (expected is None), "log2 P of a prefix is known here and unknown there"
        assert expected is None or abs(expected - (node.prefix_log2_p or 0.0)) <= 1e-3 + 1e-5 * abs(expected), "log2 P does not add up"
        assert parent.parent is None or node.requests <= parent.requests, "more requests used a node than its prefix"
        for page in range(node.num_pages):
            payload = None if node.payloads is None else node.payloads[page]
            tier = bisect_right(node.ends, page)
            if payload is None:
                bytes_in[tier] += trie.page_bytes[tier]
            else:
                assert payload.tier == tier and payload.references > 0, "a payload is freed or lies in another tier than its page"
                bytes_in[tier] += 0 if id(payload) in slots else payload.num_bytes
                slots[id(payload)] = slots.get(id(payload), 0) + 1
                payloads[id(payload)] = payload
        assert node.payloads is None or len(node.payloads) == node.num_pages, "payloads and pages differ in number"
    for address, payload in payloads.items():
        assert payload.slots == slots[address] <= payload.references, "places of a payload are miscounted"
    assert pages_in == trie.pages_in and bytes_in == trie.bytes_in, "totals of pages or bytes are wrong"
    assert num_nodes == trie.num_nodes, "nodes are miscounted"
    _check_links(trie)


def _check_links(trie: TrieState) -> None:
    """Handles, locks and children."""
    locks: dict[Node, int] = {}
    for handle in trie.handles:
        assert not handle.released and handle in handle.node.handles, "a handle is lost"
        assert 0 <= handle.pages_in_node <= handle.node.num_pages, "a handle covers pages that are not there"
        assert handle.num_pages == handle.node.start_page + handle.pages_in_node, "a handle moved"
        at = handle.node
        while at.parent is not None:
            at = at.parent
            locks[at] = locks.get(at, 0) + 1
        assert at is trie.roots.get(handle.node.namespace), "a handle holds pages that left the tree"
    for node in [*trie.roots.values(), *trie.nodes()]:
        assert node.locks == locks.get(node, 0), "locks and handles disagree"
        assert node.handles <= trie.handles, "a node holds a handle that was released"
        children = list(node.child_nodes())
        firsts = {child.tokens[: trie.page_size].tobytes() for child in children}
        assert len(firsts) == len(children) and all(node.children.values()), "two children begin with the same page"
        counted = [sum(child.ends[tier] > 0 for child in children) for tier in range(4)]
        assert node.children_in == counted, "children in a tier are miscounted"
