"""Triton kernel of `advance`, one program; `reference.py` says what it means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])  # one compilation for all batches of a block
def _advance_kernel(token_ptr, length_ptr, input_ptr, drawn_ptr, batch, BLOCK: tl.constexpr):
    request = tl.arange(0, BLOCK)
    inside = request < batch
    token = tl.load(token_ptr + request, mask=inside)
    length = tl.load(length_ptr + request, mask=inside)
    tl.store(drawn_ptr + (length % 2) * batch + request, token, mask=inside)
    tl.store(input_ptr + request, token, mask=inside)
    tl.store(length_ptr + request, length + 1, mask=inside)


def advance(tokens: torch.Tensor, lengths: torch.Tensor, token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
    """See `reference.advance`."""
    batch = len(tokens)
    _advance_kernel[(1,)](tokens, lengths, token_ids, drawn, batch, BLOCK=max(32, triton.next_power_of_2(batch)), num_warps=1)
