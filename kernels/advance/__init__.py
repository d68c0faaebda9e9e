"""What a step of one token a request leaves for the next one, on the device alone."""

from __future__ import annotations

from torch import Tensor

from kernels.advance import reference
from kernels.dispatch import use_triton

__all__ = ["advance"]


def advance(tokens: Tensor, lengths: Tensor, token_ids: Tensor, drawn: Tensor) -> None:
    """Shapes and meaning in `reference.advance`; through Triton where it applies."""
    if use_triton(tokens, lengths, token_ids, drawn):
        from kernels.advance.triton import advance as launch

        return launch(tokens, lengths, token_ids, drawn)
    return reference.advance(tokens, lengths, token_ids, drawn)
