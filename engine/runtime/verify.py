"""Verification of a ragged batch of proposals: match of tokens that do not depend on drafts, or exact rejection sampling."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from draft.protocols import Proposal
from engine.runtime.sampling import BatchSampler, finite_rows, probabilities
from kernels.accept import LANE_SAMPLE, accept


def verify(logits: Tensor, proposal: Proposal, sampler: BatchSampler, positions: list[int]) -> tuple[list[list[int]], list[int | None]]:
    """(the tokens each request gains: its accepted drafts, then one token of the target's own; the leaf among them, if one was accepted).

    logits [K + B, V] float32: for every request the target's rows after its pending token and after each of its drafts and leaves. positions: the
    sequence index of each request's first new token.

    Greedy requests and those with a seed (`SamplingParams.coupled`) keep drafts while they equal the target's own token, the largest logit or the
    winner of the race, and then a leaf that does: their text does not depend on the drafts. The others, which have no leaves, go through
    `kernels.accept`, on distributions made by the same function that made the drafts'. A request with logits that are not finite gains no token.
    """
    lengths = proposal.lengths
    adopted: list[int | None] = [None] * len(lengths)
    coupled = [b for b in range(len(lengths)) if sampler.params[b].coupled]
    rejecting = [b for b in range(len(lengths)) if not sampler.params[b].coupled]
    draft_starts = [0, *accumulate(lengths)][:-1]
    row_starts = [0, *accumulate(length + 1 + proposal.num_leaves(b) for b, length in enumerate(lengths))]
    runs: list[list[int]] = [[] for _ in lengths]
    known = torch.cat((proposal.tokens, finite_rows(logits).long())).tolist()  # one read-back
    flat, finite = known[: sum(lengths)], known[sum(lengths) :]
    drafts = [flat[start : start + length] for start, length in zip(draft_starts, lengths, strict=True)]

    if coupled:
        owners: list[int] = []
        places: list[int] = []
        before: list[list[int]] = []
        for b in coupled:
            owners += [b] * (row_starts[b + 1] - row_starts[b])
            places += range(positions[b], positions[b] + lengths[b] + 1)
            before += [drafts[b][:i] for i in range(lengths[b] + 1)]
            for leaf in proposal.leaves[b] if proposal.leaves else []:
                places.append(positions[b] + leaf.depth)
                before.append([*drafts[b][: leaf.depth - 1], leaf.token])
        rows = [r for b in coupled for r in range(row_starts[b], row_starts[b + 1])]
        own_logits = logits if not rejecting else logits[torch.tensor(rows, device=logits.device)]
        named = iter(sampler.draw_after(own_logits, owners, places, before, LANE_SAMPLE)[0].tolist())
        for b in coupled:
            own = [next(named) for _ in range(lengths[b] + 1)]
            kept = 0
            while kept < lengths[b] and drafts[b][kept] == own[kept]:
                kept += 1
            runs[b] = own[: kept + 1]
            for number in range(proposal.num_leaves(b)):
                after = next(named)
                if kept < lengths[b] and proposal.leaves[b][number] == (kept + 1, own[kept]):
                    adopted[b] = number
                    runs[b].append(after)

    if rejecting:
        rows = [r for b in rejecting for r in range(row_starts[b], row_starts[b] + lengths[b] + 1)]
        at = [d for b in rejecting for d in range(draft_starts[b], draft_starts[b] + lengths[b])]
        device = logits.device
        own_logits = logits if not coupled else logits[torch.tensor(rows, device=device)]
        owners = [b for b in rejecting for _ in range(lengths[b] + 1)]
        own_logits = sampler.penalise(own_logits, owners, [drafts[b][:i] for b in rejecting for i in range(lengths[b] + 1)])
        target_probs = probabilities(own_logits, [sampler.params[b] for b in owners])
        drawn_from = [q for d in at if (q := proposal.probs[d]) is not None]
        draft_probs = torch.stack(drawn_from) if drawn_from else target_probs[:0]
        tokens = proposal.tokens if not coupled else proposal.tokens[torch.tensor(at, dtype=torch.int64, device=device)]
        seeds, starts = sampler.counters(rejecting, [positions[b] for b in rejecting], device)
        counts = [lengths[b] for b in rejecting]
        kept_counts, following = accept(target_probs, draft_probs, tokens, torch.tensor(counts, device=device), seeds, starts, max(counts))
        for b, kept, token in zip(rejecting, kept_counts.tolist(), following.tolist(), strict=True):
            runs[b] = [*drafts[b][:kept], token]

    for b in range(len(lengths)):
        if not all(finite[row_starts[b] : row_starts[b + 1]]):
            runs[b], adopted[b] = [], None
    return runs, adopted
