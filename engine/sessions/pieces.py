"""Work that is cut into pieces, so that other requests may run between them."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def at_once(pieces: Generator[None, None, T]) -> T:
    """What a generator returns, its pieces one after the other (`EngineCore.in_turns`: with others in between)."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result
