"""Conversations that leave memory as a coded residual and come back: suspend, resume, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codec.codec import KvCodec
from codec.pack import CodecPack
from codec.spec import NUM_SINKS, QUALITIES, SPAN_TOKENS, KvLayout
from draft.features import FeatureBuffer
from draft.predictor import Predictor
from draft.protocols import DraftState
from engine.chat import next_turn
from engine.errors import Corrupted, EmptyPrompt, ForeignModel, InvalidOption
from engine.packs import Log, find_pack, pair_fingerprints, trunk_layers
from engine.request import Conversation, GenerationResult
from engine.sampling import SamplingParams
from engine.session_file import SessionFile, Span, session_errors

if TYPE_CHECKING:
    from engine.engine import Engine

TOKENS = "tokens"
SESSION_QUALITIES = (*QUALITIES, TOKENS)
PREFILL_TOKENS = 512
DEFAULT_QUALITY = "balanced"


class SessionCodec:
    """An engine's codec and predictor: turns a range of a conversation's KV into a span and back.

    An engine has one (`session_codec`): the features that its drafter keeps while decoding are those the pack's predictor asks for.
    """

    def __init__(self, engine: Engine, pack: CodecPack) -> None:
        self.engine, self.pack = engine, pack
        self.codec = KvCodec(pack, engine.device)
        self.predictor = Predictor.from_pack(pack.predictor, pack.predictor_settings, engine.device)
        self.first_layer = pack.layout.first_layer
        config = engine.target.config
        expected = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, trunk_layers(engine))
        if pack.layout != expected:
            raise InvalidOption(f"the codec pack is laid out as {pack.layout}, the engine's KV as {expected}", "calibrate a pack for this engine")
        if engine.drafter is not None and self.predictor.spec.taps:
            engine.keep_features(self.predictor.spec.taps, lambda: FeatureBuffer(self.predictor.reduce))

    def predictions(self, conversation: Conversation, start: int, end: int) -> Tensor:
        """Predicted pre-RoPE KV float32 [end - start, D] of tokens [start, end) from the features kept for them; a scratch pass of the draft supplies
        those that were never kept."""
        ids = torch.tensor(conversation.token_ids[start:end], device=self.engine.device)
        embeddings = self.engine.target.embed(ids) if self.predictor.spec.embedding else None
        return self.predictor.predict(self._latents(conversation, start, end), embeddings)

    def _latents(self, conversation: Conversation, start: int, end: int) -> Tensor:
        if not self.predictor.spec.taps:
            return self.predictor.reduce(torch.zeros(end - start, 0, self.predictor.draft_size, device=self.engine.device))
        state = conversation.draft_state
        assert self.engine.drafter is not None and state is not None, "a pack with taps belongs to an engine with a drafter"
        if state.features is None:
            state.features = FeatureBuffer(self.predictor.reduce)
            state.features.skip(state.length)
        if self.engine.draft_decoder is not None and state.length < end:
            prefill_draft(self.engine, state, conversation.token_ids[:end])
        rows = state.features.take(start, end)  # type: ignore[attr-defined]
        return self._recomputed(conversation.token_ids[:end], start) if rows is None else rows

    def _recomputed(self, token_ids: Sequence[int], start: int) -> Tensor:
        """Features of tokens from `start` on, by a pass over all of them on scratch pages."""
        drafter = self.engine.drafter
        assert drafter is not None
        sequence = self.engine.pool.new_sequence()
        state = drafter.open(sequence)
        try:
            prefill_draft(self.engine, state, token_ids)
            rows = state.features.take(start, len(token_ids))  # type: ignore[union-attr]
            assert rows is not None, "a pass over all tokens keeps all features"
            return rows.clone()
        finally:
            drafter.close([state])
            sequence.free()

    def encode(self, conversation: Conversation, start: int, end: int, quality: str) -> list[Span]:
        """Code tokens [start, end), whose KV is in the conversation's pages, in spans of at most SPAN_TOKENS tokens."""
        bounds = [(a, min(a + SPAN_TOKENS, end)) for a in range(start, end, SPAN_TOKENS)]
        if not bounds:
            return []
        target, sequence = self.engine.target, conversation.sequence
        predicted = self.predictions(conversation, start, end)
        pairs = [(target.read_kv(sequence, a, b, first_layer=self.first_layer), predicted[a - start : b - start]) for a, b in bounds]
        return [Span(a, b, data) for (a, b), data in zip(bounds, self.codec.encode_many(pairs, quality), strict=True)]

    def decode(self, conversation: Conversation, spans: Sequence[Span]) -> None:
        """Write the spans' KV into the conversation's pages; the draft's features for their tokens must be there. Raises the codec's errors."""
        predicted = self.predictions(conversation, spans[0].start, spans[-1].end)
        parts = predicted.split([s.end - s.start for s in spans])
        rows = torch.cat(self.codec.decode_many([s.data for s in spans], parts))
        self.engine.target.write_kv(conversation.sequence, spans[0].start, rows, first_layer=self.first_layer)


