"""Drafts of a draft head made with copies of weights in few bits, where each pass waits for its weights: on a CPU.

The copies of the target's first layers and of the draft head's own only propose. The target verifies with all of its own layers, and its states after
the first ones, which the verification gives, are what the draft head goes on from: so drafts leave no trace in any cache but the draft head's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from draft.draft_head import DraftHead, DraftHeadBlock, DraftHeadState
from draft.early_exit import EarlyExitDrafter
from draft.policy import step_clock
from draft.propose import draft_block
from draft.protocols import BlockPolicy, CausalDecoder, DraftSampler, DraftState, LikeliestDrafts, Proposal, ScratchPasses
from draft.tree import Leaf
from kernels.cpu_decode.stopping import Stopping
from kernels.upload import upload

BEGINS_AFTER = 16  # tokens of an answer: making the copies takes as long as some sixteen of them
MOST_PENDING_ROWS = 32  # states that one compiled call runs before its drafts: more are multiplied faster by a library


class BlockRunner(Protocol):
    """Drafts a block of the likeliest tokens in one call.

    sequences, own: in the target's pool and the draft head's. last: the one pending token of each request. pending: states [n, E] of the tokens before
    it that the draft head has not run. lengths: drafts, at least 1.
    """

    def __call__(
        self,
        sequences: Sequence[Any],
        own: Sequence[Any],
        last: Sequence[int],
        pending: Sequence[Tensor | None],
        lengths: Sequence[int],
        candidates: int,
        stopping: Stopping,
    ) -> LikeliestDrafts: ...


class ExitCopy(NamedTuple):
    """first: runs the copies of the target's first layers over the target's pool. head: the draft head with copies of its layers, over its own pool.
    ready: whether the copies are there, or were left by an earlier process; else the first pass makes them. block: drafts with both; None where only
    single passes can be run."""

    first: CausalDecoder
    head: DraftHead
    ready: Callable[[], bool]
    block: BlockRunner | None = None


class ExitCopyDrafter(EarlyExitDrafter):
    """An early exit with a draft head that drafts with copies of their weights; see `EarlyExitDrafter` and the module.

    Where the states of the draft head's own layers are features, drafts are made with the weights themselves, as these states must be exact.

    Args:
        copy: the copies.
    """

    def __init__(
        self, decoder: CausalDecoder, num_layers: int, *, draft_head: DraftHead, copy: ExitCopy, deterministic: bool = False
    ) -> None:
        super().__init__(decoder, num_layers, deterministic=deterministic, draft_head=draft_head)
        self.copy = copy

    @property
    def begins_after(self) -> int:
        """Some tokens, where the copies are still to be made: a short answer would wait for them and use them little."""
        return 0 if self.own_taps or self.copy.ready() else BEGINS_AFTER

    @property
    def resumes_at(self) -> int:
        """The first layer: the copies' states are not the target's."""
        return super().resumes_at if self.own_taps else 0

    @property
    def runs_last_draft(self) -> bool:
        """Not by the copies, whose states of it nobody needs."""
        return bool(self.own_taps)

    @property
    def weight_bytes(self) -> int:
        """The draft head's, and the copies'."""
        return super().weight_bytes + self.copy.first.weight_bytes + self.copy.head.decoder.weight_bytes

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
        if self.own_taps:
            return super().propose(states, pending, lengths, sampler, policy, given)
        drafting = [b for b, length in enumerate(lengths) if length]
        self._catch_up([cast(DraftHeadState, states[b]) for b in drafting], policy)
        if self.copy.block is not None and drafting and sampler.takes_likeliest(drafting):
            return self._likeliest(self.copy.block, drafting, cast(Sequence[DraftHeadState], states), pending, lengths, policy, given)
        return draft_block(
            self.copy.first,
            [s.sequence for s in states],
            pending,
            lengths,
            sampler,
            policy,
            given,
            last_layer=self.num_layers,
            runs_last_draft=False,
            taps=(),
            deterministic=self.deterministic,
            draft_layers=DraftHeadBlock(self.copy.head, cast(Sequence[DraftHeadState], states), ()),
        )

    def _catch_up(self, chosen: Sequence[DraftHeadState], policy: BlockPolicy | None) -> None:
        """Run waiting states beforehand where they are many, and tell the policy what that took: once, for all drafts that follow."""
        if sum(state.num_pending_hidden for state in chosen) <= MOST_PENDING_ROWS or self.draft_head is None:
            return
        clock = step_clock(self.decoder.device)
        began = clock()
        self.draft_head.run_pending(chosen)
        if policy is not None:
            policy.caught_up(clock() - began)

    def _likeliest(
        self,
        block: BlockRunner,
        drafting: list[int],
        states: Sequence[DraftHeadState],
        pending: Sequence[Sequence[int]],
        lengths: Sequence[int],
        policy: BlockPolicy | None,
        given: Sequence[Sequence[int]] | None,
    ) -> Proposal:
        """The block of the likeliest tokens of the requests `drafting`, in one call; the policy is told of it afterwards."""
        chosen = [states[b] for b in drafting]
        drafts = block(
            [state.sequence for state in chosen],
            [state.own for state in chosen],
            [pending[b][0] for b in drafting],
            [state.pending_hidden for state in chosen],
            [lengths[b] for b in drafting],
            1 if policy is None else policy.candidates,
            Stopping.never(len(drafting)) if policy is None else policy.stopping(drafting),
        )
        tokens, counts = drafts.tokens.tolist(), drafts.counts.tolist()
        kept, leaves = list(counts), [list[Leaf]() for _ in drafting]
        if policy is not None and any(map(policy.looks_at, drafting)):
            probabilities, going = drafts.probabilities.tolist(), list(range(len(drafting)))
            for depth in range(max(counts)):
                going = [i for i in going if depth < kept[i]]
                if not going:
                    break
                for i, count in zip(
                    going, policy.select([drafting[i] for i in going], [probabilities[i][depth] for i in going]), strict=True
                ):
                    kept[i] = kept[i] if count else depth
                    leaves[i] += [Leaf(depth + 1, token) for token in tokens[i][depth][1:count]]
        proposal = Proposal.empty(len(states), self.decoder.device)
        chains = [list(own) for own in given] if given else [list[int]() for _ in states]
        for i, b in enumerate(drafting):
            chains[b] = [likeliest[0] for likeliest in tokens[i][: kept[i]]]
            proposal.requests[b].leaves, proposal.requests[b].num_draft_cached = leaves[i], counts[i]
        for own, chain in zip(proposal.requests, chains, strict=True):
            own.num_drafts, own.probs = len(chain), [None] * len(chain)
        proposal.tokens = upload([token for chain in chains for token in chain], self.decoder.device)
        return proposal

    def observe_verification(self, states: Sequence[DraftState], proposal: Proposal, taps: Mapping[int, Tensor]) -> None:
        """Note the states at the exit, and the features, of each request's rows: its pending token, its drafts and its leaves."""
        counts = [own.num_rows for own in proposal.requests]
        hidden = taps[self.num_layers].split(counts)
        features: Sequence[Tensor | None] = [None] * len(counts)
        if self.feature_taps:
            features = torch.stack([taps[i] for i in self.feature_taps], dim=1).split(counts)
        for state, own, own_hidden, own_features in zip(states, proposal.requests, hidden, features, strict=True):
            own.num_pending, own.num_run, own.hidden, own.features = 1, 1 + own.num_drafts, own_hidden, own_features
            own.num_draft_cached = (own.num_draft_cached or 0) if state.num_cached == state.sequence.length else None

    def scratch(self, new_target_sequence: Callable[[], Any]) -> ScratchPasses:
        """A pass of the copies, logits included."""
        if self.own_taps:
            return super().scratch(new_target_sequence)
        first, head, _, _ = self.copy
        sequences = [new_target_sequence(), head.pool.new_sequence()]

        def draft(count: int) -> None:
            for sequence in sequences:
                sequence.reserve(count)
            tokens = torch.zeros(count, dtype=torch.int64, device=first.device)
            hidden = first.forward(tokens, sequences[:1], [count], logits="none", last_layer=self.num_layers).hidden
            head.head(head.forward(sequences[1:], hidden, [count], [0], ()).hidden)

        def close() -> None:
            for sequence in sequences:
                sequence.free()

        return ScratchPasses(draft, None, close)
