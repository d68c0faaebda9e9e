"""A request's whole state while it runs, what it leaves behind, and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, fields
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch

from draft.policy import MAX_AUTO_LENGTH, RequestDrafting
from draft.protocols import DraftState
from engine.errors import ForetoldError
from engine.kv.pool import KvPool, KvSequence
from engine.kv.shared_prefixes import OwnPage
from engine.runtime.logprobs import TokenLogprobs
from engine.runtime.metrics import SpeculationMetrics
from engine.runtime.sampling import Constraint, SamplingParams, TokenHistory

_SPARE_IDS = 256  # places at least behind a row of ids that was made anew

FinishReason = Literal["stop", "length", "eos"]


class TextSink(Protocol):
    """The text of a request's growing tokens; `engine.text.detokenizer.TextStream`."""

    @property
    def text(self) -> str: ...  # what was released so far

    def push(self, tokens: Sequence[int]) -> int | None: ...  # how many of them completed the first stop string; None: no stop string

    def take(self) -> str: ...  # released since the last call

    def finish(self) -> None: ...  # no token follows: release all


class TextSource(Protocol):
    """From token ids to text; `engine.text.decoder.TextDecoder`."""

    @property
    def tokenizer(self) -> Any | None: ...  # transformers' or one like it; None where only token ids are given

    def constraint(self, schema: str, eos_token_ids: frozenset[int]) -> Constraint: ...  # of one text; `engine.text.constraint`

    def stop_token_ids(self, stop: Sequence[str]) -> tuple[int, ...]: ...  # of the stop strings that are special tokens

    def stream(self, context: Sequence[int], stop: Sequence[str]) -> TextSink: ...  # context: the tokens before


class PrefixRestore(Protocol):
    """A stored prefix that comes back into a request's caches piece by piece; between two pieces they hold a beginning of its text.
    `engine.store.restoring`."""

    @property
    def end(self) -> int: ...  # tokens of the text that will be there

    def piece(self, tokens: int) -> bool:
        """Bring back up to so many more tokens, in whole codes; whether any are left. Where it fails, none are, and the caches may be empty."""
        ...

    def close(self) -> None: ...  # no further piece is wanted; nothing happens behind the last


@dataclass
class SequenceState:
    """Tokens and caches that outlive a request; may also be filled from outside (a session file).

    Invariant between requests: `sequence.length <= len(token_ids)`, and `draft_state.length <= len(token_ids)`; both caches hold the KV
    of a prefix of token_ids. After generating, `sequence.length == len(token_ids) - 1`: no model has run the last token yet. Tokens
    beyond a cache are run when the conversation goes on.

    num_computed: tokens whose KV this engine's steps computed, or shared; more in the
    cache were written from outside. num_chunked: of the first ones, those that whole chunks of a prompt, each alone in its pass, wrote.
    invariant: batch-invariant steps wrote all of the cache. foreign: some of it was written from outside.
    windows_from: first token of which layers with a window hold what was computed; before it they may hold anything, which they never read.
    """

    token_ids: list[int]
    sequence: KvSequence
    draft_state: DraftState | None = None
    restored_spans: list[Any] = field(
        default_factory=list
    )  # the codes that the caches' beginning was restored from: they are not coded again
    num_computed: int = 0
    num_chunked: int = 0
    invariant: bool = True
    foreign: bool = False
    windows_from: int = 0

    def emptied(self) -> None:
        """Its caches hold nothing: what is computed from now on is its own."""
        self.restored_spans = []
        self.num_computed, self.num_chunked, self.windows_from = 0, 0, 0
        self.invariant, self.foreign = True, False


