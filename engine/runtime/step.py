"""One step of the engine: run prompt chunks, or draft -> verify -> commit, for a ragged batch of requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch

from draft.policy import DraftingPolicy, StepKind, StepPlan, step_clock
from draft.propose import given_proposal
from draft.protocols import CausalDecoder, Drafter, DraftState, Proposal
from draft.state_drafter import StateDrafter, StateHeadState
from draft.tree import MAX_CANDIDATES, MAX_LEAVES, block_positions, leaf_slot
from engine.errors import NonFiniteLogits
from engine.runtime.block_runner import BlockDecoding, Gain
from engine.runtime.device_penalties import PenaltyRows
from engine.runtime.logprobs import token_logprobs
from engine.runtime.model_runner import PlainDecoding, PromptRows
from engine.runtime.request import Request
from engine.runtime.sampling import BatchSampler, finite_rows
from engine.runtime.verify import verify
from kernels.accept import COUNTER_SAMPLE
from kernels.upload import upload


@torch.inference_mode()
def prefill_step(
    requests: Sequence[Request],
    chunks: Sequence[int],
    target: CausalDecoder,
    drafter: Drafter | None,
    *,
    deterministic: bool = False,
) -> None:
    """Run the next chunks[b] tokens of each request's prompt; a request whose prompt ends here gains its first token.

    A separate draft does not run the prompt here: it catches up when it is first asked, after the first token is out.
    """
    pieces = [r.token_ids[r.sequence.length : r.sequence.length + n] for r, n in zip(requests, chunks, strict=True)]
    taps = drafter.target_taps if drafter else ()
    out = target.forward(
        upload([t for piece in pieces for t in piece], target.device),
        [r.sequence for r in requests],
        list(chunks),
        taps=taps,
        logits="last",
        deterministic=deterministic,
    )
    if drafter and taps:
        drafter.observe_target([_state(r) for r in requests], chunks, out.taps)
    for request, count in zip(requests, chunks, strict=True):
        request.sequence.advance(count)
    done = [b for b, r in enumerate(requests) if r.sequence.length == len(r.token_ids)]
    if done:
        sampler = _sampler(requests, target)
        rows = out.logits if len(done) == len(requests) else out.logits[upload(done, target.device)]
        tokens, _ = sampler.draw(rows, done, [len(requests[b].token_ids) for b in done], COUNTER_SAMPLE)
        for b, token in zip(done, torch.where(finite_rows(rows), tokens, -1).tolist(), strict=True):
            if token < 0:
                requests[b].error = _not_finite(requests[b])
            else:
                requests[b].append_tokens([token])
        _keep_logprobs([requests[b] for b in done], rows, [[i] for i in range(len(done))])


class Beside(NamedTuple):
    """A request whose next `num_tokens` tokens run beside a decode step of others. joins: whether it decodes with them from then on, as the last token
    of its text alone is left behind these."""

    request: Request
    num_tokens: int
    joins: bool


def launches_ahead(
    requests: Sequence[Request],
    drafter: Drafter | None,
    *,
    drafting: DraftingPolicy,
    plain: PlainDecoding | None,
    blocks: BlockDecoding | None,
) -> bool:
    """Whether the next decode step of these is one without drafts that launches another one ahead, of which others may be a part."""
    if plain is None:
        return False
    ready = None if blocks is None else partial(blocks.ready, requests, False)
    planned = partial(_plan, requests, drafter, drafting, False, ready)
    return _plain_turn(requests, planned, drafter, drafting, plain, blocks) is True


def _plain_turn(
    requests: Sequence[Request],
    planned: Callable[[], StepPlan],
    drafter: Drafter | None,
    drafting: DraftingPolicy,
    plain: PlainDecoding,
    blocks: BlockDecoding | None,
) -> bool | None:
    """Whether the next step, which runs without drafts whatever is planned, launches another one ahead; None where it is to be planned."""
    wanted = {r.drafting.wanted for r in requests}
    if not wanted <= {"auto", 0} or not _takes_plain(requests, plain, drafter, blocks):
        return None
    if drafter is not None if blocks is None else blocks.under_way(requests):
        return None
    left = drafting.rests(len(requests)) if "auto" in wanted else 2
    if not left and not plain.under_way([r.sequence for r in requests]):
        return None
    return left > 1 or not planned().drafts  # what is under way is used, and what follows it planned before it is read


@torch.inference_mode()
def decode_step(
    requests: Sequence[Request],
    target: CausalDecoder,
    drafter: Drafter | None,
    *,
    drafting: DraftingPolicy,
    catch_up: int,
    deterministic: bool = False,
    plain: PlainDecoding | None = None,
    blocks: BlockDecoding | None = None,
    beside: Sequence[Beside] = (),
    ahead: bool = True,
) -> bool:
    """Give every request at least one token: propose, verify in one target forward, commit.

    Everything is cut at a request's first stop: tokens, text, the target's and the draft's KV lengths, features and counters. Random
    numbers need no cutting, they are a function of seed and position. drafting: says how much each request drafts, and from which source.
    catch_up: most tokens a draft that lies behind may run in one
    step; a request still behind then decodes without drafts. plain: runs steps in which no request drafts, where the target has such a runner; blocks:
    those with drafts. beside: requests whose next tokens run beside the step that is launched ahead, where `launches_ahead` says that one is; returns
    whether they did. ahead: False where another request takes part in the next step, for which none is launched then.
    Failure leaves every request as it was: lengths only move at the end.
    """
    clock = step_clock(target.device)
    began, began_at = time.perf_counter(), clock()
    if drafter and drafter.exit_layer:
        # verification goes on from its states, or it runs the target's first layers anew where it was left behind: no other draft has a say in the text
        drafter.deterministic = deterministic
    ready = None if blocks is None else partial(blocks.ready, requests, deterministic)
    planned = partial(_plan, requests, drafter, drafting, deterministic, ready)
    wanted = {r.drafting.wanted for r in requests}
    turn = None if plain is None else _plain_turn(requests, planned, drafter, drafting, plain, blocks)
    if plain is not None and turn is not None:
        ran = _plain_step(requests, plain, blocks, drafting, began, ahead=ahead and turn, deterministic=deterministic, beside=beside)
        drafting.rested(len(requests), drafting.took(began_at, clock()), chosen="auto" in wanted)
        return ran
    if blocks is None:
        plan = (drafting.rest(len(requests)) if wanted == {"auto"} else None) or planned()
    else:
        plan, gains = blocks.step(list(requests), planned, deterministic=deterministic, ahead=ahead)
        if gains is not None:
            count = _keep_gains(requests, plan, gains, blocks, began)
            drafting.observe(plan, len(requests), count, drafting.took(began_at, clock()))
            return False
    lengths, given = plan.lengths, plan.given
    if plain is not None and not plan.drafts and _takes_plain(requests, plain, drafter, blocks):
        on = ahead and wanted <= {"auto", 0}
        _plain_step(requests, plain, blocks, drafting, began, ahead=on, deterministic=deterministic)
        drafting.observe(plan, len(requests), len(requests), drafting.took(began_at, clock()))
        return False
    positions = [len(r.token_ids) for r in requests]
    if drafter:
        _catch_up(requests, lengths, drafter, catch_up)
    sampler = _sampler(requests, target)
    if drafter and (any(lengths) or drafter.resumes_at):
        states = [_state(r) for r in requests]
        pending = [r.token_ids[s.length :] for r, s in zip(requests, states, strict=True)]
        proposal = drafter.propose(states, pending, lengths, sampler, plan.block, given)
    elif any(given):
        proposal = given_proposal(given, target.device)
    else:
        proposal = Proposal.empty(len(requests), target.device)
    proposed_at = time.perf_counter()

    tokens = _block_tokens([r.token_ids[-1] for r in requests], proposal)
    first = drafter.resumes_at if drafter else 0
    taps = drafter.target_taps if drafter and not first else ()
    tree_positions = None
    if any(own.leaves for own in proposal.requests):
        tree_positions = [block_positions(at, own.num_drafts, own.leaves) for at, own in zip(positions, proposal.requests, strict=True)]
    out = target.forward(
        tokens,
        [r.sequence for r in requests],
        [own.num_rows for own in proposal.requests],
        taps=taps,
        first_layer=first,
        hidden=proposal.hidden,
        tree_positions=tree_positions,
        deterministic=deterministic,
    )
    if drafter and taps:
        drafter.observe_verification([_state(r) for r in requests], proposal, out.taps)
    verdicts = verify(out.logits, proposal, sampler, positions)
    for request, own, (gained, leaf), at in zip(requests, proposal.requests, verdicts, positions, strict=True):
        if leaf is not None:
            kept_drafts = len(gained) - 2
            own.adopt(kept_drafts, leaf)
            request.sequence.pool.move(request.sequence, leaf_slot(at, leaf), at + kept_drafts)

    kept = [request.append_tokens(gained) if gained else 0 for request, (gained, _) in zip(requests, verdicts, strict=True)]
    for request, count in zip(requests, kept, strict=True):
        request.sequence.advance(count)
    if drafter and any(own.num_run for own in proposal.requests):
        drafter.commit([_state(r) for r in requests], proposal, kept)
    if any(request.params.logprobs is not None for request in requests):
        rows, row = [], 0
        for own, (gained, leaf), count in zip(proposal.requests, verdicts, kept, strict=True):
            after_leaf = [] if leaf is None else [row + own.num_drafts + 1 + leaf]
            rows.append([*range(row, row + len(gained) - len(after_leaf)), *after_leaf][:count])
            row += own.num_rows
        _keep_logprobs(requests, out.logits, rows)
    ended = time.perf_counter()
    for b, (request, own, (gained, leaf), count) in enumerate(zip(requests, proposal.requests, verdicts, kept, strict=True)):
        if not gained:
            request.error = _not_finite(request)
            continue
        cut = count < len(gained)
        proposed, accepted = (count, count) if cut else (own.num_drafts, len(gained) - 1)
        request.metrics.observe(proposed, accepted, count, given=bool(given[b]), seen=request.drafting.from_seen)
        request.metrics.draft_s += proposed_at - began
        request.metrics.verify_s += ended - proposed_at
        confidences = None if plan.block is None else plan.block.confidences.get(b, [])
        hits = accepted if leaf is None else min(accepted, len(gained) - 2)
        request.drafting.observe(gained[:count], proposed, hits, confidences, given=bool(given[b]))
    drafting.observe(plan, len(requests), sum(kept), drafting.took(began_at, clock()), [r.drafting for r in requests])
    return False


def _takes_plain(requests: Sequence[Request], plain: PlainDecoding, drafter: Drafter | None, blocks: BlockDecoding | None) -> bool:
    """Whether a step without drafts may run the target alone, launched ahead: no format looks at the tokens between two steps, nobody keeps the draft's
    states, and a draft left behind catches up in captured steps."""
    follows = drafter is not None and drafter.exit_layer > 0 and (blocks is None or bool(drafter.feature_taps))
    return plain.takes(len(requests)) and not follows and not any([r.constraint is not None for r in requests])


def _keep_logprobs(requests: Sequence[Request], logits: torch.Tensor, rows: Sequence[Sequence[int]]) -> None:
    """Note the log probabilities of the tokens that requests have just gained, which followed these rows of logits [n, V], where they want them."""
    for request, own in zip(requests, rows, strict=True):
        if request.params.logprobs is not None and own and request.error is None:
            picked = logits[upload(list(own), logits.device)]
            request.logprobs += token_logprobs(picked, request.token_ids[-len(own) :], request.params.logprobs)


def _plain_step(
    requests: Sequence[Request],
    plain: PlainDecoding,
    blocks: BlockDecoding | None,
    drafting: DraftingPolicy,
    began: float,
    *,
    ahead: bool,
    deterministic: bool,
    beside: Sequence[Beside] = (),
) -> bool:
    """One token for every request, and no draft. ahead: whether the next step is launched as well, with the tokens of those `beside`; returns whether
    these ran."""
    conversations = [r.conversation for r in requests]
    sequences, last = [c.sequence for c in conversations], [c.token_ids[-1] for c in conversations]
    params, seeds = [r.params for r in requests], [r.seed for r in requests]
    room = [r.remaining for r in requests] if ahead else [1] * len(requests)
    penalties = partial(_penalties, requests, plain) if any([r.penalised for r in requests]) else None
    everyone = [*requests, *(own.request for own in beside)]
    keeper = None if blocks is None else blocks.keeps_states(everyone, drafting.plain_steps_left(len(requests)))
    taps = () if keeper is None else keeper.join.state_layers
    rows = [_prompt_rows(own) for own in beside] if ahead else []
    done = plain.step(sequences, last, room, params, seeds, penalties=penalties, taps=taps, deterministic=deterministic, beside=rows)
    if done.ran_beside:
        _ran_beside(beside, rows, keeper, done.beside)
    seconds = time.perf_counter() - began
    for request, sequence, token, told in zip(requests, sequences, done.tokens, done.logprobs, strict=True):
        if token < 0:
            request.error = _not_finite(request)
            continue
        first = request.joins and not request.num_new
        if request.append_tokens([token]) and told is not None:
            request.logprobs.append(told)
        sequence.advance(1)
        metrics, own = request.metrics, request.drafting
        if not first:  # which is no step's of its own: its prompt ran beside others
            metrics.observe(0, 0, 1)
            metrics.verify_s += seconds
        if own.looks:
            own.observe([token], 0, 0, None, given=False)
    if keeper is not None and done.states is not None:
        keeper.keep_steps([cast(StateHeadState, _state(r)) for r in requests], last, done.states, done.columns)
    return done.ran_beside


def _prompt_rows(own: Beside) -> PromptRows:
    request, length = own.request, own.request.sequence.length
    tokens = request.token_ids[length : length + own.num_tokens]
    return PromptRows(request.sequence, tokens, own.joins, request.token_ids[-1], request.params, request.seed)


def _ran_beside(beside: Sequence[Beside], rows: Sequence[PromptRows], keeper: StateDrafter | None, states: torch.Tensor | None) -> None:
    """Commit the tokens that ran beside a step. states: the target's of all of them [k, F, E], of which a draft head makes its rows."""
    if keeper is not None and states is not None:
        ids = [token for own in rows for token in own.tokens]
        taps = dict(zip(keeper.join.state_layers, states, strict=True)) | {0: keeper.embed(upload(ids, states.device))}
        observed = [own for own in beside if own.num_tokens]
        keeper.observe_target([_state(own.request) for own in observed], [own.num_tokens for own in observed], taps)
    for own in beside:
        own.request.sequence.advance(own.num_tokens)


