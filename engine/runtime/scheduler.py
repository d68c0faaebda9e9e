"""Continuous batching of ragged requests: admit when the pools have room, run prompts in chunks, decode, finish, free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from draft.policy import DraftingPolicy
from draft.protocols import CausalDecoder, Drafter
from engine.errors import PoolExhausted
from engine.kv.pool import KvPool, KvSequence
from engine.runtime.model_runner import PlainDecoding
from engine.runtime.prefix import PrefixStore
from engine.runtime.request import Request
from engine.runtime.step import decode_step, prefill_step


@dataclass
class Scheduler:
    """Runs requests in order of arrival; one `step` serves every running request.

    A request is admitted when its longest possible length fits beside those of the running ones, in the target's pool and the draft's: a
    running request is then never evicted. max_batch: most requests at once. prefill_chunk: tokens of one request's prompt per step, so
    that a long prompt does not hold up the others; chunks start at multiples of it past the cached prefix, whatever else runs.
    prefill_tokens: most prompt tokens per step. plain: runs decode steps without drafts, where the target has such a runner.
    drafting: the policy that plans them.
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

    def __post_init__(self) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def idle(self) -> bool:
        """True when no request is left."""
        return not self.waiting and not self.running

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PoolExhausted when it could not even run alone in an otherwise empty pool."""
        for pool, _ in self._demands(request):
            wanted = self._pages(request, pool)
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
            chunk = min(self.prefill_chunk, len(request.token_ids) - request.sequence.length)
            budget -= chunk
            if chosen and budget < 0:
                break
            chosen.append(request)
            chunks.append(chunk)
        if chosen:
            prefill_step(chosen, chunks, self.target, self.drafter, deterministic=self._deterministic(chosen))
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
        finished = [r for r in self.running if r.finish_reason is not None or r.error is not None]
        self.running = [r for r in self.running if r not in finished]
        for request in finished:
            self._release(request)
        return refused + finished

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
                self.running.append(self.waiting.popleft())
                if self.prefix_store is not None:
                    self.prefix_store.restore(self.running[-1])
            elif self.prefix_store is not None and self.prefix_store.yield_pages():
                return [*refused, *self._admit()]
            elif self.running:
                break
            else:
                request = self.waiting.popleft()
                request.error = PoolExhausted(
                    f"a request for up to {self._longest(request)} tokens does not fit beside the open conversations' caches",
                    "close conversations, lower max_new_tokens, or give the engine a larger pool_tokens",
                )
                self._release(request)
                refused.append(request)
        return refused

    def _promise(self, request: Request, room: dict[int, int]) -> bool:
        """Take the pages a request may still need off the pools' free ones; False, and nothing taken, when there are too few."""
        missing = [(id(pool), max(0, self._pages(request, pool) - len(sequence.pages))) for pool, sequence in self._demands(request)]
        if any(count > room[pool] for pool, count in missing):
            return False
        for pool, count in missing:
            room[pool] -= count
        return True

    def _demands(self, request: Request) -> list[tuple[KvPool, KvSequence]]:
        demands = [(self.pool, request.sequence)]
        drafts = request.params.draft_length != 0 or (
            self.drafter is not None and self.drafter.exit_layer
        )  # a draft head keeps up regardless
        if self.draft_pool is not None and request.draft_state is not None and drafts:
            demands.append((self.draft_pool, request.draft_state.cache))
        return demands

    def _pages(self, request: Request, pool: KvPool) -> int:
        return -(-self._longest(request) // pool.page_size)

    def _longest(self, request: Request) -> int:
        return request.longest(drafts=self.drafter is not None or self.drafting.ngrams)

    def _release(self, request: Request) -> None:
        conversation = request.conversation
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