@dataclass(frozen=True)
class SuspendReport:
    """What a suspended session takes: tokens whose KV it stands for, the file's bytes, the bf16 bytes of that KV, seconds spent."""

    tokens: int
    stored_bytes: int
    raw_bytes: int
    bits_per_element: float
    quality: str
    seconds: float


@dataclass(frozen=True)
class ResumeReport:
    """What resuming cost: draft_s the draft's pass over the tokens, decode_s the codec and the pages, total_s everything, file included."""

    tokens: int
    draft_s: float
    decode_s: float
    total_s: float


class Session:
    """One conversation that can be suspended to a file and resumed from it. Made by `Engine.session`.

    quality: "near-lossless", "balanced", "compact", "tiny", or "tokens" (ids only: resuming runs the target over them again).
    """

    def __init__(
        self, engine: Engine, *, quality: str = DEFAULT_QUALITY, pack: str | Path | None = None, file: str | Path | None = None, log: Log = print
    ) -> None:
        if quality not in SESSION_QUALITIES:
            raise InvalidOption(f"unknown quality {quality!r}", f"choose one of {', '.join(SESSION_QUALITIES)}")
        self.engine, self.quality, self._log = engine, quality, log
        self._pack_path = pack
        self.spans: list[Span] = []
        self.suspended: SuspendReport | None = None
        self.resumed: ResumeReport | None = None
        stored = None if file is None else SessionFile.load(file)
        if quality != TOKENS or (stored is not None and stored.spans):
            session_codec(engine, pack, log)
        self.conversation = engine.open_conversation()
        if stored is not None:
            assert file is not None
            try:
                self._restore(stored, file)
            except BaseException:
                engine.close_conversation(self.conversation)
                raise

    # --- talking --------------------------------------------------------------------------------------------------------

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far."""
        return self.conversation.token_ids

    def generate(
        self, text: str | Sequence[int] = "", params: SamplingParams | None = None, on_text: Callable[[str], None] | None = None
    ) -> GenerationResult:
        """Append raw text (or token ids) and continue it. Without text the conversation just goes on. Raises as `Engine.run`."""
        tokenizer = self.engine.tokenizer
        if isinstance(text, str):
            if text and tokenizer is None:
                raise InvalidOption("a text prompt needs a tokenizer", "give token ids, or an engine with a tokenizer")
            first = not self.token_ids
            ids = tokenizer(text, add_special_tokens=first)["input_ids"] if text and tokenizer is not None else []
        else:
            ids = list(text)
        return self.engine.run(self.conversation, ids, params, on_text)

    def chat(
        self, message: str, params: SamplingParams | None = None, on_text: Callable[[str], None] | None = None
    ) -> GenerationResult:
        """Say something as the user, through the model's chat template, and return the assistant's answer. Raises as `Engine.run`, and EmptyPrompt."""
        if not message.strip():
            raise EmptyPrompt("the message is empty", "say something")
        if self.token_ids:
            ids = next_turn(self.engine.tokenizer, message, self.token_ids)
        else:
            ids = self.engine.encode([{"role": "user", "content": message}])
        return self.engine.run(self.conversation, ids, params, on_text)

    # --- leaving and coming back ----------------------------------------------------------------------------------------

    def suspend(self, path: str | Path) -> SuspendReport:
        """Write the session to `path`; the session itself stays usable. Spans coded before keep their bytes, only new tokens are coded.

        Raises:
            EmptyPrompt: there is nothing to keep. DiskFull, CacheNotWritable: the file could not be written; an earlier one is untouched.
        """
        began = time.perf_counter()
        if not self.token_ids:
            raise EmptyPrompt("the session is empty", "generate something before suspending it")
        num_cached = self.conversation.sequence.length
        prints = pair_fingerprints(self.engine)
        if self.quality == TOKENS and not self.spans:
            spans: list[Span] = []
        else:
            codec = session_codec(self.engine, self._pack_path, self._log)
            self.spans = [s for s in self.spans if s.end <= num_cached]
            start = self.spans[-1].end if self.spans else min(NUM_SINKS, num_cached)
            if self.quality != TOKENS:
                self.spans += codec.encode(self.conversation, start, num_cached, self.quality)
            else:
                num_cached = start  # what came since is kept as tokens
            spans = self.spans
            prints["pack"] = codec.pack.digest
        stored = SessionFile(list(self.token_ids), num_cached, self.quality, prints, spans).save(path)
        elements = self._layout.full_dim * max(1, self.conversation.sequence.length)
        self.suspended = SuspendReport(
            self.conversation.sequence.length, stored, 2 * elements, 8 * stored / elements, self.quality, time.perf_counter() - began
        )
        return self.suspended

    def close(self) -> None:
        """Give the session's pages back."""
        self.engine.close_conversation(self.conversation)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def kv_figures(self) -> dict[str, int | float | str | None]:
        """The `kv` object of the command line's JSON."""
        tokens, report, sequence = self.conversation.sequence.length, self.suspended, self.conversation.sequence
        return {
            "tokens": tokens,
            "raw_bytes": 2 * tokens * self._layout.full_dim,
            "hot_bytes": len(sequence.pages) * self.engine.pool.page_bytes,
            "stored_bytes": report.stored_bytes if report else None,
            "bits_per_element": report.bits_per_element if report else None,
            "quality": report.quality if report else None,
        }

    @property
    def _layout(self) -> KvLayout:
        config = self.engine.target.config
        return KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, trunk_layers(self.engine))

    def _restore(self, stored: SessionFile, path: str | Path) -> None:
        began = time.perf_counter()
        engine, conversation = self.engine, self.conversation
        prints = pair_fingerprints(engine)
        if stored.spans:
            codec = session_codec(engine, self._pack_path, self._log)
            prints["pack"] = codec.pack.digest
        for role in prints:
            if stored.fingerprints.get(role) != prints[role]:
                raise ForeignModel(f"session file {path} was written with another {role}", "resume it with the models and pack it was made with")
        if any(not 0 <= t < engine.target.config.vocab_size for t in stored.token_ids) or len(stored.token_ids) > engine.context:
            raise Corrupted(f"session file {path} holds tokens the model cannot have", "restore it from a copy, or start a new session")
        conversation.token_ids[:] = stored.token_ids
        cached = stored.token_ids[: stored.num_cached] if stored.spans else []
        draft_s = decode_s = 0.0
        if cached:
            assert conversation.draft_state is not None or engine.drafter is None
            run_sinks(engine, conversation, min(NUM_SINKS, len(cached)))
            if engine.drafter is not None and conversation.draft_state is not None:
                prefill_draft(engine, conversation.draft_state, cached)
            _synchronise(engine)
            draft_s = time.perf_counter() - began
            with session_errors(path):
                codec.decode(conversation, stored.spans)
            conversation.sequence.advance(len(cached) - conversation.sequence.length)
            _synchronise(engine)
            decode_s = time.perf_counter() - began - draft_s
            self.spans = stored.spans
        self.resumed = ResumeReport(len(cached), draft_s, decode_s, time.perf_counter() - began)


