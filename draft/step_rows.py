"""The target's states of steps without drafts, kept as they are until a draft head on its last states asks for the rows that they give.

Such a step is to cost no more than one that nobody drafts behind: it copies states and launches nothing else. Most of them are asked for all at once,
when drafts begin again.

Axes: S steps, k joined layers, B requests, E hidden size, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from draft.state_join import StateJoin
from kernels.upload import upload


class StepStates(NamedTuple):
    """Where the states of one step lie: source[step] of source [S, k, B, E], which are those after `StateJoin.state_layers`."""

    source: Tensor
    step: int


@dataclass(eq=False)
class StepRows:
    """Rows of tokens that consecutive steps have run for one request, joined when they are asked for.

    embed: token ids [n] int64 -> the target's embeddings [n, E]. source, step, column: the first token's states are source[step, :, column], those of
    the others follow it. before: the fused state [E] of the token before the first, or its states [k, E]; None: not known.
    """

    join: StateJoin
    embed: Callable[[Tensor], Tensor]
    source: Tensor
    step: int
    column: int
    tokens: list[int]
    before: Tensor | None

    @property
    def num_rows(self) -> int:
        """n."""
        return len(self.tokens)

    def follow(self, states: StepStates, column: int) -> bool:
        """Whether a step's states lie behind those of the last token."""
        return states.source is self.source and states.step == self.step + len(self.tokens) and column == self.column

    def last_states(self) -> Tensor:
        """The states [k, E] of the last token: a view."""
        return self.source[self.step + len(self.tokens) - 1, :, self.column]

    def last_fused(self) -> Tensor:
        """The same fused, [E]."""
        return self._fuse(self.last_states()[None])[0]

    def rows(self) -> Tensor:
        """[n, E]."""
        return joined_rows([self])[0]

    def unfused(self) -> Tensor:
        """The states [m, k, E] of the tokens before those of the rows: m = n where the first one's are known unfused, else n - 1."""
        states = self.source[self.step : self.step + len(self.tokens) - 1, :, self.column]
        return states if self.before is None or self.before.dim() == 1 else torch.cat([self.before[None], states])

    def _fuse(self, states: Tensor) -> Tensor:
        """States [n, k, E] -> [n, E]."""
        return self.join.fused(list(states.unbind(1)))


def joined_rows(several: Sequence[StepRows]) -> Sequence[Tensor]:
    """The rows [n, E] of each, made together."""
    first = several[0]
    states = [own.unfused() for own in several]
    fused = (first._fuse(torch.cat(states)) if sum(map(len, states)) else first.source.new_zeros(0, first.source.shape[-1])).split(
        list(map(len, states))
    )
    parts: list[Tensor] = []
    for own, known in zip(several, fused, strict=True):
        if len(known) < own.num_rows:
            parts.append(known.new_zeros(1, known.shape[1]) if own.before is None else own.before[None])
        parts.append(known)
    tokens = upload([token for own in several for token in own.tokens], first.source.device)
    return first.join.rows(torch.cat(parts), first.embed(tokens)).split([own.num_rows for own in several])
