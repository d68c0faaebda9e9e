"""Batched greedy answers on conversations; suspending and resuming them through the bytes of a session file, through a file, or in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from codec.spec import NUM_SINKS, QUALITIES, divergence_of
from engine.errors import InvalidOption
from engine.kv.pool import KvSequence
from engine.model.decoder import forward_reserved
from engine.runtime.core import EngineCore
from engine.runtime.request import SequenceState
from engine.sessions.codec_params import pair_fingerprints
from engine.sessions.file import SessionFile, Span
from engine.sessions.kv_codec import PASS_TOKENS, coded_end, session_codec

CHUNK_TOKENS = 1024
_TOGETHER = 8  # sequences of a prefill
PREDICTION = "prediction"
_PREDICTION_STEP = 4096.0  # every residual rounds to zero: what is left is the prediction


def step_name(quality: str) -> str | float:
    """What the codec takes for a quality's name: the name (or "klX", a promise of X), X of "stepX", or a step that keeps no residual for "prediction".
    Raises InvalidOption."""
    if divergence_of(quality) is not None:
        return quality
    if quality == PREDICTION:
        return _PREDICTION_STEP
    try:
        if quality.startswith("step") and float(quality[4:]) > 0:
            return float(quality[4:])
    except ValueError:
        pass
    raise InvalidOption(
        f"unknown quality {quality!r}", f"choose from {', '.join(QUALITIES)}, {PREDICTION}, or klX or stepX with a number X"
    )


@torch.inference_mode()
def run_tokens(core: EngineCore, conversations: Sequence[SequenceState], pieces: Sequence[list[int]], logits: str) -> torch.Tensor | None:
    """Run the target over pieces[b], which follow what conversation b's cache holds; logits as in `Decoder.forward`. Advances."""
    states = [c.draft_state for c in conversations if c.draft_state is not None]
    taps = core.drafter.target_taps if core.drafter and states else ()
    flat = torch.tensor([t for piece in pieces for t in piece], device=core.device)
    counts = [len(piece) for piece in pieces]
    for state, conversation, count in zip(states, conversations, counts, strict=False):
        if taps and state.cache is not conversation.sequence:
            state.cache.ensure(conversation.sequence.length + count)  # a draft head looks at what the target runs
    out = forward_reserved(
        core.target,
        flat,
        [c.sequence for c in conversations],
        counts,
        taps=taps,
        logits=logits,
        deterministic=core.deterministic,  # type: ignore[arg-type]
    )
    if core.drafter is not None and taps:
        core.drafter.observe_target(states, counts, out.taps)
    for conversation, count in zip(conversations, counts, strict=True):
        conversation.sequence.advance(count)
    return out.logits


@torch.inference_mode()
def open_with(core: EngineCore, token_ids: Sequence[Sequence[int]]) -> list[SequenceState]:
    """Conversations whose caches hold all of each of token_ids, and whose draft has run them too."""
    conversations = [core.open_sequence_state() for _ in token_ids]
    for conversation, ids in zip(conversations, token_ids, strict=True):
        conversation.token_ids[:] = ids
    for first in range(0, len(conversations), _TOGETHER):
        some = conversations[first : first + _TOGETHER]
        for start in range(0, max(len(c.token_ids) for c in some), CHUNK_TOKENS):
            going = [c for c in some if len(c.token_ids) > start]
            run_tokens(core, going, [c.token_ids[start : start + CHUNK_TOKENS] for c in going], "none")
        run_draft(core, some)
    return conversations


@torch.inference_mode()
def run_draft(core: EngineCore, conversations: Sequence[SequenceState]) -> None:
    """Let a separate draft run what it lacks of the conversations' caches, all of them together: its features are what is coded against."""
    drafter = core.drafter
    if drafter is None or core.draft_model is None:
        return
    pairs = [(c, c.draft_state) for c in conversations if c.draft_state is not None]
    for conversation, state in pairs:
        state.sequence.ensure(conversation.sequence.length)
    while behind := [(c, state) for c, state in pairs if state.length < c.sequence.length]:
        drafter.prefill(
            [state for _, state in behind],
            [c.token_ids[state.length : min(state.length + PASS_TOKENS, c.sequence.length)] for c, state in behind],
        )


