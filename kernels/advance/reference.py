"""Meaning of `advance` in plain PyTorch: what a step of one token a request leaves for the next one."""

from __future__ import annotations

import torch
from torch import Tensor


def advance(tokens: Tensor, lengths: Tensor, token_ids: Tensor, drawn: Tensor) -> None:
    """Make the tokens that a step drew the next step's input, one position further on, and keep them for whoever reads them meanwhile.

    Args:
        tokens: [B] int64, drawn behind lengths[b] + 1 tokens.
        lengths: [B] int64, position of each request's token that was run; grows by one.
        token_ids: [B] int64, written: the next step's tokens.
        drawn: [2, B] int64, row lengths[b] % 2 of request b written; the other one holds what the step before drew.
    """
    batch = len(tokens)
    drawn[lengths % 2, torch.arange(batch, device=tokens.device)] = tokens
    token_ids.copy_(tokens)
    lengths.add_(1)
