"""What the draft package needs from the engine, and what it gives back. Nothing here imports the engine.

Axes: B requests, N tokens of a flattened ragged batch, V vocabulary, E hidden size of the model that drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from draft.tree import Leaf, TreePosition
from kernels.cpu_decode.stopping import Stopping


class DecoderOutput(Protocol):
    """What a forward returns; read-only here."""

    @property
    def logits(self) -> Tensor | None: ...  # [N, V] or [B, V] float32

    @property
    def hidden(self) -> Tensor: ...  # [N, E], residual stream after the last layer that ran

    @property
    def taps(self) -> Mapping[int, Tensor]: ...  # {i: [N, E]}, residual stream after i layers


class KvSequence(Protocol):
    """One request's key and value cache: `length` tokens are committed; a forward writes behind them, into pages that its caller has reserved, and does
    not move it."""

    @property
    def length(self) -> int: ...

    def reserve(self, n: int) -> None: ...  # pages for n tokens behind the committed ones

    def advance(self, n: int) -> None: ...

    def truncate(self, length: int) -> None: ...

    def free(self) -> None: ...


class KvPool(Protocol):
    """Where sequences get their pages."""

    @property
    def bytes(self) -> int: ...

    def new_sequence(self) -> Any: ...


class CausalDecoder(Protocol):
    """The part of `engine.model.decoder.Decoder` that drafting uses; see there for the meaning of the arguments."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def num_threads(self) -> int: ...

    @property
    def follows_tables(self) -> bool: ...  # whether passes of few tokens read a sequence's pages wherever they lie, at no cost

    @property
    def captured_rows(self) -> int | None: ...  # new tokens up to which passes are captured; None: none is

    def forward(
        self,
        token_ids: Tensor | None,
        sequences: list[Any],
        query_lens: list[int],
        *,
        starts: list[int] | None = None,
        taps: tuple[int, ...] = (),
        logits: Any = "all",
        first_layer: int = 0,
        last_layer: int | None = None,
        hidden: Tensor | None = None,
        tree_positions: list[TreePosition] | None = None,
        deterministic: bool = False,
    ) -> Any: ...

    def head(self, hidden: Tensor, *, deterministic: bool = False) -> Tensor: ...


class FeatureStore(Protocol):
    """The part of `codec.predictor.features.FeatureBuffer` used while decoding: the draft's hidden states, one row per committed token."""

    @property
    def length(self) -> int: ...

    def append(self, rows: Tensor) -> None: ...  # rows [n, taps, E]

    def skip(self, count: int) -> None: ...

    def truncate(self, length: int) -> None: ...


