"""The rows that a draft head on the target's last states runs on: a token's embedding joined with the target's state of the token before it.

EAGLE (Li et al., 2024, arXiv 2401.15077) joins the last layer's state, EAGLE-3 (Li et al., 2025, arXiv 2503.01840) those of several layers, which a
matrix fuses first. While drafting, the head's own output stands for the target's state of what was drafted.

Axes: N tokens, E hidden size, k joined layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rms_norm import rms_norm


@dataclass(frozen=True)
class StateJoin:
    """state_layers: numbers of the target's layers whose states are joined, its last one at the end. state_norm, embed_norm: [E]. join: [E, 2E], of the
    normed state and the normed embedding. fuse: [E, kE], of the k states, each normed without a weight; None for the last state alone."""

    state_layers: tuple[int, ...]
    state_norm: Tensor
    embed_norm: Tensor
    join: Tensor
    fuse: Tensor | None
    eps: float
    _ones: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ones", torch.ones_like(self.state_norm))  # beforehand: not within a step that is captured

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(part.nbytes for part in (self.state_norm, self.embed_norm, self.join, self.fuse) if part is not None)

    def fused(self, states: list[Tensor]) -> Tensor:
        """The target's states after `state_layers` layers, each [N, E] -> what stands for them all [N, E]."""
        if self.fuse is None:
            return states[-1]
        stacked = torch.stack(states, 1)  # [N, k, E]: one norm of all
        normed, _ = rms_norm(stacked.view(-1, stacked.shape[-1]), self._ones, self.eps)
        return F.linear(normed.view(len(stacked), -1), self.fuse)

    def embedded(self, embeddings: Tensor) -> Tensor:
        """The embeddings' part of rows [N, E], which `rows_of` adds to the states' part."""
        size = self.join.shape[0]
        return F.linear(rms_norm(embeddings, self.embed_norm, self.eps)[0], self.join[:, size:])

    def rows_of(self, states: Tensor, embedded: Tensor, out: Tensor) -> None:
        """`rows` from states [N, E] and what `embedded` gave for their tokens [N, E], written to out [N, E]: in few operations, for captured steps."""
        torch.addmm(embedded, rms_norm(states, self.state_norm, self.eps)[0], self.join[:, : self.join.shape[0]].T, out=out)

    def rows(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Rows of the own layers [N, E] from fused or own states of the tokens before and embeddings, each [N, E]; an unknown state is 0."""
        parts = (states, self.state_norm), (embeddings, self.embed_norm)
        return F.linear(torch.cat([rms_norm(part, weight, self.eps)[0] for part, weight in parts], -1), self.join)
