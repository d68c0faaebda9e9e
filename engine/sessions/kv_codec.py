"""From a conversation's KV to coded spans and back, with the features that speculation left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codec.codec import KvCodec
from codec.errors import CodecError
from codec.pack import CodecPack
from codec.pages import PageDecoder
from codec.predictor.dense import load_predictor
from codec.predictor.features import FeatureBuffer
from codec.quantize import levels_of
from codec.spec import SPAN_TOKENS, KvLayout
from draft.protocols import DraftState
from engine.errors import InvalidOption, PackMismatch
from engine.kv.pool import KvSequence, PagedPool
from engine.runtime.request import Conversation
from engine.sessions.codec_params import Log, find_pack, trunk_layers
from engine.sessions.file import Span
from kernels.dispatch import use_triton

if TYPE_CHECKING:
    from engine.engine import Engine

PREFILL_TOKENS = 512
SPANS_AT_ONCE = 64  # read, predicted and coded together: bounds the memory of a long session
DECODED_ON_GPU = 256  # a GPU decodes a span's lanes one symbol after the other: only many spans fill it


class SessionCodec:
    """An engine's codec and predictor: turns a range of a conversation's KV into spans and back.

    An engine has one (`session_codec`): the features that its drafter keeps while decoding are those the pack's predictor asks for.

    Raises:
        PackMismatch: the pack holds no predictor. InvalidOption: it is laid out for another engine.
    """

    def __init__(self, engine: Engine, pack: CodecPack) -> None:
        self.engine, self.pack = engine, pack
        try:
            self.codec = KvCodec(pack, engine.device)
            self._pages = PageDecoder(self.codec)
            self.predictor = load_predictor(pack.predictor, pack.predictor_settings, engine.device)
        except CodecError as error:
            raise PackMismatch(error.what, error.remedy) from error
        self.first_layer = pack.layout.first_layer
        config = engine.target.config
        first_layer = max(trunk_layers(engine), self.predictor.spec.target_layers)
        expected = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, first_layer)
        if pack.layout != expected:
            raise InvalidOption(
                f"the codec pack is laid out as {pack.layout}, the engine's KV as {expected}", "calibrate a pack for this engine"
            )
        if self.predictor.spec.taps:
            engine.keep_features(self.predictor.spec.taps, lambda: FeatureBuffer(self.predictor.reduce))

    def encode(self, conversation: Conversation, start: int, end: int, quality: str) -> list[Span]:
        """Code tokens [start, end), whose KV is in the conversation's pages, in spans of at most SPAN_TOKENS tokens.

        Raises InvalidOption when the KV cannot be coded (it overflowed).
        """
        if start >= end:
            return []
        latents, target_rows = self._latents(conversation, start, end), self._target_rows(conversation, start, end)
        bounds = [(a, min(a + SPAN_TOKENS, end)) for a in range(start, end, SPAN_TOKENS)]
        spans: list[Span] = []
        for at in range(0, len(bounds), SPANS_AT_ONCE):
            some = bounds[at : at + SPANS_AT_ONCE]
            pairs, levels = [], []
            begin = some[0][0]
            rows = self.engine.target.read_kv(conversation.sequence, begin, some[-1][1], first_layer=self.first_layer)
            for a, b in some:
                features = latents[a - start : b - start], _part(target_rows, a - start, b - start)
                pairs.append((rows[a - begin : b - begin], self.predictor.predict(*features)))
                octaves = self.predictor.step_octaves(*features)
                levels.append(None if octaves is None else levels_of(octaves))
            try:
                coded = self.codec.encode_many(pairs, quality, levels)
            except CodecError as error:
                raise InvalidOption(error.what, error.remedy) from error
            spans += [Span(a, b, data) for (a, b), data in zip(some, coded, strict=True)]
        return spans

    def release(self, conversation: Conversation, before: int) -> None:
        """Drop the features of tokens before `before`: their spans keep their bytes, so nothing asks for them again."""
        state = conversation.draft_state
        if state is not None and state.features is not None:
            state.features.forget(before)  # type: ignore[attr-defined]

    def decode(self, conversation: Conversation, spans: Sequence[Span]) -> None:
        """Write the spans' KV into the conversation's pages; does not advance. Raises the codec's errors."""
        start, end = spans[0].start, spans[-1].end
        latents, target_rows = self._latents(conversation, start, end), self._target_rows(conversation, start, end, chunk_ends(spans))
        count = DECODED_ON_GPU if self.engine.device.type == "cuda" else SPANS_AT_ONCE
        for at in range(0, len(spans), count):
            some = spans[at : at + count]
            # span by span: products of the same shape give the same bits at every resume
            predicted = [
                self.predictor.predict(latents[s.start - start : s.end - start], _part(target_rows, s.start - start, s.end - start))
                for s in some
            ]
            self._write(conversation.sequence, some, predicted)

    def _write(self, sequence: KvSequence, spans: Sequence[Span], predicted: list[Tensor]) -> None:
        """Decode neighbouring spans, given the prediction [T, D] of each, into pages; on a GPU without the rows in between."""
        pool, data, start, end = sequence.pool, [s.data for s in spans], spans[0].start, spans[-1].end
        if isinstance(pool, PagedPool) and pool.kv.dtype == torch.bfloat16 and use_triton(pool.kv):
            sequence.ensure(end)
            pages, offsets = sequence.addresses(start, end)
            angles = self.engine.target.rope.slice(start, end)
            self._pages.decode(data, predicted, pool.kv, pages * pool.page_size + offsets, *angles, self.first_layer)
        else:
            rows = torch.cat(self.codec.decode_many(data, predicted))
            self.engine.target.write_kv(sequence, start, rows, first_layer=self.first_layer)

    def _target_rows(self, conversation: Conversation, start: int, end: int, ends: Sequence[int] = ()) -> Tensor | None:
        """The target's hidden states [end - start, target taps, E] of tokens [start, end), where the predictor uses them: its first layers run over
        them (chunks as in `prefill_draft`) and write their own KV."""
        spec, target = self.predictor.spec, self.engine.target
        if not spec.target_taps:
            return None
        ids = torch.tensor(conversation.token_ids[start:end], device=self.engine.device)
        if spec.target_layers == 0:
            return target.embed(ids)[:, None]
        rows, at = [], start
        for stop in (*ends, end):
            while at < stop:
                count = min(stop - at, PREFILL_TOKENS)
                out = target.forward(
                    ids[at - start : at - start + count],
                    [conversation.sequence],
                    [count],
                    starts=[at],
                    taps=spec.target_taps,
                    logits="none",
                    last_layer=spec.target_layers,
                    deterministic=self.engine.deterministic,
                )
                rows.append(torch.stack([out.taps[i] for i in spec.target_taps], 1))
                at += count
        return torch.cat(rows)

    def _latents(self, conversation: Conversation, start: int, end: int) -> Tensor:
        """[end - start, r] from the features kept for tokens [start, end); the draft runs the tokens it never saw, and a pass over scratch pages
        supplies features that were never kept."""
        if not self.predictor.spec.taps:
            return self.predictor.reduce(torch.zeros(end - start, 0, self.predictor.draft_size, device=self.engine.device))
        state = conversation.draft_state
        if state is None:  # opened by hand, without a request so far
            return self._recomputed(conversation.token_ids[:end], start)
        if state.features is None:
            state.features = FeatureBuffer(self.predictor.reduce)
            state.features.skip(state.length)
        if self.engine.draft_decoder is not None:
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