class DraftSampler(Protocol):
    """Draws drafted tokens with each request's own sampling parameters: the same function that later builds the target's distribution."""

    def draw(
        self, logits: Tensor, rows: Sequence[int], positions: Sequence[int], *, token_ids: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """logits [n, V_draft] float32; rows: the request of each row; positions: the sequence index of the token to be drawn. token_ids [V_draft]
        int64, ascending: the target's ids that the columns stand for (None: the columns' numbers); all others have probability 0.

        Returns tokens [n] int64 and, per row, the distribution [V] float32 it was drawn from, or None for a greedy request (a point mass).
        """
        ...

    def takes_likeliest(
        self, rows: Sequence[int]
    ) -> bool: ...  # whether the drafts of these requests are the likeliest tokens, whatever came before


class LikeliestDrafts(Protocol):
    """What a compiled call has drafted; `kernels.cpu_decode.drafts.Drafted`."""

    @property
    def counts(self) -> Any: ...  # drafts of each request, int64 [B]

    @property
    def tokens(self) -> Any: ...  # the likeliest tokens at each depth, the draft first, int64 [B, K, candidates]

    @property
    def probabilities(self) -> Any: ...  # theirs, float32 [B, K, candidates]


class BlockPolicy(Protocol):
    """Ends blocks early; `draft.policy.BlockPolicy`. Requests are named by their number in the batch."""

    @property
    def candidates(self) -> int: ...  # most tokens at one depth

    def looks_at(self, b: int) -> bool: ...  # whether request b's block may end early

    # how many of the likeliest tokens each request of `batch` proposes; 0 ends its block
    def select(self, batch: Sequence[int], probabilities: Sequence[Sequence[float]]) -> list[int]: ...

    def onward(self, batch: Sequence[int]) -> set[int]: ...  # the requests that another draft is looked for

    def stopping(self, batch: Sequence[int]) -> Stopping: ...  # the same for a compiled call

    def caught_up(self, seconds: float) -> None: ...  # what running tokens that the drafter had left out took, before the block


@dataclass
class DraftState:
    """What a drafter keeps per request.

    sequence: the draft's own KV (under an early exit: the target's sequence itself). features: its hidden states of committed tokens, or None
    when nobody asked for them. Invariant: features.length == sequence.length whenever features are kept and the state was never filled
    from outside.
    """

    sequence: Any
    features: FeatureStore | None = None

    @property
    def length(self) -> int:
        """Tokens whose draft KV is committed."""
        return self.sequence.length

    @property
    def num_cached(self) -> int:
        """Tokens that need no further pass before drafts can follow them."""
        return self.sequence.length

    @property
    def rerun_from(self) -> int:
        """First token of the target's sequence that a draft which rests on the target's first layers has these run once more for."""
        return self.num_cached

    @property
    def shareable(self) -> bool:
        """Whether a page of `cache` holds the same tokens as the target's page of that number."""
        return True

    @property
    def knows_text(self) -> bool:
        """Whether drafts would rest on all of the text: not where steps without drafts have left the draft behind what it can catch up with."""
        return True

    @property
    def cache(self) -> Any:
        """The sequence in the draft's own pool."""
        return self.sequence

    def align(self) -> None:
        """Forget what lies beyond the target's sequence, where the draft's cache rests on it."""


@dataclass
class RequestProposal:
    """One request's part of a batch's proposal, and what the drafter must remember of it until it is committed.

    num_drafts: its drafts. probs: per draft the distribution [V] float32 it was drawn from; None is a point mass (a greedy draft, or one that was
    not drawn but read from the text). leaves: tokens beside its drafts. num_pending: committed tokens that the drafter ran before the drafts.
    num_run: all tokens it ran, pending ones and drafts. num_draft_cached: how many of these a draft head's layers ran as well (None: they could not,
    or there is no draft head). hidden [num_run + leaves, E]: states after the first layers, rows of the batch's `Proposal.hidden`. features
    [num_run + leaves, taps, E]: of the same tokens (None: nobody asked for them).
    """

    num_drafts: int = 0
    probs: list[Tensor | None] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    num_pending: int = 0
    num_run: int = 0
    num_draft_cached: int | None = None
    hidden: Tensor | None = None
    features: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows of its verification: its pending token, drafts and leaves."""
        return 1 + self.num_drafts + len(self.leaves)

    @property
    def point_mass(self) -> bool:
        """True when every draft was certain before it was drawn."""
        return all(q is None for q in self.probs)

    def adopt(self, num_kept: int, number: int) -> None:
        """Leaf `number` was accepted after the first num_kept drafts: it takes the place of the draft beside which it stood."""
        if self.hidden is not None:
            self.hidden[1 + num_kept] = self.hidden[self.num_run + number]
            if self.features is not None:
                self.features[1 + num_kept] = self.features[self.num_run + number]
        else:
            # a model of its own has not run the leaf, and the draft in its place was the wrong one
            self.num_run = min(self.num_run, self.num_pending + num_kept)
        if self.num_draft_cached is not None:
            self.num_draft_cached = min(self.num_draft_cached, num_kept + 1)


@dataclass
class Proposal:
    """A batch's drafted tokens.

    tokens [K] int64: all drafts, requests in order. requests: one each. hidden: every request's rows in order, from which the target goes on (None:
    the target starts at its first layer).
    """

    tokens: Tensor
    requests: list[RequestProposal]
    hidden: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> Proposal:
        """No draft for any of `batch` requests, and nothing run."""
        return cls(torch.empty(0, dtype=torch.int64, device=device), [RequestProposal() for _ in range(batch)])


@dataclass(frozen=True)
class ScratchPasses:
    """A drafter's passes over sequences of their own, to be timed; each runs so many tokens.

    draft: one drafting pass, logits included. last: the pass over a block's last draft, which proposes nothing (None: it takes as long as `draft`).
    close: gives the sequences back.
    """

    draft: Callable[[int], Any]
    last: Callable[[int], Any] | None
    close: Callable[[], None]


class Drafter(Protocol):
    """A source of proposals. Pages are reserved by the caller of its methods, for all tokens that are passed and drafted.

    name: for reports. feature_taps: layers whose hidden states are kept. target_taps: taps the target's own prefill must hand to
    `observe_target`, and its verification, where that begins at the first layer, to `observe_verification`. exit_layer: the target's first layers that
    drafts rest on (0: none). resumes_at: first layer the target still has to run on a proposal, exit_layer where that brings the states there, else 0.
    runs_last_draft: whether a block of k drafts costs k + 1 passes instead of k. max_positions: longest sequence the drafter can follow.
    begins_after: new tokens of a request before automatic drafts are worth what the drafter takes to begin.
    deterministic: whether its forwards are batch-invariant; a step sets it where they write keys and values of the target's.
    """

    name: str
    feature_taps: tuple[int, ...]
    exit_layer: int
    max_positions: int
    deterministic: bool

    @property
    def begins_after(self) -> int: ...

    @property
    def resumes_at(self) -> int: ...

    @property
    def runs_last_draft(self) -> bool: ...

    @property
    def target_taps(self) -> tuple[int, ...]: ...

    @property
    def takes_leaves(self) -> bool:
        """Whether its blocks may hold leaves."""
        ...

    @property
    def takes_given(self) -> bool:
        """Whether it can propose tokens from elsewhere."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights beyond the target's."""
        ...

    @property
    def pool_bytes(self) -> int:
        """Bytes of KV pool beyond the target's."""
        ...

    def keep_features(self, taps: tuple[int, ...], new_buffer: Callable[[], FeatureStore]) -> None:
        """From now on opened states keep hidden states of committed tokens at `taps`, each in a buffer of its own."""
        ...

    def open(self, target_sequence: Any) -> DraftState:
        """A state for a request whose target cache is `target_sequence`."""
        ...

    def prefill(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """Run committed tokens that follow each state's `length`; see the implementations for what moves."""
        ...

    def catch_up(self, states: Sequence[DraftState], tokens: Sequence[Sequence[int]]) -> None:
        """Learn of tokens after `num_cached` that the target's cache holds already, or that a separate draft lies behind."""
        ...

    def observe_target(self, states: Sequence[DraftState], query_lens: Sequence[int], taps: Mapping[int, Tensor]) -> None:
        """Take features from a prefill of the target that just ran (flattened taps [N, E]); nothing for a separate model."""
        ...

    def observe_verification(self, states: Sequence[DraftState], proposal: Proposal, taps: Mapping[int, Tensor]) -> None:
        """Take what the drafter keeps of a verification that ran all of the target's layers (flattened taps [N, E]), before the proposal is cut and
        committed."""
        ...

    def propose(
        self,
        states: Sequence[DraftState],
        pending: Sequence[Sequence[int]],
        lengths: Sequence[int],
        sampler: DraftSampler,
        policy: BlockPolicy | None = None,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Proposal:
        """Draft lengths[b] tokens (0 allowed) after pending[b], the committed tokens the drafter has not run (at least one), or fewer where the policy
        ends the block; or propose given[b], tokens from elsewhere, where there are any (lengths[b] is 0 then)."""
        ...

    def commit(self, states: Sequence[DraftState], proposal: Proposal, num_new: Sequence[int]) -> None:
        """Keep what belongs to committed tokens: the step added num_new[b] >= 1 tokens, the last of which no model has run yet."""
        ...

    def close(self, states: Sequence[DraftState]) -> None:
        """Give back what the states hold."""
        ...

    def scratch(self, new_target_sequence: Callable[[], Any]) -> ScratchPasses:
        """Its passes, to be timed. new_target_sequence: makes a sequence of the target's."""
        ...
