"""Meaning of `advance_block` in plain PyTorch: which drafts of a block are kept, and what that leaves for the next step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockState(NamedTuple):
    """What a step of drafts reads of B requests and leaves for the next one, int64 [B] each.

    length: position of the last token, which no model had run. first: where the next draft's first pass begins. previous, last: the tokens at
    length - 1 and length.
    """

    length: Tensor
    first: Tensor
    previous: Tensor
    last: Tensor


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
    """Keep each request's drafts up to the first that is not the target's own token, and move the state behind the token after them.

    Args:
        tokens: [B, k + 1] int64: the last token, then k drafts.
        own: [B, k + 1] int64: the target's tokens after each of these.
        best: [B, k + 1] int64: its most likely ones, -1 where its logits are not finite; then the request gains nothing.
        num_drafts: [B] int64, at most k: drafts that may be kept; rows behind these say nothing.
        state: written.
        out: [B, k + 2] int64, written: how many tokens are gained, these, and 0 behind them up to k tokens.
        runs_kept: whether the next draft runs all that was kept once more (`first` behind the last token), or the last token that was kept alone.
        accepted: of requests whose drafts were accepted otherwise (`kernels.accept`): [B] bool, true for those that are matched all the same, and
            the others' [B] int64 drafts that are kept and tokens after them.
        exits, hidden: [k + 1, B, E] states of the tokens, of which each request's last kept one is written to hidden [B, E].
    """
    batch, length = len(tokens), tokens.shape[1] - 1
    steps = torch.arange(length + 1, device=tokens.device)
    drafts = tokens[:, 1:]
    kept = ((drafts == own[:, :-1]) & (steps[:-1] < num_drafts[:, None])).long().cumprod(1).sum(1)
    following = own.gather(1, kept[:, None])[:, 0]
    if accepted is not None:
        matched, num_accepted, next_token = accepted
        kept, following = torch.where(matched, kept, num_accepted), torch.where(matched, following, next_token)
    finite = ((best >= 0) | (steps > num_drafts[:, None])).all(1)
    out[:, 0] = torch.where(finite, kept + 1, 0)
    out[:, 1:-1] = drafts
    out[:, -1] = 0
    out[:, 1:].scatter_(1, kept[:, None], following[:, None])
    state.previous.copy_(tokens.gather(1, kept[:, None])[:, 0])
    state.last.copy_(following.clamp_min(0))
    # else the last token that was kept is run once more: after a whole block the draft has not run it
    state.first.copy_(state.length + (1 if runs_kept else kept))
    state.length.add_(kept + 1)
    if exits is not None and hidden is not None:
        hidden.copy_(exits[kept, torch.arange(batch, device=tokens.device)])
