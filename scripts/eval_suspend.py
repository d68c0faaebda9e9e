"""Batched greedy answers on conversations, and suspending and resuming them in memory, through the bytes of a session file."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from codec.spec import NUM_SINKS, QUALITIES
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.packs import pair_fingerprints
from engine.request import Conversation
from engine.session_codec import chunk_ends, prefill_draft, run_sinks, session_codec
from engine.session_file import SessionFile, Span

CHUNK_TOKENS = 1024
PREDICTION = "prediction"
_PREDICTION_STEP = 1e6  # every residual rounds to zero: what is left is the prediction


def step_name(quality: str) -> str | float:
    """What the codec takes for a quality's name: the name, X of "stepX", or a step that keeps no residual for "prediction". Raises InvalidOption."""
    if quality in QUALITIES:
        return quality
    if quality == PREDICTION:
        return _PREDICTION_STEP
    try:
        if quality.startswith("step") and float(quality[4:]) > 0:
            return float(quality[4:])
    except ValueError:
        pass
    raise InvalidOption(f"unknown quality {quality!r}", f"choose from {', '.join(QUALITIES)}, {PREDICTION}, or stepX with a number X")


@torch.inference_mode()
def run_tokens(engine: Engine, conversations: Sequence[Conversation], pieces: Sequence[list[int]], logits: str) -> torch.Tensor | None:
    """Run the target over pieces[b], which follow what conversation b's cache holds; logits as in `Decoder.forward`. Advances."""
    taps = engine.drafter.target_taps if engine.drafter else ()
    flat = torch.tensor([t for piece in pieces for t in piece], device=engine.device)
    counts = [len(piece) for piece in pieces]
    out = engine.target.forward(
        flat, [c.sequence for c in conversations], counts, taps=taps, logits=logits, deterministic=engine.deterministic  # type: ignore[arg-type]
    )
    if engine.drafter is not None and taps:
        engine.drafter.observe_target([c.draft_state for c in conversations if c.draft_state is not None], counts, out.taps)
    for conversation, count in zip(conversations, counts, strict=True):
        conversation.sequence.advance(count)
    return out.logits


def open_with(engine: Engine, token_ids: Sequence[int]) -> Conversation:
    """A conversation whose cache holds all of token_ids."""
    conversation = engine.open_conversation()
    conversation.token_ids[:] = token_ids
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        run_tokens(engine, [conversation], [list(token_ids[start : start + CHUNK_TOKENS])], "none")
    return conversation


def ask(engine: Engine, conversations: Sequence[Conversation], questions: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Append each question's tokens and answer all greedily as one batch; returns the answers without their end tokens.

    The conversations keep question and answer (with its end token); as everywhere, the last token's KV is not in the cache yet.
    """
    for conversation, question in zip(conversations, questions, strict=True):
        conversation.token_ids.extend(question)
    answers: list[list[int]] = [[] for _ in conversations]
    active = list(range(len(conversations)))
    for _ in range(max_new_tokens):
        chosen = [conversations[b] for b in active]
        logits = run_tokens(engine, chosen, [c.token_ids[c.sequence.length :] for c in chosen], "last")
        assert logits is not None
        going = []
        for b, token in zip(active, logits.argmax(-1).tolist(), strict=True):
            conversations[b].token_ids.append(token)
            if token not in engine.eos_token_ids:
                answers[b].append(token)
                going.append(b)
        active = going
        if not active:
            break
    return answers


def roll_back(conversation: Conversation, length: int) -> None:
    """Forget everything from token `length` on."""
    conversation.sequence.truncate(length)
    del conversation.token_ids[length:]
    state = conversation.draft_state
    if state is not None and state.sequence is not conversation.sequence and state.length > length:
        state.sequence.truncate(length)
    if state is not None and state.features is not None and state.features.length > length:
        state.features.truncate(length)


class Suspender:
    """Writes an engine's conversations as session files' bytes and opens them again: `Session.suspend` and resume without the disk."""

    def __init__(self, engine: Engine, pack: str | None, log: Callable[[str], None] = print) -> None:
        self.engine, self.codec = engine, session_codec(engine, pack, log)
        self._prints = pair_fingerprints(engine) | {"pack": self.codec.pack.digest}

    def suspend(self, conversation: Conversation, quality: str, spans: Sequence[Span] = ()) -> bytes:
        """The file's bytes; `spans` coded before keep theirs."""
        num_cached = conversation.sequence.length
        start = spans[-1].end if spans else min(NUM_SINKS, num_cached)
        new = self.codec.encode(conversation, start, num_cached, step_name(quality))  # type: ignore[arg-type]
        return SessionFile(list(conversation.token_ids), num_cached, quality, self._prints, [*spans, *new]).to_bytes()

    def resume(self, data: bytes) -> tuple[Conversation, list[Span]]:
        """A new conversation from a file's bytes alone, and its spans."""
        stored = SessionFile.from_bytes(data)
        conversation = self.engine.open_conversation()
        conversation.token_ids[:] = stored.token_ids
        if stored.spans:
            run_sinks(self.engine, conversation, NUM_SINKS)
            if self.engine.drafter is not None and conversation.draft_state is not None:
                prefill_draft(self.engine, conversation.draft_state, stored.token_ids[: stored.num_cached], chunk_ends(stored.spans))
            self.codec.decode(conversation, stored.spans)
            conversation.sequence.advance(stored.num_cached - conversation.sequence.length)
        return conversation, stored.spans
