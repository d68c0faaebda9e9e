"""A stored prefix on its way back into a request's caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from codec.errors import CodecError
from engine.errors import ForetoldError
from engine.runtime.core import EngineCore
from engine.runtime.request import Request
from engine.sessions.restore import SpanRestore

TROUBLE = (ForetoldError, CodecError, OSError, MemoryError)
"""What costs no request its answer when a store meets it."""


class StoredRestore:
    """See `engine.runtime.request.PrefixRestore`.

    Args:
        core: the request's engine.
        request: it was admitted, and nothing else writes its caches.
        restore: of its conversation.
        lookup_s: what it took to find what is restored.
        came: told of every piece: the request's tokens before it, and the number of spans that came.
        ended: told at the end, however it comes: all tokens that came, the seconds that took, and whether nothing is missing.
        failed: told of trouble that costs no request its answer.
    """

    def __init__(
        self,
        core: EngineCore,
        request: Request,
        restore: SpanRestore,
        lookup_s: float,
        *,
        came: Callable[[int, int], Any],
        ended: Callable[[int, float, bool], Any],
        failed: Callable[[Exception], Any],
    ) -> None:
        self.core, self.request, self.restore = core, request, restore
        self.end, self._lookup_s = restore.spans[-1].end, lookup_s
        self._came, self._ended, self._failed = came, ended, failed
        self._tokens, self._took_s, self._open = 0, 0.0, True

    def piece(self, tokens: int) -> bool:
        """See `PrefixRestore.piece`."""
        if not self._open:
            return False
        request, began, before = self.request, time.perf_counter(), self.request.sequence.length
        try:
            with torch.inference_mode():
                count = self.restore.piece(tokens)
        except BaseException as error:
            self._empty()
            self._close(whole=False)
            if not isinstance(error, TROUBLE):
                raise
            self._failed(error)
            return False
        if self.core.device.type == "cuda":
            torch.cuda.synchronize(self.core.device)
        self._took_s += time.perf_counter() - began
        self._tokens += request.sequence.length - before
        request.restored_tokens, request.restore_s = self._tokens, self._lookup_s + self._took_s
        request.reused_tokens = request.sequence.length
        if count:
            self._came(before, count)
        if not self.restore.left:
            self._close(whole=True)
        return self._open

    def close(self) -> None:
        """See `PrefixRestore.close`."""
        self._close(whole=False)

    def _close(self, *, whole: bool) -> None:
        if self._open:
            self._open = False
            self._ended(self._tokens, self._took_s, whole)

    def _empty(self) -> None:
        """Give the conversation caches that hold nothing: a restore that failed may have left anything in the old ones."""
        conversation, drafter = self.request.conversation, self.core.drafter
        if drafter is not None and conversation.draft_state is not None:
            drafter.close([conversation.draft_state])
        conversation.sequence.free()
        conversation.sequence = self.core.pool.new_sequence()
        if drafter is not None:
            conversation.draft_state = drafter.open(conversation.sequence)
        conversation.emptied()
        self.request.reused_tokens = self.request.restored_tokens = 0
