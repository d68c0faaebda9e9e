"""Drafts of a draft head made with copies of weights in few bits, where each pass waits for its weights: on a CPU.

The copies of the target's first layers and of the draft head's own only propose. The target verifies with all of its own layers, and its states after
the first ones, which the verification gives, are what the draft head goes on from: so drafts leave no trace in any cache but the draft head's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from draft.draft_head import DraftHead, DraftHeadBlock, DraftHeadState
from draft.early_exit import EarlyExitDrafter
from draft.propose import draft_block
from draft.protocols import BlockPolicy, CausalDecoder, DraftSampler, DraftState, Proposal, ScratchPasses


class ExitCopy(NamedTuple):
    """first: runs the copies of the target's first layers over the target's pool. head: the draft head with copies of its layers, over its own pool."""

    first: CausalDecoder
    head: DraftHead


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
        first, head = self.copy
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
