"""Continuous batching of ragged requests: admit when the pools have room, run prompts in chunks, decode, finish, free."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from draft.policy import DraftingPolicy
from draft.protocols import CausalDecoder, Drafter
from engine.errors import PoolExhausted
from engine.kv.pool import KvPool
from engine.kv.shared_prefixes import CachedPage, SharedPrefixes, Use
from engine.runtime.block_runner import BlockDecoding
from engine.runtime.model_runner import MAX_ROWS, PlainDecoding
from engine.runtime.prefix import PrefixStore
from engine.runtime.request import PrefixRestore, Request
from engine.runtime.reserve import Demand, block_demands, chunk_demands, holding_blocks, reserve, restore_demands, whole_demands
from engine.runtime.step import Beside, decode_step, launches_ahead, prefill_step

HEADROOM_TOKENS = 256  # a request that is interrupted runs its text again, so that must not happen every few steps
# tokens of a prompt that run beside others' decode steps at most, and keys that its rows read in one: a pass of its own reads each once
_MOST_BESIDE, _MOST_KEYS_BESIDE = 2 * MAX_ROWS, 1 << 17
_MOST_STEPS_BESIDE = 8  # of others, that a prompt's first token waits for where these leave it few rows


class _Chunk(NamedTuple):
    """The next `tokens` of a request's prompt, which run in this step. beside: as rows of the others' decode step."""

    request: Request
    tokens: int
    beside: Beside | None = None

    @property
    def ends(self) -> bool:
        """Whether the request decodes afterwards."""
        return self.tokens == self.request.num_uncomputed

    @property
    def written(self) -> int:
        """Tokens that pages are needed for: one that joins the others has its last token run as well."""
        return self.tokens if self.beside is None else self.beside.num_tokens + self.beside.joins


@dataclass
class Scheduler:
    """Runs requests in order of arrival; one `step` serves every running request.

    A request is admitted when what it has and the next `headroom` tokens fit beside those of the running ones, in the target's pool and the draft's.
    The oldest running request, and those whose caches a conversation goes on with, are promised their longest possible length and never interrupted.
    When a step's pages do not fit, the request that came last gives its own back and waits; it runs its text again, but for what a pool or a store
    kept of it, and goes on (recompute preemption: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
    2023, section 4.5). Open conversations keep their pages, answering or not: whoever holds one may be about to go on, or to suspend it. Where they
    have taken what a request was promised, it waits for those that run, and ends with an error once none does.
    max_batch: most requests at once. prefill_chunk: tokens of one request's prompt per step, so that a long prompt does not hold up the others; short
    ones run as rows of the others' decode steps where these are launched ahead. whole_chunks:
    chunks end at multiples of it, counted from the text's first token, and a whole one runs alone in its pass: then its numbers are the same whatever
    else is served and whatever was shared before it.
    prefill_tokens: most prompt tokens per step. restore_tokens: of a stored prefix that are brought back in one step, for one request; they count as
    prompt tokens. plain, blocks: run decode steps without drafts and with them, where the models have such runners.
    shared_prefixes: known beginnings, looked up when a request's first chunk comes up, so that what ran meanwhile is known too; with whole chunks, it
    comes up once no other request is computing a chunk of the same beginning. drafting: the policy
    that plans them.
    """

    target: CausalDecoder
    pool: KvPool
    drafter: Drafter | None = None
    draft_pool: KvPool | None = None
    max_batch: int = 64
    prefill_chunk: int = 512
    prefill_tokens: int = 2048
    restore_tokens: int = 512
    deterministic: bool = False
    plain: PlainDecoding | None = None
    blocks: BlockDecoding | None = None
    prefix_store: PrefixStore | None = None
    drafting: DraftingPolicy = field(default_factory=DraftingPolicy)
    shared_prefixes: SharedPrefixes | None = None
    whole_chunks: bool = False
    headroom: int = HEADROOM_TOKENS
    preemptions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._carried_out = False  # whether the last step was, to its end
        # tokens that a request and others were found to begin with, -1: with fewer than were asked for
        self._alike: WeakKeyDictionary[Request, WeakKeyDictionary[Request, int]] = WeakKeyDictionary()

    @property
    def idle(self) -> bool:
        """True when no request is left."""
        return not self.waiting and not self.running

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PoolExhausted when it could not even run alone in an otherwise empty pool."""
        demands = whole_demands(request, self.drafter, drafts=self._drafts)
        request.most_pages = [most for demand in demands for most in demand.sequence.at_most(demand.tokens)]
        for pool, wanted in request.most_pages:
            if wanted > pool.max_pages:
                raise PoolExhausted(
                    f"the request may grow to {wanted} pages of {pool.page_size} tokens, the KV pool has {pool.max_pages}",
                    "lower max_new_tokens, shorten the prompt, or give the engine a larger pool_tokens",
                )
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Drop a request that has not finished; what it has committed so far stays consistent in its conversation."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        self._release(request)

    def step(self) -> list[Request]:
        """Run one piece of a restore, one chunk of every prompt in progress (within the budget) and one decode step of all others.

        Returns the requests that finished. One that does not fit beside the open conversations although nothing runs is among them, with
        `error` set, and so is one whose logits are not finite.
        """
        ended = [] if self._carried_out else self._end()  # in a step that failed behind them
        refused = self._admit()
        restored = self._restore()
        prefilling: list[Request] = []
        decoding: list[Request] = []
        for request in self.running:
            if request is restored or request.asks_store or request.restoring is not None:
                continue
            (prefilling if request.num_uncomputed > request.joins else decoding).append(request)
        chosen = self._chunks(prefilling, decoding, self.prefill_tokens - (0 if restored is None else self.restore_tokens))
        demands = {chunk.request: chunk_demands(chunk.request, self.drafter, chunk.written) for chunk in chosen}
        drafts = self._drafts
        able = holding_blocks(decoding, self.drafter, drafts=drafts, changed=not self._carried_out)
        self._carried_out = False
        demands |= {r: block_demands(r, self.drafter, drafts=drafts) for r in decoding if r not in able}
        for request in sorted(demands, key=lambda r: r.submitted_at):
            if request in self.running and self._make_room(request, demands[request]):
                reserve(demands[request])
                able.add(request)
        if demands:  # some may have had to go
            able.intersection_update(self.running)
        chosen, decoding = [chunk for chunk in chosen if chunk.request in able], [r for r in decoding if r in able]
        joined = any(chunk.ends for chunk in chosen if chunk.beside is None)  # what is launched ahead would not be the next step
        beside = [chunk for chunk in chosen if chunk.beside is not None and decoding and not joined]
        alone = [chunk for chunk in chosen if chunk not in beside]
        self._prefill(
            alone, drafted=any(chunk.beside is None and self._beside(chunk.request, self._most_beside(decoding)) for chunk in alone)
        )
        if decoding:
            ran = decode_step(
                decoding,
                self.target,
                self.drafter,
                drafting=self.drafting,
                catch_up=self.prefill_chunk,
                deterministic=self._deterministic(decoding),
                plain=self.plain,
                blocks=self.blocks,
                beside=[chunk.beside for chunk in beside if chunk.beside is not None],
                ahead=not joined,
            )
            for request in decoding:
                self._computed(request)
                if request.joins:
                    request.joins = False
                    self._keep(request)
            if ran:
                self._ran_beside(beside)
            else:
                self._prefill(beside, drafted=False)
        ended += refused + self._end()
        self._carried_out = True
        return ended

    def _end(self) -> list[Request]:
        """Those that have finished run no more."""
        finished = [r for r in self.running if r.finish_reason is not None or r.error is not None]
        if finished:
            self.running = [r for r in self.running if r not in finished]
        for request in finished:
            self._release(request)
        return finished

    def _chunks(self, prefilling: Sequence[Request], decoding: list[Request], budget: int) -> list[_Chunk]:
        """What runs of these prompts, within so many tokens. One that turns out to be known whole decodes with the others."""
        chosen: list[_Chunk] = []
        # one that was interrupted may be among the others at once
        rows = self._rows_beside(decoding) - sum(r.num_new > 0 and not r.looked_up for r in prefilling) if prefilling else 0
        for request in prefilling:
            if self._waits(request, [chunk.request for chunk in chosen]):
                request.looked_up = False
                continue
            self._share(request)
            if request.num_uncomputed == 0:  # interrupted behind whole pages, and all of them are still known
                decoding.append(request)
                continue
            beside = self._beside(request, rows)
            if beside is None:
                done = request.sequence.length % self.prefill_chunk if self.whole_chunks else 0
                chunk = _Chunk(request, min(self.prefill_chunk - done, request.num_uncomputed))
            else:
                rows -= beside.num_tokens + beside.joins
                chunk = _Chunk(request, min(beside.num_tokens + beside.joins, request.num_uncomputed), beside)
            budget -= chunk.tokens
            if chosen and budget < 0:
                break
            chosen.append(chunk)
        return chosen

    def _most_beside(self, decoding: Sequence[Request]) -> int:
        """Rows that a step of these without drafts, launched ahead, has for tokens of prompts."""
        if not decoding or self.plain is None or self._deterministic(decoding) or any(r.penalised for r in decoding):
            return 0
        if self.pool.keeps_beside or (self.drafter is not None and self.drafter.feature_taps):
            return 0
        return max(0, MAX_ROWS - len(decoding))

    def _rows_beside(self, decoding: Sequence[Request]) -> int:
        """The same where the next step is one."""
        rows = self._most_beside(decoding)
        if not rows or not launches_ahead(decoding, self.drafter, drafting=self.drafting, plain=self.plain, blocks=self.blocks):
            return 0
        return rows

    def _beside(self, request: Request, rows: int) -> Beside | None:
        """The tokens of a prompt that take so many rows of a decode step; None where it has a pass of its own."""
        length, tokens = request.sequence.length, len(request.token_ids)
        left = tokens - length  # the last one gives the next token
        if rows < 1 or tokens < 2 or left > min(_MOST_BESIDE, _MOST_STEPS_BESIDE * rows) or min(left, rows) * tokens > _MOST_KEYS_BESIDE:
            return None
        if self._promised(request) or request.penalised or request.constraint is not None or request.drafting.wanted not in ("auto", 0):
            return None
        joins = left <= rows
        count = left - 1 if joins else min(rows, left - 2)
        return Beside(request, count, joins) if count or joins else None

    def _prefill(self, chunks: Sequence[_Chunk], *, drafted: bool) -> None:
        """Run these in passes of their own. drafted: because the others have drafts."""
        whole = {chunk.request for chunk in chunks if self.whole_chunks and chunk.tokens == self.prefill_chunk}
        for group in [*([c] for c in chunks if c.request in whole), [c for c in chunks if c.request not in whole]]:
            if group:
                (self.drafting.joined if drafted else self.drafting.interrupted)()
                requests = [chunk.request for chunk in group]
                prefill_step(
                    requests, [chunk.tokens for chunk in group], self.target, self.drafter, deterministic=self._deterministic(requests)
                )
        for request in [chunk.request for chunk in chunks]:
            conversation, length = request.conversation, request.sequence.length
            if request in whole and conversation.num_chunked == length - self.prefill_chunk and not self._promised(request):
                conversation.num_chunked = length
            self._computed(request)
            # what lies beside pages is only there at the end of a chunk; others may wait for whole chunks
            if request.num_new or self.pool.keeps_beside or (request in whole and len(self.running) > 1):
                self._keep(request)

    def _ran_beside(self, chunks: Sequence[_Chunk]) -> None:
        """These ran beside a decode step."""
        for request, _, beside in chunks:
            self._computed(request)
            if beside is not None and beside.joins:
                request.joins = True
                self.running.remove(request)  # in the order of the step that was launched ahead
                self.running.append(request)

    def _make_room(self, request: Request, demands: list[Demand]) -> bool:
        """Make these fit, by interrupting what came later; False when the request itself had to go."""
        while any(need > pool.num_free_pages for pool, need in _needs(demands)):
            if self.prefix_store is not None and self.prefix_store.yield_pages():
                continue
            victims = [r for r in self.running if r.owns_cache and r.submitted_at >= request.submitted_at]
            if not victims:  # pages that were promised are held by conversations opened since
                request.error = self._no_room(request)
                return False
            victim = max(victims, key=lambda r: r.submitted_at)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Give a request's pages back; it waits before all others, with the text it has."""
        self.preemptions += 1
        self._end_restore(request)
        if self.plain is not None:
            self.plain.forget(request.sequence)
        if self.blocks is not None:
            self.blocks.forget(request)
        kept = self._keep(request)
        self.running.remove(request)
        conversation = request.conversation
        continued = request.num_new and not conversation.foreign
        request.own_pages = SharedPrefixes.own_pages(kept, conversation.sequence) if continued else None
        if self.drafter is not None and conversation.draft_state is not None:
            self.drafter.close([conversation.draft_state])
        conversation.sequence.truncate(0)
        conversation.draft_state = None if self.drafter is None else self.drafter.open(conversation.sequence)
        conversation.emptied()
        request.looked_up, request.joins, request.held_until = False, False, 0
        self.waiting.appendleft(request)

    def _no_room(self, request: Request) -> PoolExhausted:
        return PoolExhausted(
            f"a request for up to {request.longest(drafts=self._drafts)} tokens does not fit beside the open conversations' caches",
            "close conversations, lower max_new_tokens, or give the engine a larger pool_tokens",
        )

    def _promised(self, request: Request) -> bool:
        """Whether its text may not depend on how sums are ordered."""
        return self.deterministic or request.params.seed is not None

    def _waits(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether a request that has computed nothing waits: one of the others, which run now, computes a whole chunk that both begin with."""
        if self.shared_prefixes is None or not (self.whole_chunks and self.shared_prefixes.computed):
            return False
        if request.sequence.length or request.num_new:
            return False
        for other in others:
            length, promised = other.sequence.length, self._promised(other)
            end = length + self.prefill_chunk
            same = (other.namespace or "") == (request.namespace or "") and promised == self._promised(request)
            if not same or other.conversation.foreign or not (promised or other.conversation.num_chunked == length):
                continue
            if length % self.prefill_chunk == 0 and end < len(request.token_ids) and request.token_ids[:end] == other.token_ids[:end]:
                return True
        return False

    def _share(self, request: Request) -> None:
        """At a request's first chunk: begin its caches with the pages of its prompt's longest known prefix."""
        if self.shared_prefixes is None or request.looked_up:
            return
        request.looked_up = True
        conversation, state = request.conversation, request.draft_state
        if conversation.sequence.pages or (state is not None and state.cache.pages):
            return
        draft = None if state is None or self.draft_pool is None else state.cache
        invariant, own = self._promised(request), request.own_pages
        use = Use.INVARIANT if invariant else Use.ANY
        if request.params.greedy and not invariant:
            if own is None:
                use = Use.CHUNKS if self.whole_chunks else Use.ANY
            else:
                use = Use.OWN if self.whole_chunks else Use.COMPUTED
        shared = self.shared_prefixes.share(request.id_row, request.namespace or "", use, conversation.sequence, draft, own or ())
        if shared.tokens:
            request.reused_tokens = shared.tokens
            if shared.codes:
                conversation.restored_spans, conversation.foreign = list(shared.codes), True
            else:
                conversation.num_computed, conversation.num_chunked = shared.tokens, shared.chunked_tokens
            conversation.invariant = conversation.invariant and invariant
            if state is not None and state.features is not None:
                state.features.skip(state.length)

    def _computed(self, request: Request) -> None:
        """A step wrote the KV that its conversation has committed since the last one."""
        conversation = request.conversation
        conversation.num_computed = conversation.sequence.length
        if conversation.invariant and not self._promised(request):
            conversation.invariant = False

    def _keep(self, request: Request) -> list[CachedPage]:
        """Leave what a request has computed to others; nothing that was restored from outside or whose numbers are in doubt. Returns what is kept of
        these pages (`SharedPrefixes.insert`)."""
        conversation, state = request.conversation, request.draft_state
        if self.shared_prefixes is None or conversation.foreign or request.error is not None:
            return []
        if conversation.sequence.length > conversation.num_computed:  # filled from outside, and never admitted
            return []
        draft = None if state is None or self.draft_pool is None or not state.shareable else state.cache
        return self.shared_prefixes.insert(
            request.id_row,
            request.namespace or "",
            conversation.invariant,
            conversation.sequence,
            draft,
            chunked_tokens=conversation.num_chunked,
        )

    def _deterministic(self, requests: Sequence[Request]) -> bool:
        """Whether a step of these must be batch-invariant: what a seed names may not depend on who else is served."""
        return self.deterministic or any(request.params.seed is not None for request in requests)

    def _admit(self) -> list[Request]:
        refused: list[Request] = []
        if not self.waiting or len(self.running) >= self.max_batch:
            return refused
        while self.waiting and len(self.running) < self.max_batch and self._has_room_for_all():
            self._begin(self.waiting.popleft())
        if not self.waiting or len(self.running) >= self.max_batch:
            return refused
        pools = [*self.pool.groups, *(() if self.draft_pool is None else self.draft_pool.groups)]
        room = {id(pool): pool.num_free_pages for pool in pools}
        oldest = min(self.running, key=lambda r: r.submitted_at, default=self.waiting[0])
        for request in self.running:
            for pool, need in self._promise(request, oldest):
                room[id(pool)] -= need
        while self.waiting and len(self.running) < self.max_batch:
            promise = self._promise(self.waiting[0], oldest if self.running else self.waiting[0])
            if all(need <= room[id(pool)] for pool, need in promise):
                for pool, need in promise:
                    room[id(pool)] -= need
                self._begin(self.waiting.popleft())
            elif self.prefix_store is not None and self.prefix_store.yield_pages():
                return [*refused, *self._admit()]
            elif self.running:
                break
            else:
                request = self.waiting.popleft()
                request.error = self._no_room(request)
                self._release(request)
                refused.append(request)
        return refused

    def _has_room_for_all(self) -> bool:
        """Whether the free pages are enough for all running requests and the first that waits at their longest, whatever they hold already: then no
        promise is in doubt, and none is worked out."""
        wanted: dict[KvPool, int] = {}
        for request in (*self.running, self.waiting[0]):
            for pool, pages in request.most_pages:
                wanted[pool] = wanted.get(pool, 0) + pages
        return all(pages <= pool.num_free_pages for pool, pages in wanted.items())

    def _begin(self, request: Request) -> None:
        """It runs from now on."""
        self.running.append(request)
        self.drafting.begin(request.drafting, request.namespace or "")
        request.asks_store = self.prefix_store is not None
        self._look_at_caches(request)

    def _look_at_caches(self, request: Request) -> None:
        """Something else than a step may have filled a request's caches."""
        conversation, length = request.conversation, request.sequence.length
        conversation.num_chunked = min(conversation.num_chunked, length)
        conversation.foreign = conversation.foreign or length > conversation.num_computed

    def _restore(self) -> Request | None:
        """Ask the store for those that were admitted, and bring back a piece for the first that gets something; returns that one. Of two restores one
        is made after the other: others wait for one piece a step, and the second may begin with what the first gave back."""
        for request in self.running:
            if request.asks_store and not self._comes_back(request):
                request.asks_store = False
                if self.prefix_store is not None:
                    self._share(request)  # first: what is in the pool costs nothing
                    request.restoring = self.prefix_store.restore(request)
                    self._look_at_caches(request)
        for request in self.running:
            if request.restoring is not None:
                return self._restore_piece(request, request.restoring)
        return None

    def _restore_piece(self, request: Request, restoring: PrefixRestore) -> Request:
        """One of its pieces, if there are pages for all of them."""
        if not request.sequence.windows:  # whose pages are taken pass by pass
            demands = restore_demands(request, self.drafter, restoring.end)
            if not self._make_room(request, demands):
                return request
            reserve(demands)
        self.drafting.interrupted()
        alone = len(self.running) == 1 and self.pool.device.type == "cuda"  # which is faster with all at once
        try:
            left = restoring.piece(restoring.end if alone else self.restore_tokens)
        except BaseException:  # which ends it
            self._end_restore(request)
            request.looked_up = request.sequence.length > 0
            raise
        if not left:
            request.restoring = None
            if not request.sequence.length:  # it failed: what came before is in the pool
                request.looked_up = False
                self._share(request)
        self._look_at_caches(request)
        return request

    def _comes_back(self, request: Request) -> bool:
        """Whether a request that has nothing waits: what it begins with is about to be restored for another one, and can then be shared."""
        if self.shared_prefixes is None or request.sequence.length or self._promised(request) or request.own_pages is not None:
            return False
        for other in self.running:
            if other.restoring is None or (other.namespace or "") != (request.namespace or ""):
                continue
            end = other.sequence.length + self.pool.page_size
            if end <= min(other.restoring.end, len(request.token_ids) - 1) and self._begin_alike(request, other, end):
                return True
        return False

    def _begin_alike(self, request: Request, other: Request, end: int) -> bool:
        """Whether the first `end` tokens of both are equal. Asked in every step of a restore, with `end` growing: what was compared is not again."""
        known = self._alike.setdefault(request, WeakKeyDictionary())
        start = known.get(other, 0)
        if 0 <= start < end:
            start = known[other] = end if request.token_ids[start:end] == other.token_ids[start:end] else -1
        return start >= end

    @staticmethod
    def _end_restore(request: Request) -> None:
        """No piece of it is wanted any more."""
        request.asks_store = False
        if request.restoring is not None:
            request.restoring.close()
            request.restoring = None

    def _promise(self, request: Request, oldest: Request) -> list[tuple[KvPool, int]]:
        """Pages that a request may still take of each pool before it can be interrupted."""
        whole = request is oldest or not request.owns_cache
        most = None if whole else len(request.token_ids) + self.headroom
        return _needs(whole_demands(request, self.drafter, drafts=self._drafts, most=most))

    @property
    def _drafts(self) -> bool:
        """Whether requests may have drafts, be they of a drafter or of their own text."""
        return self.drafter is not None or self.drafting.ngrams

    def _release(self, request: Request) -> None:
        conversation = request.conversation
        self._end_restore(request)
        self._keep(request)
        if request.error is None:
            self.drafting.end(request.token_ids, request.prompt_tokens, request.namespace or "")
        if self.prefix_store is not None:
            self.prefix_store.finished(request)
        if request.owns_cache:
            if self.prefix_store is not None and self.prefix_store.take_over(conversation):
                return
            if self.drafter is not None and conversation.draft_state is not None:
                self.drafter.close([conversation.draft_state])
            conversation.sequence.free()
        else:
            # pages written by rejected drafts hold nothing
            conversation.sequence.truncate(conversation.sequence.length)
            if self.draft_pool is not None and conversation.draft_state is not None:
                cache = conversation.draft_state.cache
                cache.truncate(cache.length)


def _needs(demands: list[Demand]) -> list[tuple[KvPool, int]]:
    """Pages that are to be taken of each pool."""
    return [found for demand in demands for found in demand.needs]
