"""Conversations that leave memory as a coded residual and come back: suspend, resume, go on."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch

from codec.references import Lent
from codec.spec import NUM_SINKS, QUALITIES, QUALITY_DIVERGENCE, KvLayout
from engine.errors import Corrupted, EmptyPrompt, ForeignModel, InvalidOption, SessionBusy, SessionClosed
from engine.inputs import named_path, shown
from engine.runtime.core import EngineCore
from engine.runtime.request import GenerationResult
from engine.runtime.sampling import SamplingParams
from engine.sessions.codec_params import Log, pair_fingerprints
from engine.sessions.file import SessionFile, Span, mean_divergence, session_errors, write_file
from engine.sessions.kv_codec import SessionCodec, coded_end, known_codec, session_codec
from engine.sessions.pieces import at_once
from engine.sessions.rates import SHORTEST, finding, known_rates, measuring
from engine.sessions.restore import SpanRestore
from engine.sessions.stages import StageClock
from engine.text.chat import next_turn
from engine.text.encoding import encode_text
from engine.text.prompts import encode_prompt
from engine.text.prompts import token_ids as prompt_ids

AUTO, TOKENS = "auto", "tokens"
SESSION_QUALITIES = (AUTO, *QUALITIES, TOKENS)
DEFAULT_QUALITY = AUTO
AUTO_QUALITY = "balanced"
"""What `auto` codes at, where coding pays."""

DECODE, RECOMPUTE = "decode", "recompute"
RESTORES = (AUTO, DECODE, RECOMPUTE)
_OTHERS = "others"  # a stage: what runs between two pieces of a restore


@dataclass(frozen=True)
class SuspendReport:
    """What a suspended session takes: tokens whose KV it stands for, the file's bytes, the bf16 bytes of that KV, the file's bits over that KV's
    elements, seconds spent. restore: "decode" or "recompute", what a resume of it will do; reason: why, where that was chosen by what pays.
    estimated_kl: what the coded tokens' error is expected to do to the target's output, nats a position: 0 where nothing was coded, None where the
    codec parameters state no divergence curve. rounding_kl: the part of it that the target's own arithmetic causes, in the dtype of the calibration
    (None where that is not stated): a quality that promises less cannot be kept."""

    tokens: int
    stored_bytes: int
    raw_bytes: int
    bits_per_element: float
    quality: str
    seconds: float
    restore: str
    reason: str | None
    estimated_kl: float | None
    rounding_kl: float | None

    @property
    def reachable(self) -> bool:
        """Whether the quality's promise is above what the target's own rounding does."""
        return self.rounding_kl is None or self.rounding_kl < QUALITY_DIVERGENCE.get(self.quality, math.inf)


@dataclass(frozen=True)
class ResumeReport:
    """What resuming cost: draft_s the passes of the draft (and of the target over the first tokens), decode_s the codec and the pages, total_s
    everything, file included. tokens: restored ones. restore and reason: as in `SuspendReport`, what was done."""

    tokens: int
    draft_s: float
    decode_s: float
    total_s: float
    restore: str
    reason: str | None


def _largest_file(core: EngineCore) -> int:
    """Bytes that no session of this engine's models exceeds: coded KV is smaller than bf16, of which the context holds so much."""
    config = core.target.config
    return (1 << 20) + 2 * 2 * config.num_layers * config.kv_width * core.context


