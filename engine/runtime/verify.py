"""Verification of a ragged batch of proposals: match of tokens that do not depend on drafts, or exact rejection sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from draft.protocols import Proposal, RequestProposal
from engine.runtime.sampling import BatchSampler, finite_rows, probabilities
from kernels.accept import COUNTER_SAMPLE, accept
from kernels.upload import upload


class Verdict(NamedTuple):
    """What a request gains. tokens: its accepted drafts, then one of the target's own; none where its logits are not finite. leaf: the number of the
    leaf among them, if one was accepted."""

    tokens: list[int]
    leaf: int | None = None


@dataclass
class _Block:
    """One request's rows in a verification. row, draft: where its rows and its drafts begin in the batch's. position: sequence index of its first
    new token. drafts: their ids."""

    request: int
    own: RequestProposal
    row: int
    draft: int
    position: int
    drafts: list[int]

    def chain(self) -> Iterator[tuple[int, int, Sequence[int]]]:
        """(request, position of the token that follows, drafts before it) of the rows of its pending token and drafts."""
        for i in range(self.own.num_drafts + 1):
            yield self.request, self.position + i, self.drafts[:i]


def verify(logits: Tensor, proposal: Proposal, sampler: BatchSampler, positions: list[int]) -> list[Verdict]:
    """What each request gains from its proposal.

    logits [K + B, V] float32: for every request the target's rows after its pending token and after each of its drafts and leaves. positions: the
    sequence index of each request's first new token.

    Greedy requests and those with a seed (`SamplingParams.coupled`) keep drafts while they equal the target's own token, the largest logit or the
    winner of the race, and then a leaf that does: their text does not depend on the drafts. So do requests whose drafts were not drawn at random:
    where q is a point mass, rejection sampling keeps a draft with probability p(draft) and else draws from p without it, which is to draw from p and
    keep the draft that was drawn. The others, which have no leaves, go through `kernels.accept`, on distributions made by the same function that
    made the drafts'. A request with logits that are not finite gains no token.
    """
    known = torch.cat((proposal.tokens, finite_rows(logits).long())).tolist()  # one read-back
    num_drafts = len(proposal.tokens)
    blocks, row, draft = [], 0, 0
    for b, own in enumerate(proposal.requests):
        blocks.append(_Block(b, own, row, draft, positions[b], known[draft : draft + own.num_drafts]))
        row, draft = row + own.num_rows, draft + own.num_drafts
    verdicts = [Verdict([]) for _ in blocks]
    matched = [block for block in blocks if sampler.params[block.request].coupled or block.own.point_mass]
    rejecting = [block for block in blocks if not (sampler.params[block.request].coupled or block.own.point_mass)]
    if matched:
        _match(logits, matched, sampler, verdicts)
    if rejecting:
        _reject(logits, proposal, rejecting, sampler, verdicts)
    for block in blocks:
        if not all(known[num_drafts + block.row : num_drafts + block.row + block.own.num_rows]):
            verdicts[block.request] = Verdict([])
    return verdicts


def _match(logits: Tensor, blocks: Sequence[_Block], sampler: BatchSampler, verdicts: list[Verdict]) -> None:
    """Keep drafts while they are the target's own tokens."""
    places: list[tuple[int, int, Sequence[int]]] = []
    for block in blocks:
        places += block.chain()
        places += [(block.request, block.position + leaf.depth, [*block.drafts[: leaf.depth - 1], leaf.token]) for leaf in block.own.leaves]
    rows = [block.row + i for block in blocks for i in range(block.own.num_rows)]
    owners, at, before = zip(*places, strict=True)
    named = iter(sampler.draw_after(_rows(logits, rows), owners, at, before, COUNTER_SAMPLE)[0].tolist())
    for block in blocks:
        target = [next(named) for _ in range(block.own.num_drafts + 1)]
        kept = 0
        while kept < block.own.num_drafts and block.drafts[kept] == target[kept]:
            kept += 1
        gained, adopted = target[: kept + 1], None
        for number, leaf in enumerate(block.own.leaves):
            after = next(named)
            if kept < block.own.num_drafts and leaf == (kept + 1, target[kept]):
                gained, adopted = [*gained, after], number
        verdicts[block.request] = Verdict(gained, adopted)


def _reject(logits: Tensor, proposal: Proposal, blocks: Sequence[_Block], sampler: BatchSampler, verdicts: list[Verdict]) -> None:
    """Rejection sampling of drafts that were drawn at random."""
    device = logits.device
    places = [place for block in blocks for place in block.chain()]
    owners, before = [place[0] for place in places], [place[2] for place in places]
    rows = [block.row + i for block in blocks for i in range(block.own.num_drafts + 1)]
    target_probs = probabilities(sampler.penalise(_rows(logits, rows), owners, before), [sampler.params[b] for b in owners])
    draft_probs = torch.stack([q for block in blocks for q in block.own.probs if q is not None])
    tokens = _rows(proposal.tokens, [block.draft + i for block in blocks for i in range(block.own.num_drafts)])
    counts = [block.own.num_drafts for block in blocks]
    seeds, starts = sampler.counters([block.request for block in blocks], [block.position for block in blocks], device)
    kept_counts, following = accept(target_probs, draft_probs, tokens, upload(counts, device), seeds, starts, max(counts))
    for block, kept, token in zip(blocks, kept_counts.tolist(), following.tolist(), strict=True):
        verdicts[block.request] = Verdict([*block.drafts[:kept], token])


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """The given rows, ascending; `values` itself where these are all."""
    return values if len(rows) == len(values) else values[upload(rows, values.device)]
