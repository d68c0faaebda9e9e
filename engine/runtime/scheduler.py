"""Continuous batching of ragged requests: admit when the pools have room, run prompts in chunks, decode, finish, free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from draft.policy import DraftingPolicy
from draft.protocols import CausalDecoder, Drafter
from engine.errors import PoolExhausted
from engine.kv.pool import KvPool
from engine.kv.shared_prefixes import SharedPrefixes
from engine.runtime.model_runner import PlainDecoding
from engine.runtime.prefix import PrefixStore
from engine.runtime.request import Request
from engine.runtime.reserve import Demand, block_demands, chunk_demands, reserve, whole_demands
from engine.runtime.step import decode_step, prefill_step


@dataclass
class Scheduler:
    """Runs requests in order of arrival; one `step` serves every running request.

    A request is admitted when its longest possible length fits beside those of the running ones, in the target's pool and the draft's: a
    running request is then never evicted. max_batch: most requests at once. prefill_chunk: tokens of one request's prompt per step, so
    that a long prompt does not hold up the others; chunks start at multiples of it past the cached prefix, whatever else runs.
    prefill_tokens: most prompt tokens per step. plain: runs decode steps without drafts, where the target has such a runner. shared_prefixes: known
    beginnings, looked up when a request's first chunk comes up, so that what ran meanwhile is known too. drafting: the policy that plans them.
    """

    target: CausalDecoder
    pool: KvPool
    drafter: Drafter | None = None
    draft_pool: KvPool | None = None
    max_batch: int = 64
    prefill_chunk: int = 512
    prefill_tokens: int = 2048
    deterministic: bool = False
    plain: PlainDecoding | None = None
    prefix_store: PrefixStore | None = None
    drafting: DraftingPolicy = field(default_factory=DraftingPolicy)
    shared_prefixes: SharedPrefixes | None = None

    def __post_init__(self) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def idle(self) -> bool:
        """True when no request is left."""
        return not self.waiting and not self.running

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PoolExhausted when it could not even run alone in an otherwise empty pool."""
        for demand in self._demands(request):
            pool = demand.sequence.pool
            wanted = -(-demand.tokens // pool.page_size)
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
        """Run one chunk of every prompt in progress (within the budget) and one decode step of all others.

        Returns the requests that finished. One that does not fit beside the open conversations although nothing runs is among them, with
        `error` set, and so is one whose logits are not finite.
        """
        refused = self._admit()
        prefilling = [r for r in self.running if r.num_new == 0]
        decoding = [r for r in self.running if r.num_new > 0]
        chosen: list[Request] = []
        chunks: list[int] = []
        budget = self.prefill_tokens
        for request in prefilling:
            self._share(request)
            chunk = min(self.prefill_chunk, len(request.token_ids) - request.sequence.length)
            budget -= chunk
            if chosen and budget < 0:
                break
            chosen.append(request)
            chunks.append(chunk)
        for request, chunk in zip(chosen, chunks, strict=True):
            reserve(chunk_demands(request, self.drafter, chunk))
        for request in decoding:
            reserve(block_demands(request, self.drafter, drafts=self._drafts))
        if chosen:
            prefill_step(chosen, chunks, self.target, self.drafter, deterministic=self._deterministic(chosen))
            for request in chosen:
                self._computed(request)
                if request.num_new or self.pool.keeps_beside:  # what lies beside pages is only there at the end of a chunk
                    self._keep(request)
        if decoding:
            decode_step(
                decoding,
                self.target,
                self.drafter,
                drafting=self.drafting,
                catch_up=self.prefill_chunk,
                deterministic=self._deterministic(decoding),
                plain=self.plain,
            )
            for request in decoding:
                self._computed(request)
        finished = [r for r in self.running if r.finish_reason is not None or r.error is not None]
        self.running = [r for r in self.running if r not in finished]
        for request in finished:
            self._release(request)
        return refused + finished

    def _promised(self, request: Request) -> bool:
        """Whether its text may not depend on how sums are ordered."""
        return self.deterministic or request.params.seed is not None

    def _share(self, request: Request) -> None:
        """At a request's first chunk: begin its caches with the pages of its prompt's longest known prefix."""
        if self.shared_prefixes is None or request.looked_up:
            return
        request.looked_up = True
        conversation, state = request.conversation, request.draft_state
        if conversation.sequence.pages or (state is not None and state.cache.pages):
            return
        draft = None if state is None or self.draft_pool is None else state.cache
        invariant = self._promised(request)
        shared = self.shared_prefixes.share(request.token_ids, request.namespace or "", invariant, conversation.sequence, draft)
        if shared:
            request.reused_tokens = conversation.num_computed = shared
            conversation.invariant = conversation.invariant and invariant
            if state is not None and state.features is not None:
                state.features.skip(state.length)

    def _computed(self, request: Request) -> None:
        """A step wrote the KV that its conversation has committed since the last one."""
        request.conversation.num_computed = request.sequence.length
        request.conversation.invariant = request.conversation.invariant and self._promised(request)

    def _keep(self, request: Request) -> None:
        """Leave what a request has computed to others; nothing that was restored from outside or whose numbers are in doubt."""
        conversation, state = request.conversation, request.draft_state
        if self.shared_prefixes is None or conversation.foreign or request.error is not None:
            return
        if conversation.sequence.length > conversation.num_computed:  # filled from outside, and never admitted
            return
        draft = None if state is None or self.draft_pool is None else state.cache
        self.shared_prefixes.insert(request.token_ids, request.namespace or "", conversation.invariant, conversation.sequence, draft)

    def _deterministic(self, requests: list[Request]) -> bool:
        """Whether a step of these must be batch-invariant: what a seed names may not depend on who else is served."""
        return self.deterministic or any(request.params.seed is not None for request in requests)

    def _admit(self) -> list[Request]:
        refused: list[Request] = []
        if not self.waiting or len(self.running) >= self.max_batch:
            return refused
        room = {id(self.pool): self.pool.num_free_pages}
        if self.draft_pool is not None:
            room[id(self.draft_pool)] = self.draft_pool.num_free_pages
        for request in self.running:
            self._promise(request, room)
        while self.waiting and len(self.running) < self.max_batch:
            if self._promise(self.waiting[0], room):
                request = self.waiting.popleft()
                self.running.append(request)
                self.drafting.begin(request.drafting, request.namespace or "")
                if self.prefix_store is not None:
                    self._share(request)  # first: what is in the pool costs nothing
                    self.prefix_store.restore(request)
                conversation = request.conversation
                conversation.foreign = conversation.foreign or conversation.sequence.length > conversation.num_computed
            elif self.prefix_store is not None and self.prefix_store.yield_pages():
                return [*refused, *self._admit()]
            elif self.running:
                break
            else:
                request = self.waiting.popleft()
                request.error = PoolExhausted(
                    f"a request for up to {request.longest(drafts=self._drafts)} tokens does not fit beside the open conversations' caches",
                    "close conversations, lower max_new_tokens, or give the engine a larger pool_tokens",
                )
                self._release(request)
                refused.append(request)
        return refused

    def _promise(self, request: Request, room: dict[int, int]) -> bool:
        """Take the pages a request may still need off the pools' free ones; False, and nothing taken, when there are too few."""
        missing = [(id(demand.sequence.pool), demand.missing) for demand in self._demands(request)]
        if any(count > room[pool] for pool, count in missing):
            return False
        for pool, count in missing:
            room[pool] -= count
        return True

    @property
    def _drafts(self) -> bool:
        """Whether requests may have drafts, be they of a drafter or of their own text."""
        return self.drafter is not None or self.drafting.ngrams

    def _demands(self, request: Request) -> list[Demand]:
        return whole_demands(request, self.drafter, drafts=self._drafts)

    def _release(self, request: Request) -> None:
        conversation = request.conversation
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
