"""What the scheduler asks of a store of prefixes that outlive the pools; `engine.store.prefix_cache` is one."""

from __future__ import annotations

from typing import Any, Protocol

from engine.runtime.request import PrefixRestore, Request, SequenceState


class PrefixStore(Protocol):
    """Called by whoever holds the engine's lock; nothing it meets may fail a request."""

    def restore(self, request: Request) -> PrefixRestore | None:
        """The request was admitted and runs next: what is known of its prompt, to be brought back into its caches; None where that is nothing. Each
        piece is noted in the request."""
        ...

    def finished(self, request: Request) -> None:
        """The request has ended, and its caches hold what it committed: keep what is new, later."""
        ...

    def take_over(self, conversation: SequenceState) -> bool:
        """The conversation is about to be closed: True if it still has to be kept, and will be closed afterwards (`EngineCore.discard`)."""
        ...

    def yield_pages(self) -> bool:
        """Pages are needed: close conversations that were taken over, kept or not, and what is measured in; False when there are none."""
        ...

    def flush(self, timeout_s: float | None = None) -> bool:
        """Keep now what waits to be kept; False when the time was too short. The caller does not hold the lock."""
        ...

    def report(self) -> dict[str, Any]:
        """What it did for this engine, and what it holds, for JSON (docs/json.md)."""
        ...
