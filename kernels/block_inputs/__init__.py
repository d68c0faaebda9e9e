"""Where the tokens of a drafting pass or a verification stand, from lengths that only the device knows."""

from __future__ import annotations

from torch import Tensor

from kernels.block_inputs import reference
from kernels.dispatch import use_triton

__all__ = ["block_inputs"]


def block_inputs(
    lengths: Tensor,
    firsts: Tensor,
    limits: Tensor,
    page_table: Tensor,
    offset: int,
    page_size: int,
    positions: Tensor,
    slots: Tensor,
    context_lens: Tensor,
) -> None:
    """Shapes and meaning in `reference.block_inputs`; through Triton where it applies."""
    arguments = (lengths, firsts, limits, page_table, offset, page_size, positions, slots, context_lens)
    if use_triton(lengths, page_table, positions):
        from kernels.block_inputs.triton import block_inputs as launch

        return launch(*arguments)
    return reference.block_inputs(*arguments)