def chunk_ends(spans: Sequence[Span]) -> list[int]:
    """Where passes over a stored session's tokens stop: a shorter span ends what one suspension added, and passes that stop there repeat to the bit at
    later resumes."""
    return [s.end for s in spans if s.end - s.start < SPAN_TOKENS]


def _part(rows: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if rows is None else rows[start:end]


def session_codec(engine: Engine, pack: str | Path | None = None, log: Log = print) -> SessionCodec:
    """The engine's one codec, made at first use (see `find_pack`). Raises InvalidOption when another pack is asked for later."""
    path = None if pack is None else Path(pack).absolute()
    if engine.session_codec is None:
        engine.session_codec = SessionCodec(engine, find_pack(engine, path, log))
        engine.session_pack = path
    elif path is not None and path != engine.session_pack:
        raise InvalidOption("this engine already codes its sessions with another pack", "use one engine per pack")
    return engine.session_codec


def run_sinks(engine: Engine, conversation: Conversation, count: int) -> None:
    """Run the target over the first `count` tokens of an empty conversation: their KV depends on nothing else, so it needs no storing."""
    ids = torch.tensor(conversation.token_ids[:count], device=engine.device)
    taps = engine.drafter.target_taps if engine.drafter else ()
    out = engine.target.forward(ids, [conversation.sequence], [count], taps=taps, logits="none", deterministic=engine.deterministic)
    if engine.drafter is not None and taps and conversation.draft_state is not None:
        engine.drafter.observe_target([conversation.draft_state], [count], out.taps)
    conversation.sequence.advance(count)


def prefill_draft(engine: Engine, state: DraftState, token_ids: Sequence[int], ends: Sequence[int] = ()) -> None:
    """Let the draft run what it lacks of token_ids, keeping features where it keeps any. A trunk's sequence advances with it: the caller then writes
    the other layers' KV.

    Chunks have at most PREFILL_TOKENS tokens and stop at each of `ends` (ascending): tokens before an end are run the same way, to the bit, whatever
    follows it.
    """
    drafter = engine.drafter
    assert drafter is not None
    for end in (*ends, len(token_ids)):
        while chunk := token_ids[state.length : min(end, state.length + PREFILL_TOKENS)]:
            drafter.prefill([state], [chunk])
            if drafter.verify_from:
                state.sequence.advance(len(chunk))