def run_sinks(engine: Engine, conversation: Conversation, count: int) -> None:
    """Run the target over the first `count` tokens of an empty conversation: their KV depends on nothing else, so it needs no storing."""
    ids = torch.tensor(conversation.token_ids[:count], device=engine.device)
    taps = engine.drafter.target_taps if engine.drafter else ()
    out = engine.target.forward(ids, [conversation.sequence], [count], taps=taps, logits="none", deterministic=engine.deterministic)
    if engine.drafter is not None and taps and conversation.draft_state is not None:
        engine.drafter.observe_target([conversation.draft_state], [count], out.taps)
    conversation.sequence.advance(count)


def prefill_draft(engine: Engine, state: DraftState, token_ids: Sequence[int]) -> None:
    """Let the draft run what it lacks of token_ids, in chunks, keeping features where it keeps any."""
    drafter = engine.drafter
    assert drafter is not None
    if drafter.verify_from and state.features is None:
        raise InvalidOption("the trunk keeps no features in this conversation", "open the session after choosing its pack")
    while True:
        done = state.features.length if drafter.verify_from and state.features is not None else state.length
        chunk = token_ids[done : done + PREFILL_TOKENS]
        if not chunk:
            return
        drafter.prefill([state], [chunk])


def session_codec(engine: Engine, pack: str | Path | None = None, log: Log = print) -> SessionCodec:
    """The engine's one codec, made at first use (see `find_pack`). Raises InvalidOption when another pack is asked for later."""
    if engine.session_codec is None:
        engine.session_codec = SessionCodec(engine, find_pack(engine, pack, log))
        engine.session_pack = pack
    elif pack is not None and pack != engine.session_pack:
        raise InvalidOption("this engine already codes its sessions with another pack", "use one engine per pack")
    return engine.session_codec


def _synchronise(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
