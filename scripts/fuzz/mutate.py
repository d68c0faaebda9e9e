"""Changes of JSON values and of bytes, each a function of its random generator alone."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 64.5, -0.0, 1e-300, 1e30, float("nan"), float("inf"), -float("inf"), 10**5, 10**9, 2**31, 2**32, 2**63,
    2**64, 10**30, "", "64", "x" * 1000, "\x1b[31m", "\ud800", "../x", "a\0b", [], {}, [[]], [0], [-1], ["x"], {"a": 1}, {"": None},
)  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    """A value of any type and size, now and then nested."""
    if rng.random() < 0.03:
        deep: Any = 0
        for _ in range(rng.choice((5, 70, 500))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return copy.deepcopy(rng.choice(ODD_VALUES))


def change_json(value: Any, rng: random.Random, times: int | None = None) -> Any:
    """A copy of a JSON value with one to three places changed, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        holder, key = _place(value, rng)
        if holder is None:
            value = odd_value(rng) if rng.random() < 0.2 else value
            continue
        kind = rng.random()
        if kind < 0.6:
            holder[key] = odd_value(rng)
        elif kind < 0.75:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(("x", "", "extra", "factor", "type"))] = odd_value(rng)
        else:
            holder.insert(key, odd_value(rng))
        if kind > 0.95 and isinstance(holder, dict) and key in holder and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] + rng.choice((-1, 1, 2, 100))
    return value


def _place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container within the value and a key of it, (None, None) for an empty or plain value; deeper places with falling chance."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value:
        holder, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = value[key]
        if rng.random() < 0.4:
            break
    return holder, key


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four flips, odd numbers, cuts, copies or insertions."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 400) + 1), rng.random()
        if kind < 0.35 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, rng.getrandbits(64)))
            out[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind < 0.75:
            del out[at : at + rng.choice((1, 8, 100, len(out)))]
        elif kind < 0.9:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + rng.choice((1, 8, 64))]
        else:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
    return bytes(out)


def describe(text: str, limit: int = 120) -> str:
    """The text on one printable line, cut."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line[:limit]
