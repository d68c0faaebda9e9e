"""The engine's core: models, KV pools, scheduler, drafter and running conversations. It knows no files, no sessions, and loads no tokenizer."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from draft.policy import LENGTHS, CostModel, DraftingPolicy, measure_costs
from draft.protocols import Drafter, FeatureStore
from draft.source import DraftSource, NgramSource
from draft.spans import SpanPolicy
from engine.config import EngineConfig
from engine.errors import EmptyPrompt, InvalidOption, PoolExhausted, PromptTooLong
from engine.kv.formats import PLAIN, check_format
from engine.kv.shared_prefixes import SharedPrefixes
from engine.kv.windowed_pool import WindowedPool
from engine.model.decoder import Decoder
from engine.runtime.block_runner import block_decoding
from engine.runtime.device_sampling import Drawing
from engine.runtime.draft_copy import exit_copy
from engine.runtime.memory import (
    POOL_TOKENS_CPU,
    PREFILL_TOKENS,
    most_cached_ends,
    most_cached_pages,
    open_pool,
    page_counts,
    plan_devices,
    prefill_chunk,
    restore_tokens,
    step_tokens,
    window_layers,
)
from engine.runtime.metrics import SpeculationMetrics
from engine.runtime.model_runner import CAPTURED_LENGTHS, MAX_ROWS, GraphedDecoder, graphed, plain_decoding, sizes_beside, sizes_up_to
from engine.runtime.prefix import PrefixStore
from engine.runtime.request import GenerationResult, Request, SequenceState, StreamEvent, TextSource
from engine.runtime.sampling import SamplingParams
from engine.runtime.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from engine.runtime.scheduler import Scheduler
from engine.runtime.turns import Turns
from kernels.compile_ahead import compile_ahead
from kernels.cpu_decode.crew import CREW

TEXT_CONTEXT = 5  # prompt tokens decoded along with the first new ones
CAPTURE_LIMIT_S = 20.0  # that steps captured at the start may take
MEASURED_AFTER = 64  # tokens that were not drafted for: measuring takes as long as some fifteen, copies that are made for it as many again
_FREE_SHARE = 0.8  # of its threads' time that a process gets on a machine that is free
_MEASURED_COUNTS = (1, 2, 4, 8, 16, 32, 64)  # tokens of the forwards that are timed
_MEASURED_COUNTS_CPU = (1, 4, 8, 16)  # a text waits meanwhile: 32 and 64 take four times as long as these, and go on as 8 and 16 let expect
_MEASURED_COUNTS_MATRICES = (
    1,
    8,
    16,
    32,
    64,
)  # where a processor multiplies matrices: up to 16 take about as long as one, and tell nothing of more

T = TypeVar("T")


def _measured_counts(target: Decoder) -> tuple[int, ...]:
    """Tokens of the forwards that `EngineCore.measure_costs` times."""
    if target.device.type != "cpu":
        return _MEASURED_COUNTS
    return _MEASURED_COUNTS_MATRICES if target.multiplies_matrices else _MEASURED_COUNTS_CPU


class Captured(NamedTuple):
    """What was captured at the start: steps, and seconds."""

    steps: int
    seconds: float


class EngineCore:
    """Runs conversations with a target, a draft source and their KV pools.

    Whatever changes its state holds `lock`, so threads take turns, step by step, in the order in which they asked (docs/guarantees.md).

    A seed names one text, whatever drafts, draft length and batch (docs/guarantees.md). The automatic draft length rests on costs (`cost_model`)
    that are given, or measured once: on a CPU after the first tokens (MEASURED_AFTER), which are not drafted for.
    Measured costs are corrected while text is generated.

    Args:
        target: the model whose distribution is sampled.
        source: of drafts; None for no speculation.
        config: options.
        text: from token ids to text and stop tokens.
        eos_token_ids: what ends a text.
        sampling_defaults: taken by requests without parameters.
        kv_means: [L, 2, G, d] float32, channel means of the target's keys and values; needed by quantised KV formats only.

    Raises:
        InvalidOption: an early exit after more layers than the target has, or another bad option.
    """

    def __init__(
        self,
        target: Decoder,
        source: DraftSource | None,
        config: EngineConfig,
        *,
        text: TextSource,
        eos_token_ids: frozenset[int],
        sampling_defaults: SamplingDefaults = NO_DEFAULTS,
        kv_means: torch.Tensor | None = None,
    ) -> None:
        self.target, self.source, self.config = target, source, config
        self.lock = Turns()
        self.text, self.eos_token_ids = text, eos_token_ids
        self.sampling_defaults = sampling_defaults
        cached = None if source is None else source.cached_decoder
        check_format(config.kv_cache_dtype, target.config.head_dim)
        captures = config.kv_cache_dtype == PLAIN and GraphedDecoder.fits(target)
        # how the memory of each GPU is shared out; () on a CPU
        self.memory_plans = plan_devices(target, cached, config, captures=captures)
        if not self.memory_plans and config.gpu_memory_utilization is not None:
            raise InvalidOption(
                "gpu_memory_utilization is of a GPU's memory, and the models are on a CPU", "leave it out, or give pool_tokens"
            )
        tokens = self.memory_plans[0].pool_tokens if self.memory_plans else config.pool_tokens or POOL_TOKENS_CPU
        start, pages = page_counts(tokens, config.page_size)
        if target.device.type == "cuda":
            start = pages  # captured steps hold addresses: a GPU's pool gets its size at once
        self.pool = open_pool(
            target,
            config.kv_cache_dtype,
            start,
            config.page_size,
            pages,
            means=kv_means,
            windows=window_layers(target, config),
            step_tokens=step_tokens(target, config),
        )
        self.draft_pool = None if cached is None else cached.new_pool(start, config.page_size, max_pages=pages)
        runner = graphed(target, self.pool)
        self.runner = runner  # the target, its small passes captured where that can be
        self.pool.steps_follow_tables = runner.follows_tables
        self.drafter: Drafter | None = None
        if source is not None:
            cached_runner = None if cached is None or self.draft_pool is None else graphed(cached, self.draft_pool)
            if self.draft_pool is not None and cached_runner is not None:
                self.draft_pool.steps_follow_tables = cached_runner.follows_tables
            self.drafter = source.drafter(
                runner,
                self.draft_pool,
                cached=cached_runner,
                deterministic=config.deterministic,
                copy=partial(exit_copy, deterministic=config.deterministic),
            )
        chunk = config.prefill_chunk or prefill_chunk(target.device)
        self.shared_prefixes = None
        if config.prefix_sharing:
            self.shared_prefixes = self._new_shared_prefixes(chunk_tokens=chunk)
        blocks = None if source is None else block_decoding(runner, self.drafter)
        ngrams = isinstance(source, NgramSource) or (config.ngrams and source is not None)
        measured, by_draft, rows = config.costs is None, target.device.type == "cpu", runner.captured_rows
        drafting = DraftingPolicy(config.costs, measured=measured, draft_by_draft=by_draft, ngrams=ngrams, lengths=LENGTHS)
        if blocks is not None and rows is not None:
            drafting = SpanPolicy(config.costs, measured=measured, ngrams=ngrams, lengths=CAPTURED_LENGTHS, most_rows=rows)
        self.scheduler = Scheduler(
            runner,
            self.pool,
            self.drafter,
            self.draft_pool,
            max_batch=config.max_batch,
            prefill_chunk=chunk,
            prefill_tokens=max(PREFILL_TOKENS, chunk),
            restore_tokens=restore_tokens(target.device, chunk),
            deterministic=config.deterministic,
            plain=plain_decoding(runner),
            blocks=blocks,
            drafting=drafting,
            shared_prefixes=self.shared_prefixes,
            whole_chunks=target.device.type == "cpu",
        )
        self.costs_stale = False  # they are used, and measured again when there is time
        # told of what is measured, and whether the machine was free for it
        self.on_costs: Callable[[CostModel, bool], None] | None = None
        self._without_costs: list[Request] = []
        self._undrafted_tokens = 0  # of ended requests that had no costs
        # the one that the drafter keeps features for; made by `engine.sessions` at first use, and not looked at here
        self.session_codec: Any = None

    # --- figures --------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any | None:
        """Of the target; None where only token ids are given."""
        return self.text.tokenizer

    @property
    def draft_model(self) -> Any | None:
        """The draft where it is a model of its own."""
        return None if self.source is None else self.source.model

    @property
    def cost_model(self) -> CostModel | None:
        """What the drafting policy starts from; None before it is measured."""
        return self.scheduler.drafting.costs

    @cost_model.setter
    def cost_model(self, costs: CostModel | None) -> None:
        self.scheduler.drafting.costs = costs

    @property
    def exit_layer(self) -> int:
        """The target's first layers that drafts rest on (0: none); their KV is recomputed at a resume, not stored."""
        return 0 if self.source is None else self.source.exit_layer

    @property
    def deterministic(self) -> bool:
        """Whether batch-invariant kernels run."""
        return self.config.deterministic

    @property
    def device(self) -> torch.device:
        """Where the models lie."""
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of KV pages in the model's own format."""
        return self.target.dtype

    @property
    def context(self) -> int:
        """Most tokens a request may have, prompt and new ones together."""
        return self.target.config.max_position_embeddings

    @property
    def drafter_name(self) -> str:
        """The source of drafts, for reports."""
        return "none" if self.source is None else self.source.name if self.drafter is None else self.drafter.name

    def memory(self) -> dict[str, int]:
        """Bytes held: target_bytes and draft_bytes of weights, pool_bytes of both KV pools as they are now."""
        draft_bytes, draft_pool = (self.drafter.weight_bytes, self.drafter.pool_bytes) if self.drafter else (0, 0)
        return {"target_bytes": self.target.weight_bytes, "draft_bytes": draft_bytes, "pool_bytes": self.pool.bytes + draft_pool}

    @property
    def held_share(self) -> float:
        """Share of the target's pages that running requests hold, shared ones once: neither those kept for later requests nor those that wait to be
        coded. Any thread may ask."""
        held = {page for request in self.scheduler.running[:] for page in request.sequence.pages[:]}
        return len(held) / self.pool.max_pages

    def measure_costs(self) -> CostModel | None:
        """The costs that the drafting policy starts from, measured at the first call by a few timed forwards on scratch sequences; None without a
        source of drafts, or without a free page to measure in."""
        if self.source is not None and (self.cost_model is None or self.costs_stale):
            longest = self.context if self.drafter is None else min(self.context, self.drafter.max_positions)
            room = min(longest, self.pool.num_free_tokens)
            counts = [n for n in _measured_counts(self.target) if n <= room]
            if not counts:
                return self.cost_model
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            if self.scheduler.blocks is not None:
                self.cost_model = self.scheduler.blocks.measure_costs(counts, deterministic=self.deterministic)
            else:
                scratch = None if self.drafter is None else self.drafter.scratch(self.pool.new_sequence)
                with CREW.alone():  # steps whose threads are on trial tell nothing of later ones
                    self.cost_model = measure_costs(
                        self.scheduler.target,
                        self.drafter,
                        self.pool.new_sequence,
                        scratch,
                        token_counts=counts,
                        deterministic=self.deterministic,
                    )
            self.costs_stale = False
            share = (time.process_time() - began_cpu_s) / (time.perf_counter() - began_s)
            if self.on_costs is not None:
                self.on_costs(self.cost_model, self.device.type != "cpu" or share >= _FREE_SHARE * self.runner.num_threads)
        return self.cost_model

    @torch.inference_mode()
    def capture_steps(self, limit_s: float = CAPTURE_LIMIT_S) -> Captured | None:
        """On a GPU, capture the steps of greedy requests and of those with the model's own sampling defaults beforehand, over short contexts
        (64 pages): a step's first use compiles and captures, which takes up to a second. Plain steps come first, then prompts and drafts of small
        batches, then plain steps with prompts beside, those that keep no states for a draft head, as those of requests without drafts, and last prompts
        of more than MAX_ROWS tokens; after limit_s seconds the rest is left to its first use. None where steps are not captured."""
        runner, blocks = self.runner, self.scheduler.blocks
        if not isinstance(runner, GraphedDecoder):
            return None
        began = time.perf_counter()
        until_s = began + limit_s
        with self.lock:
            default = self.sampling_defaults.params()
            drawings = [Drawing.of([p], self.target.config.vocab_size) for p in {p.greedy: p for p in (SamplingParams(), default)}.values()]
            taps = () if self.drafter is None else self.drafter.target_taps
            sizes = sizes_up_to(min(self.config.max_batch, MAX_ROWS))
            for compiling in (
                (compile_ahead(), nullcontext()) if runner.captures else (nullcontext(),)
            ):  # kernels of all steps first, at once
                with compiling:
                    for batch in sizes:
                        for drawing in drawings:
                            if time.perf_counter() < until_s:
                                kept = () if blocks is None else blocks.step_taps(batch)
                                runner.capture_common(batch, drawing, taps=kept, deterministic=self.deterministic)
                    for batch in sizes:
                        if not self.deterministic:
                            runner.capture_prompts(batch, taps=taps, until_s=until_s)
                        for drawing in drawings:
                            if blocks is not None:
                                blocks.capture_common(batch, drawing, deterministic=self.deterministic, until_s=until_s)
                    kept = () if blocks is None else blocks.step_taps(1)
                    for batch in () if self.deterministic else sizes_beside(self.config.max_batch):
                        for drawing in drawings:
                            if time.perf_counter() < until_s:
                                runner.capture_common(batch, drawing, taps=kept)
                    for batch in sizes:
                        for drawing in drawings:
                            if blocks is not None and blocks.step_taps(batch) and time.perf_counter() < until_s:
                                runner.capture_common(batch, drawing, deterministic=self.deterministic)
                    if not self.deterministic:
                        runner.capture_long_prompts(sizes[-1], taps=taps, until_s=until_s)
                        if blocks is not None:
                            blocks.capture_long_prompts(sizes[-1], until_s=until_s)
            return Captured(runner.num_steps + (0 if blocks is None else blocks.num_steps), time.perf_counter() - began)

    def _measure_late(self) -> None:
        """Give requests that began without costs theirs, once they and those before them have MEASURED_AFTER tokens, and one that has some goes on."""
        scheduled = self.scheduler.running + list(self.scheduler.waiting)
        self._without_costs = [request for request in self._without_costs if request in scheduled]
        going = [request.num_new for request in self._without_costs if request.num_new]
        if going and self._undrafted_tokens + sum(going) >= MEASURED_AFTER:
            with suppress(PoolExhausted):  # measured by a later request, then
                self.measure_costs()
            self._without_costs.clear()

    def in_turns(self, pieces: Generator[None, None, T]) -> T:
        """What a generator returns, each piece of which holds the lock; steps of those being served run in between, if the caller does not hold it. An
        interrupt between two pieces closes the generator."""
        try:
            while True:
                try:
                    with self.lock:
                        next(pieces)
                except StopIteration as end:
                    return end.value
        finally:
            with self.lock:
                pieces.close()

    # --- conversations --------------------------------------------------------------------------------------------------

    def keep_features(self, taps: tuple[int, ...], new_buffer: Callable[[], FeatureStore]) -> None:
        """Conversations opened from now on keep the draft's hidden states of committed tokens, for the codec.

        Raises:
            InvalidOption: there is no drafter, or it has no such layer. See `Drafter.keep_features`.
        """
        if self.drafter is None:
            raise InvalidOption("features come from a draft, and this engine has none", 'use a draft model, or draft="trunk"')
        self.drafter.keep_features(taps, new_buffer)

    def open_sequence_state(
        self,
    ) -> SequenceState:
        """An empty conversation. It keeps its pages until `close_sequence_state`."""
        with self.lock:
            sequence = self.pool.new_sequence()
            return SequenceState([], sequence, self.drafter.open(sequence) if self.drafter else None)

    @property
    def prefix_store(self) -> PrefixStore | None:
        """Where prefixes are kept that outlive the pools; None: nowhere."""
        return self.scheduler.prefix_store

    @prefix_store.setter
    def prefix_store(self, store: PrefixStore | None) -> None:
        self.scheduler.prefix_store = store

    def share_restored(self) -> SharedPrefixes:
        """Keep in the pools what a store gives back, for the next request that begins with it, beside whatever is shared already."""
        if self.shared_prefixes is None:
            self.shared_prefixes = self.scheduler.shared_prefixes = self._new_shared_prefixes(computed=False)
        return self.shared_prefixes

    def hold_whole_texts(self, whole: bool) -> None:
        """Whether layers with a window hold all of each text from now on, where their pool may grow so far: on a CPU."""
        if isinstance(self.pool, WindowedPool) and self.device.type == "cpu":
            self.pool.slides = not whole

    def _new_shared_prefixes(self, **options: Any) -> SharedPrefixes:
        return SharedPrefixes(
            self.pool,
            self.draft_pool,
            max_pages=most_cached_pages(self.pool),
            max_ends=most_cached_ends(self.pool),
            whole_chunks=self.device.type == "cpu",
            with_drafts=len(self.pool.groups) > 1 and self.exit_layer > 0,
            **options,
        )

    def close_sequence_state(self, conversation: SequenceState) -> None:
        """Give a conversation's pages back, once a store has kept them; it must not be used afterwards."""
        with self.lock:
            if self.prefix_store is None or not self.prefix_store.take_over(conversation):
                self.discard(conversation)

    def discard(self, conversation: SequenceState) -> None:
        """Give a conversation's pages back now."""
        with self.lock:
            if self.drafter is not None and conversation.draft_state is not None:
                self.drafter.close([conversation.draft_state])
            conversation.sequence.free()

    def run(
        self,
        conversation: SequenceState,
        new_token_ids: Sequence[int] = (),
        params: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Append tokens to a conversation and generate; the caches are reused, and kept for the next turn. on_text gets each piece of text.

        Without new tokens the conversation's text goes on. The conversation is as before when it is refused.

        Raises:
            EmptyPrompt, PromptTooLong, InvalidOption, PoolExhausted.
        """
        self.check_tokens([*conversation.token_ids, *new_token_ids])
        result, before = None, len(conversation.token_ids)
        with self.lock:
            events = self.events(self.submit(conversation, new_token_ids, params or self.sampling_defaults.params(), owns_cache=False))
        try:
            with closing(events):  # a failing on_text must end the request at once
                for event in events:
                    result = event.result
                    if on_text is not None and event.text:
                        on_text(event.text)
        except PoolExhausted:  # refused before anything ran
            del conversation.token_ids[max(before, conversation.sequence.length) :]
            raise
        assert result is not None
        return result

    # --- requests -------------------------------------------------------------------------------------------------------

    def check_tokens(self, tokens: Sequence[int]) -> np.ndarray:
        """The token ids as int32 [T]. Raises EmptyPrompt, PromptTooLong, or InvalidOption for an id outside the vocabulary."""
        if not tokens:
            raise EmptyPrompt("the prompt is empty", "give at least one word, or one token id")
        if len(tokens) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens, the model's context is {self.context}",
                "shorten it: at least one token must be left to generate",
            )
        size = self.target.config.vocab_size
        with suppress(OverflowError):
            row = np.fromiter(tokens, np.int64, len(tokens))
            if row.min() >= 0 and row.max() < size:
                return row.astype(np.int32)
        wrong = next(t for t in tokens if not 0 <= t < size)
        raise InvalidOption(f"token id {wrong} is outside the vocabulary of {size}", "use the target's own tokenizer")

    def submit(
        self,
        conversation: SequenceState,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        owns_cache: bool,
        row: np.ndarray | None = None,
    ) -> Request:
        """Queue a request that appends `tokens` (checked) to a conversation and generates. The caller holds `lock`.

        owns_cache: the conversation is closed with the request, and at once when it is refused. row: the whole text as `check_tokens` returned it,
        where the caller has it.

        Raises:
            InvalidOption: stop strings without a tokenizer, or biased tokens outside the vocabulary. PoolExhausted: it could not even run alone.
        """
        before = len(conversation.token_ids)
        try:
            params.check_vocabulary(self.target.config.vocab_size)
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *self.text.stop_token_ids(params.stop)))
            constraint = self.text.constraint(params.response_format, self.eos_token_ids) if params.response_format else None
            automatic = self.source is not None and params.draft_length == "auto"
            late = automatic and self.device.type == "cpu" and (self.cost_model is None or self.costs_stale)
            if automatic and not late:  # a GPU's next step runs already when this one's tokens are read, and must not be disturbed
                self.measure_costs()
            if self.drafter is not None and conversation.draft_state is None:
                conversation.draft_state = self.drafter.open(conversation.sequence)
            conversation.token_ids.extend(tokens)
            if conversation.sequence.length >= len(conversation.token_ids):
                # everything is in the cache: the last token runs again, for its logits
                conversation.sequence.truncate(len(conversation.token_ids) - 1)
                if not conversation.sequence.length:  # taken back farther than layers with a window hold it
                    conversation.emptied()
                state = conversation.draft_state
                if state is not None and state.sequence is conversation.sequence and state.features is not None:
                    state.features.truncate(state.length)
            request = Request(
                conversation,
                params,
                seed=secrets.randbits(48) if params.seed is None else params.seed,
                context=self.context,
                eos_token_ids=self.eos_token_ids,
                stream=self.text.stream(conversation.token_ids[-TEXT_CONTEXT:], params.stop),
                drafting=self.scheduler.drafting.request(params.draft_length, greedy=params.greedy),
                metrics=SpeculationMetrics(self.drafter_name),
                owns_cache=owns_cache,
                constraint=constraint,
                row=row,
            )
            self.scheduler.submit(request)
            if late:
                self._without_costs.append(request)
        except BaseException:
            del conversation.token_ids[before:]
            if owns_cache:
                self.close_sequence_state(conversation)
            raise
        return request

    def events(self, request: Request) -> Generator[StreamEvent, None, None]:
        """Run a submitted request to its end, with whatever else is submitted; an event a step. Closing the generator cancels the request."""
        try:
            event: StreamEvent | None = None
            while event is None or event.result is None:
                with self.lock:
                    event = request.news(self.memory)
                    if event is None:  # another thread's step serves this request too
                        if request.finish_reason is None:
                            self._step(request)
                        event = request.news(self.memory)
                if event is not None:
                    yield event
        finally:
            self.abandon(request)

    def finish(self, request: Request) -> GenerationResult:
        """Run a submitted request to its end, with whatever else is submitted."""
        with self.lock:
            while request.finish_reason is None:
                self._step(request)
            return request.result(self.memory())

    def abandon(self, request: Request) -> None:
        """Cancel a request, whatever state an interrupt left it in; nothing happens to one that has finished."""
        with self.lock:
            if request in self._without_costs:
                self._without_costs.remove(request)
            if request in self.scheduler.running or request in self.scheduler.waiting:
                self.scheduler.cancel(request)

    def step(self) -> None:
        """One step of all running requests. Whoever has tokens has been told of them when costs are measured, as that is done first."""
        with self.lock:
            if self._without_costs:
                self._measure_late()
            self.scheduler.step()
            if self._without_costs:
                self._undrafted_tokens += sum(request.num_new for request in self._without_costs if request.finish_reason is not None)
                self._without_costs = [request for request in self._without_costs if request.finish_reason is None]

    def _step(self, request: Request) -> None:
        self.step()
        if request.error is not None:
            raise request.error
