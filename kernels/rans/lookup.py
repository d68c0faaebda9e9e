"""What the Triton coders look up instead of searching and dividing, made from a model's frequencies.

Search: a class's entries are the leaves of a complete tree with sixteen items a node (64 bytes), symbol s at place s + 8 * 16^k - 1 for the least
depth k that holds them all; a class of up to sixteen entries is one node. Places without an entry repeat the nearest one's item.
Item: start << 18 | place in its node << 14 | frequency; frequency 0 marks an item that stands for a node below. Items rise with their start, so
the one that holds a slot is the one with the least unsigned difference from (slot << 18 | 2^18 - 1), and that difference alone gives
frequency, place and slot - start.

Division: after a word is emitted a state x is below f * 2^18. With s = ceil(log2 f) and 2^(31 + s) / f rounded up to m, x // f = x m >> (31 + s)
as long as x (m f - 2^(31 + s)) < 2^(31 + s) (Granlund and Montgomery, 1994); where that could fail, m is rounded down and multiplies x + 1
(Robison, 2005).
"""

from __future__ import annotations

import torch

ITEM_SHIFT = 18
PLACE_SHIFT = 14


def _item(start: torch.Tensor, place: torch.Tensor, freq: torch.Tensor | int) -> torch.Tensor:
    return start << ITEM_SHIFT | (place & 15) << PLACE_SHIFT | freq


def search_trees(
    freqs: torch.Tensor, starts: torch.Tensor, begins: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes, int32 [N, 16], root of class c first to node c, and the number of each class's first node below the root, int32 [C].

    Args:
        freqs, starts: int64, of all entries, class after class.
        begins, limits: int64 [C], a class's first entry and its limit (2 limit + 2 entries).
    """
    roots: list[torch.Tensor] = []
    below: list[torch.Tensor] = []
    first_child, total = [], len(limits)
    for begin, limit in zip(begins.tolist(), limits.tolist(), strict=True):
        own, count, depth = slice(begin, begin + 2 * limit + 2), 2 * limit + 2, 0
        while 8 * 16**depth - 1 < limit:
            depth += 1
        front = 8 * 16**depth - 1 - limit  # places before the first entry
        first_child.append(total if depth else 0)
        for level in range(depth + 1):
            span = 16 ** (depth - level)  # leaves an item stands for
            place = torch.arange(16 ** (level + 1)).clamp(front // span, (front + count - 1) // span)
            entry = (place * span - front).clamp(min=0)
            items = _item(starts[own][entry], place, freqs[own][entry] if level == depth else 0).view(-1, 16)
            (below if level else roots).append(items)
            total += len(items) if level else 0
    nodes = torch.cat(roots + below)
    return nodes.to(torch.int32), torch.tensor(first_child, dtype=torch.int32)


def divisors(freqs: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """int64 [entries]: frequency << 18 | start << 4 | shift below; above, the multiplier m whose top bit (always set) tells instead whether it
    was rounded down. x // f = (x + rounded down) m >> (32 + shift)."""
    f = freqs.long()
    shift = torch.tensor([max(int(n) - 1, 0).bit_length() for n in f.tolist()]) - 1
    scale = torch.ones_like(f) << (shift.clamp(min=0) + 32)
    up = (scale + f - 1) // f
    down = (up * f - scale) * f > scale >> 18
    multiplier = torch.where(down, scale // f, up)
    one = f == 1
    multiplier, down = torch.where(one, 0xFFFFFFFF, multiplier), down | one
    high = (multiplier & 0x7FFFFFFF) | down.long() << 31
    return high << 32 | f << 18 | starts.long() << 4 | shift.clamp(min=0)
