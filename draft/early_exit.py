"""The target's own first layers as drafter, alone or under trained layers: verification goes on from the hidden states at the exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from draft.draft_head import MAX_PENDING_HIDDEN, DraftHead, DraftHeadBlock, DraftHeadState
from draft.errors import ExitLayerError
from draft.model import append_features, check_taps
from draft.propose import draft_block
from draft.protocols import BlockPolicy, CausalDecoder, DraftSampler, DraftState, FeatureStore, Proposal, ScratchPasses
from kernels.upload import upload


def default_exit_layer(num_layers: int) -> int:
    """Layers of an early exit when nobody says otherwise: a fifth of the target's."""
    return max(1, num_layers // 5)


class EarlyExitDrafter:
    """Drafts with the target's first `num_layers` layers, under a trained draft head or the target's own norm and head.

    Untrained, it is exact and accepts little; trained, it is exact and accepts more.

    The first layers' KV is the target's, in the target's sequence; a draft head has its own (see `draft.draft_head`). Every block runs the first layers
    once for the pending token and each draft; the target's verification then starts at layer `num_layers` from the hidden states in the proposal, so no
    layer runs twice for a token.

    Feature taps 0 to `num_layers` are the hidden states at the exit, those beyond are the draft head's after its first, second... layer.

    Args:
        decoder: the target.
        num_layers: layers below the exit, 1 <= num_layers < the target's.
        deterministic: passed to every forward.
        draft_head: the draft head that goes on from the states at the exit.
    """

    def __init__(
        self, decoder: CausalDecoder, num_layers: int, *, deterministic: bool = False, draft_head: DraftHead | None = None
    ) -> None:
        total = decoder.config.num_layers
        if not 1 <= num_layers < total:
            raise ExitLayerError(
                f"an early exit after {num_layers} layers does not fit a target of {total}", f"choose between 1 and {total - 1}"
            )
        self.decoder, self.num_layers, self.deterministic, self.draft_head = decoder, num_layers, deterministic, draft_head
        self.name = "early exit" if draft_head is None else "draft head"
        self.exit_layer = num_layers
        self.feature_taps: tuple[int, ...] = ()
        self.max_positions: int = decoder.config.max_position_embeddings
        self._new_buffer: Callable[[], FeatureStore] | None = None

    @property
    def begins_after(self) -> int:
        """Nothing: its weights are the target's."""
        return 0

    @property
    def resumes_at(self) -> int:
        """The exit: proposals bring the states there."""
        return self.exit_layer

    @property
    def runs_last_draft(self) -> bool:
        """True, as verification goes on from its state."""
        return True

    @property
    def target_taps(self) -> tuple[int, ...]:
        """A prompt's hidden states come from the target's prefill: those of the first layers that are kept."""
        return self.first_taps

    @property
    def first_taps(self) -> tuple[int, ...]:
        """Of passes of the first layers: features at and below the exit, and what a draft head goes on from."""
        start = () if self.draft_head is None else (self.num_layers,)
        return tuple(sorted({*start, *(tap for tap in self.feature_taps if tap <= self.num_layers)}))

    @property
    def own_taps(self) -> tuple[int, ...]:
        """Numbers of the draft head's layers whose states are features."""
        return tuple(tap - self.num_layers for tap in self.feature_taps if tap > self.num_layers)

    @property
    def takes_leaves(self) -> bool:
        """Not where the draft head's states are kept, which a leaf has none of."""
        return not self.own_taps

    @property
    def takes_given(self) -> bool:
        """Not where the draft head's states are kept, which tokens that it does not run have none of."""
        return not self.own_taps

    @property
    def weight_bytes(self) -> int:
        """The draft head's; the first layers are the target's."""
        return 0 if self.draft_head is None else self.draft_head.decoder.weight_bytes

    @property
    def pool_bytes(self) -> int:
        """Of the draft head's pool; the first layers' KV lies in the target's."""
        return 0 if self.draft_head is None else self.draft_head.pool.bytes

    def keep_features(self, taps: tuple[int, ...], new_buffer: Callable[[], FeatureStore]) -> None:
        """States opened from now on keep the hidden states after `taps` layers. Raises FeatureTapError beyond the exit and the draft head."""
        check_taps(taps, self.num_layers + (self.draft_head.decoder.config.num_layers if self.draft_head else 0), self.name)
        self.feature_taps, self._new_buffer = taps, new_buffer if taps else None

    def open(self, target_sequence: Any) -> DraftState:
        """A state over the target's own sequence; tokens already in it have no features."""
        features = self._new_buffer() if self._new_buffer else None
        if features is not None:
            features.skip(target_sequence.length)
        return DraftState(target_sequence, features) if self.draft_head is None else self.draft_head.open(target_sequence, features)

    def prefill(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """Write the first layers' KV of tokens that follow what each state covers, and keep their features.

        The sequences do not move: the other layers' KV of these tokens is still to be written, by whoever restores a session, who then
        advances; or it is there already, where a draft head learns of a cache that was filled without it. A run of several calls passes
        the tokens behind the sequence: positions start where features end, where they are kept, or where the draft head's knowledge does.
        """
        self._prefill(states, tokens, leave=False)

    def prefill_first_layers(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """As `prefill`, but a draft head's own layers run these tokens when drafts are first asked for: nothing else waits for them. Where their states
        are features, and without a draft head, `prefill`."""
        if self.draft_head is None or self.own_taps:
            self.prefill(states, tokens)
        else:
            self._prefill(states, tokens, leave=True)

    def _prefill(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]], *, leave: bool) -> None:
        query_lens = [len(t) for t in tokens]
        flat = upload([t for ts in tokens for t in ts], self.decoder.device)
        if self.draft_head is not None:
            starts = [state.num_cached for state in states]
        else:
            starts = [state.sequence.length if state.features is None else state.features.length for state in states]
        out = self.decoder.forward(
            flat,
            [s.sequence for s in states],
            query_lens,
            starts=starts,
            taps=self.first_taps,
            logits="none",
            last_layer=self.num_layers,
            deterministic=self.deterministic,
        )
        self._keep(states, starts, query_lens, out.taps, leave=leave)

    def catch_up(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """`prefill`."""
        self.prefill(states, tokens)

    def observe_target(self, states: Sequence[DraftState], query_lens: Sequence[int], taps: Mapping[int, Tensor]) -> None:
        """Keep the features of a prompt chunk the target just ran, and what the draft head needs of it."""
        for state in states:
            if isinstance(state, DraftHeadState):
                state.align()
        self._keep(states, [state.sequence.length for state in states], query_lens, taps)

    def observe_verification(self, states: Sequence[DraftState], proposal: Proposal, taps: Mapping[int, Tensor]) -> None:
        """The proposal's own passes gave the states at the exit."""

    def _keep(
        self,
        states: Sequence[DraftState],
        starts: Sequence[int],
        query_lens: Sequence[int],
        taps: Mapping[int, Tensor],
        *,
        leave: bool = False,
    ) -> None:
        """Take the hidden states of tokens starts[b] onward of each request from a pass that ran `target_taps`. leave: for the first draft."""
        if self.draft_head is None:
            append_features(states, query_lens, taps, self.feature_taps)
            return
        adapted = cast(Sequence[DraftHeadState], states)
        follows = [state.num_cached == start for state, start in zip(adapted, starts, strict=True)]
        for state, own, rows in zip(adapted, follows, taps[self.num_layers].split(list(query_lens)), strict=True):
            if own:
                self.draft_head.append_hidden(state, rows)
        behind = [state for state, own in zip(adapted, follows, strict=True) if own]
        if not self.own_taps:
            if leave:
                for state in behind:
                    state.num_left = state.num_pending_hidden
            self.draft_head.run_pending(behind, least=MAX_PENDING_HIDDEN, besides_left=True)
            self._append(adapted, starts, query_lens, taps)
            return
        # rows that waited from before have had their turn: only those of this pass are features
        counts = [state.num_pending_hidden for state in behind]
        parts = {tap: iter(states.split(counts)) for tap, states in self.draft_head.run_pending(behind, self.own_taps).items()}
        missing = taps[self.num_layers]
        own_states = {
            self.num_layers + tap: torch.cat(
                [next(parts[tap])[-n:] if own else missing[:n] for n, own in zip(query_lens, follows, strict=True)]
            )
            for tap in self.own_taps
        }
        self._append(adapted, starts, query_lens, {**taps, **own_states}, follows)

    def _append(
        self,
        states: Sequence[DraftState],
        starts: Sequence[int],
        query_lens: Sequence[int],
        taps: Mapping[int, Tensor],
        known: Sequence[bool] | None = None,
    ) -> None:
        """Append features where they end at `starts` (tokens run once more have theirs already); requests that are not `known` get a gap."""
        if not self.feature_taps:
            return
        rows = torch.stack([taps[i] for i in self.feature_taps], dim=1)  # [N, taps, E]
        for b, part in enumerate(rows.split(list(query_lens))):
            features = states[b].features
            if features is None or features.length != starts[b]:
                continue
            if known is None or known[b]:
                features.append(part)
            else:
                features.skip(len(part))

    def propose(
        self,
        states: Sequence[DraftState],
        pending: Sequence[Sequence[int]],
        lengths: Sequence[int],
        sampler: DraftSampler,
        policy: BlockPolicy | None = None,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Proposal:
        """Draft lengths[b] tokens after the one pending token; a request with length 0 just runs the first layers."""
        assert all(len(tokens) == 1 for tokens in pending), "an early exit shares the target's cache, which lacks exactly the last token"
        own = None if self.draft_head is None else DraftHeadBlock(self.draft_head, cast(Sequence[DraftHeadState], states), self.own_taps)
        return draft_block(
            self.decoder,
            [s.sequence for s in states],
            pending,
            lengths,
            sampler,
            policy,
            given,
            last_layer=self.num_layers,
            runs_last_draft=True,
            taps=self.feature_taps,
            deterministic=self.deterministic,
            draft_layers=own,
        )

    def commit(self, states: Sequence[DraftState], proposal: Proposal, num_new: Sequence[int]) -> None:
        """Keep the features of the committed tokens, and the draft head's KV; the target's sequence is advanced by the decode step itself."""
        for state, own, count in zip(states, proposal.requests, num_new, strict=True):
            gap = False
            if isinstance(state, DraftHeadState) and self.draft_head is not None:
                assert own.hidden is not None
                gap = not self.draft_head.commit(state, own.num_draft_cached, own.hidden[:count])
            if state.features is None or own.features is None:
                continue
            if gap and self.own_taps:
                state.features.skip(count)
            else:
                state.features.append(own.features[:count])
        if self.draft_head is not None:
            self.draft_head.run_pending(cast(Sequence[DraftHeadState], states), least=MAX_PENDING_HIDDEN, besides_left=True)

    def close(self, states: Sequence[DraftState]) -> None:
        """Free a draft head's pages; the sequences themselves belong to the target."""
        for state in states:
            if isinstance(state, DraftHeadState):
                state.own.free()

    def scratch(self, new_target_sequence: Callable[[], Any]) -> ScratchPasses:
        """The first layers with the target's head, or with the draft head's layers and head; the last draft runs the first layers alone, which only is
        another pass where there is a draft head."""
        draft_head, sequences = self.draft_head, [new_target_sequence()]

        def first_layers(sequence: Any, count: int) -> Any:
            tokens = torch.zeros(count, dtype=torch.int64, device=self.decoder.device)
            sequence.reserve(count)
            return self.decoder.forward(
                tokens, [sequence], [count], logits="none", last_layer=self.num_layers, deterministic=self.deterministic
            ).hidden

        if draft_head is None:
            return ScratchPasses(
                lambda count: self.decoder.head(first_layers(sequences[0], count), deterministic=self.deterministic),
                None,
                sequences[0].free,
            )
        sequences += [new_target_sequence(), draft_head.pool.new_sequence()]

        def draft(count: int) -> None:
            sequences[2].reserve(count)
            draft_head.head(draft_head.forward([sequences[2]], first_layers(sequences[0], count), [count], [0], ()).hidden)

        def close() -> None:
            for sequence in sequences:
                sequence.free()

        return ScratchPasses(draft, lambda count: first_layers(sequences[1], count), close)
