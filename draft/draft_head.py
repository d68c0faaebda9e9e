"""A draft head at work: trained layers that run on the target's hidden states after its first m layers, with a KV of their own.

Their KV lags behind the target's on purpose. States of committed tokens wait until drafts are wanted, so that a prompt's answer does not wait for
them, steps without drafts cost nothing, and the last draft of a block is run together with the token that follows it, if it was accepted at all.

Axes: B requests, N new tokens over the batch, E hidden size, R reduced vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from draft.protocols import CausalDecoder, DraftState, FeatureStore, KvPool
from draft.rows import pick
from kernels.upload import upload

_MOST_PARTS = 64  # tensors that one request's states may lie in
MAX_PENDING_HIDDEN = 512  # states that wait before they are run after all; bounds their memory and the pause before the next draft
_PASS_ROWS = 512  # of states that were left for the first draft, run together


class LaterRows(Protocol):
    """Rows that are made or looked up when they are asked for."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    def rows(self) -> Tensor:
        """[num_rows, E]."""


@dataclass(slots=True, eq=False)  # not frozen: many are made a step, and that takes twice as long
class Part:
    """Rows of a larger tensor that are looked up when they are asked for: a step that hardly ever asks saves the host's time."""

    source: Tensor
    place: tuple[int | slice, ...]
    num_rows: int

    def rows(self) -> Tensor:
        """[num_rows, E]."""
        return self.source[self.place]


@dataclass
class DraftHeadState(DraftState):
    """The state of a request under a draft head, with the own layers' cache.

    own: their KV of a prefix of the committed tokens; others wait as the states at the exit of the tokens after it. num_left: the first of these, which
    wait for a draft that is asked for, or until MAX_PENDING_HIDDEN others wait behind them.
    """

    own: Any = None
    num_left: int = 0
    _waiting: list[Tensor | LaterRows] = field(default_factory=list)
    _num_waiting: int = 0

    @property
    def pending_hidden(self) -> Tensor | None:
        """The states at the exit [n, E] of the n tokens after `own`, which its layers have not run."""
        if not self._waiting:
            return None
        parts = [part if isinstance(part, Tensor) else part.rows() for part in self._waiting]
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        self._waiting = [rows]
        return rows

    @pending_hidden.setter
    def pending_hidden(self, rows: Tensor | None) -> None:
        self._waiting, self._num_waiting = ([], 0) if rows is None else ([rows], len(rows))
        self.num_left = min(self.num_left, self._num_waiting)

    def append_hidden(self, rows: Tensor | LaterRows) -> None:
        """States [m, E] of the tokens after those that wait join them; they are put into one tensor when they are asked for."""
        self._waiting.append(rows)
        self._num_waiting += len(rows) if isinstance(rows, Tensor) else rows.num_rows
        if len(self._waiting) >= _MOST_PARTS:
            _ = self.pending_hidden

    def ran(self, count: int) -> None:
        """The own layers have run the states that wait, and `count` tokens after them."""
        count += self._num_waiting
        if self._num_waiting:  # first: broken off in between, the tokens count as never run
            self._waiting, self._num_waiting, self.num_left = [], 0, 0
        self.own.advance(count)

    def waits_last(self, rows: object) -> bool:
        """Whether these are the last ones that `append_hidden` got, and still wait as they came."""
        return bool(self._waiting) and self._waiting[-1] is rows

    def replace_last(self, rows: Tensor) -> None:
        """The same rows as the last ones that wait, as they are known now."""
        self._waiting[-1] = rows

    def grew(self) -> None:
        """The last rows that wait are one more than before."""
        self._num_waiting += 1

    @property
    def num_known(self) -> int:
        """Tokens the own layers have run or can run."""
        return self.own.length + self._num_waiting

    @property
    def num_cached(self) -> int:
        """The same; fewer than the target's when its cache was filled without their knowledge."""
        return self.own.length + self._num_waiting

    @property
    def num_pending_hidden(self) -> int:
        """n."""
        return self._num_waiting

    @property
    def cache(self) -> Any:
        """The sequence in the own layers' pool."""
        return self.own

    def align(self) -> None:
        """Forget what lies beyond the target's sequence, which was cut or never advanced."""
        length = self.sequence.length
        if self.num_cached > length:
            if self.own.length > length:
                self.own.truncate(length)
            self.pending_hidden = (
                None if self.pending_hidden is None or self.own.length == length else self.pending_hidden[: length - self.own.length]
            )


