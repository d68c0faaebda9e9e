"""From a conversation's KV to coded spans and back, with the features that speculation left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from codec.codec import KvCodec, SpanSetting
from codec.errors import CodecError
from codec.fidelity import plan_spans
from codec.pack import CodecPack
from codec.pages import EntropyDecoded, PageDecoder
from codec.predictor.features import FeatureBuffer
from codec.references import Lent
from codec.spans import SpanCodec, SpanEncoder
from codec.spec import NUM_SINKS, QUALITIES, SPAN_TOKENS, KvLayout, step_of
from draft.early_exit import EarlyExitDrafter
from draft.protocols import DraftState
from engine.calibrate.restore_cost import draft_layers_run
from engine.errors import InvalidOption, PackMismatch
from engine.kv.pool import KvPool, KvSequence, PagedPool
from engine.kv.windowed_pool import WindowedPool
from engine.model.decoder import Decoder
from engine.runtime.core import EngineCore
from engine.runtime.request import SequenceState
from engine.sessions.codec_params import Log, fitted_pack, known_pack
from engine.sessions.file import Span
from engine.sessions.pieces import whole
from engine.sessions.repeats import Repeats, SpanSources
from engine.sessions.stages import Rates, StageClock
from kernels.dispatch import use_triton
from kernels.upload import upload

PASS_TOKENS = 512  # of a pass over known tokens on a CPU
_LARGEST_PASS = 16_384  # on a GPU, where its memory allows
_PASS_TOKENS: WeakKeyDictionary[Decoder, int] = WeakKeyDictionary()  # so that passes keep their shapes, and their bits
_WARM_SIZES = ((SPAN_TOKENS, SPAN_TOKENS), (SPAN_TOKENS - NUM_SINKS, SPAN_TOKENS))
_CODED_TOKENS = {"cpu": 256, "cuda": 4096}
"""Read, predicted and coded together: bounds the memory of a long session, and what others wait for during its suspend. Bytes do not depend on it."""


_LAST_TOKENS = {"near-lossless": 64}
"""Of a session at that quality, the fewest of its last tokens that are kept as ids and run again with what follows them.

The next token attends to these the most. With the code's errors in them, 32 greedy tokens of SmolLM2 went on as if never stored in 31% of 42 sessions;
run again over what was restored, in 60% (all of the text run again in bfloat16: 69%), at 14% fewer bits."""

_MOST_LEFT = 8192  # tokens whose states wait for a draft head's layers; [T, E] of them are held until drafts are asked for


def coded_end(num_tokens: int, quality: str | float) -> int:
    """Tokens of a session's `num_tokens` that are coded, its first ones included: whole spans where the last tokens are kept as ids."""
    last = _LAST_TOKENS.get(quality, 0) if isinstance(quality, str) else 0
    return max(0, num_tokens - last) // SPAN_TOKENS * SPAN_TOKENS if last else num_tokens


