"""The library's front door: an engine holds the models and the KV pools, and generates text."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draft.errors import DraftError
from draft.length import CostModel
from draft.protocols import FeatureStore
from engine.calibrate.channel_means import open_pool
from engine.errors import EmptyPrompt, InvalidOption, PoolExhausted, PromptTooLong
from engine.hub.resolve import check_vocabularies, load_tokenizer, resolve_model, resolve_pair
from engine.model.config import read_config
from engine.model.decoder import Decoder, DecoderConfig
from engine.model.device import START_TOKENS, default_pool_tokens, device_named, dtype_named
from engine.runtime.drafters import Draft, TrainedTrunk, build_drafter, choose_draft, measure_engine, new_controller, own_model
from engine.runtime.metrics import SpeculationMetrics
from engine.runtime.model_runner import graphed, plain_decoding
from engine.runtime.request import Conversation, GenerationResult, Request, StreamEvent
from engine.runtime.sampling import SamplingParams
from engine.runtime.scheduler import Scheduler
from engine.text.detokenizer import TextStream
from engine.text.prompts import Prompt, as_prompts, encode_prompt, end_tokens, special_tokens

if TYPE_CHECKING:
    from engine.sessions.kv_codec import SessionCodec
    from engine.sessions.session import Session

TEXT_CONTEXT = 5  # prompt tokens decoded along with the first new ones


class Engine:
    """Generates with a target, a source of drafts and their KV pools. Not thread-safe: one thread drives an engine.

    Equal seeds give equal text within a process, in any batch. The automatic draft length rests on costs measured once (`cost_model`),
    at the first request that needs them; to repeat sampled text in another process, pass that one's `cost_model` as `costs`, or fix
    `draft_length`.

    Args:
        target: the model whose distribution is sampled.
        tokenizer: None allows token ids only.
        draft: a small model with the target's vocabulary, a number of the target's first layers (trunk), a trained trunk, or None for no
            speculation.
        pool_tokens: most tokens of KV each pool may hold; memory is taken on demand. Default: 131,072 on a CPU, half the free memory of a GPU.
        page_size, max_batch, prefill_chunk: see `PagedPool` and `Scheduler`.
        deterministic: shape-stable kernels: greedy text is then the same with and without speculation, to the bit.
        hot: format of the target's KV while it is attended: "bf16" (the model's own), "q4", "q3" or "q2". A draft model's stays its own.
        costs: frozen costs for the automatic draft length.
        target_dir, draft_dir: where the models came from, for fingerprints. pair: name of the known pair.

    Raises:
        InvalidOption: a trunk deeper than the target, or another bad option.
    """

    def __init__(
        self,
        target: Decoder,
        tokenizer: Any | None = None,
        *,
        draft: Draft = None,
        pool_tokens: int | None = None,
        page_size: int = 64,
        max_batch: int = 64,
        prefill_chunk: int = 512,
        deterministic: bool = False,
        hot: str = "bf16",
        costs: CostModel | None = None,
        target_dir: Path | None = None,
        draft_dir: Path | None = None,
        pair: str | None = None,
    ) -> None:
        for name, value in (("page_size", page_size), ("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise InvalidOption(f"{name} cannot be {value}", "give a whole number from 1 on")
        self.target, self.tokenizer, self.deterministic, self.hot = target, tokenizer, deterministic, hot
        self.target_dir, self.draft_dir, self.pair = target_dir, draft_dir, pair
        self.draft_decoder = draft if isinstance(draft, Decoder) else None
        self.trained_trunk = draft if isinstance(draft, TrainedTrunk) else None
        tokens = default_pool_tokens(target, own_model(draft), hot) if pool_tokens is None else pool_tokens
        if tokens < page_size:
            raise InvalidOption(f"pool_tokens cannot be {tokens}", f"give at least one page of {page_size} tokens")
        pages = tokens // page_size
        # captured steps hold addresses: a GPU's pool gets its size at once
        start = pages if target.device.type == "cuda" else min(pages, -(-START_TOKENS // page_size))
        self.pool = open_pool(target, hot, start, page_size, pages, tokenizer=tokenizer, target_dir=target_dir)
        runner = graphed(target, self.pool)
        self.drafter, self.draft_pool = build_drafter(
            runner,
            draft,
            lambda model: model.new_pool(start, page_size, max_pages=pages),
            name=draft_dir.name if draft_dir else "model",
            deterministic=deterministic,
        )
        self.scheduler = Scheduler(
            runner,
            self.pool,
            self.drafter,
            self.draft_pool,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            deterministic=deterministic,
            plain=plain_decoding(runner),
        )
        self.cost_model = costs
        self.session_codec: SessionCodec | None = None
        self.session_pack: str | Path | None = None
        self.eos_token_ids = end_tokens(target.config.eos_token_ids, tokenizer, target_dir)
        self._special = special_tokens(tokenizer)

    # --- making one -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path,
        draft: str | Path = "none",
        *,
        device: str = "auto",
        dtype: str = "auto",
        trunk_layers: int | None = None,
        **options: Any,
    ) -> Engine:
        """Load models. target: folder or hub id; draft: the same, the folder of a trunk adapter, "trunk" (the adapter that ships for a target of
        this shape, else its own first layers, untrained), or "none".

        device: "auto", "cpu", "cuda", "cuda:1". dtype: "auto" (bfloat16), "bfloat16", "float32". trunk_layers: so many layers, untrained.
        options: see the constructor.

        Raises:
            ModelNotFound, DownloadFailed, UnsupportedArchitecture, VocabularyMismatch, BadAdapter, InvalidOption.
        """
        where, kind = device_named(device), dtype_named(dtype)
        target_dir = resolve_model(target)
        # first: the tokenizer of a model we do not run may fail to load in ways of its own
        choice = choose_draft(draft, DecoderConfig.from_hf(read_config(target_dir)), trunk_layers)
        if choice.model is not None:
            DecoderConfig.from_hf(read_config(choice.model))
        tokenizer = load_tokenizer(target_dir)
        if choice.model is not None:
            check_vocabularies(tokenizer, load_tokenizer(choice.model))
        decoder = Decoder.from_pretrained(target_dir, dtype=kind, device=where)
        return cls(decoder, tokenizer, draft=choice.load(decoder), target_dir=target_dir, draft_dir=choice.model, **options)

    @classmethod
    def from_pair(cls, name: str, *, progress: Any | None = None, draft: str | Path | None = None, **options: Any) -> Engine:
        """Load a known pair, fetched on first use. draft: another draft than the pair's own; options: see `from_pretrained`.

        Raises:
            UnknownPair, DownloadFailed, HashMismatch, DiskFull, and what `from_pretrained` raises.
        """
        paths = resolve_pair(name, progress)
        return cls.from_pretrained(paths.target_dir, paths.draft if draft is None else draft, pair=name, **options)

    # --- figures --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the models lie."""
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the KV pools."""
        return self.target.dtype

    @property
    def context(self) -> int:
        """Most tokens a request may have, prompt and new ones together."""
        return self.target.config.max_position_embeddings

    @property
    def drafter_name(self) -> str:
        """The source of drafts, for reports."""
        return self.drafter.name if self.drafter else "none"

    def memory(self) -> dict[str, int]:
        """Bytes held: target_bytes and draft_bytes of weights, pool_bytes of both KV pools as they are now."""
        draft_bytes, draft_pool = (self.drafter.weight_bytes, self.drafter.pool_bytes) if self.drafter else (0, 0)
        return {"target_bytes": self.target.weight_bytes, "draft_bytes": draft_bytes, "pool_bytes": self.pool.bytes + draft_pool}

    def keep_features(self, taps: tuple[int, ...], new_buffer: Callable[[], FeatureStore]) -> None:
        """Conversations opened from now on keep the draft's hidden states of committed tokens, for the codec.

        Raises:
            InvalidOption: the engine has no draft, or its draft no such layer. See `Drafter.keep_features`.
        """
        if self.drafter is None:
            raise InvalidOption("features come from a draft, and this engine has none", 'use a draft model, or draft="trunk"')
        try:
            self.drafter.keep_features(taps, new_buffer)
        except DraftError as error:
            raise InvalidOption(error.what, error.remedy) from error

    # --- generating -----------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as it is, chat messages through the model's template. Raises EmptyPrompt, InvalidOption, PromptTooLong."""
        return encode_prompt(self.tokenizer, prompt, self.context)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[GenerationResult]:
        """Continue prompts (texts, lists of token ids, or lists of chat messages) as one batch of ragged requests; results in order.

        params: one for all (also the same seed for all), or one per prompt.

        Raises:
            EmptyPrompt, PromptTooLong, InvalidOption, PoolExhausted: before or while generating; nothing stays behind.
        """
        given = as_prompts(prompts)
        if not given:
            raise EmptyPrompt("there is no prompt", "give at least one")
        each = [params or SamplingParams()] * len(given) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(given):
            raise InvalidOption(
                f"{len(each)} sampling parameters were given for {len(given)} prompts", "give one for all, or one per prompt"
            )
        ids = [self.encode(prompt) for prompt in given]
        for tokens in ids:
            self._check_tokens(tokens)
        requests: list[Request] = []
        try:
            for tokens, own in zip(ids, each, strict=True):
                requests.append(self._submit(self.open_conversation(), tokens, own, owns_cache=True))
            return [self._finish(request) for request in requests]
        except BaseException:
            for request in requests:
                self._abandon(request)
            raise

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Continue one prompt, yielding text as it is accepted; the last event has finish_reason and result.

        Closing the iterator ends the request. Raises as `generate`; a bad prompt is refused here, before the first event is asked for.
        """
        tokens = self.encode(prompt)
        self._check_tokens(tokens)

        def events() -> Iterator[StreamEvent]:
            yield from self._events(self._submit(self.open_conversation(), tokens, params or SamplingParams(), owns_cache=True))

        return events()

    def open_conversation(self) -> Conversation:
        """An empty conversation. It keeps its pages until `close_conversation`."""
        sequence = self.pool.new_sequence()
        return Conversation([], sequence, self.drafter.open(sequence) if self.drafter else None)

    def session(
        self,
        file: str | Path | None = None,
        *,
        quality: str | None = None,
        pack: str | Path | None = None,
        restore: str = "auto",
        log: Callable[[str], None] = print,
    ) -> Session:
        """A conversation that can be suspended to a file; with `file`, one resumed from it. See `engine.sessions.session.Session`.

        quality: "auto", "near-lossless", "balanced", "compact", "tiny" or "tokens" (default: the file's own, else "auto": what comes back fastest on
        this machine). pack: a codec pack's file (default: the pair's own, fitted at first use). restore: "auto", "decode" or "recompute".

        Raises:
            BadSessionFile and its kinds, PackMismatch, InvalidOption.
        """
        from engine.sessions.session import Session

        return Session(self, quality=quality, pack=pack, file=file, restore=restore, log=log)

    def close_conversation(self, conversation: Conversation) -> None:
        """Give a conversation's pages back; it must not be used afterwards."""
        if self.drafter is not None and conversation.draft_state is not None:
            self.drafter.close([conversation.draft_state])
        conversation.sequence.free()

    def run(
        self,
        conversation: Conversation,
        new_token_ids: Sequence[int] = (),
        params: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Append tokens to a conversation and generate; the caches are reused, and kept for the next turn. on_text gets each piece of text.

        Without new tokens the conversation's text goes on. Raises as `generate`; the conversation is then as before.
        """
        self._check_tokens([*conversation.token_ids, *new_token_ids])
        result, before = None, len(conversation.token_ids)
        events = self._events(self._submit(conversation, new_token_ids, params or SamplingParams(), owns_cache=False))
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

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise EmptyPrompt("the prompt is empty", "give at least one word, or one token id")
        if len(tokens) >= self.context:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens, the model's context is {self.context}",
                "shorten it: at least one token must be left to generate",
            )
        wrong = next((t for t in tokens if not 0 <= t < self.target.config.vocab_size), None)
        if wrong is not None:
            raise InvalidOption(
                f"token id {wrong} is outside the vocabulary of {self.target.config.vocab_size}", "use the target's own tokenizer"
            )

    def _submit(self, conversation: Conversation, tokens: Sequence[int], params: SamplingParams, *, owns_cache: bool) -> Request:
        """Queue a request; `tokens` were checked."""
        if params.stop and self.tokenizer is None:
            raise InvalidOption("stop strings need a tokenizer", "use stop_token_ids, or give the engine a tokenizer")
        params.check_vocabulary(self.target.config.vocab_size)
        stop_ids = tuple(self._special[s] for s in params.stop if s in self._special)
        params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *stop_ids))
        if self.drafter is not None and params.draft_length == "auto" and self.cost_model is None:
            self.cost_model = measure_engine(self, self.drafter)
        if self.drafter is not None and conversation.draft_state is None:
            conversation.draft_state = self.drafter.open(conversation.sequence)
        before = len(conversation.token_ids)
        conversation.token_ids.extend(tokens)
        if conversation.sequence.length >= len(conversation.token_ids):
            # everything is in the cache: the last token runs again, for its logits
            conversation.sequence.truncate(len(conversation.token_ids) - 1)
            state = conversation.draft_state
            if state is not None and state.sequence is conversation.sequence and state.features is not None:
                state.features.truncate(state.length)
        request = Request(
            conversation,
            params,
            seed=secrets.randbits(48) if params.seed is None else params.seed,
            context=self.context,
            eos_token_ids=self.eos_token_ids,
            stream=TextStream(self._decode, conversation.token_ids[-TEXT_CONTEXT:], params.stop),
            controller=new_controller(params, self.cost_model, self.device),
            metrics=SpeculationMetrics(self.drafter_name),
            owns_cache=owns_cache,
        )
        try:
            self.scheduler.submit(request)
        except BaseException:
            del conversation.token_ids[before:]
            if owns_cache:
                self.close_conversation(conversation)
            raise
        return request

    def _events(self, request: Request) -> Generator[StreamEvent, None, None]:
        seen = request.prompt_tokens
        try:
            while request.finish_reason is None:
                self._step(request)
                if request.finish_reason is None and len(request.token_ids) > seen:
                    new, seen = request.token_ids[seen:], len(request.token_ids)
                    yield StreamEvent(request.stream.take(), new)
            result = request.result(self.memory())
            yield StreamEvent(request.stream.take(), request.token_ids[seen:], request.finish_reason, result)
        finally:
            self._abandon(request)

    def _finish(self, request: Request) -> GenerationResult:
        while request.finish_reason is None:
            self._step(request)
        return request.result(self.memory())

    def _step(self, request: Request) -> None:
        self.scheduler.step()
        if request.error is not None:
            raise request.error

    def _abandon(self, request: Request) -> None:
        # whatever state an interrupt left it in: a request that the scheduler still has must not run again
        if request in self.scheduler.running or request in self.scheduler.waiting:
            self.scheduler.cancel(request)

    def _decode(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None or not ids:
            return ""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
