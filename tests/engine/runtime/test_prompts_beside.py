"""Prompts that begin while others decode run as rows of their steps: the texts are those of passes of their own, and nothing waits for them."""

from __future__ import annotations

import pytest
import torch

from engine.engine import Engine
from engine.errors import NonFiniteLogits
from engine.runtime import scheduler as scheduling
from engine.runtime.model_runner import MAX_ROWS, PlainDecoding, PromptRows, rows_with
from engine.runtime.sampling import SamplingParams
from tests.engine.runtime.test_block_runner import GPU, sources, with_blocks
from tests.engine.runtime.test_state_head import PROMPTS as STATE_PROMPTS
from tests.engine.runtime.test_state_head_captured import captured, check_rows, made, source, target

__all__ = ["made", "source", "sources", "target"]
pytestmark = [pytest.mark.gpu] if GPU else []

# lengths of prompts, and after how many steps each comes: of one token, of more than a step has rows for, and several at once
ARRIVALS = [(4, 0), (33, 0), (2, 3), (36, 4), (1, 4), (17, 4), (150, 6), (90, 9), (60, 9), (250, 15), (300, 16), (5, 30)]


def prompts_of(arrivals):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(1, 80, (length,), generator=draw).tolist() for length, _ in arrivals]


@pytest.fixture
def rows(monkeypatch):
    """Tokens that each launch had beside its requests."""
    seen, launch = [], PlainDecoding._launch

    def recorded(self, sequences, starts, *rest):
        beside = rest[6] if len(rest) > 6 else ()
        seen.append((len(sequences), [len(own.tokens) for own in beside]))
        assert len(sequences) + sum(seen[-1][1]) <= MAX_ROWS
        return launch(self, sequences, starts, *rest)

    monkeypatch.setattr(PlainDecoding, "_launch", recorded)
    return seen


@pytest.fixture
def passes(monkeypatch):
    """Requests of each prompt pass."""
    seen, run = [], scheduling.prefill_step

    def recorded(requests, chunks, *rest, **options):
        seen.append(sum(chunks))
        return run(requests, chunks, *rest, **options)

    monkeypatch.setattr(scheduling, "prefill_step", recorded)
    return seen


def serve(core, prompts, params, arrivals):
    """The requests, each submitted at its step; all pages are free afterwards."""
    requests, step = [], 0
    while len(requests) < len(prompts) or not core.scheduler.idle:
        for (_, at), prompt, own in list(zip(arrivals, prompts, params, strict=True))[len(requests) :]:
            if at <= step:
                requests.append(core.submit(core.open_sequence_state(), prompt, own, owns_cache=True))
        core.step()
        step += 1
    for pool in filter(None, (core.pool, core.draft_pool)):
        pool.check_integrity()
        assert pool.num_free_pages == pool.max_pages
    assert all(request.error is None for request in requests)
    return requests


def engine_of(sources, kind="ngram", **options):
    target, drafts = sources
    options = {"page_size": 16, "pool_tokens": 4096, "max_batch": 8, "prefix_sharing": False} | options
    engine = with_blocks(Engine(target, draft=drafts[kind], **options))
    engine.core.scheduler.whole_chunks = False  # as on a GPU
    return engine


@pytest.mark.parametrize("lengths", [[30], [1, 2, 9, 40, 5]], ids=["equal", "ragged"])
@pytest.mark.parametrize("kind", ["ngram", "model", "head"])
def test_texts_are_those_of_passes_of_their_own(sources, kind, lengths, rows, passes, monkeypatch):
    prompts = prompts_of(ARRIVALS)
    params = [SamplingParams(max_new_tokens=lengths[b % len(lengths)], ignore_eos=True, draft_length=0) for b in range(len(prompts))]
    found = serve(engine_of(sources, kind).core, prompts, params, ARRIVALS)
    assert sum(map(bool, (beside for _, beside in rows))) >= 5 and len(passes) <= 6
    passes.clear()
    monkeypatch.setattr(scheduling.Scheduler, "_rows_beside", lambda self, decoding: 0)
    alone = serve(engine_of(sources, kind).core, prompts, params, ARRIVALS)
    assert sum(passes) >= sum(map(len, prompts)) - len(prompts)
    assert [r.token_ids for r in found] == [r.token_ids for r in alone]
    assert [r.metrics.steps for r in found] == [r.metrics.steps for r in alone], "a first token is no decode step's"
    assert all(r.first_token_at for r in found)


