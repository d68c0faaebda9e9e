"""Pages for what a step is about to write: asked for by whoever calls a step, before it, so that no forward pass allocates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from draft.protocols import Drafter
from draft.tree import MAX_LEAVES
from engine.kv.pool import KvPool, KvSequence
from engine.runtime.request import Request
from engine.runtime.sampling import MAX_DRAFT_LENGTH

MOST_STEP_TOKENS = 2 * MAX_DRAFT_LENGTH + 1 + MAX_LEAVES
"""Most tokens that a request is given pages for behind its text, to decode."""


class Demand(NamedTuple):
    """Pages that a sequence needs: for `tokens` tokens in all, those from `start` on to be written; whole: step by step."""

    sequence: KvSequence
    tokens: int
    start: int
    whole: bool = False

    @property
    def needs(self) -> list[tuple[KvPool, int]]:
        """Pages that are still to be taken of each pool."""
        return self.sequence.needs(self.tokens, self.start, whole=self.whole)

    def reserve(self) -> None:
        """Take them. Raises PoolExhausted; nothing is taken then."""
        self.sequence.ensure(self.tokens, self.start)


def _demands(request: Request, drafter: Drafter | None, target_tokens: int, draft_tokens: int) -> list[Demand]:
    sequence, state = request.sequence, request.draft_state
    start = sequence.length
    found = []
    if drafter is not None and state is not None:
        state.align()  # first: what it cuts off gives its pages back
        if drafter.exit_layer:
            start = min(start, state.rerun_from)  # a draft head that lies behind has the first layers run once more
        if state.cache is not sequence and (request.params.draft_length != 0 or drafter.exit_layer):  # a draft head keeps up regardless
            found.append(Demand(state.cache, draft_tokens, min(state.cache.length, draft_tokens)))
    return [Demand(sequence, target_tokens, start), *found]


def chunk_demands(request: Request, drafter: Drafter | None, chunk: int) -> list[Demand]:
    """Of the next `chunk` tokens of its prompt; a separate draft does not run them yet."""
    sequence = request.sequence
    end = sequence.length + chunk
    return [d for d in _demands(request, drafter, end, end) if d.sequence is sequence or (drafter is not None and drafter.exit_layer)]


def restore_demands(request: Request, drafter: Drafter | None, end: int) -> list[Demand]:
    """Of tokens that are restored up to `end`. A separate draft runs them even for a request without drafts, but pages for that are not promised."""
    return _demands(request, drafter, end, end)


def block_demands(request: Request, drafter: Drafter | None, *, drafts: bool) -> list[Demand]:
    """Of one decode step and the one that may be launched ahead of its result: pending tokens, as many drafts as there may be (`drafts`: if there may
    be any), and their leaves."""
    end = _block_end(request, drafts)
    return _demands(request, drafter, end, end)


def holding_blocks(requests: Sequence[Request], drafter: Drafter | None, *, drafts: bool) -> set[Request]:
    """Those of which nothing is missing of `block_demands`: in most steps all, so it is asked of all first."""
    exit_layer = 0 if drafter is None else drafter.exit_layer
    found = set()
    for request in requests:
        sequence, state, end = request.sequence, request.draft_state, _block_end(request, drafts)
        start = sequence.length
        if drafter is None or state is None:
            held = sequence.holds(start, end)
        else:
            state.align()  # first: what it cuts off gives its pages back
            held = sequence.holds(min(start, state.rerun_from) if exit_layer else start, end)
            cache = state.cache
            if held and cache is not sequence and (exit_layer or request.params.draft_length != 0):
                held = cache.holds(min(cache.length, end), end)
        if held:
            found.add(request)
    return found


def _block_end(request: Request, drafts: bool) -> int:
    length, more = len(request.token_ids), 1
    if drafts:
        more = 2 * request.most_drafts + 1 + (MAX_LEAVES if request.params.draft_length == "auto" else 0)
    return max(length, min(request.longest(drafts=drafts), length + more))


def whole_demands(request: Request, drafter: Drafter | None, *, drafts: bool, most: int | None = None) -> list[Demand]:
    """Of the request at its longest, or at `most` tokens and the drafts of a step, where that is less."""
    longest = request.longest(drafts=drafts)
    if most is not None:
        longest = min(longest, most + (request.most_drafts if drafts else 0))
    return [demand._replace(whole=True) for demand in _demands(request, drafter, longest, longest)]


def reserve(demands: list[Demand]) -> None:
    """Take the pages of all. Raises PoolExhausted; those before the one that does not fit are kept, and no contents change."""
    for demand in demands:
        demand.reserve()