def ask(
    core: EngineCore, conversations: Sequence[SequenceState], questions: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
) -> list[list[int]]:
    """Append each question's tokens and answer all greedily as one batch; returns the answers without their end tokens.

    The conversations keep question and answer (with its end token); as everywhere, the last token's KV is not in the cache yet.
    """
    for conversation, question in zip(conversations, questions, strict=True):
        conversation.token_ids.extend(question)
    answers: list[list[int]] = [[] for _ in conversations]
    active = list(range(len(conversations)))
    for step in range(1, max(max_new_tokens, default=0) + 1):
        chosen = [conversations[b] for b in active]
        logits = run_tokens(core, chosen, [c.token_ids[c.sequence.length :] for c in chosen], "last")
        assert logits is not None
        going = []
        for b, token in zip(active, logits.argmax(-1).tolist(), strict=True):
            conversations[b].token_ids.append(token)
            if token not in core.eos_token_ids:
                answers[b].append(token)
                if step < max_new_tokens[b]:
                    going.append(b)
        active = going
        if not active:
            break
    return answers


def ask_aside(
    core: EngineCore, conversations: Sequence[SequenceState], questions: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
) -> list[list[int]]:
    """`ask` without a trace: every question gets a cache of its own that shares the conversation's full pages (one may be asked many times)."""
    asides = []
    try:
        for conversation in conversations:
            asides.append(SequenceState(list(conversation.token_ids), copied(conversation.sequence, shared=True)))
        return ask(core, asides, questions, max_new_tokens)
    finally:
        for aside in asides:
            aside.sequence.free()


@torch.inference_mode()
def copied(sequence: KvSequence, shared: bool) -> KvSequence:
    """The same KV in a sequence of its own. shared: in the same pages, until either writes into them."""
    new = sequence.fork()
    if not shared:
        new.ensure(new.length, 0)
    return new


class Suspender:
    """Writes an engine's conversations as session files' bytes and opens them again: `Session.suspend` and resume without the disk."""

    def __init__(self, core: EngineCore, pack: str | None, log: Callable[[str], None] = print) -> None:
        self.core, self.codec = core, session_codec(core, pack, log)
        self._prints = pair_fingerprints(core) | {"pack": self.codec.pack.digest}

    @torch.inference_mode()
    def suspend(self, conversation: SequenceState, quality: str, spans: Sequence[Span] = ()) -> bytes:
        """The file's bytes; `spans` coded before keep theirs."""
        end = coded_end(conversation.sequence.length, quality)
        return self._file(conversation, quality, [*spans, *self._coded(conversation, quality, spans, end)])

    def through_file(self, conversation: SequenceState, quality: str, spans: Sequence[Span] = ()) -> tuple[SequenceState, list[Span], int]:
        """Suspended into a file on disk and resumed from it: a new conversation, its spans, the file's bytes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session"
            path.write_bytes(self.suspend(conversation, quality, spans))
            data = path.read_bytes()
        return *self.resume(data), len(data)

    @torch.inference_mode()
    def in_place(self, conversation: SequenceState, quality: str, spans: Sequence[Span] = ()) -> list[Span]:
        """The conversation's KV becomes what a resume would give, without the draft's second pass: tokens that no span covers are coded, and decoded
        over themselves. Returns all spans."""
        every = [*spans, *self._coded(conversation, quality, spans, conversation.sequence.length)]
        if len(every) > len(spans):
            self.codec.decode(conversation, every)  # new ones may refer to earlier ones
        return every

    def _coded(self, conversation: SequenceState, quality: str, spans: Sequence[Span], end: int) -> list[Span]:
        """Codes of the tokens before `end` that no span covers, as `Session.suspend` makes them."""
        held = conversation.sequence.length
        start = spans[-1].end if spans else min(NUM_SINKS, end)
        return self.codec.encode(conversation, start, end, step_name(quality), earlier=spans, next_position=min(end, held - 1))

    def file_bytes(self, conversation: SequenceState, quality: str, spans: Sequence[Span]) -> int:
        """Bytes of the session file that a conversation would be suspended into."""
        return len(self._file(conversation, quality, spans))

    def _file(self, conversation: SequenceState, quality: str, spans: Sequence[Span]) -> bytes:
        end = spans[-1].end if spans else conversation.sequence.length
        return SessionFile(list(conversation.token_ids), end, quality, self._prints, list(spans)).to_bytes()

    @torch.inference_mode()
    def resume(self, data: bytes) -> tuple[SequenceState, list[Span]]:
        """A new conversation from a file's bytes alone, and its spans."""
        stored = SessionFile.from_bytes(data)
        conversation = self.core.open_sequence_state()
        conversation.token_ids[:] = stored.token_ids
        if stored.spans:
            self.codec.restore(conversation, stored.spans)
        return conversation, stored.spans
