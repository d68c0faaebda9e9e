"""Rejection sampling of a block of drafted tokens: the meaning, in plain PyTorch.

Leviathan, Kalman, Matias: "Fast inference from transformers via speculative decoding" (ICML 2023), algorithm 1; Chen et al.: "Accelerating
large language model decoding with speculative sampling" (2023), algorithm 2. The output's distribution is exactly the target's.
Axes: B requests, K = sum of the drafts over the batch, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.philox.reference import philox_uniform

COUNTER_DRAFT, COUNTER_ACCEPT, COUNTER_SAMPLE = 0, 1, 2
SAMPLE_BLOCK = 1024


class Accepted(NamedTuple):
    num_accepted: Tensor  # [B] int64, drafts kept, from the first on
    next_token: Tensor  # [B] int64, the token after them: resampled at the first rejection, a fresh draw when every draft was kept


def sample_rows(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index per row with probability proportional to its weight, by inverting the cumulative sum.

    weights [n, V] float32, >= 0, at least one positive a row; uniform [n] float32 in [0, 1). Returns [n] int64. Two levels (sums of
    blocks of 1024, then inside one block) keep a 150,000-word row exact to a few float64 roundings and cheap. An index of weight 0 is
    never returned.
    """
    n, vocab = weights.shape
    num_blocks = -(-vocab // SAMPLE_BLOCK)
    padded = torch.nn.functional.pad(weights, (0, num_blocks * SAMPLE_BLOCK - vocab)) if vocab % SAMPLE_BLOCK else weights
    blocks = padded.reshape(n, num_blocks, SAMPLE_BLOCK)
    block_ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniform.double() * block_ends[:, -1]
    # First block whose end lies beyond the wanted mass: such a block is never empty. Rounding up to the total is clamped back.
    block = torch.minimum((block_ends <= wanted[:, None]).sum(-1), (block_ends < block_ends[:, -1:]).sum(-1))
    rows = torch.arange(n, device=weights.device)
    before = torch.where(block > 0, block_ends[rows, (block - 1).clamp_min(0)], torch.zeros_like(wanted))
    inside = blocks[rows, block].double().cumsum(-1)
    offset = torch.minimum((inside <= (wanted - before)[:, None]).sum(-1), (inside < inside[:, -1:]).sum(-1))
    return block * SAMPLE_BLOCK + offset


def accept(
    target_probs: Tensor,
    draft_probs: Tensor,
    draft_tokens: Tensor,
    num_drafts: Tensor,
    seeds: Tensor,
    positions: Tensor,
    max_drafts: int,
    *,
    even: bool = False,
) -> Accepted:
    """Keep each request's drafts up to the first rejection and draw the token that follows.

    target_probs [K + B, V] float32: request b's rows are its num_drafts[b] drafts' distributions, then the one after the last draft.
    draft_probs [K, V] float32 and draft_tokens [K] int64: what each draft was drawn from, and the draft; requests in order.
    num_drafts [B] int64 (0 allowed), seeds [B] int64, positions [B] int64: the sequence index of each request's first draft.
    max_drafts: the largest of num_drafts, known to the host (so that nothing is read back). even: every request has max_drafts rows of draft_probs
    and max_drafts + 1 of target_probs; of one with fewer drafts the later ones are padding.
    Draft i is kept when u * q(x) < p(x), u from (seed, position + i, COUNTER_ACCEPT); the next token is drawn from max(p - q, 0), or from p
    when all were kept, with (seed, its position, COUNTER_SAMPLE).
    """
    batch, device = num_drafts.shape[0], num_drafts.device
    numbers = torch.arange(batch, device=device)
    draft_starts = numbers * max_drafts if even else num_drafts.cumsum(0) - num_drafts
    target_starts = draft_starts + numbers
    num_accepted = torch.zeros_like(num_drafts)
    if max_drafts > 0:
        steps = torch.arange(max_drafts, device=device)
        present = steps < num_drafts[:, None]  # [B, max_drafts]
        draft_rows = (draft_starts[:, None] + steps).clamp_max(draft_tokens.shape[0] - 1)
        target_rows = (target_starts[:, None] + steps).clamp_max(target_probs.shape[0] - 1)
        tokens = draft_tokens[draft_rows]
        p, q = target_probs[target_rows, tokens], draft_probs[draft_rows, tokens]
        uniform = philox_uniform(seeds[:, None], positions[:, None] + steps, COUNTER_ACCEPT)
        kept = present & (uniform * q < p)
        num_accepted = kept.long().cumprod(-1).sum(-1)
    weights = target_probs[target_starts + num_accepted]
    if max_drafts > 0:
        rejected = num_accepted < num_drafts
        q_rows = draft_probs[(draft_starts + num_accepted).clamp_max(draft_tokens.shape[0] - 1)]
        residual = (weights - q_rows).clamp_min(0)
        # p and q equal up to rounding leave no residual mass: then p itself is the residual's limit.
        use_residual = rejected & (residual.sum(-1) > 0)
        weights = torch.where(use_residual[:, None], residual, weights)
    uniform = philox_uniform(seeds, positions + num_accepted, COUNTER_SAMPLE)
    return Accepted(num_accepted, sample_rows(weights, uniform))
