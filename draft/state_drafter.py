"""A draft head on the target's last states as drafter: a draft token costs the head's own layers, and none of the target's.

Its rows (`draft.state_join`) need the target's state of the token before, which a verification gives for the tokens it keeps. So drafts run on the
head's own states, and the rows of those that are kept are run once more with the target's, together with the token that follows: no key or value of a
guessed state stays. Where the target's cache was filled without the head's knowledge, these tokens have no rows: the head drafts from what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from draft.draft_head import MAX_PENDING_HIDDEN, DraftHead, DraftHeadBlock, DraftHeadState
from draft.early_exit import EarlyExitDrafter
from draft.model import append_features
from draft.propose import draft_block
from draft.protocols import BlockPolicy, CausalDecoder, DecoderOutput, DraftSampler, DraftState, FeatureStore, Proposal, ScratchPasses
from draft.state_join import StateJoin
from draft.step_rows import StepRows, StepStates, joined_rows
from kernels.upload import upload

_MOST_KEPT = 128  # tokens of steps without drafts whose states a request keeps
_LEAST_KEPT = 32  # fewer wait on when those of others are run


@dataclass(slots=True, eq=False)  # not frozen: one is made a request in every step, and that takes twice as long
class KeptBlock:
    """What a captured step has kept of one request's n tokens, looked up when it is asked for.

    source [B, N, 2E]: of request b the target's fused states of its tokens, and beside each the row of the token after it; the last of these rows is
    not kept.
    """

    source: Tensor
    b: int
    count: int
    size: int

    @property
    def num_rows(self) -> int:
        """n - 1."""
        return self.count - 1

    def rows(self) -> Tensor:
        """Of the tokens after the first [n - 1, E]."""
        return self.source[self.b, : self.count - 1, self.size :]

    def last(self) -> Tensor:
        """The fused state [E] of the last token."""
        return self.source[self.b, self.count - 1, : self.size]


@dataclass
class StateHeadState(DraftHeadState):
    """The state of a request under a draft head on the target's last states.

    num_skipped: tokens of the target's cache that have no rows.
    """

    num_skipped: int = 0
    _last: Tensor | KeptBlock | StepRows | None = None

    @property
    def last(self) -> Tensor | None:
        """The target's fused state [E] of the last token that it has run, which the next token's row is joined with; None: not known."""
        if isinstance(self._last, StepRows):
            self._last = self._last.last_fused()
        return self._last.last() if isinstance(self._last, KeptBlock) else self._last

    @last.setter
    def last(self, state: Tensor | KeptBlock | StepRows | None) -> None:
        self._last = state

    @property
    def steps(self) -> StepRows | None:
        """The rows of the last steps without drafts, where the last token that the target has run is one of theirs."""
        return self._last if isinstance(self._last, StepRows) else None

    @property
    def num_cached(self) -> int:
        """Tokens that have rows, or are known to have none."""
        return self.num_skipped + self.own.length + self._num_waiting

    @property
    def rerun_from(self) -> int:
        """No layer of the target is run again for this head."""
        return self.sequence.length

    @property
    def shareable(self) -> bool:
        """Whether a page of the own layers holds the same tokens as the target's."""
        return self.num_skipped == 0

    @property
    def knows_text(self) -> bool:
        """See `DraftState.knows_text`: drafts behind a gap of tokens without states are hardly accepted."""
        return self.num_skipped == 0 and self.num_cached >= self.sequence.length

    def ran_block(self, block: KeptBlock) -> None:
        """The own layers have run the rows that wait and that of a block's first token; those of its others wait now."""
        self.ran(1)
        if block.num_rows:
            self._waiting, self._num_waiting = [block], block.num_rows
        self._last = block

    def waits_as(self, kept: Tensor) -> bool:
        """Whether the rows that wait are those that a captured step has left in `kept` (`KeptBlock`), and no others."""
        last = self._last
        return isinstance(last, KeptBlock) and last.source is kept and self._num_waiting == last.num_rows

    def skip(self, count: int) -> None:
        """The next `count` tokens of the target's cache have no rows."""
        if count:
            self.num_skipped, self.last = self.num_skipped + count, None

    def align(self) -> None:
        """Forget what lies beyond the target's sequence; which tokens were skipped is not known, so none before these is kept either."""
        length = self.sequence.length
        if self.num_cached <= length:
            return
        self.last = None
        if self.num_skipped:
            self.own.truncate(0)
            self.pending_hidden, self.num_skipped = None, length
        else:
            super().align()