class SessionCodec:
    """An engine's codec and predictor: turns a range of a conversation's KV into spans and back.

    An engine has one (`session_codec`): the features that its drafter keeps while decoding are those the pack's predictor asks for.

    Raises:
        PackMismatch: the pack holds no predictor. InvalidOption: it is laid out for another engine.
    """

    def __init__(self, core: EngineCore, pack: CodecPack) -> None:
        self.core, self.pack = core, pack
        self.pack_path: Path | None = None  # as the user named it
        try:
            self._spans = SpanCodec(pack, core.device, product_dtype(core.dtype, core.device), core.dtype)
        except CodecError as error:
            raise PackMismatch(error.what, error.remedy) from error
        self.predictor, self.curve = self._spans.predictor, self._spans.curve
        self.rates: Rates | None = None
        self._warming: threading.Thread | None = None
        self.first_layer = pack.layout.first_layer
        config = core.target.config
        first_layer = max(core.exit_layer, self.predictor.spec.recomputed_layers)
        expected = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, first_layer)
        if pack.layout != expected:
            raise InvalidOption(
                f"the codec pack is laid out as {pack.layout}, the engine's KV as {expected}", "calibrate a pack for this engine"
            )
        draft, taps = core.draft_model, self.predictor.spec.taps
        self._shallow_layers: int | None = None  # of a separate draft whose other layers a restore leaves out
        if draft is not None and draft_layers_run(taps, draft.config.num_layers) < draft.config.num_layers:
            self._shallow_layers = max(taps, default=0)
        if taps:
            core.keep_features(taps, lambda: FeatureBuffer(self.predictor.reduce))
        if core.device.type == "cuda":
            self.make_ready()  # here, as the thread and the first restore would both begin to
            self._warming = threading.Thread(target=self.warm_up, name="codec warm-up", daemon=True)
            self._warming.start()

    @property
    def codec(self) -> KvCodec:
        """Of spans; made at first use."""
        return self._spans.codec

    @property
    def pages(self) -> PageDecoder:
        """Spans to KV; made at first use."""
        return self._spans.pages

    def make_ready(self) -> None:
        """Make now what is else made at first use, so that no request waits for it."""
        _ = self.pages

    @property
    def draft_catches_up(self) -> bool:
        """Whether a restore leaves a separate draft's cache for later, or the layers of a draft head."""
        drafter = self.core.drafter
        head = isinstance(drafter, EarlyExitDrafter) and drafter.draft_head is not None and not drafter.own_taps
        return self._shallow_layers is not None or (head and self.core.device.type == "cpu")

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Code and decode a few random tokens: makes tables, and on a GPU compiles kernels, which takes seconds that no suspend should wait for."""
        layout, spec, device, dtype = self.pack.layout, self.predictor.spec, self.core.device, self.core.dtype
        generator = torch.Generator().manual_seed(0)
        pool = self.core.pool
        into_pages = self._writes_pages(pool)
        for sizes in _WARM_SIZES:  # Triton compiles a kernel once more for numbers that 16 divides
            tokens = sum(sizes)
            latents = self.predictor.reduce(
                torch.randn(tokens, len(spec.taps), self.predictor.draft_size, generator=generator, dtype=torch.float32).to(device, dtype)
            )
            hidden = torch.randn(
                tokens, len(spec.target_taps), self.core.target.config.hidden_size, generator=generator, dtype=torch.float32
            ).to(device, dtype)
            features = latents, hidden if spec.target_taps else None
            truth = self.predictor.predict(*features)
            pairs = [(part + 1e-3 * part.abs().mean(), part) for part in truth.split(sizes)]
            if self.curve is not None:  # far from any promise, so that every way to keep it is looked at
                far = [(own + 1e6 * torch.ones_like(own), part) for own, part in pairs]
                plan_spans(self.codec, self.curve, "balanced", far, [None] * len(sizes), [None] * len(sizes))
            slots, angles = (
                torch.arange(tokens, device=device),
                torch.zeros(tokens, layout.head_dim // 2, dtype=torch.float32, device=device),
            )
            kv = torch.zeros(
                layout.num_layers, 2, 2, SPAN_TOKENS, layout.num_kv_heads, layout.head_dim, dtype=self.pages.dtype, device=device
            )
            kinds = (False,) if self.codec.transform.fallback is None else (False, True)
            for step, fallback in itertools.product(map(step_of, QUALITIES), kinds):
                settings = [SpanSetting(step, fallback)] * len(sizes)
                spans = self.codec.encode_many(pairs, settings, [torch.zeros(size, dtype=torch.int8) for size in sizes])
                parts = self.pages.start(spans, beside=False)
                if into_pages:
                    self.pages.write_pages(parts, *features, kv, slots, angles, angles, self.first_layer)
                else:
                    for _, rows in self.pages.rows(parts, *features):
                        assert rows.shape[1] == layout.dim
                self.pages.check(parts)

    def ready(self) -> None:
        """Wait for a warm-up that is under way."""
        if self._warming is not None:
            self._warming.join()
            self._warming = None

    def features(self, conversation: SequenceState, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        """What `Predictor.predict` takes, of tokens [start, end): from what was kept while decoding, else from passes of the models."""
        return self._latents(conversation, start, end), self._target_rows(conversation, start, end)

    @torch.inference_mode()
    def encoding(
        self,
        conversation: SequenceState,
        start: int,
        end: int,
        quality: str | float,
        clock: StageClock | None = None,
        earlier: Sequence[Span] | None = None,
        *,
        next_position: int = 0,
        sources: SpanSources | None = None,
    ) -> Generator[None, None, list[Span]]:
        """Code tokens [start, end), whose KV is in the conversation's pages, in spans that end at multiples of SPAN_TOKENS: whole ones fill pages. In
        pieces, between two of which requests may run, the conversation's own not.

        quality: a name, whose promised divergence is kept where the pack states its curve (`codec.fidelity`), else a fixed step; or a step.
        earlier: the spans before `start`, without a gap, none where `start` is the first coded token. Where token ids repeat, a span may then refer to
        what was coded before (`codec.references`), and decodes only together with all of `earlier`. None: every span decodes alone.
        sources: what spans may refer to instead of `earlier`.
        next_position: the first that will be run behind these tokens, if the code serves no other purpose: layers with a window then code nothing of
        tokens that it does not see.

        Raises InvalidOption when the KV cannot be coded (it overflowed).
        """
        if start >= end:
            return []
        self.ready()
        clock = clock or StageClock(self.core.device)
        latents, target_rows = self.features(conversation, start, end)
        clock.mark("features")
        grid = range(start - start % SPAN_TOKENS, end, SPAN_TOKENS)
        bounds = [(max(a, start), min(a + SPAN_TOKENS, end)) for a in grid]
        try:
            repeats: SpanSources | None = sources if earlier is None else Repeats(self.codec, conversation.token_ids[:end], earlier, bounds)
        except CodecError as error:
            raise InvalidOption(error.what, error.remedy) from error
        spans: list[Span] = []
        count = _CODED_TOKENS.get(self.core.device.type, _CODED_TOKENS["cpu"]) // SPAN_TOKENS
        for some in (bounds[i : i + count] for i in range(0, len(bounds), count)):
            if spans:
                yield
            part = slice(some[0][0] - start, some[-1][1] - start)
            inputs = latents[part], None if target_rows is None else target_rows[part]
            encoder = self._encoder(conversation, inputs, some, next_position)
            try:
                for group in [range(len(some))] if repeats is None else repeats.groups(some):
                    own = [some[n] for n in group]
                    before = None if repeats is None else repeats.before(own, encoder.residuals, group, quality)
                    wanted = None if repeats is None else [repeats.wanted(*bound) for bound in own]
                    components = encoder.quantise(quality, group, before, wanted, clock.mark)
                    if repeats is not None:
                        repeats.add(own, components)
                coded = encoder.write()
            except CodecError as error:
                raise InvalidOption(error.what, error.remedy) from error
            spans += [Span(*some[n], data, encoder.divergence.get(n)) for n, data in enumerate(coded)]
            clock.mark("code")
        return spans

    encode = whole(encoding)

    def _encoder(
        self, conversation: SequenceState, inputs: tuple[Tensor, Tensor | None], bounds: Sequence[tuple[int, int]], next_position: int
    ) -> SpanEncoder:
        """Of spans (start, end) that follow one another, given the features of their tokens."""
        first = bounds[0][0]

        def read(a: int, b: int) -> Tensor:
            return self.core.target.read_kv(conversation.sequence, first + a, first + b, first_layer=self.first_layer)

        def unseen(rows: Tensor, predicted: Tensor, at: int) -> None:
            self._leave_out_unseen(conversation.sequence, rows, predicted, first + at, next_position)

        return SpanEncoder(self._spans, inputs, [b - a for a, b in bounds], read, unseen)

    def _leave_out_unseen(self, sequence: KvSequence, rows: Tensor, predicted: Tensor, first: int, next_position: int) -> None:
        """Let rows [T, D] of a sequence's tokens from `first` on be as predicted, so that no residual is coded, where they lie before the window of a
        layer's query at `next_position`, or are not held."""
        width = self.core.target.config.kv_width
        for number, shape in enumerate(self.core.target.layer_shapes[self.first_layer :]):
            seen = 0 if shape.window is None else max(next_position + 1 - shape.window, sequence.held_from(self.first_layer + number))
            if (unseen := seen - first) > 0:
                own = slice(number * width, (number + 1) * width)
                rows[:unseen, own] = predicted[:unseen, own]

    def run_target(self, conversation: SequenceState, count: int) -> None:
        """Run the target over the first `count` tokens of an empty conversation, in passes as long as the draft's; advances."""
        size = known_pass_tokens(self.core.target, conversation.sequence)
        for at in range(0, count, size):
            run_tokens(self.core, conversation, min(size, count - at))

    def release(self, conversation: SequenceState, before: int) -> None:
        """Drop the features of tokens before `before`: their spans keep their bytes, so nothing asks for them again."""
        state = conversation.draft_state
        if state is not None and state.features is not None:
            state.features.forget(before)  # type: ignore[attr-defined]

    def restore(
        self,
        conversation: SequenceState,
        spans: Sequence[Span],
        clock: StageClock | None = None,
        lent: Lent | None = None,
        *,
        leaves_head: bool = False,
        draft_end: int = 0,
    ) -> None:
        """Fill a conversation's caches, the draft's included, with the tokens that spans cover and those before them; advances. The caches are empty,
        or hold what comes before the spans.

        Entropy decoding runs beside the passes of the draft and of the target's first layers (on a GPU); the target's other layers come out of one
        product a chunk. A predictor that looks at the first layers of a separate draft needs only these (`draft_layers_run`): the draft's cache stays
        empty then, and the draft catches up when it is first asked for drafts. lent: the same spans, read, and what they refer to outside of the text.
        leaves_head: so do a draft head's own layers, where `may_leave_head`. Other texts cannot share its pages then.
        draft_end: tokens of which the draft's first layers alone have run already, for an earlier part of the spans.
        Raises the codec's errors; the conversation must then be closed.
        """
        self.ready()
        clock = clock or StageClock(self.core.device)
        start, end = spans[0].start, spans[-1].end
        drafter, state = self.core.drafter, conversation.draft_state
        side_by_side = (
            self.core.device.type == "cuda" and not clock.waits and not conversation.sequence.windows
        )  # whose pages are taken pass by pass
        if side_by_side and drafter is not None and drafter.exit_layer == 0 and state is not None:
            parts, latents, target_rows = self._passes_side_by_side(conversation, state, spans, clock, lent, draft_end)
        else:
            parts = self._entropy_decoded(spans, lent, beside=not clock.waits)
            clock.mark("entropy")
            run_tokens(self.core, conversation, start - conversation.sequence.length)
            clock.mark("sinks")
            latents = self._draft_pass(state, conversation, start, end, draft_end, leave=leaves_head and self.may_leave_head(end))
            clock.mark("draft")
            target_rows = self._target_rows(conversation, start, end)
            clock.mark("target_layers")
        self._decode(conversation, parts, latents, target_rows, start, end)
        clock.mark("product")
        self.release(conversation, end)
        conversation.sequence.advance(end - conversation.sequence.length)

    def _passes_side_by_side(
        self,
        conversation: SequenceState,
        state: DraftState,
        spans: Sequence[Span],
        clock: StageClock,
        lent: Lent | None,
        draft_end: int,
    ) -> tuple[list[EntropyDecoded], Tensor, Tensor | None]:
        """On a GPU: the draft's pass on the current stream, and on another one, meanwhile, the entropy decoder and the target's passes. What the host
        does for these (reading spans, laying out batches, launching small kernels) then never leaves the device without work."""
        start, end = spans[0].start, spans[-1].end
        current, side = torch.cuda.current_stream(self.core.device), self.pages.side_stream()
        conversation.sequence.ensure(end)  # here, as a pool that grows belongs to the current stream
        side.wait_stream(current)
        latents = self._draft_pass(state, conversation, start, end, draft_end)
        clock.mark("draft")
        with torch.cuda.stream(side):
            parts = self._entropy_decoded(spans, lent, beside=True)
            run_tokens(self.core, conversation, start - conversation.sequence.length)
            target_rows = self._target_rows(conversation, start, end)
        current.wait_stream(side)
        if target_rows is not None:
            target_rows.record_stream(current)
        clock.mark("target_layers")
        return parts, latents, target_rows

    def _entropy_decoded(self, spans: Sequence[Span], lent: Lent | None, *, beside: bool) -> list[EntropyDecoded]:
        if lent is None:
            return self.pages.start([s.data for s in spans], beside=beside)
        return self.pages.begin(lent.codes, lent.lent, beside=beside)

    def decode(self, conversation: SequenceState, spans: Sequence[Span]) -> None:
        """Write the spans' KV into the conversation's pages, which hold what comes before; does not advance. Raises the codec's errors."""
        start, end = spans[0].start, spans[-1].end
        parts = self.pages.start([s.data for s in spans])
        self._decode(conversation, parts, *self.features(conversation, start, end), start, end)

    def _writes_pages(self, pool: KvPool) -> TypeGuard[PagedPool]:
        """Whether products go straight into a pool's pages."""
        return (
            isinstance(pool, PagedPool)
            and pool.kv.dtype == self.pages.dtype
            and (use_triton(pool.kv) or self.pages.writes_compiled(pool.kv))
        )

    def _decode(
        self,
        conversation: SequenceState,
        parts: Sequence[EntropyDecoded],
        latents: Tensor,
        target_rows: Tensor | None,
        start: int,
        end: int,
    ) -> None:
        sequence, target = conversation.sequence, self.core.target
        pool = sequence.pool
        if pool.slides:
            sequence.hold_only_seen(end)
        sequence.ensure(end, start)
        one_rope = target.config.local_rope is None  # the kernel turns the keys of all layers alike
        if one_rope and self._writes_pages(pool):
            pages, offsets = sequence.addresses(start, end)
            slots, angles = pages * pool.page_size + offsets, target.rope.slice(start, end)
            self.pages.write_pages(parts, latents, target_rows, pool.kv, slots, *angles, self.first_layer)
        else:
            for tokens, rows in self.pages.rows(parts, latents, target_rows):
                target.write_kv(sequence, start + tokens.start, rows, first_layer=self.first_layer)
        self.pages.check(parts)

    def _target_rows(self, conversation: SequenceState, start: int, end: int) -> Tensor | None:
        """The target's hidden states [end - start, target taps, E] of tokens [start, end), where the predictor uses them: its first layers run over
        them and write their own KV."""
        spec, target = self.predictor.spec, self.core.target
        if not spec.target_taps:
            return None
        ids = upload(conversation.token_ids[start:end], self.core.device)
        if spec.recomputed_layers == 0:
            return target.embed(ids)[:, None]
        sequence, first = conversation.sequence, start
        in_place = sequence.sees(start)
        if not in_place:  # layers with a window have given back what these tokens attend to
            sequence, first = self.core.pool.new_sequence(), 0
            ids = upload(conversation.token_ids[:end], self.core.device)
        else:
            conversation.invariant = conversation.invariant and self.core.deterministic  # its pages are written anew
        rows, size = [], known_pass_tokens(target, sequence)
        try:
            if not sequence.windows:
                sequence.ensure(end, start)
            for at in range(first, end, size):
                count = min(end - at, size)
                sequence.ensure(at + count, at)
                out = target.forward(
                    ids[at - first : at - first + count],
                    [sequence],
                    [count],
                    starts=[at],
                    taps=spec.target_taps,
                    logits="none",
                    last_layer=spec.recomputed_layers,
                    deterministic=self.core.deterministic,
                )
                sequence.slide(at + count)
                rows.append(torch.stack([out.taps[i] for i in spec.target_taps], 1)[max(0, start - at) :])
        finally:
            if not in_place:
                sequence.free()
        return torch.cat(rows)

    def may_leave_head(self, end: int) -> bool:
        """Whether a restore of a text of `end` tokens may leave a draft head's own layers for later: a GPU's captured steps have no room for many
        waiting states, and its first draft would wait no shorter."""
        return self.core.device.type == "cpu" and end <= _MOST_LEFT

    def draft_end(self, conversation: SequenceState, done: int) -> int | None:
        """Where a restore lets the draft go on; None without one. done: tokens that a separate draft's first layers alone have run."""
        state = conversation.draft_state
        if state is None:
            return None
        return done if self._runs_shallow(state) else min(state.rerun_from, state.length)

    def run_draft(self, conversation: SequenceState, start: int, end: int) -> int:
        """Let the draft, or the first layers that a restore needs of it, run tokens [start, end), start: `draft_end`. Returns how many tokens
        a separate draft's first layers alone have run."""
        state = conversation.draft_state
        assert state is not None, "only a draft has layers to run"
        if self._runs_shallow(state):
            self._run_shallow(state, conversation.token_ids, start, end)
            return end
        prefill_draft(self.core, state, conversation.token_ids[:end])
        return 0

    def _runs_shallow(self, state: DraftState) -> bool:
        """Whether a restore runs the first layers of a separate draft alone."""
        return self._shallow_layers is not None and not state.length

    def _draft_pass(
        self, state: DraftState | None, conversation: SequenceState, start: int, end: int, draft_end: int = 0, *, leave: bool = False
    ) -> Tensor:
        """[end - start, r] for a conversation that is being restored: the draft runs what it lacks of tokens [0, end), or its first layers alone run
        tokens [draft_end, end)."""
        if state is None or not self._runs_shallow(state):
            if self.core.drafter is not None and state is not None:
                prefill_draft(self.core, state, conversation.token_ids[:end], leave=leave)
            return self._latents(conversation, start, end)
        if not self.predictor.spec.taps:
            return self.predictor.reduce(
                torch.zeros(end - start, 0, self.predictor.draft_size, dtype=torch.float32, device=self.core.device)
            )
        found = self._run_shallow(state, conversation.token_ids, draft_end, end).take(start, end)
        assert found is not None, "a pass over all tokens keeps all features"
        return found

    def _run_shallow(self, state: DraftState, token_ids: Sequence[int], start: int, end: int) -> FeatureBuffer:
        """Run a separate draft's first layers over tokens [start, end), behind those that they have run; returns their features."""
        taps, draft = self.predictor.spec.taps, self.core.draft_model
        assert draft is not None and self._shallow_layers is not None
        rows = FeatureBuffer(self.predictor.reduce)
        rows.skip(start)
        ids = upload(token_ids[start:end], self.core.device).clamp_max(draft.config.vocab_size - 1)
        size = pass_tokens(draft)
        state.sequence.ensure(end)
        for at in range(start, end, size):
            count = min(size, end - at)
            own = ids[at - start : at - start + count]
            if self._shallow_layers == 0:
                rows.append(draft.embed(own)[:, None])
                continue
            # pages behind the sequence's length, which the draft's own pass over these tokens writes again
            out = draft.forward(
                own,
                [state.sequence],
                [count],
                starts=[at],
                taps=taps,
                logits="none",
                last_layer=self._shallow_layers,
                deterministic=self.core.deterministic,
            )
            rows.append(torch.stack([out.taps[i] for i in taps], 1))
        return rows

    def _latents(self, conversation: SequenceState, start: int, end: int) -> Tensor:
        """[end - start, r] from the features kept for tokens [start, end); the draft runs the tokens it never saw, and a pass over scratch pages
        supplies features that were never kept."""
        if not self.predictor.spec.taps:
            return self.predictor.reduce(
                torch.zeros(end - start, 0, self.predictor.draft_size, dtype=torch.float32, device=self.core.device)
            )
        state = conversation.draft_state
        if state is None:  # opened by hand, without a request so far
            return self._recomputed(conversation.token_ids[:end], start)
        if state.features is None:
            state.features = FeatureBuffer(self.predictor.reduce)
            state.features.skip(state.length)
        if self.core.draft_model is not None:
            prefill_draft(self.core, state, conversation.token_ids[:end])
        rows = state.features.take(start, end)  # type: ignore[attr-defined]
        return self._recomputed(conversation.token_ids[:end], start) if rows is None else rows

    def _recomputed(self, token_ids: Sequence[int], start: int) -> Tensor:
        """Features of tokens from `start` on, by a pass over all of them on scratch pages."""
        drafter = self.core.drafter
        assert drafter is not None
        sequence = self.core.pool.new_sequence()
        state = drafter.open(sequence)
        try:
            prefill_draft(self.core, state, token_ids)
            rows = state.features.take(start, len(token_ids))  # type: ignore[union-attr]
            assert rows is not None, "a pass over all tokens keeps all features"
            return rows.clone()
        finally:
            drafter.close([state])
            sequence.free()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the decoder's product: the engine's own where the device multiplies bfloat16 fast, else float32."""
    if dtype == torch.bfloat16 and (device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        return torch.bfloat16
    return torch.float32


def pass_tokens(model: Decoder) -> int:
    """Most tokens of one pass over known tokens: a GPU is given as many as its free memory holds the widest layer's activations of."""
    if model.device.type != "cuda":
        return PASS_TOKENS
    if model in _PASS_TOKENS:
        return _PASS_TOKENS[model]
    config = model.config
    free = torch.cuda.mem_get_info(model.device)[0]
    each = 2 * (3 * config.intermediate_size + 8 * config.hidden_size)
    return _PASS_TOKENS.setdefault(model, max(PASS_TOKENS, min(_LARGEST_PASS, free // (2 * each))))


def known_pass_tokens(model: Decoder, sequence: KvSequence) -> int:
    """The same over a sequence, whose windowed layers have room for a step's tokens alone."""
    size = pass_tokens(model)
    return min(size, sequence.pool.step_tokens) if isinstance(sequence.pool, WindowedPool) else size


def session_codec(core: EngineCore, pack: str | Path | None = None, log: Log = print) -> SessionCodec:
    """The engine's one codec, made at first use, with a pack that is fitted now where none is known (`fitted_pack`). Raises InvalidOption when another
    pack is asked for later."""
    codec = known_codec(core, pack, log)
    if codec is None:
        codec = core.session_codec = SessionCodec(core, fitted_pack(core, log))
    return codec


def known_codec(core: EngineCore, pack: str | Path | None = None, log: Log = print) -> SessionCodec | None:
    """The same where its pack is known (`known_pack`), else None."""
    path = None if pack is None else Path(pack).absolute()
    if core.session_codec is None:
        if (found := known_pack(core, path, log)) is None:
            return None
        core.session_codec = SessionCodec(core, found)
        core.session_codec.pack_path = path
    elif path is not None and path != core.session_codec.pack_path:
        raise InvalidOption("this engine already codes its sessions with another pack", "use one engine per pack")
    return core.session_codec


def run_tokens(core: EngineCore, conversation: SequenceState, count: int) -> None:
    """Run the target over the next `count` tokens of a conversation, the KV of which was not stored; advances."""
    if not count:
        return
    start = conversation.sequence.length
    ids = upload(conversation.token_ids[start : start + count], core.device)
    taps, state = core.drafter.target_taps if core.drafter else (), conversation.draft_state
    conversation.sequence.reserve(count)
    if taps and state is not None and state.cache is not conversation.sequence:
        state.cache.ensure(start + count)
    # a few tokens are bound by launches, which a captured pass saves; a batch-invariant session keeps the bits of a prompt's own passes
    model = core.target if core.deterministic else core.runner
    out = model.forward(ids, [conversation.sequence], [count], taps=taps, logits="none", deterministic=core.deterministic)
    if core.drafter is not None and taps and state is not None:
        core.drafter.observe_target([state], [count], out.taps)
    conversation.sequence.advance(count)


def prefill_draft(core: EngineCore, state: DraftState, token_ids: Sequence[int], *, leave: bool = False) -> None:
    """Let the draft run what it lacks of token_ids, keeping features where it keeps any, in passes of `pass_tokens`. An early exit's sequence advances
    with it: the caller then writes the other layers' KV. leave: what no feature needs of a draft head is run when drafts are first asked for.

    Raises InvalidOption when a draft head lies farther behind than layers with a window hold the text.
    """
    drafter = core.drafter
    assert drafter is not None
    drafter.deterministic = core.deterministic  # whatever the last step's requests asked for
    size = known_pass_tokens(core.draft_model or core.target, state.sequence)
    if not state.sequence.windows:
        state.sequence.ensure(len(token_ids), state.rerun_from)
    if state.cache is not state.sequence:
        state.cache.ensure(len(token_ids))
    while (behind := state.rerun_from) < min(
        state.length, len(token_ids)
    ):  # a draft head takes tokens in order, from the first that it lacks
        if not state.sequence.sees(behind):
            raise InvalidOption("the draft lies behind what layers with a window hold of the text", "begin a new session")
        drafter.catch_up([state], [token_ids[behind : min(behind + size, state.length)]])
    while chunk := token_ids[state.length : state.length + size]:
        state.sequence.ensure(state.length + len(chunk), state.rerun_from)
        if leave and isinstance(drafter, EarlyExitDrafter):
            drafter.prefill_first_layers([state], [chunk])
        else:
            drafter.prefill([state], [chunk])
        if drafter.exit_layer:
            state.sequence.advance(len(chunk))