def _penalties(requests: Sequence[Request], plain: PlainDecoding) -> PenaltyRows:
    """As of the requests' last tokens."""
    vocab_size, device = plain.target.config.vocab_size, plain.target.device
    return PenaltyRows([r.params for r in requests], [r.history(vocab_size, device) for r in requests])


def _keep_gains(requests: Sequence[Request], plan: StepPlan, gains: Sequence[Gain], blocks: BlockDecoding, began: float) -> int:
    """Append what a captured step has found. Returns how many tokens were kept."""
    kept = [request.append_tokens(gain.tokens) if gain.tokens else 0 for request, gain in zip(requests, gains, strict=True)]
    for request, count in zip(requests, kept, strict=True):
        request.conversation.sequence.advance(count)
    blocks.commit(kept)
    seconds = time.perf_counter() - began
    for request, (tokens, proposed), given, count in zip(requests, gains, plan.given, kept, strict=True):
        if not tokens:
            request.error = _not_finite(request)
            continue
        accepted, metrics, own = len(tokens) - 1, request.metrics, request.drafting
        if count <= accepted:
            tokens, proposed, accepted = tokens[:count], count, count
        metrics.observe(proposed, accepted, count, given=bool(given), seen=own.from_seen)
        metrics.verify_s += seconds
        own.observe(tokens, proposed, accepted, None, given=bool(given))
    return sum(kept)