class StateDrafter(EarlyExitDrafter):
    """Drafts with the own layers of a draft head that goes on from the target's last states.

    Feature taps are, as those of an early exit after `num_layers` layers, the target's states after at most so many layers: codec parameters and
    sessions are those of such an early exit without a head.

    Args:
        decoder: the target.
        num_layers: layers whose KV is computed and not stored in sessions.
        draft_head: the own layers.
        join: what their rows are made with.
        embed: token ids [N] int64 -> the target's embeddings [N, E], as its first layer gets them.
        deterministic: passed to every forward.
    """

    def __init__(
        self,
        decoder: CausalDecoder,
        num_layers: int,
        *,
        draft_head: DraftHead,
        join: StateJoin,
        embed: Callable[[Tensor], Tensor],
        deterministic: bool = False,
    ) -> None:
        super().__init__(decoder, num_layers, deterministic=deterministic)
        self.states_head, self.join, self.embed = draft_head, join, embed
        self._size = decoder.config.hidden_size
        self.name = "draft head"

    @property
    def resumes_at(self) -> int:
        """The target's first layer."""
        return 0

    @property
    def runs_last_draft(self) -> bool:
        """No: what follows it needs the target's state."""
        return False

    @property
    def target_taps(self) -> tuple[int, ...]:
        """Embeddings, the states that are joined, and features."""
        return tuple(sorted({0, *self.join.state_layers, *self.feature_taps}))

    @property
    def weight_bytes(self) -> int:
        """Of the own layers, their head and the join."""
        return self.states_head.decoder.weight_bytes + self.join.num_bytes

    @property
    def pool_bytes(self) -> int:
        """Of the own layers' pool."""
        return self.states_head.pool.bytes

    def open(self, target_sequence: Any) -> DraftState:
        """A state over the target's sequence; tokens already in it have no rows and no features."""
        features: FeatureStore | None = self._new_buffer() if self._new_buffer else None
        if features is not None:
            features.skip(target_sequence.length)
        return StateHeadState(target_sequence, features, self.states_head.pool.new_sequence(), num_skipped=target_sequence.length)

    def prefill(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """Write the first layers' KV of tokens that follow the target's sequences, and keep their features (`EarlyExitDrafter`). They have no rows."""
        super().prefill(states, tokens)
        for state, own in zip(cast(Sequence[StateHeadState], states), tokens, strict=True):
            state.skip(max(0, state.sequence.length + len(own) - state.num_cached))

    def catch_up(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """These tokens, which the target's cache holds, have no rows."""
        for state, own in zip(cast(Sequence[StateHeadState], states), tokens, strict=True):
            state.skip(len(own))

    def observe_target(self, states: Sequence[DraftState], query_lens: Sequence[int], taps: Mapping[int, Tensor]) -> None:
        """Rows of a prompt chunk that the target just ran, and its features."""
        known = cast(Sequence[StateHeadState], states)
        counts = list(query_lens)
        for state in known:
            state.align()
            state.skip(state.sequence.length - state.num_cached)
        fused = self.join.fused([taps[layer] for layer in self.join.state_layers]).split(counts)
        for state, own, embeddings in zip(known, fused, taps[0].split(counts), strict=True):
            state.append_hidden(self._rows(state, own, embeddings))
            state.last = own[-1]
        self.states_head.run_pending(known, least=MAX_PENDING_HIDDEN)
        append_features(states, query_lens, taps, self.feature_taps)

    def _rows(self, state: StateHeadState, fused: Tensor, embeddings: Tensor) -> Tensor:
        """Rows [n, E] of the next n tokens, whose own fused states and embeddings [n, E] are given."""
        first = torch.zeros_like(fused[:1]) if state.last is None else state.last[None]
        return self.join.rows(torch.cat([first, fused[:-1]]), embeddings)

    def next_rows(self, states: Sequence[StateHeadState], tokens: Tensor) -> Tensor:
        """The rows [B, E] of the tokens [B] int64 that follow what the target has run of B requests."""
        kept = [state for state in states if state.steps is not None]
        if kept:
            fused = self.join.fused(list(torch.stack([state.steps.last_states() for state in kept if state.steps is not None]).unbind(1)))
            for state, own in zip(kept, fused, strict=True):
                state.last = own
        embeddings = self.embed(tokens)
        unknown = embeddings.new_zeros(embeddings.shape[1])
        return self.join.rows(torch.stack([unknown if state.last is None else state.last for state in states]), embeddings)

    def propose(
        self,
        states: Sequence[DraftState],
        pending: Sequence[Sequence[int]],
        lengths: Sequence[int],
        sampler: DraftSampler,
        policy: BlockPolicy | None = None,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Proposal:
        """Draft lengths[b] tokens after the one pending token; a request with length 0 costs nothing."""
        assert all(len(tokens) == 1 for tokens in pending), "the target's cache lacks exactly the last token"
        known = cast(Sequence[StateHeadState], states)
        feed = _JoinedRows(self, known)
        return draft_block(
            cast(CausalDecoder, feed),
            [s.sequence for s in states],
            pending,
            lengths,
            sampler,
            policy,
            given,
            last_layer=0,
            runs_last_draft=False,
            taps=(),
            deterministic=self.deterministic,
            draft_layers=_StateBlock(self.states_head, known, feed),
        )

    def observe_verification(self, states: Sequence[DraftState], proposal: Proposal, taps: Mapping[int, Tensor]) -> None:
        """Note the fused states and embeddings, and the features, of each request's rows: its pending token, its drafts and its leaves."""
        counts = [own.num_rows for own in proposal.requests]
        fused = self.join.fused([taps[layer] for layer in self.join.state_layers])
        hidden = torch.cat([fused, taps[0]], -1).split(counts)
        features: Sequence[Tensor | None] = [None] * len(counts)
        if self.feature_taps:
            features = torch.stack([taps[i] for i in self.feature_taps], dim=1).split(counts)
        for state, own, own_hidden, own_features in zip(states, proposal.requests, hidden, features, strict=True):
            own.num_pending, own.num_run, own.hidden, own.features = 1, 1 + own.num_drafts, own_hidden, own_features
            own.num_draft_cached = (own.num_draft_cached or 0) if state.num_cached == state.sequence.length else None

    def commit(self, states: Sequence[DraftState], proposal: Proposal, num_new: Sequence[int]) -> None:
        """Keep the rows of the committed tokens: the KV of the pending one's, if it was run, and the others to be run with the target's states."""
        known = cast(Sequence[StateHeadState], states)
        for state, own, count in zip(known, proposal.requests, num_new, strict=True):
            assert own.hidden is not None
            if not count:
                continue
            fused, embeddings = own.hidden[:count].chunk(2, -1)
            if own.num_draft_cached is None:
                state.skip(state.sequence.length - state.num_cached)
            else:
                self.states_head.commit(state, min(own.num_draft_cached, 1), self._rows(state, fused, embeddings))
            state.last = fused[-1].clone()
            if state.features is not None and own.features is not None:
                state.features.append(own.features[:count])
        self.states_head.run_pending(known, least=MAX_PENDING_HIDDEN)

    def keep_block(self, state: StateHeadState, kept: Tensor, b: int, count: int, token: int | None) -> None:
        """`commit` of n tokens whose captured step has made the rows of those after the first.

        kept, b: see `KeptBlock`. token: the first of them, which no model had run; None where the own layers have run its row, and those that waited.
        """
        block = KeptBlock(kept, b, count, self._size)
        if token is None:
            return state.ran_block(block)
        if state.num_cached + count != state.sequence.length:
            state.skip(state.sequence.length - state.num_cached - count + 1)
        else:
            state.append_hidden(self.next_rows([state], upload([token], self.decoder.device)))
        if count > 1:
            state.append_hidden(block)
        state.last = block

    def keep_steps(self, states: Sequence[StateHeadState], tokens: Sequence[int], kept: StepStates, columns: Sequence[int]) -> None:
        """`commit` of a step without drafts, which has run one token of each request; a sequence that has not moved has kept none.

        kept: where the target's states of these tokens are, those of each request in its column.
        """
        for column, state, token in zip(columns, states, tokens, strict=True):
            if state.num_cached < state.sequence.length:
                self._keep_step(state, token, kept, column)
        if max(state.num_pending_hidden for state in states) >= _MOST_KEPT:  # states that are kept take memory
            self.run_waiting(states, least=_LEAST_KEPT)

    def run_waiting(self, states: Sequence[StateHeadState], *, least: int) -> None:
        """Run the rows of all `states` of which at least `least` wait, those of steps without drafts made together."""
        kept = [(state, own) for state in states if state.num_pending_hidden >= least and (own := state.steps) and state.waits_last(own)]
        if len(kept) > 1:
            for (state, _), rows in zip(kept, joined_rows([own for _, own in kept]), strict=True):
                state.replace_last(rows)
        self.states_head.run_pending(states, least=least)

    def _keep_step(self, state: StateHeadState, token: int, kept: StepStates, column: int) -> None:
        """Nothing is launched."""
        state.skip(state.sequence.length - 1 - state.num_cached)
        steps = state.steps
        if steps is not None and state.waits_last(steps) and steps.follow(kept, column):
            steps.tokens.append(token)
            state.grew()
        else:
            before = state.last if steps is None else steps.last_states()
            steps = StepRows(self.join, self.embed, *kept, column, [token], before)
            state.append_hidden(steps)
        state.last = steps

    def close(self, states: Sequence[DraftState]) -> None:
        """Free the own layers' pages; the sequences themselves belong to the target."""
        for state in cast(Sequence[StateHeadState], states):
            state.own.free()

    def scratch(self, new_target_sequence: Callable[[], Any]) -> ScratchPasses:
        """Own layers and their head over joined rows."""
        head, sequence = self.states_head, self.states_head.pool.new_sequence()

        def draft(count: int) -> None:
            sequence.reserve(count)
            embeddings = self.embed(torch.zeros(count, dtype=torch.int64, device=self.decoder.device))
            rows = self.join.rows(embeddings, embeddings)
            head.head(head.forward([sequence], rows, [count], [0], ()).hidden)

        return ScratchPasses(draft, None, sequence.free)


class _JoinedRows:
    """What `draft_block` runs in place of the target's first layers: a token's row, from its embedding and the state of the token before it, which is
    the target's for a pending token and the head's own for a draft."""

    def __init__(self, drafter: StateDrafter, states: Sequence[StateHeadState]) -> None:
        self.drafter, self.config, self.device = drafter, drafter.decoder.config, drafter.decoder.device
        size, dtype = self.config.hidden_size, drafter.decoder.dtype
        unknown = torch.zeros(size, dtype=dtype, device=self.device)
        self.before = torch.stack([unknown if state.last is None else state.last for state in states])  # [B, E]
        self._numbers = {id(state.sequence): b for b, state in enumerate(states)}

    def forward(self, token_ids: Tensor, sequences: list[Any], query_lens: list[int], **options: Any) -> DecoderOutput:
        """Rows [N, E] as the states `hidden`."""
        chosen = upload([self._numbers[id(sequence)] for sequence in sequences], self.device)
        rows = self.drafter.join.rows(self.before[chosen], self.drafter.embed(token_ids))
        return _Rows(rows)


@dataclass(frozen=True)
class _Rows:
    """A `draft.protocols.DecoderOutput` of rows alone."""

    hidden: Tensor
    logits: None = None

    @property
    def taps(self) -> Mapping[int, Tensor]:
        return {}


class _StateBlock(DraftHeadBlock):
    """The own layers' part in drafting one block, which tells `feed` their states."""

    def __init__(self, draft_head: DraftHead, states: Sequence[StateHeadState], feed: _JoinedRows) -> None:
        super().__init__(draft_head, states, ())
        self.feed = feed

    def spoke(self, requests: Sequence[int], hidden: Tensor) -> None:
        """The own layers' states [n, E] of these requests' last rows."""
        self.feed.before[upload(list(requests), hidden.device)] = hidden
