"""Draft tree: further tokens proposed beside a draft, in case the target takes one of them instead.

While weights are what a step waits for, a row more in a verification costs little, and the second likeliest token is right often where the first is
not (a tree of drafts: Miao et al., "SpecInfer", 2024). Nothing is drafted after them, so they are leaves. A block is the pending token, the chain
of drafts, then the leaves in the order of their depths; a leaf has the position of the draft beside which it stands, and sees what it sees.

Its keys and values lie behind the longest chain, where no chain token looks; the accepted one's are moved to where they belong.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_CHAIN = 12  # drafts of a block that may have leaves
MAX_LEAVES = 8  # of a block
MAX_CANDIDATES = 4  # tokens at one depth, the draft included


class Leaf(NamedTuple):
    """depth: of the draft beside which it stands, 1 for the first. token: the target's id."""

    depth: int
    token: int


class TreePosition(NamedTuple):
    """Where new tokens of one request stand that do not simply follow one another: each sees the cache's tokens before its position, and itself.

    positions: in the text. slots: in the cache.
    """

    positions: list[int]
    slots: list[int]


def leaf_slot(base: int, number: int) -> int:
    """Place in the cache of a block's leaf number 0, 1...; base: position of the block's first draft."""
    return base + MAX_CHAIN + number


def block_positions(base: int, num_drafts: int, leaves: list[Leaf]) -> TreePosition:
    """A whole block, from its pending token on."""
    chain = list(range(base - 1, base + num_drafts))
    slots = [leaf_slot(base, number) for number in range(len(leaves))]
    return TreePosition(chain + [base + leaf.depth - 1 for leaf in leaves], chain + slots)