def _plan(
    requests: Sequence[Request],
    drafter: Drafter | None,
    drafting: DraftingPolicy,
    deterministic: bool,
    ready: Callable[[StepKind], Sequence[int]] | None = None,
) -> StepPlan:
    """This step's drafts: what the policy wants, as far as target, drafter and text have room for them.

    Leaves are for greedy text, where the order of sums may depend on what else is run, and where memory was promised for their slots. Drafts from the
    text beside a drafter only where the drafter can take them. In captured steps (`ready`) automatic drafts come only from a draft that knows the text.
    """
    if all(request.params.draft_length == 0 for request in requests):
        return StepPlan([0] * len(requests), [[] for _ in requests])
    tokens = [r.token_ids for r in requests]
    room = [max(0, r.remaining - 1) for r in requests]
    drafter_room, most_tokens = None, None
    if drafter is not None:
        begins_after, most = drafter.begins_after, drafter.max_positions
        drafter_room = [max(0, most - len(own)) for own in tokens]
        for b, request in enumerate(requests):
            if request.params.draft_length == "auto":
                waits = begins_after > 0 and request.num_new < begins_after
                if waits or (ready is not None and not _state(request).knows_text):
                    drafter_room[b] = 0
    if drafting.draft_by_draft:
        leaves = drafter is not None and drafter.takes_leaves and not deterministic
        most_tokens = [MAX_CANDIDATES if leaves and _takes_leaves(request) else 1 for request in requests]
    return drafting.plan(
        [r.drafting for r in requests],
        tokens,
        room,
        drafter_room=drafter_room,
        most_tokens=most_tokens,
        ngrams=drafter is None or drafter.takes_given,
        ready=ready,
    )


