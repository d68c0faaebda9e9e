"""One forward pass as one value, which every runner of a model's passes takes as it is: the decoder, captured steps, compiled steps.

Axes: B requests, N = sum of new tokens over the batch (flattened, ragged), L layers, H query heads, d head size, E hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch

from draft.tree import TreePosition
from engine.errors import InvalidOption
from engine.kv.pool import KvSequence
from engine.model.attention import AttentionBatch

Logits = Literal["all", "last", "none"]
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]  # (layer, queries before rotation [N, H, d], residual stream after it [N, E])


class DecoderOutput(NamedTuple):
    """What a forward pass returns."""

    logits: torch.Tensor | None  # float32 [N, V] ("all"), [B, V] ("last") or None ("none", or the last layer was not run)
    hidden: torch.Tensor  # [N, E] residual stream after the last layer run, before the final norm
    taps: dict[int, torch.Tensor]  # layer count i -> [N, E] residual stream after i layers


@dataclass(frozen=True)
class ForwardPass:
    """New tokens of a ragged batch, one request's after another's, and what is run of the model and returned.

    Args:
        token_ids: [N] int64; not used, and may be None, when `hidden` is given.
        sequences: B, one per request, all of one pool of the model; they own the pages of their new tokens alone.
        query_lens: B, new tokens of each request, at least 1.
        starts: B, position of each request's first new token.
        layers: to be run, within 0 to L.
        taps: layer counts i (0 to L) whose residual stream is returned: 0 the embeddings, L before the final norm.
        logits: of all new tokens, of each request's last, or none. Only computed when the last layer is run.
        hidden: [N, E] residual stream to start from; needed when the first layer is not run.
        tree_positions: B, where the new tokens of each request stand, if they do not follow one another from `starts` on (draft trees).
        observe: called after each layer with its number, its queries before rotation and the residual stream after it.
        deterministic: the result of a token is the same bits alone, in any batch and in any block.
    """

    token_ids: torch.Tensor | None
    sequences: list[KvSequence]
    query_lens: list[int]
    starts: list[int]
    layers: range
    taps: tuple[int, ...] = ()
    logits: Logits = "all"
    hidden: torch.Tensor | None = None
    tree_positions: list[TreePosition] | None = None
    observe: Observer | None = None
    deterministic: bool = False

    @property
    def source(self) -> torch.Tensor | None:
        """What the first layer starts from, a row a new token: hidden states [N, E], else token ids [N]; None where neither is given."""
        return self.token_ids if self.hidden is None else self.hidden

    @property
    def batch(self) -> AttentionBatch:
        """What attention needs to know of it."""
        return AttentionBatch(self.sequences, self.query_lens, self.starts, self.tree_positions)

    @property
    def ends(self) -> list[int]:
        """Row of each request's last new token."""
        return list(accumulate(self.query_lens, initial=-1))[1:]

    def speaks(self, depth: int) -> bool:
        """Whether a model of `depth` layers computes logits in it."""
        return self.logits != "none" and self.layers.stop == depth

    def of(self, source: torch.Tensor, sequences: list[KvSequence], query_lens: Sequence[int], starts: Sequence[int]) -> ForwardPass:
        """The same pass over other rows, in consecutive places."""
        ids, hidden = (source, None) if self.hidden is None else (self.token_ids, source)
        lens, firsts = list(query_lens), list(starts)
        return replace(self, token_ids=ids, hidden=hidden, sequences=sequences, query_lens=lens, starts=firsts, tree_positions=None)

    def check(self, depth: int) -> None:
        """Raises InvalidOption where its parts do not fit each other, or a model of `depth` layers."""
        first, last, count = self.layers.start, self.layers.stop, sum(self.query_lens)
        if not self.sequences or len(self.sequences) != len(self.query_lens) or min(self.query_lens) < 1:
            raise InvalidOption("a batch needs one query length of at least 1 per sequence", "check sequences and query_lens")
        if len(self.starts) != len(self.sequences) or min(self.starts) < 0:
            raise InvalidOption("a batch needs one start of at least 0 per sequence", "check starts")
        if not 0 <= first <= last <= depth:
            raise InvalidOption(f"layers {first} to {last} are not within 0 to {depth}", "check first_layer and last_layer")
        if any(not first <= tap <= last for tap in self.taps):
            raise InvalidOption(f"taps {self.taps} are not all within the layers run, {first} to {last}", "ask for taps of those layers")
        source = self.source
        if source is None or (self.hidden is None and first > 0):
            raise InvalidOption("a forward pass without token ids, or from a later layer, needs hidden states", "pass hidden")
        if source.shape[0] != count:
            raise InvalidOption(f"{source.shape[0]} rows were given for {count} new tokens", "make query_lens sum to the number of rows")


class PassRunner(ABC):
    """Whoever runs a model's forward passes: callers spell one out (`forward`), the runner takes it as one value (`run`)."""

    config: Any  # of the model

    @abstractmethod
    def run(self, asked: ForwardPass) -> DecoderOutput:
        """Run new tokens of a ragged batch through the layers, write their keys and values, attend causally to all before.

        Pages are the caller's business, and sequence lengths do not move: commit with `sequence.advance(n)`, roll back by not doing so.

        Raises:
            InvalidOption: the pass's parts do not fit each other.
            PagesNotReserved: a sequence does not own its new tokens' pages alone (`KvSequence.ensure`).
        """

    def forward(
        self,
        token_ids: torch.Tensor | None,
        sequences: list[KvSequence],
        query_lens: list[int],
        *,
        starts: list[int] | None = None,
        taps: tuple[int, ...] = (),
        logits: Logits = "all",
        first_layer: int = 0,
        last_layer: int | None = None,
        hidden: torch.Tensor | None = None,
        observe: Observer | None = None,
        tree_positions: list[TreePosition] | None = None,
        deterministic: bool = False,
    ) -> DecoderOutput:
        """`run` of a pass with these parts, by the names that `ForwardPass` explains.

        starts: None is each sequence's length. first_layer, last_layer: run layers [first_layer, last_layer); last_layer None is L.
        """
        return self.run(
            ForwardPass(
                token_ids,
                sequences,
                query_lens,
                [sequence.length for sequence in sequences] if starts is None else starts,
                range(first_layer, self.config.num_layers if last_layer is None else last_layer),
                taps,
                logits,
                hidden,
                tree_positions,
                observe,
                deterministic,
            )
        )