class Session:
    """One conversation that can be suspended to a file and resumed from it. Made by `Engine.session`. Two answers at once are refused (SessionBusy).

    quality: "near-lossless", "balanced", "compact", "tiny": coded spans. "tokens": ids only; the target runs over them again when the session goes
    on, and its KV is then exact. "auto": spans at "balanced" where coding the new tokens and restoring all of them is faster on this machine than
    recomputing (`Rates.coding_pays`), else "tokens". None: as the file was written, "auto" without one. What was coded before keeps its quality.

    restore: what to do with a file's spans: "decode", "recompute" (the target runs over the ids, and the spans are kept for the next file), or "auto":
    a quality that was asked for by name is decoded, and of a session at "auto" or "tokens" whichever is faster here is done.

    Where no codec parameters of the pair are known, they are fitted when tokens are to be coded and not before (`suspend`, `fit_codec`). unfitted: the
    last file holds tokens as ids that would have been coded with them.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        quality: str | None = None,
        pack: str | Path | None = None,
        file: str | Path | None = None,
        restore: str = AUTO,
        log: Log = print,
    ) -> None:
        began = time.perf_counter()
        if quality is not None and quality not in SESSION_QUALITIES:
            raise InvalidOption(f"unknown quality {quality!r}", f"choose one of {', '.join(SESSION_QUALITIES)}")
        if restore not in RESTORES:
            raise InvalidOption(f"unknown way to restore {restore!r}", f"choose one of {', '.join(RESTORES)}")
        if not callable(log):
            raise InvalidOption(f"log cannot be {shown(log)}", "give a function that takes a text")
        stored = None if file is None else SessionFile.load(file, core.context, _largest_file(core), beside=True)
        self._begin(core, stored, file, quality, pack, restore, log, began)

    @classmethod
    def from_bytes(
        cls,
        core: EngineCore,
        data: bytes,
        *,
        quality: str | None = None,
        pack: str | Path | None = None,
        restore: str = AUTO,
        log: Log = print,
    ) -> Session:
        """A session resumed from what `to_bytes` returned; arguments and errors as in `Engine.session`."""
        began, session = time.perf_counter(), cls.__new__(cls)
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise InvalidOption(f"a session cannot be read from {shown(data)}", "give the bytes that to_bytes returned")
        with session_errors("in memory"):
            stored = SessionFile.from_bytes(data, core.context, beside=True)
        session._begin(core, stored, "in memory", quality, pack, restore, log, began)
        return session

    def _begin(
        self,
        core: EngineCore,
        stored: SessionFile | None,
        source: str | Path | None,
        quality: str | None,
        pack: str | Path | None,
        restore: str,
        log: Log,
        began: float,
    ) -> None:
        self.core, self._log = core, log
        self.quality = quality or (DEFAULT_QUALITY if stored is None else AUTO if stored.auto else stored.quality)
        self._pack_path, self._closed = pack, False
        self._turn = threading.Lock()  # held while an answer is made, or while it is coded in turns with others
        self._coding = threading.RLock()  # held while the session is coded and written, which the next answer waits for
        self._coded_now = False
        self._answering: int | None = None  # thread in which an answer is made
        self.spans: list[Span] = []
        self._foreign: SessionFile | None = None  # whose spans other codec parameters wrote: kept until these tokens are coded anew
        self.unfitted = False
        self.suspended: SuspendReport | None = None
        self.resumed: ResumeReport | None = None
        try:
            with core.lock:
                if stored is not None:
                    self._check(stored, source)
                wants_codec = self.quality != TOKENS or (stored is not None and stored.spans)
                if wants_codec and known_codec(core, pack, log) is None and core.tokenizer is None and quality in QUALITIES:
                    session_codec(core, pack, log)  # says what is missing, before anything is generated that it could not code
                self.conversation = core.open_sequence_state()
                self._give_back = weakref.finalize(self, core.close_sequence_state, self.conversation)
                self._give_back.atexit = False
            if stored is not None:
                try:
                    core.in_turns(self._restore(stored, source, restore, began))
                except BaseException:
                    self.close()
                    raise
        except Exception:
            if stored is not None:  # whose spans do not belong together says so, whatever else was found
                with session_errors(source):
                    stored.confirm()
            raise

    # --- talking --------------------------------------------------------------------------------------------------------

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far."""
        return self.conversation.token_ids

    def generate(
        self, text: str | Sequence[int] = "", params: SamplingParams | None = None, on_text: Callable[[str], None] | None = None
    ) -> GenerationResult:
        """Append raw text (or token ids) and continue it. Without text the conversation just goes on. Raises as `EngineCore.run`."""
        with self._turns():
            tokenizer = self.core.tokenizer
            if isinstance(text, str):
                if text and tokenizer is None:
                    raise InvalidOption("a text prompt needs a tokenizer", "give token ids, or an engine with a tokenizer")
                first = not self.token_ids
                with self.core.lock:  # tokenizers refuse a second thread
                    ids = encode_text(tokenizer, text, add_special_tokens=first, most=self.core.context) if text else []
            else:
                ids = prompt_ids(text)
            return self._run(ids, params, on_text)

    def chat(
        self,
        message: str,
        params: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
        *,
        system: str | None = None,
        prefill: str | None = None,
    ) -> GenerationResult:
        """Say something as the user, through the model's chat template, and return the answer.

        system: the system message, at the first turn only. prefill: what the answer begins with; the result holds what comes after it.

        Raises as `EngineCore.run`, EmptyPrompt, and InvalidOption for a system message in a conversation that has begun.
        """
        if not isinstance(message, str):
            raise InvalidOption(f"a message is of type {type(message).__name__}", "give a text")
        if not message.strip():
            raise EmptyPrompt("the message is empty", "say something")
        if prefill is not None and not isinstance(prefill, str):
            raise InvalidOption(f"prefill is of type {type(prefill).__name__}", "give a text")
        with self._turns():
            with self.core.lock:  # tokenizers refuse a second thread
                ids = self._turn_ids(message, system, prefill)
            return self._run(ids, params, on_text)

    def _turn_ids(self, message: str, system: str | None, prefill: str | None) -> list[int]:
        tokenizer, context = self.core.tokenizer, self.core.context
        if self.token_ids:
            if system is not None:
                raise InvalidOption("the conversation has begun: its system message cannot be set", "start a new session")
            ids = next_turn(tokenizer, message, self.token_ids)
        else:
            opening = [] if system is None else [{"role": "system", "content": system}]
            ids = encode_prompt(tokenizer, [*opening, {"role": "user", "content": message}], context)
        return [*ids, *encode_text(tokenizer, prefill, add_special_tokens=False, most=context)] if prefill else ids

    @contextmanager
    def _turns(self) -> Iterator[None]:
        """One answer at a time. Raises SessionBusy, SessionClosed."""
        free = False
        try:
            with self._no_coding():
                free = self._turn.acquire(blocking=False)
            if not free:
                raise SessionBusy("the session is answering already", "wait for the answer's end, or use a session of its own")
            self._check_open()
            self._answering = threading.get_ident()
            yield
        finally:
            if free:
                self._answering = None
                self._turn.release()

    @contextmanager
    def _no_coding(self) -> Iterator[None]:
        """Held while nobody codes the session; another thread's suspend is waited for. Raises SessionBusy where that would never end: within the
        suspend (`log`, a signal's handler), and in a thread that holds the engine's lock, which the suspend needs."""
        if self._coding.acquire(blocking=not self.core.lock.mine):
            try:
                if not self._coded_now:
                    yield
                    return
            finally:
                self._coding.release()
        raise SessionBusy("the session is being suspended", "go on when that has ended, and do not hold the engine's lock meanwhile")

    def _run(self, ids: Sequence[int], params: SamplingParams | None, on_text: Callable[[str], None] | None) -> GenerationResult:
        """`EngineCore.run`. Broken off anywhere (Ctrl-C, a failing on_text), the session keeps what was generated and can go on."""
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidOption(f"sampling parameters are {shown(params)}", "give SamplingParams(...)")
        if on_text is not None and not callable(on_text):
            raise InvalidOption(f"on_text cannot be {shown(on_text)}", "give a function that takes a text")
        try:
            return self.core.run(self.conversation, ids, params, on_text)
        except BaseException:
            state = self.conversation.draft_state
            if state is not None and state.features is not None:
                # cache and features grow one after the other; an interrupt may fall between the two
                state.features.truncate(min(state.features.length, state.length))
                state.features.skip(state.length - state.features.length)
            raise

    # --- leaving and coming back ----------------------------------------------------------------------------------------

    def suspend(self, path: str | Path, *, fit: bool = True) -> SuspendReport:
        """Write the session to `path`; the session itself stays usable. Spans coded before keep their bytes, only new tokens are coded.

        fit: fit codec parameters first where they are needed and none are known (`fit_codec`). Without it new tokens are kept as ids then, beside what
        was stored.

        Raises:
            EmptyPrompt: there is nothing to keep. InvalidOption: the KV overflowed and cannot be coded, or `path` is none.
            SessionBusy: asked for within a suspend of the session or a step of its answer, by `log` or a signal's handler. SessionClosed.
            DiskFull, CacheNotWritable: the file could not be written; an earlier one is untouched.
        """
        began, path = time.perf_counter(), named_path(path, "a session file")
        with self._alone():  # the write, too: of two suspends to one path the later one stays
            file, reason, held = self._coded(fit)
            data = file.to_bytes()
            write_file(path, data)
            # of tokens that wait to be run again, the file stands for the KV too; the last token never has any
            tokens = max(held, len(file.token_ids) - 1)
            elements = self._layout.full_dim * tokens
            bits = 8 * len(data) / elements if elements else 0.0
            restore = DECODE if self.spans else RECOMPUTE
            seconds = time.perf_counter() - began
            loss = (mean_divergence(file.spans), self._rounding_kl()) if self.spans else (0.0, None)
            self.suspended = SuspendReport(tokens, len(data), 2 * elements, bits, file.quality, seconds, restore, reason, *loss)
            return self.suspended

    def fit_codec(self) -> None:
        """Fit the codec parameters of the session's pair, where none are known: a minute of one thread for a target of 135 M weights, which `log` is
        told of. Raises InvalidOption without a tokenizer, PackMismatch, SessionClosed."""
        self._check_open()
        with self.core.lock:
            session_codec(self.core, self._pack_path, self._log)

    def _rounding_kl(self) -> float | None:
        """As the codec parameters state it."""
        curve = session_codec(self.core, self._pack_path, self._log).curve
        return curve.rounding if curve is not None else None

    def to_bytes(self, *, fit: bool = True) -> bytes:
        """What `suspend` writes, kept by the caller instead. Raises EmptyPrompt, InvalidOption, SessionBusy, SessionClosed."""
        with self._alone():
            return self._coded(fit)[0].to_bytes()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The session is coded meanwhile. Waits and raises as `_no_coding`."""
        with self._no_coding():
            self._coded_now = True
            try:
                yield
            finally:
                self._coded_now = False

    def _coded(self, fit: bool) -> tuple[SessionFile, str | None, int]:
        """What `_code` returns, coded in pieces between which requests may run, unless an answer of the session is under way."""
        if self._turn.acquire(blocking=False):
            try:
                return self.core.in_turns(self._code(fit))
            finally:
                self._turn.release()
        if self._answering == threading.get_ident() and self.core.lock.mine:  # caches and ids grow one after the other
            raise SessionBusy("the session is in the middle of a step", "suspend it in on_text, or when the answer has ended")
        with self.core.lock:
            return at_once(self._code(fit))

    def _code(self, fit: bool) -> Generator[None, None, tuple[SessionFile, str | None, int]]:
        """The session as a file's contents, its new tokens coded; why they are coded or not, where that was chosen; tokens whose KV it holds. Spans are
        the session's at the end alone."""
        self._check_open()
        if not self.token_ids:
            raise EmptyPrompt("the session is empty", "generate something before suspending it")
        held = self.conversation.sequence.length
        prints = pair_fingerprints(self.core)
        quality, reason = self.quality, None
        self.spans = [s for s in self.spans if s.end <= len(self.token_ids)]
        if not self.spans and quality != TOKENS:  # what a store gave back keeps its code too
            portable = takewhile(lambda s: s.end <= held and not s.borrows, self.conversation.restored_spans)
            self.spans = list(portable)  # behind a span that borrows all is coded anew, from what was restored
        start = self.spans[-1].end if self.spans else min(NUM_SINKS, held)
        end = coded_end(held, quality)
        if not self.conversation.sequence.sees(max(0, end - 1)):  # taken back so far that layers with a window hold the end alone
            end = held
        # fewer tokens than that are neither worth a measurement nor codec parameters
        wanted = held >= SHORTEST if quality == AUTO else quality != TOKENS and end > start
        codec = self._codec(fit and wanted)
        self.unfitted = wanted and codec is None
        if quality == AUTO:
            rates = None if codec is None else (yield from finding(codec, held, self._log))
            new = held - (self.spans[-1].end if self.spans else 0)
            quality = AUTO_QUALITY if rates is not None and rates.coding_pays(new, held) else TOKENS
            if rates is not None:
                reason = rates.coding_reason(new, held)
            elif held < SHORTEST:
                reason = f"{held} tokens are few enough to be recomputed"
            elif codec is not None:
                reason = "the pool has no room to measure in what restoring takes"
        if self.unfitted:
            reason = "kept as ids: there are no codec parameters for this pair yet"
        elif quality != TOKENS and codec is not None:
            # the last token may run again
            self.spans += yield from codec.encoding(self.conversation, start, end, quality, earlier=list(self.spans), next_position=end - 1)
            if not self.spans:
                reason = f"all {held} tokens are among the last, which {quality} keeps as ids"
        if not self.spans:
            return self._uncoded(held, quality, prints), reason, held
        assert codec is not None, "spans are of the engine's codec"
        self._foreign = None
        start = self.spans[-1].end  # what comes behind is kept as tokens
        if quality != TOKENS:
            codec.release(self.conversation, start)
        prints["pack"] = codec.pack.digest
        return SessionFile(list(self.token_ids), start, quality, prints, list(self.spans), self.quality == AUTO), reason, held

    def _codec(self, fit: bool) -> SessionCodec | None:
        """The engine's codec, fitted where `fit` says so; None where nothing was or can be coded."""
        if self.quality == TOKENS and not self.spans:
            return None
        if fit and self.core.tokenizer is not None:
            return session_codec(self.core, self._pack_path, self._log)
        return known_codec(self.core, self._pack_path, lambda _: None)  # a damaged pack was told of when the session was opened

    def _uncoded(self, held: int, quality: str, prints: dict[str, str]) -> SessionFile:
        """The session's ids, with what other codec parameters coded of them, which those decode still."""
        foreign = self._foreign
        if foreign is None or foreign.num_cached > len(self.token_ids):
            return SessionFile(list(self.token_ids), held, quality, prints, [], self.quality == AUTO)
        quality = foreign.quality if self.quality == AUTO else quality
        return SessionFile(list(self.token_ids), foreign.num_cached, quality, foreign.fingerprints, foreign.spans, self.quality == AUTO)

    def close(self) -> None:
        """Give the session's pages back; afterwards it refuses to go on or to be suspended. A session that is dropped is closed.

        Raises SessionBusy while an answer is made.
        """
        with self._no_coding():
            if self._turn.locked():
                raise SessionBusy("the session is answering", "close it when the answer has ended")
            self._closed = True
        self._give_back()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("the session is closed", "open it again from its file, or start a new one")

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
            "hot_bytes": sequence.pool.bytes_of(sequence),
            "stored_bytes": report.stored_bytes if report else None,
            "bits_per_element": report.bits_per_element if report else None,
            "quality": report.quality if report else None,
            "estimated_kl": report.estimated_kl if report else None,
            "rounding_kl": report.rounding_kl if report else None,
            "restore": report.restore if report else self.resumed.restore if self.resumed else None,
        }

    @property
    def _layout(self) -> KvLayout:
        config = self.core.target.config
        return KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, self.core.exit_layer)

    def _check(self, stored: SessionFile, path: str | Path | None) -> None:
        """Refuse a file of other models before a pack is looked for: fitting one would take minutes."""
        if stored.quality not in SESSION_QUALITIES or stored.quality == AUTO:
            raise Corrupted(
                f"session file {path} names an unknown quality {stored.quality!r}", "update the program, or restore the file from a copy"
            )
        for role, digest in pair_fingerprints(self.core).items():
            if stored.fingerprints.get(role) != digest and role != "draft":  # what drafts decides nothing but how spans come back
                raise ForeignModel(
                    f"session file {path} was written with another {role}", "resume it with the models and pack it was made with"
                )
        if max(stored.token_ids, default=0) >= self.core.target.config.vocab_size:
            raise Corrupted(f"session file {path} holds tokens the model cannot have", "restore it from a copy, or start a new session")

    def _restore(self, stored: SessionFile, source: str | Path | None, how: str, began: float) -> Generator[None, None, None]:
        """Fill the session from its file, in pieces between which requests may run (`EngineCore.in_turns`)."""
        core, conversation = self.core, self.conversation
        conversation.token_ids[:] = stored.token_ids
        draft_s = decode_s = 0.0
        num_cached, reason = 0, None
        if stored.spans:
            codec = known_codec(core, self._pack_path, self._log)
            foreign = None
            if stored.fingerprints.get("draft") != pair_fingerprints(core)["draft"]:
                foreign = "draft"
            elif codec is None or stored.fingerprints.get("pack") != codec.pack.digest:
                foreign = "pack"
            if foreign and (how == DECODE or self._pack_path is not None):
                raise ForeignModel(
                    f"session file {source} was written with another {foreign}", "resume it with the models and pack it was made with"
                )
            if codec is None or foreign:
                reason = self._keep_foreign(stored, source, foreign)
            else:
                # links are of the file's chain; what is here was checked, and is bound anew when it is written
                self.spans = [replace(span, link=None) for span in stored.spans]
                if how == AUTO and self.quality in QUALITIES:  # asked for by name, now or when the file was written
                    how = DECODE
                if how == AUTO:
                    if known_rates(codec) is None and stored.num_cached >= SHORTEST:
                        yield from measuring(codec, self._log)
                    rates = codec.rates
                    how = DECODE if rates is None or rates.pays(stored.num_cached) else RECOMPUTE
                    reason = None if rates is None else rates.reason(stored.num_cached)
                if how == DECODE:
                    num_cached = stored.num_cached
                    clock = StageClock(core.device)
                    with session_errors(source):
                        yield from self._pieces(codec, stored.spans, clock)
                    narrowest = min((shape.window for shape in core.target.layer_shapes if shape.window is not None), default=num_cached)
                    conversation.sequence.hold_only_seen(num_cached)
                    conversation.windows_from = max(0, num_cached - narrowest)
                    stages = clock.seconds()
                    del stages[_OTHERS]
                    draft_s = stages.get("sinks", 0.0) + stages["draft"]
                    decode_s = sum(stages.values()) - draft_s
        with session_errors(source):
            stored.confirm()
        done = DECODE if num_cached else RECOMPUTE
        self.resumed = ResumeReport(num_cached, draft_s, decode_s, time.perf_counter() - began, done, reason)

    def _keep_foreign(self, stored: SessionFile, source: str | Path | None, role: str | None) -> str:
        """Of spans that the engine's codec does not decode: a pack fitted on the spot is kept in the cache alone, and where that is gone, or drafts
        come from elsewhere, the ids still tell everything. Returns why."""
        self._foreign = replace(stored, spans=[replace(span, link=None) for span in stored.spans])
        reason = "it was written with another draft" if role == "draft" else "the codec parameters it was written with are gone"
        self._log(f"{reason}: the {len(stored.token_ids)} tokens of {shown(str(source), 200)} are recomputed from their ids, exactly")
        return reason

    def _pieces(self, codec: SessionCodec, spans: Sequence[Span], clock: StageClock) -> Generator[None, None, None]:
        """Restore them, piece by piece so that requests may run in between. Where none does, at once if that is faster: on a GPU, and where spans refer
        to earlier ones, which each piece decodes for itself."""
        core, end, tokens, lent = self.core, spans[-1].end, self.core.scheduler.restore_tokens, None
        if core.device.type == "cuda" and core.scheduler.idle:
            tokens = end
        if end > tokens:
            lent = Lent(codec.codec.read([span.data for span in spans]), [])
            if core.scheduler.idle and any(code.references for code in lent.codes):
                tokens = end
        restore = SpanRestore(codec, self.conversation, spans, lent, leaves_head=True)
        while restore.left:
            clock.mark(_OTHERS)
            with torch.inference_mode():
                restore.piece(tokens, clock)
            yield
