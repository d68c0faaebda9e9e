"""Which drafts of a step are kept, and what that leaves for the next step, on the device alone."""

from __future__ import annotations

from torch import Tensor

from kernels.advance_block import reference
from kernels.advance_block.reference import BlockState
from kernels.dispatch import use_triton

__all__ = ["BlockState", "advance_block"]


def advance_block(
    tokens: Tensor,
    own: Tensor,
    best: Tensor,
    num_drafts: Tensor,
    state: BlockState,
    out: Tensor,
    *,
    runs_kept: bool,
    accepted: tuple[Tensor, Tensor, Tensor] | None = None,
    exits: Tensor | None = None,
    hidden: Tensor | None = None,
) -> None:
    """Shapes and meaning in `reference.advance_block`; through Triton where it applies."""
    launch = reference.advance_block
    if use_triton(tokens, own, best, out):
        from kernels.advance_block.triton import advance_block as launch
    return launch(tokens, own, best, num_drafts, state, out, runs_kept=runs_kept, accepted=accepted, exits=exits, hidden=hidden)
