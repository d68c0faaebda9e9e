"""Work that is cut into pieces, so that other requests may run between them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
P = ParamSpec("P")
T = TypeVar("T")


def at_once(pieces: Generator[None, None, T]) -> T:
    """What a generator returns, its pieces one after the other (`EngineCore.in_turns`: with others in between)."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: T = end.value
            return result


def whole(method: Callable[Concatenate[Owner, P], Generator[None, None, T]]) -> Callable[Concatenate[Owner, P], T]:
    """The method that does at once what another one of its class, with the same parameters, does in pieces."""

    @wraps(method)
    def run(self: Owner, /, *args: P.args, **options: P.kwargs) -> T:
        pieces: Generator[None, None, T] = getattr(self, method.__name__)(*args, **options)
        return at_once(pieces)

    return run
