"""Which stored sequence lends most to a request: the paper's d_T (arXiv 2604.15356) on the trie, and the search it ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.kv.trie import Trie, common_tokens
from engine.kv.trie_nodes import Match, Node


class Donor(NamedTuple):
    """What a stored sequence can lend to a request."""

    match: Match  # the whole pages they share, locked
    node: Node  # holds the last token they share
    num_tokens: int  # tokens they share, the last page's part included
    distance: float | None  # d_T in bits: the larger, the better a donor; None where log2 P is unknown


def nearest_donor(trie: Trie, tokens: Sequence[int] | np.ndarray, namespace: str = "", max_candidates: int = 256) -> Donor:
    """The stored sequence with the largest d_T to `tokens`, that is with the longest common prefix, to the token.

    For one request the order by d_T is the order by length, so no probability is needed to find the donor. Among equals the one used
    last wins. Beyond the whole pages at most `max_candidates` branches are compared.
    """
    ids = trie.token_ids(tokens)
    match = trie.match(ids, namespace)
    rest = ids[match.num_tokens :]
    node, start = match.node, match.pages_in_node * trie.page_size
    if match.pages_in_node < node.num_pages:
        branches = [(node, node.tokens[start : start + trie.page_size])]
    else:
        children = [child for child, _ in zip(node.child_nodes(), range(max_candidates), strict=False)]
        branches = [(child, child.tokens[: trie.page_size]) for child in children]
    best = (0, node.last_s, node)
    for branch, page in branches:
        common = common_tokens(page, rest)
        if common and (common, branch.last_s) > best[:2]:
            best = (common, branch.last_s, branch)
    common, _, holder = best
    inside = common + (start if holder is node else 0)
    log2_p = holder.log2_p_inside(inside)
    return Donor(match, holder, match.num_tokens + common, None if log2_p is None else 0.0 - log2_p)


def distance(trie: Trie, a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray, namespace: str = "") -> float:
    """d_T(a, b) = -log2 P(a ^ b) in bits, a ^ b their longest common prefix: information they share, 0 for nothing in common.

    No metric: d(a, a) is not 0 but the information in all of a, and d grows the closer two sequences are. It ranks donors.

    Raises:
        ValueError: the common prefix, or its probability, is not in the trie.
    """
    ids, other = trie.token_ids(a), trie.token_ids(b)
    shared = ids[: common_tokens(ids, other)]
    donor = nearest_donor(trie, shared, namespace)
    donor.match.release()
    if donor.num_tokens < len(shared) or donor.distance is None:
        raise ValueError(f"the trie knows no probability of the {len(shared)} tokens that the sequences share")
    return donor.distance
