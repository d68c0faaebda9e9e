"""A separate small model as drafter, with its own KV pool and sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from draft.errors import FeatureTapError
from draft.propose import draft_block
from draft.protocols import BlockPolicy, CausalDecoder, DraftSampler, DraftState, FeatureStore, KvPool, Proposal, ScratchPasses
from kernels.upload import upload


class ModelDrafter:
    """Drafts with a small causal model that shares the target's vocabulary up to padding.

    Args:
        decoder: the small model.
        pool: its KV pool.
        name: for reports.
        deterministic: passed to every forward.
    """

    target_taps: tuple[int, ...] = ()
    exit_layer = 0
    begins_after = 0
    resumes_at = 0
    runs_last_draft = False
    takes_leaves = True
    takes_given = True

    def __init__(self, decoder: CausalDecoder, pool: KvPool, *, name: str = "model", deterministic: bool = False) -> None:
        self.decoder, self.pool, self.name, self.deterministic = decoder, pool, name, deterministic
        self.feature_taps: tuple[int, ...] = ()
        self.max_positions: int = decoder.config.max_position_embeddings
        self._new_buffer: Callable[[], FeatureStore] | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the draft's weights."""
        return self.decoder.weight_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of the draft's KV pool."""
        return self.pool.bytes

    def keep_features(self, taps: tuple[int, ...], new_buffer: Callable[[], FeatureStore]) -> None:
        """States opened from now on keep the draft's hidden states after `taps` layers.

        Raises FeatureTapError for a layer it does not have.
        """
        check_taps(taps, self.decoder.config.num_layers, self.name)
        self.feature_taps, self._new_buffer = taps, new_buffer if taps else None

    def open(self, target_sequence: Any = None) -> DraftState:
        """A fresh state; the target's sequence is not needed."""
        return DraftState(self.pool.new_sequence(), self._new_buffer() if self._new_buffer else None)

    def prefill(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """Run committed tokens that follow each state, in one forward, and commit their KV and features. Chunking is the caller's."""
        query_lens = [len(t) for t in tokens]
        flat = upload([t for ts in tokens for t in ts], self.decoder.device)
        out = self.decoder.forward(
            flat.clamp_max(self.decoder.config.vocab_size - 1),
            [s.sequence for s in states],
            query_lens,
            taps=self.feature_taps,
            logits="none",
            deterministic=self.deterministic,
        )
        append_features(states, query_lens, out.taps, self.feature_taps)
        for state, count in zip(states, query_lens, strict=True):
            state.sequence.advance(count)

    def catch_up(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """`prefill`."""
        self.prefill(states, tokens)

    def observe_target(self, states: Sequence[DraftState], query_lens: Sequence[int], taps: Mapping[int, Tensor]) -> None:
        """The target's hidden states are of no use to a separate model."""

    def observe_verification(self, states: Sequence[DraftState], proposal: Proposal, taps: Mapping[int, Tensor]) -> None:
        """Nor are those of a verification."""

    def propose(
        self,
        states: Sequence[DraftState],
        pending: Sequence[Sequence[int]],
        lengths: Sequence[int],
        sampler: DraftSampler,
        policy: BlockPolicy | None = None,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Proposal:
        """Draft lengths[b] tokens after pending[b]; requests with length 0 cost nothing and stay behind until they are asked again."""
        return draft_block(
            self.decoder,
            [s.sequence for s in states],
            pending,
            lengths,
            sampler,
            policy,
            given,
            last_layer=None,
            runs_last_draft=False,
            taps=self.feature_taps,
            deterministic=self.deterministic,
        )

    def commit(self, states: Sequence[DraftState], proposal: Proposal, num_new: Sequence[int]) -> None:
        """Keep the KV and features of the pending tokens and of the accepted drafts that were run (the last draft never is)."""
        for state, own, count in zip(states, proposal.requests, num_new, strict=True):
            if own.num_run == 0:
                continue
            kept = min(own.num_pending + count - 1, own.num_run)
            if state.features is not None and own.features is not None:
                state.features.append(own.features[:kept])
            state.sequence.advance(kept)

    def close(self, states: Sequence[DraftState]) -> None:
        """Free the draft's pages."""
        for state in states:
            state.sequence.free()

    def scratch(self, new_target_sequence: Callable[[], Any]) -> ScratchPasses:
        """One forward with its logits, in a sequence of its own."""
        sequence = self.pool.new_sequence()

        def draft(count: int) -> None:
            tokens = torch.zeros(count, dtype=torch.int64, device=self.decoder.device)
            sequence.reserve(count)
            out = self.decoder.forward(tokens, [sequence], [count], logits="none", deterministic=self.deterministic)
            self.decoder.head(out.hidden, deterministic=self.deterministic)

        return ScratchPasses(draft, None, sequence.free)


def check_taps(taps: tuple[int, ...], num_layers: int, name: str) -> None:
    """Raise FeatureTapError unless every tap lies in 0..num_layers (0: the embeddings)."""
    wrong = [i for i in taps if not 0 <= i <= num_layers]
    if wrong:
        raise FeatureTapError(f"drafter {name!r} has no hidden state after layer {wrong[0]}", f"choose taps from 0 to {num_layers}")


def append_features(states: Sequence[DraftState], query_lens: Sequence[int], taps: Mapping[int, Tensor], order: tuple[int, ...]) -> None:
    """Append a forward's flattened taps {i: [N, E]} to the states' feature buffers, in the given order of taps."""
    if not order or all(state.features is None for state in states):
        return
    rows = torch.stack([taps[i] for i in order], dim=1)  # [N, taps, E]
    for state, part in zip(states, rows.split(list(query_lens)), strict=True):
        if state.features is not None:
            state.features.append(part)