class DraftHead:
    """The own layers with their norm and head, and where their KV lies.

    Args:
        decoder: n layers of the target's hidden size, and a head of R rows; its embeddings are never used.
        token_ids: [R] int64, ascending, on the decoder's device: the target's ids of the head's rows.
        pool: the decoder's KV pool.
        deterministic: passed to every forward.
    """

    def __init__(self, decoder: CausalDecoder, token_ids: Tensor, pool: KvPool, *, deterministic: bool = False) -> None:
        self.decoder, self.token_ids, self.pool, self.deterministic = decoder, token_ids, pool, deterministic

    def open(self, target_sequence: Any, features: FeatureStore | None) -> DraftHeadState:
        """A state over the target's sequence, none of whose tokens is known to the own layers."""
        return DraftHeadState(target_sequence, features, self.pool.new_sequence())

    def append_hidden(self, state: DraftHeadState, rows: Tensor) -> None:
        """exit states rows [n, E] of the tokens after the covered ones join those that wait."""
        state.append_hidden(rows)

    def run_pending(
        self, states: Sequence[DraftHeadState], taps: tuple[int, ...] = (), *, least: int = 1, besides_left: bool = False
    ) -> Mapping[int, Tensor]:
        """Run the waiting states of all `states` that have at least `least`, in one forward, and commit them. Returns {own layers i: [N, E]}.

        besides_left: those that were left for the first draft do not count. They are run before the others, without taps, and one pass of them a call.
        """
        chosen = [state for state in states if state.num_pending_hidden - (state.num_left if besides_left else 0) >= least]
        for state in chosen:
            self.run_left(state, 1 if besides_left else None)
        chosen = [state for state in chosen if state.num_pending_hidden and not state.num_left]
        if not chosen:
            return {}
        rows = [state.pending_hidden for state in chosen if state.pending_hidden is not None]
        counts = [len(part) for part in rows]
        out = self.forward([s.own for s in chosen], torch.cat(rows), counts, [s.own.length for s in chosen], taps)
        for state in chosen:
            state.ran(0)
        return out.taps

    def run_left(self, state: DraftHeadState, most_passes: int | None = None) -> None:
        """Run the states that were left for the first draft, in passes that bound the memory."""
        passes = 0
        while state.num_left and passes != most_passes and (rows := state.pending_hidden) is not None:
            passes += 1
            count, left = min(state.num_left, _PASS_ROWS), state.num_left
            self.forward([state.own], rows[:count], [count], [state.own.length], ())
            state.pending_hidden = None  # first: broken off in between, the tokens count as never run
            state.own.advance(count)
            state.pending_hidden = rows[count:] if count < len(rows) else None
            state.num_left = left - count

    def commit(self, state: DraftHeadState, num_run: int | None, rows: Tensor) -> bool:
        """Keep a block's committed tokens, whose exit states are rows [n, E]: the KV of those among the num_run that were run, the states of others.
        False, and nothing is kept, where the block's first token does not follow the covered ones (num_run None)."""
        if num_run is None:
            return False
        if run := min(num_run, len(rows)):
            state.ran(run)
        if run < len(rows):
            self.append_hidden(state, rows[run:])
        return True

    def forward(self, sequences: list[Any], hidden: Tensor, counts: list[int], starts: list[int], taps: tuple[int, ...]) -> Any:
        """The own layers over exit states [N, E]; moves nothing. Returns a DecoderOutput without logits."""
        return self.decoder.forward(
            None, sequences, counts, starts=starts, hidden=hidden, taps=taps, logits="none", deterministic=self.deterministic
        )

    def head(self, hidden: Tensor) -> Tensor:
        """float32 logits [N, R] of the own layers' states [N, E]."""
        return self.decoder.head(hidden, deterministic=self.deterministic)


class DraftHeadBlock:
    """The own layers' part in drafting one block: called after each pass of the first layers, which has one row per request.

    num_run: per request the tokens of the block that the own layers have run; None where the target's cache is not covered: such a request cannot
    draft, and its rows are passed over.

    Args:
        states: of all requests.
        taps: numbers of own layers whose states are wanted; every run token's are then computed, those of the last draft and of requests without
            drafts included.
    """

    def __init__(self, draft_head: DraftHead, states: Sequence[DraftHeadState], taps: tuple[int, ...]) -> None:
        self.draft_head, self.states, self.taps = draft_head, states, taps
        self.num_run = [0 if state.num_cached == state.sequence.length else None for state in states]

    def step(self, rows: Sequence[int], hidden: Tensor, drawing: Sequence[int]) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Run the states at the exit hidden [n, E] of the requests `rows`.

        drawing: which of the rows want to draw. Returns float32 logits [len(drawing), R] (None without any) and, where taps are wanted, {i: [n, E]} of
        all rows, undefined for requests that cannot draft.
        """
        chosen = [i for i, b in enumerate(rows) if self.num_run[b] is not None] if self.taps else list(drawing)
        if not chosen:
            return None, {i: hidden for i in self.taps}
        parts, counts, starts = [], [], []
        for i in chosen:
            state, done = self.states[rows[i]], self.num_run[rows[i]]
            assert done is not None, "a request whose cache is not covered was asked for drafts"
            if not done:
                self.draft_head.run_left(state)
            first = done == 0 and state.pending_hidden is not None
            if first and state.pending_hidden is not None:
                parts.append(state.pending_hidden)
            parts.append(hidden[i : i + 1])
            counts.append(1 + first * state.num_pending_hidden)
            starts.append(state.own.length if first else state.num_known + done)
            self.num_run[rows[i]] = done + 1
        out = self.draft_head.forward([self.states[rows[i]].own for i in chosen], torch.cat(parts), counts, starts, self.taps)
        last = dict(zip(chosen, (end - 1 for end in accumulate(counts)), strict=True))  # of each request's rows
        taps = {}
        if self.taps:
            to, source = (upload(list(places), hidden.device) for places in (last.keys(), last.values()))
            taps = {tap: torch.zeros_like(hidden).index_copy_(0, to, out.taps[tap][source]) for tap in self.taps}
        if not drawing:
            return None, taps
        spoken = pick(out.hidden, [last[i] for i in drawing])
        self.spoke([rows[i] for i in drawing], spoken)
        return self.draft_head.head(spoken), taps

    def spoke(self, requests: Sequence[int], hidden: Tensor) -> None:
        """Told of the own layers' states [n, E] that drafts of these requests are drawn from."""