def test_nothing_waits_for_a_prompt_that_runs_beside(sources, rows, passes):
    """Every launch but the first follows one that is under way."""
    arrivals = [(length, at) for length, at in ARRIVALS[:8] if length > 1]  # a prompt of one token has nothing that could run beside
    prompts = prompts_of(arrivals)
    params = [SamplingParams(max_new_tokens=60, ignore_eos=True, draft_length=0)] * len(prompts)
    core = engine_of(sources).core
    fresh = []
    step = core.scheduler.plain.step

    def watched(sequences, *rest, **options):
        fresh.append(not core.scheduler.plain.under_way(sequences))
        return step(sequences, *rest, **options)

    core.scheduler.plain.step = watched
    serve(core, prompts, params, arrivals)
    assert fresh[0] and not any(fresh[1:])
    assert len(passes) == 1, "the first two, with which nobody decodes"


def test_a_first_token_answers_what_was_looked_up_for_it(sources):
    """Drafts that were looked up behind a prompt are not taken for those of its second token."""
    core = engine_of(sources).core
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    core.submit(core.open_sequence_state(), [4] * 9, params, owns_cache=True)
    for _ in range(3):
        core.step()
    late = core.submit(core.open_sequence_state(), [5, 6, 7] * 3, params, owns_cache=True)
    core.step()
    assert late.joins and late.drafting.look_up(late.token_ids, 3)[0] == [5, 6, 7] and late.drafting.looks
    core.step()
    assert late.num_new == 1 and not late.drafting.looks
    assert late.metrics.steps == 0


def test_a_prompt_that_finds_few_rows_runs_in_a_pass_of_its_own(sources, rows, passes, monkeypatch):
    """Else its first token would wait for a step for every few of its tokens."""
    monkeypatch.setattr(scheduling, "MAX_ROWS", 6)
    arrivals = [(9, 0), (9, 0), (9, 0), (9, 0), (17, 3), (16, 9)]  # at most 2 rows beside the first four
    prompts = prompts_of(arrivals)
    params = [SamplingParams(max_new_tokens=30, ignore_eos=True, draft_length=0)] * len(prompts)
    found = serve(engine_of(sources).core, prompts, params, arrivals)
    assert passes == [36, 17, 16]
    assert not any(beside for _, beside in rows)
    alone = [engine_of(sources).generate([prompt], own)[0].token_ids for prompt, own in zip(prompts, params, strict=True)]
    assert [r.token_ids[r.prompt_tokens :] for r in found] == alone


def test_log_probabilities_of_a_first_token(sources, monkeypatch):
    prompts = prompts_of(ARRIVALS[:6])
    params = [SamplingParams(max_new_tokens=12, ignore_eos=True, draft_length=0, logprobs=2)] * 6
    found = serve(engine_of(sources).core, prompts, params, ARRIVALS[:6])
    monkeypatch.setattr(scheduling.Scheduler, "_rows_beside", lambda self, decoding: 0)
    alone = serve(engine_of(sources).core, prompts, params, ARRIVALS[:6])
    for mine, theirs in zip(found, alone, strict=True):
        assert mine.token_ids == theirs.token_ids and len(mine.logprobs) == 12
        assert [own.logprob for own in mine.logprobs] == pytest.approx([own.logprob for own in theirs.logprobs], abs=1e-3)