def _takes_leaves(request: Request) -> bool:
    """Whether its text is greedy, and there is memory for leaves behind it."""
    memory = leaf_slot(len(request.token_ids), MAX_LEAVES) <= request.longest(drafts=True)
    return request.params.greedy and memory and request.sequence.pool.takes_tree_positions


def _sampler(requests: Sequence[Request], target: CausalDecoder) -> BatchSampler:
    """What draws their next tokens."""
    vocab_size = target.config.vocab_size
    histories = [r.history(vocab_size, target.device) for r in requests]
    return BatchSampler([r.params for r in requests], [r.seed for r in requests], vocab_size, histories)


def _not_finite(request: Request) -> NonFiniteLogits:
    return NonFiniteLogits(
        f"the model's logits after {len(request.token_ids)} tokens are NaN or infinite",
        "its weights or a resumed session hold values that are no finite numbers: check the files, or use float32",
    )


def _catch_up(requests: Sequence[Request], lengths: list[int], drafter: Drafter, limit: int) -> None:
    """Let drafts that lie too far behind run one chunk of at most `limit` tokens, and those still behind skip this step (sets their length to 0).

    A separate draft may lie `limit` tokens behind, as it runs what it lacks with its next block; an early exit has to know all of the target's cache,
    and one that lies behind what the target's windowed layers hold does not draft.
    """
    ends, slack = ([r.sequence.length for r in requests], 0) if drafter.exit_layer else ([len(r.token_ids) for r in requests], limit)
    behind = [b for b, r in enumerate(requests) if lengths[b] and ends[b] - _state(r).num_cached > slack]
    for b in [b for b in behind if drafter.exit_layer and not requests[b].sequence.sees(_state(requests[b]).rerun_from)]:
        lengths[b] = 0
        behind.remove(b)
    if behind:
        states = [_state(requests[b]) for b in behind]
        pieces = [requests[b].token_ids[s.num_cached : min(s.num_cached + limit, ends[b])] for b, s in zip(behind, states, strict=True)]
        drafter.catch_up(states, pieces)
        for b, state in zip(behind, states, strict=True):
            if ends[b] - state.num_cached > slack:
                lengths[b] = 0


def _block_tokens(last: list[int], proposal: Proposal) -> torch.Tensor:
    """Each request's last token followed by its drafts and its leaves, flattened."""
    device = proposal.tokens.device
    pending = upload(last, device)
    if not proposal.tokens.numel():
        return pending
    beside = [leaf.token for own in proposal.requests for leaf in own.leaves]
    parts = [pending, proposal.tokens, *([upload(beside, device)] if beside else [])]
    if len(last) == 1:
        return torch.cat(parts)
    order, drafted, leaf = [], len(last), len(last) + len(proposal.tokens)
    for b, own in enumerate(proposal.requests):
        order += [b, *range(drafted, drafted + own.num_drafts), *range(leaf, leaf + len(own.leaves))]
        drafted, leaf = drafted + own.num_drafts, leaf + len(own.leaves)
    return torch.cat(parts)[upload(order, device)]


def _state(request: Request) -> DraftState:
    assert request.draft_state is not None, "a request under a drafter has a draft state"
    return request.draft_state
