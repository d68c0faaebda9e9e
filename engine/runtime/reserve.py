"""Pages for what a step is about to write: asked for by whoever calls a step, before it, so that no forward pass allocates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from draft.policy import MAX_AUTO_LENGTH
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


def holding_blocks(requests: Sequence[Request], drafter: Drafter | None, *, drafts: bool, changed: bool) -> set[Request]:
    """Those of which nothing is missing of `block_demands`: in most steps all, so it is asked of all first.

    What is held lasts until the text has grown into it, unless pages have been shared since, or something else than steps that were carried out
    has moved the caches (`changed`): only then the caches are asked anew.
    """
    found: set[Request] = set()
    if not requests:
        return found
    first = requests[0].conversation
    as_of = first.sequence.pool.sharings
    if first.draft_state is not None:
        as_of += first.draft_state.cache.pool.sharings
    for request in requests:
        if request.held_until < len(request.conversation.token_ids) or request.held_as_of != as_of or changed:
            request.held_until, request.held_as_of = _held_until(request, drafter, drafts), as_of
        if request.held_until >= len(request.conversation.token_ids):
            found.add(request)
    return found


def _held_until(request: Request, drafter: Drafter | None, drafts: bool) -> int:
    """Tokens that the text may have while nothing is missing of `block_demands`; 0 where something is now."""
    sequence, state = request.sequence, request.draft_state
    length, end, caches = len(request.token_ids), _block_end(request, drafts), [(sequence, sequence.length)]
    if drafter is not None and state is not None:
        state.align()  # first: what it cuts off gives its pages back
        cache = state.cache
        if drafter.exit_layer:
            caches = [(sequence, min(sequence.length, state.rerun_from))]
        if cache is not sequence and (drafter.exit_layer or request.params.draft_length != 0):
            caches.append((cache, min(cache.length, end)))
    if not all(cache.holds(start, end) for cache, start in caches):
        return 0
    if any(cache.windows for cache, _ in caches):
        return length  # what they hold slides on with the text
    return max(length, min(cache.capacity for cache, _ in caches) - (end - length))


def _block_end(request: Request, drafts: bool) -> int:
    length, more = len(request.conversation.token_ids), 1
    if drafts:
        wanted = request.params.draft_length
        more = 2 * MAX_AUTO_LENGTH + 1 + MAX_LEAVES if wanted == "auto" else 2 * wanted + 1
    longest = request.longest(drafts=drafts)
    return length + more if length + more < longest else max(length, longest)


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
