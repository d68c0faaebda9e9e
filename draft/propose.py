"""The autoregressive drafting loop over a ragged batch, shared by a draft model and an early exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from draft.draft_head import DraftHeadBlock
from draft.policy import likeliest
from draft.protocols import BlockPolicy, CausalDecoder, DraftSampler, Proposal, RequestProposal
from draft.rows import pick
from draft.tree import Leaf, TreePosition, leaf_slot
from kernels.upload import upload


def draft_block(
    decoder: CausalDecoder,
    sequences: Sequence[Any],
    pending: Sequence[Sequence[int]],
    lengths: Sequence[int],
    sampler: DraftSampler,
    policy: BlockPolicy | None = None,
    given: Sequence[Sequence[int]] | None = None,
    *,
    last_layer: int | None,
    runs_last_draft: bool,
    taps: tuple[int, ...],
    deterministic: bool,
    draft_layers: DraftHeadBlock | None = None,
) -> Proposal:
    """Run pending[b] and then draft lengths[b] tokens for every request, feeding each draft back.

    decoder runs layers [0, last_layer) and its own head, or draft_layers run on their states and speak in its place (a draft head: there every
    request has one pending token; taps above last_layer are draft_layers'). Requests with lengths[b] == 0 are skipped unless runs_last_draft
    (early exit), where every request's last draft, or its pending token, is run too because verification goes on from its hidden state. Sequences do
    not move. Drafts are drawn at sequence positions length + len(pending) + i by `sampler`. They are never read back to the host here, except in a
    pass where the policy looks at a request. Its leaves run beside their draft, where the last draft is run at all. Given drafts are proposed as they
    are, and run only where the last draft is: all in the first pass.
    """
    batch, device, lengths = len(sequences), decoder.device, list(lengths)
    given = given or [()] * batch
    vocab_size = decoder.config.vocab_size
    bases = [sequence.length + len(tokens) for sequence, tokens in zip(sequences, pending, strict=True)]
    rows = [b for b in range(batch) if lengths[b] > 0 or runs_last_draft]
    query_lens = [len(pending[b]) + len(given[b]) for b in rows]
    starts = [sequences[b].length for b in rows]
    tokens = upload([t for b in rows for t in (*pending[b], *given[b])], device)

    beside: list[list[int]] = [[] for _ in rows]  # leaves in the pass at hand, target's ids
    leaves: list[list[Leaf]] = [[] for _ in range(batch)]
    passes: list[tuple[Tensor, dict[int, Tensor]]] = []  # hidden and taps of each forward
    run_at: list[list[int]] = [[] for _ in range(batch)]  # where each request's run tokens lie in the concatenated passes
    side_at: list[list[int]] = [[] for _ in range(batch)]  # the same of its leaves
    draws: list[Tensor] = []
    drawn_at: list[list[int]] = [[] for _ in range(batch)]
    probs: list[list[Tensor | None]] = [[] for _ in range(batch)]
    num_run = num_drawn = step = 0
    token_ids = {} if draft_layers is None else {"token_ids": draft_layers.draft_head.token_ids}
    decoder_taps = taps if draft_layers is None else tuple(tap for tap in taps if tap <= (last_layer or 0))
    while rows:
        # Ids beyond the drafter's own embedding (vocabularies may differ in padding) can only cost acceptance, never correctness.
        out = decoder.forward(
            tokens.clamp_max(vocab_size - 1),
            [sequences[b] for b in rows],
            query_lens,
            starts=starts,
            taps=decoder_taps,
            logits="none",
            last_layer=last_layer,
            deterministic=deterministic,
            tree_positions=_placed(rows, starts, beside, leaves),
        )
        passes.append((out.hidden, dict(out.taps) if decoder_taps else {}))
        ends = torch.tensor(query_lens).cumsum(0).tolist()
        speaks = [end - 1 - len(others) for end, others in zip(ends, beside, strict=True)]
        for b, end, count, speaker in zip(rows, ends, query_lens, speaks, strict=True):
            run_at[b] += range(num_run + end - count, num_run + speaker + 1)
            side_at[b] += range(num_run + speaker + 1, num_run + end)
        num_run += ends[-1]

        drawing = [i for i, b in enumerate(rows) if lengths[b] > step]
        logits = None
        if draft_layers is not None:
            logits, more = draft_layers.step(rows, pick(out.hidden, speaks), drawing)
            passes[-1][1].update({(last_layer or 0) + i: states for i, states in more.items()})
        elif drawing:
            logits = decoder.head(pick(out.hidden, [speaks[i] for i in drawing]), deterministic=deterministic)
        if logits is None:
            break
        drafted = [rows[i] for i in drawing]
        drawn, distributions = sampler.draw(logits, drafted, [bases[b] + step for b in drafted], **token_ids)
        draws.append(drawn)
        kept = list(range(len(drafted)))
        others: list[list[int]] = [[] for _ in drafted]
        if policy is not None and any(map(policy.looks_at, drafted)):
            kept, others = _stopped_drafts(logits, drawn, distributions, drafted, policy, token_ids.get("token_ids"))
            onward_rows = policy.onward([drafted[i] for i in kept if lengths[drafted[i]] > step + 1])
            for i, b in enumerate(drafted):
                leaves[b] += [Leaf(step + 1, token) for token in others[i]]
                if b not in onward_rows:
                    lengths[b] = step + (i in kept)
        for i in kept:
            drawn_at[drafted[i]].append(num_drawn + i)
            probs[drafted[i]].append(distributions[i])
        num_drawn += len(drafted)

        step += 1
        onward = [i for i in kept if lengths[drafted[i]] > step or runs_last_draft]
        rows = [drafted[i] for i in onward]
        beside = [others[i] if runs_last_draft else [] for i in onward]
        tokens = pick(drawn, onward)
        if any(beside):
            tokens = torch.tensor(
                [t for own, others_here in zip(tokens.tolist(), beside, strict=True) for t in (own, *others_here)], device=device
            )
        query_lens, starts = [1 + len(others_here) for others_here in beside], [bases[b] + step - 1 for b in rows]

    hidden = torch.cat([h for h, _ in passes]) if passes and runs_last_draft else None
    stacked = None
    if taps and passes:
        stacked = torch.cat([torch.stack([values[i] for i in taps], dim=1) for _, values in passes])  # [N, taps, E]
    proposal = Proposal.empty(batch, device)
    if any(given):
        known = [(b, token) for b in range(batch) for token in given[b]]
        for b, _ in known:
            drawn_at[b].append(num_drawn)
            probs[b].append(None)
            num_drawn += 1
        draws.append(upload([token for _, token in known], device))
    if draws:
        proposal.tokens = pick(torch.cat(draws), [i for own in drawn_at for i in own])
    if hidden is not None:
        proposal.hidden = pick(hidden, [i for b in range(batch) for i in run_at[b] + side_at[b]])
    at = 0
    for b in range(batch):
        rows_of = run_at[b] + side_at[b]
        proposal.requests[b] = RequestProposal(
            num_drafts=len(probs[b]),
            probs=probs[b],
            leaves=leaves[b],
            num_pending=len(pending[b]) if rows_of else 0,
            num_run=len(run_at[b]),
            num_draft_cached=None if draft_layers is None else draft_layers.num_run[b],
            hidden=None if proposal.hidden is None else proposal.hidden[at : at + len(rows_of)],
            features=None if stacked is None else pick(stacked, rows_of),
        )
        at += len(rows_of)
    return proposal


def given_proposal(given: Sequence[Sequence[int]], device: torch.device) -> Proposal:
    """Tokens from elsewhere as a proposal, where there is no drafter that runs anything."""
    tokens = upload([token for own in given for token in own], device)
    return Proposal(tokens, [RequestProposal(len(own), [None] * len(own)) for own in given])


def _stopped_drafts(
    logits: Tensor,
    drawn: Tensor,
    distributions: Sequence[Tensor | None],
    requests: Sequence[int],
    policy: BlockPolicy,
    token_ids: Tensor | None,
) -> tuple[list[int], list[list[int]]]:
    """(rows whose draft is kept, per row the target's ids of its leaves) of drafts `drawn` from logits [n, V]."""
    probabilities, columns = likeliest(logits, distributions, policy.candidates)
    kept, leaves = [], []
    for i, count in enumerate(policy.select(requests, probabilities)):
        if count:
            kept.append(i)
        own = int(drawn[i]) if count > 1 else None
        found = [column if token_ids is None else int(token_ids[column]) for column in columns[i][:count]] if count > 1 else []
        leaves.append([token for token in found if token != own][: count - 1])
    return kept, leaves


def _placed(rows: list[int], starts: list[int], beside: list[list[int]], leaves: list[list[Leaf]]) -> list[TreePosition] | None:
    """Tree positions of a pass in which some draft has leaves beside it; None where none has."""
    if not any(beside):
        return None
    tree_positions = []
    for b, start, others in zip(rows, starts, beside, strict=True):
        slots = []
        if others:
            base = start + 1 - leaves[b][-1].depth
            slots = [leaf_slot(base, number) for number in range(len(leaves[b]) - len(others), len(leaves[b]))]
        tree_positions.append(TreePosition([start] * (1 + len(others)), [start, *slots]))
    return tree_positions