@dataclass(frozen=True)
class GenerationResult:
    """What a request returns.

    text: up to the stop string or end token, exclusive. token_ids: the new tokens; the last one is the stop or end token, or the one
    that completed the stop string. finish_reason: "stop" (stop string or stop token), "eos" (end-of-sequence token) or "length".
    prompt_tokens: tokens before the new ones; reused_tokens: how many of them were in the cache already, or shared. ttft_s: seconds
    from submission to the first token. decode_s: from there to the last; tokens_per_s: the tokens after the first, over decode_s (0 for one token).
    logprobs: one a new token, where they were asked for.
    restored_tokens, restore_s: those of the reused ones that came from a store before the prompt ran, and the seconds of ttft_s that took.
    seed: the request's own, which names this text, or the key of the random numbers it drew without one. memory: target_bytes, draft_bytes, pool_bytes.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    ttft_s: float
    decode_s: float
    tokens_per_s: float
    seed: int
    speculation: SpeculationMetrics
    memory: dict[str, int]
    logprobs: list[TokenLogprobs] | None = None
    restored_tokens: int = 0
    restore_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The result's part of the command line's JSON."""
        plain = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("token_ids", "speculation", "logprobs")
        }
        return plain | {"speculation": self.speculation.as_dict()}


@dataclass(frozen=True)
class StreamEvent:
    """A piece of a stream: the text released and the tokens accepted since the last event; the final event has finish_reason and result.

    logprobs: one a token, where they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    result: GenerationResult | None = None
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(eq=False)
class Request:
    """One generation. token_ids (prompt, then generated) is the conversation's own list, so both always agree.

    context: tokens the model can hold. eos_token_ids: what ends the text unless ignored. owns_cache: free the caches at the end (no
    conversation goes on). constraint: of the new text's format. logprobs: of the new tokens, where the parameters ask for them.
    """

    conversation: SequenceState
    params: SamplingParams
    seed: int
    context: int
    eos_token_ids: frozenset[int]
    stream: TextSink
    drafting: RequestDrafting
    metrics: SpeculationMetrics
    owns_cache: bool = True
    prompt_tokens: int = field(init=False)
    reused_tokens: int = field(init=False)
    namespace: str | None = None  # whose stored and shared prefixes it may use; None: the engine's own
    restored_tokens: int = 0
    restore_s: float = 0.0
    finish_reason: FinishReason | None = None
    error: ForetoldError | None = None
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    constraint: Constraint | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    # the pages that it left behind when it was interrupted after its first token; None where it was not, or its numbers were a store's
    own_pages: Sequence[OwnPage] | None = None
    looked_up: bool = False  # whether the pages of its prompt's known beginning were asked for
    asks_store: bool = False  # whether a store is still to be asked for it, before it runs
    restoring: PrefixRestore | None = None  # under way: it runs afterwards
    most_pages: Sequence[tuple[KvPool, int]] = ()  # of each pool, that it may hold at its longest
    joins: bool = False  # whether it decodes from its prompt's last token on: the tokens before ran beside a step of others
    num_told: int = field(init=False)  # tokens that `news` has given, the prompt's included
    penalised: bool = field(init=False)  # as its parameters are, asked in every step
    # tokens of its text up to which the next steps' pages are held, as of a state of the pools (`engine.runtime.reserve.holding_blocks`)
    held_until: int = 0
    held_as_of: int = -1
    row: InitVar[np.ndarray | None] = None  # its tokens as int32 [T], which are not written to; None: they are made when they are asked for
    _history: TokenHistory | None = None

    def __post_init__(self, row: np.ndarray | None) -> None:
        self._id_row = np.empty(0, np.int32) if row is None else row
        self._num_ids = len(self._id_row)  # of its tokens, in the row
        assert row is None or len(row) == len(self.token_ids), "a row of ids is of the whole text"
        self.prompt_tokens = self.num_told = len(self.token_ids)
        self.reused_tokens = self.sequence.length
        self.penalised = self.params.penalised
        self._ends = frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else self.eos_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and generated tokens."""
        return self.conversation.token_ids

    @property
    def id_row(self) -> np.ndarray:
        """The same as int32 [T], a view that stays right while the text grows: what joined since the last call is appended, as a list of 100,000
        takes two milliseconds to become an array."""
        tokens, have = self.conversation.token_ids, self._num_ids
        count = len(tokens)
        if count > have:
            if count > len(self._id_row):
                row = np.empty(count + max(_SPARE_IDS, count // 8), np.int32)
                row[:have] = self._id_row[:have]
                self._id_row = row
            self._id_row[have:count] = np.fromiter(islice(tokens, have, count), np.int32, count - have)
            self._num_ids = count
        return self._id_row[:count]

    @property
    def sequence(self) -> KvSequence:
        """The target's KV of a prefix of them."""
        return self.conversation.sequence

    @property
    def draft_state(self) -> DraftState | None:
        """What the source of drafts keeps for the conversation; None without a source."""
        return self.conversation.draft_state

    @property
    def num_new(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens to be run before it can decode: of its prompt, whose last one gives the first new token, or of all its text after an interruption."""
        length = len(self.conversation.token_ids)
        return length - (length > self.prompt_tokens) - self.conversation.sequence.length

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return min(self.params.max_new_tokens + self.prompt_tokens, self.context) - len(self.conversation.token_ids)

    def history(self, vocab_size: int, device: torch.device) -> TokenHistory | None:
        """Its tokens counted for the penalties; None where it has none."""
        if not self.params.penalised:
            return None
        if self._history is None:
            self._history = TokenHistory(self.params, vocab_size, self.prompt_tokens, device, self.constraint)
        return self._history.follow(self.token_ids)

    def longest(self, *, drafts: bool) -> int:
        """Most tokens it may have in a cache at once, and memory is promised for; with `drafts`, those of its last step included."""
        return min(self.context, self.prompt_tokens + self.params.max_new_tokens + (self.most_drafts if drafts else 0))

    @property
    def most_drafts(self) -> int:
        """Drafts that one of its steps may have."""
        return MAX_AUTO_LENGTH if self.params.draft_length == "auto" else self.params.draft_length

    def append_tokens(self, run: Sequence[int]) -> int:
        """Append accepted tokens up to the first stop, set finish_reason if there is one, and return how many were kept (at least one)."""
        limit, stop_at = self.remaining, None
        if len(run) > limit:
            run = run[:limit]
        if not self._ends.isdisjoint(run):
            stop_at = next(i for i, t in enumerate(run) if t in self._ends)
        kept = self.stream.push(run if stop_at is None else run[:stop_at])
        if kept is not None:
            self.finish_reason = "stop"
        elif stop_at is not None:
            kept = stop_at + 1
            self.finish_reason = "stop" if run[stop_at] in self.params.stop_token_ids else "eos"
        else:
            kept = len(run)
            if kept == limit:
                self.finish_reason = "length"
        self.conversation.token_ids += run if kept == len(run) else run[:kept]
        self.last_token_at = now = time.perf_counter()
        if not self.first_token_at:
            self.first_token_at = now
        if self.finish_reason is not None:
            self.stream.finish()
        return kept

    def news(self, memory: Callable[[], dict[str, int]]) -> StreamEvent | None:
        """What came since the last call; None when that is neither a token nor the end. memory: see `result`, asked at the end alone."""
        new, finished = self.token_ids[self.num_told :], self.finish_reason is not None
        if not new and not finished:
            return None
        told, self.num_told = self.num_told - self.prompt_tokens, len(self.token_ids)
        result = self.result(memory()) if finished else None
        return StreamEvent(self.stream.take(), new, self.finish_reason, result, self.logprobs[told:])

    def result(self, memory: dict[str, int]) -> GenerationResult:
        """The finished request's result."""
        assert self.finish_reason is not None
        decode_s = self.last_token_at - self.first_token_at
        return GenerationResult(
            text=self.stream.text,
            token_ids=self.token_ids[self.prompt_tokens :],
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            new_tokens=self.num_new,
            ttft_s=self.first_token_at - self.submitted_at,
            decode_s=decode_s,
            tokens_per_s=(self.num_new - 1) / decode_s if decode_s > 0 else 0.0,
            seed=self.seed,
            speculation=self.metrics,
            memory=memory,
            logprobs=None if self.params.logprobs is None else self.logprobs,
            restored_tokens=self.restored_tokens,
            restore_s=self.restore_s,
        )
