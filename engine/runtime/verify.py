"""Verification of a ragged batch of proposals: greedy match, or exact rejection sampling."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from draft.protocols import Proposal
from engine.runtime.sampling import BatchSampler, probabilities
from kernels.accept import accept


def verify(logits: Tensor, proposal: Proposal, sampler: BatchSampler, positions: list[int]) -> tuple[list[list[int]], list[int | None]]:
    """(the tokens each request gains: its accepted drafts, then one token of the target's own; the sibling among them, if one was accepted).

    logits [K + B, V] float32: for every request the target's rows after its pending token and after each of its drafts and siblings. positions: the
    sequence index of each request's first new token. Greedy requests keep drafts while they equal the largest logit, and then a sibling that does;
    the others, which have no siblings, go through `kernels.accept`, on distributions made by the same function that made the drafts'. One read-back
    to the host.
    """
    lengths = proposal.lengths
    adopted: list[int | None] = [None] * len(lengths)
    greedy = [b for b in range(len(lengths)) if sampler.params[b].greedy]
    sampled = [b for b in range(len(lengths)) if not sampler.params[b].greedy]
    draft_starts = [0, *accumulate(lengths)][:-1]
    row_starts = [0, *accumulate(length + 1 + proposal.num_siblings(b) for b, length in enumerate(lengths))][:-1]
    runs: list[list[int]] = [[] for _ in lengths]
    drafts = proposal.tokens.tolist()

    if greedy:
        rows = [r for b in greedy for r in range(row_starts[b], row_starts[b] + lengths[b] + 1 + proposal.num_siblings(b))]
        best = iter((logits if not sampled else logits[torch.tensor(rows, device=logits.device)]).argmax(-1).tolist())
        for b in greedy:
            own = [next(best) for _ in range(lengths[b] + 1)]
            kept = 0
            while kept < lengths[b] and drafts[draft_starts[b] + kept] == own[kept]:
                kept += 1
            runs[b] = own[: kept + 1]
            for number in range(proposal.num_siblings(b)):
                after = next(best)
                if proposal.siblings[b][number] == (kept + 1, own[kept]) and kept < lengths[b]:
                    adopted[b] = number
                    runs[b].append(after)

    if sampled:
        rows = [r for b in sampled for r in range(row_starts[b], row_starts[b] + lengths[b] + 1)]
        places = [d for b in sampled for d in range(draft_starts[b], draft_starts[b] + lengths[b])]
        device = logits.device
        own_logits = logits if not greedy else logits[torch.tensor(rows, device=device)]
        target_probs = probabilities(own_logits, [sampler.params[b] for b in sampled for _ in range(lengths[b] + 1)])
        drawn_from = [q for d in places if (q := proposal.probs[d]) is not None]
        draft_probs = torch.stack(drawn_from) if drawn_from else target_probs[:0]
        tokens = proposal.tokens if not greedy else proposal.tokens[torch.tensor(places, dtype=torch.int64, device=device)]
        seeds, starts = sampler.counters(sampled, [positions[b] for b in sampled], device)
        counts = [lengths[b] for b in sampled]
        kept_counts, following = accept(target_probs, draft_probs, tokens, torch.tensor(counts, device=device), seeds, starts, max(counts))
        for b, kept, token in zip(sampled, kept_counts.tolist(), following.tolist(), strict=True):
            runs[b] = [*drafts[draft_starts[b] : draft_starts[b] + kept], token]
    return runs, adopted
