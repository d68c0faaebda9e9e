"""The target's own first layers as drafter: no second cache, and verification goes on from the trunk's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from draft.drafter import append_features, check_taps
from draft.errors import TrunkDepthError
from draft.propose import draft_block
from draft.protocols import CausalDecoder, DraftSampler, DraftState, FeatureStore, Proposal


def default_trunk_layers(num_layers: int) -> int:
    """Layers of a trunk when nobody says otherwise: a fifth of the target's."""
    return max(1, num_layers // 5)


class TrunkDrafter:
    """Drafts with the target's first `num_layers` layers under the target's own final norm and head.

    Untrained, it is exact and accepts little.

    Its KV is the target's, in the target's sequence. Every block runs the first layers once for the pending token and each draft; the
    target's verification then starts at layer `num_layers` from the hidden states in the proposal, so no layer runs twice for a token.

    Args:
        decoder: the target.
        num_layers: layers of the trunk, 1 <= num_layers < the target's.
        deterministic: passed to every forward.
    """

    name = "trunk"
    runs_last_draft = True

    def __init__(self, decoder: CausalDecoder, num_layers: int, *, deterministic: bool = False) -> None:
        total = decoder.config.num_layers
        if not 1 <= num_layers < total:
            raise TrunkDepthError(f"a trunk of {num_layers} layers does not fit a target of {total}", f"choose between 1 and {total - 1}")
        self.decoder, self.num_layers, self.deterministic = decoder, num_layers, deterministic
        self.verify_from = num_layers
        self.feature_taps: tuple[int, ...] = ()
        self.max_positions: int = decoder.config.max_position_embeddings
        self._new_buffer: Callable[[], FeatureStore] | None = None

    @property
    def target_taps(self) -> tuple[int, ...]:
        """The trunk's features of a prompt come from the target's prefill."""
        return self.feature_taps

    @property
    def weight_bytes(self) -> int:
        """Nothing beyond the target."""
        return 0

    @property
    def pool_bytes(self) -> int:
        """Nothing beyond the target's pool."""
        return 0

    def keep_features(self, taps: tuple[int, ...], new_buffer: Callable[[], FeatureStore]) -> None:
        """States opened from now on keep the trunk's hidden states after `taps` layers. Raises FeatureTapError beyond the trunk."""
        check_taps(taps, self.num_layers, self.name)
        self.feature_taps, self._new_buffer = taps, new_buffer if taps else None

    def open(self, target_sequence: Any) -> DraftState:
        """A state over the target's own sequence; tokens already in it have no features."""
        features = self._new_buffer() if self._new_buffer else None
        if features is not None:
            features.skip(target_sequence.length)
        return DraftState(target_sequence, features)

    def prefill(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """Write the trunk's layers' KV of tokens that follow each sequence and keep their features.

        The sequences do not move: the other layers' KV of these tokens is still to be written, by whoever restores a session, who then
        advances. A run that takes several calls therefore passes features.length tokens behind it: positions start at features.length
        when features are kept.
        """
        query_lens = [len(t) for t in tokens]
        flat = torch.tensor([t for ts in tokens for t in ts], dtype=torch.int64, device=self.decoder.device)
        starts = [state.sequence.length if state.features is None else state.features.length for state in states]
        out = self.decoder.forward(
            flat, [s.sequence for s in states], query_lens, starts=starts, taps=self.feature_taps, logits="none",
            last_layer=self.num_layers, deterministic=self.deterministic,
        )  # fmt: skip
        append_features(states, query_lens, out.taps, self.feature_taps)

    def observe_target(self, states: Sequence[DraftState], query_lens: Sequence[int], taps: Mapping[int, Tensor]) -> None:
        """Keep the features of a prompt chunk the target just ran."""
        append_features(states, query_lens, taps, self.feature_taps)

    def propose(
        self, states: Sequence[DraftState], pending: Sequence[Sequence[int]], lengths: Sequence[int], sampler: DraftSampler
    ) -> Proposal:
        """Draft lengths[b] tokens after the one pending token; a request with length 0 just runs its trunk."""
        assert all(len(tokens) == 1 for tokens in pending), "the trunk shares the target's cache, which lacks exactly the last token"
        return draft_block(
            self.decoder, [s.sequence for s in states], pending, lengths, sampler,
            last_layer=self.num_layers, runs_last_draft=True, taps=self.feature_taps, deterministic=self.deterministic,
        )  # fmt: skip

    def commit(self, states: Sequence[DraftState], proposal: Proposal, num_new: Sequence[int]) -> None:
        """Keep the features of the committed tokens; the target's sequence is advanced by the decode step itself."""
        for b, state in enumerate(states):
            rows = proposal.features[b]
            if state.features is not None and rows is not None:
                state.features.append(rows[: num_new[b]])

    def close(self, states: Sequence[DraftState]) -> None:
        """The sequences belong to the target."""