@pytest.mark.parametrize("change", ["cancel", "preempt", "cancel the others"])
@pytest.mark.parametrize("wait", [0, 1])
def test_a_request_that_joins_and_is_interrupted(sources, change, wait):
    """Before its first token was read, or with the next step."""
    prompts = prompts_of(ARRIVALS)[:4]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, draft_length=0)
    alone = [engine_of(sources).generate([prompt], params)[0].token_ids for prompt in prompts]
    core = engine_of(sources).core
    first = [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in prompts[:2]]
    for _ in range(4):
        core.step()
    late = [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in prompts[2:]]
    core.step()
    assert all(request.joins and not request.num_new for request in late)
    for _ in range(wait):
        core.step()
    for request in first if change == "cancel the others" else late[:1]:
        if change == "preempt":
            core.scheduler._preempt(request)
            assert not request.joins
        else:
            core.scheduler.cancel(request)
    while not core.scheduler.idle:
        core.step()
    ended = [(request, text) for request, text in zip([*first, *late], alone, strict=True) if request.finish_reason is not None]
    assert len(ended) == {"cancel": 3, "preempt": 4, "cancel the others": 2}[change]
    for request, text in ended:
        assert request.token_ids[request.prompt_tokens :] == text
    core.pool.check_integrity()
    assert core.pool.num_free_pages == core.pool.max_pages


def test_a_full_pool_interrupts_and_other(sources, rows):
    """Texts that run again beside others after they were interrupted, their own tokens included."""
    arrivals = [(length, 2 * b) for b, length in enumerate((20, 33, 40, 12, 50, 8))]
    prompts = prompts_of(arrivals)
    params = [SamplingParams(max_new_tokens=50, ignore_eos=True, draft_length=0)] * len(prompts)
    alone = [engine_of(sources).generate([prompt], own)[0].token_ids for prompt, own in zip(prompts, params, strict=True)]
    core = engine_of(sources, pool_tokens=256).core
    core.scheduler.headroom = 1
    found = serve(core, prompts, params, arrivals)
    assert core.scheduler.preemptions and any(beside for _, beside in rows)
    assert [r.token_ids[r.prompt_tokens :] for r in found] == alone


@pytest.mark.parametrize("kind", ["ngram", "model", "head"])
def test_logits_that_are_not_finite_end_their_request_alone(sources, kind, rows):
    """One that joins: what is launched ahead of its first token follows none."""
    target, prompts = sources[0], prompts_of([(9, 0), (40, 0), (33, 0)])
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, draft_length=0)
    alone = [engine_of(sources).generate([prompt], params)[0].token_ids for prompt in prompts]
    core, embeddings = engine_of(sources, kind, prefix_sharing=True).core, target.embed_tokens.weight.data
    kept = embeddings[85].clone()
    assert all(85 not in [*prompt, *text] for prompt, text in zip(prompts, alone, strict=True))
    try:
        embeddings[85] = torch.nan
        requests = [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in prompts[:2]]
        for _ in range(3):
            core.step()
        late = [core.submit(core.open_sequence_state(), own, params, owns_cache=True) for own in ([*prompts[2][:20], 85, 4, 5], prompts[2])]
        while not core.scheduler.idle:
            core.step()
    finally:
        embeddings[85] = kept
    assert [22, 32] in [beside for _, beside in rows]
    assert isinstance(late[0].error, NonFiniteLogits) and not late[0].num_new
    assert [r.token_ids[r.prompt_tokens :] for r in (*requests, late[1])] == alone
    assert core.pool.num_free_pages == core.pool.max_pages


def test_one_that_ended_in_a_step_that_failed_is_not_run_again(sources, monkeypatch):
    """Its prompt gave its last token before the others' launch failed."""
    prompts = prompts_of([(9, 0), (1, 0)])
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, draft_length=0)
    text = engine_of(sources).generate([prompts[0]], params)[0].token_ids
    stop = engine_of(sources).generate([prompts[1]], params)[0].token_ids[0]
    core = engine_of(sources).core
    first = core.submit(core.open_sequence_state(), prompts[0], params, owns_cache=True)
    core.step()
    conversation = core.open_sequence_state()
    late = core.submit(conversation, prompts[1], SamplingParams(max_new_tokens=12, stop_token_ids=(stop,)), owns_cache=False)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="launch"):
        patch.setattr(core.scheduler.plain, "_launch", lambda *_: (_ for _ in ()).throw(RuntimeError("launch")))
        core.step()
    assert late.finish_reason == "stop" and late in core.scheduler.running
    assert late in core.scheduler.step() and late not in core.scheduler.running
    assert conversation.token_ids == [*prompts[1], stop] and conversation.sequence.length == 1
    while not core.scheduler.idle:
        core.step()
    assert first.token_ids[9:] == text


def test_the_rest_of_a_known_beginning_runs_beside(sources, rows):
    beginning = prompts_of([(64, 0)])[0]
    prompts = [[*beginning, 3, 4, 5], [*beginning, 9, 8, 7, 6], [*beginning[:40], 1, 2]]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, draft_length=0)
    alone = [engine_of(sources).generate([prompt], params)[0].token_ids for prompt in prompts]
    core = engine_of(sources, prefix_sharing=True).core
    requests = [core.submit(core.open_sequence_state(), prompts[0], params, owns_cache=True)]
    for _ in range(3):
        core.step()
    requests += [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in prompts[1:]]
    while not core.scheduler.idle:
        core.step()
    assert [beside for _, beside in rows if beside] == [[3, 9]], "what is left behind whole pages, without the last tokens"
    assert [r.reused_tokens for r in requests] == [0, 64, 32]
    assert [r.token_ids[r.prompt_tokens :] for r in requests] == alone


def test_one_that_was_interrupted_and_is_known_whole_finds_a_row(sources, rows):
    """It decodes with the others at once, beside a prompt that takes all other rows."""
    prompts = prompts_of([(16, 0)] * 3 + [(254, 0)])
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=0)
    alone = [engine_of(sources).generate([prompt], params)[0].token_ids for prompt in prompts]
    core = engine_of(sources, prefix_sharing=True).core
    requests = [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in prompts[:3]]
    last = requests[-1]
    while last.sequence.length % 16 != 15:
        core.step()
    requests.append(core.submit(core.open_sequence_state(), prompts[3], params, owns_cache=True))
    core.step()
    assert last.sequence.length == 32 and rows[-1] == (3, [125])
    core.scheduler._preempt(last)
    core.step()
    assert last.reused_tokens == 32 and last.num_new == 18 and rows[-1] == (3, [125])
    while not core.scheduler.idle:
        core.step()
    assert [r.token_ids[r.prompt_tokens :] for r in requests] == alone


def test_prompts_that_are_promised_their_bits_run_alone(sources, rows):
    params = [SamplingParams(max_new_tokens=20, ignore_eos=True, draft_length=0, seed=seed) for seed in (None, None, 5, None)]
    arrivals = [(9, 0), (9, 3), (9, 5), (9, 8)]
    serve(engine_of(sources).core, prompts_of(arrivals), params, arrivals)
    assert [beside for _, beside in rows if beside] == [[8]], "none with or beside a request under a seed"


def test_a_draft_head_on_last_states_knows_the_prompt(target, source, rows):
    engine = captured(target, source)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=2)
    core = engine.core
    conversations, requests = [], []
    for b, prompt in enumerate([STATE_PROMPTS[3], STATE_PROMPTS[1], STATE_PROMPTS[0], STATE_PROMPTS[3][:7]]):
        conversations.append(core.open_sequence_state())
        requests.append(core.submit(conversations[-1], prompt, params, owns_cache=False))
        requests[-1].drafting.wanted = 0  # for now: its states are kept
        for _ in range(1 + 3 * (b == 0)):
            core.step()
    while not core.scheduler.idle:
        core.step()
    assert sum(len(beside) for _, beside in rows) == 3
    for conversation in conversations:
        assert conversation.draft_state.num_skipped == 0 and conversation.draft_state.knows_text
        check_rows(engine, target, source, conversation)


def test_rows_of_a_step_with_prompts(sources):
    pool = sources[0].new_pool(8, 16)
    joins, other = pool.new_sequence(4), pool.new_sequence(4)
    joins.advance(10)
    beside = [
        PromptRows(joins, [1, 2], True, 3, SamplingParams(), 0),
        PromptRows(other, [4, 5, 6], False, 9, SamplingParams(), 0),
    ]
    rows, places, unsettled = rows_with(beside, [7, 2, 2, 5], [30, 12])
    assert rows == [7, 2, 2, 2, 5, 5, 5]
    assert places == [30, 12, 10, 11, 0, 1, 2]
    assert unsettled == [0, 2, 0, 1, 0, 1, 2]
