"""Requests that are interrupted for want of pages go on with the same text; those that were promised their pages are not."""

from __future__ import annotations

import random

import pytest
import torch

from engine.engine import Engine
from engine.errors import PoolExhausted
from engine.runtime.sampling import SamplingParams


def engine_of(target, draft, headroom=8, **options):
    engine = Engine(target, draft=draft, **({"page_size": 8, "prefill_chunk": 16, "max_batch": 6} | options))
    engine.core.scheduler.headroom = headroom
    return engine


def check(engine):
    core = engine.core
    assert core.scheduler.idle
    for pool in (core.pool, core.draft_pool):
        if pool is not None:
            pool.check_integrity()
            assert pool.num_free_pages == pool.max_pages


def requests(draft, seeded, count=6):
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 60) for _ in range(rng.randrange(3, 30))] for _ in range(count)]
    params = [
        SamplingParams(
            max_new_tokens=24 + 4 * i,
            ignore_eos=True,
            draft_length=0 if draft == "none" else 2,
            frequency_penalty=0.4 if i == 2 else 0.0,
            **({"temperature": 0.9, "seed": i} if seeded else {}),
        )
        for i in range(count)
    ]
    return prompts, params


@pytest.mark.parametrize(
    ("draft", "seeded", "options"),
    [
        ("none", True, {}),
        ("model", False, {}),
        ("model", True, {}),
        ("exit", False, {"deterministic": True}),
        ("head", True, {}),
        ("states", True, {}),
        ("states", False, {"prefix_sharing": True}),
        ("none", False, {"prefix_sharing": True}),
        ("head", False, {"prefix_sharing": True}),
    ],
)
def test_interrupted_requests_go_on_with_the_same_text(target, drafts, draft, seeded, options):
    prompts, params = requests(draft, seeded)
    wanted = engine_of(target, drafts[draft], **options).generate(prompts, params)
    small = engine_of(target, drafts[draft], pool_tokens=208, **options)
    results = small.generate(prompts, params)
    assert small.core.scheduler.preemptions >= 2
    assert [r.token_ids for r in results] == [r.token_ids for r in wanted]
    assert [r.new_tokens for r in results] == [p.max_new_tokens for p in params]
    check(small)


@pytest.mark.parametrize("draft", ["none", "model", "exit", "head", "states"])
def test_a_request_interrupted_behind_whole_pages_has_nothing_to_run_again(target, drafts, draft):
    """All its pages are known when it comes back: it decodes at once."""
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=0 if draft == "none" else 2)
    wanted = engine_of(target, drafts[draft]).generate([[5] * 9], params)[0].token_ids
    engine = engine_of(target, drafts[draft], prefix_sharing=True)
    stream = engine.stream([5] * 9, params)
    next(stream)
    [request] = engine.core.scheduler.running
    while request.sequence.length % 8:
        engine.core.step()
    assert request.finish_reason is None
    engine.core.scheduler._preempt(request)
    found = list(stream)[-1].result
    assert found.token_ids == wanted and found.reused_tokens % 8 == 0 and found.reused_tokens > 9
    assert engine.core.scheduler.idle


def test_more_run_at_once_than_could_be_promised_their_longest(target):
    params = SamplingParams(max_new_tokens=80, ignore_eos=True, stop_token_ids=())
    engine, most = engine_of(target, None, pool_tokens=200), 0

    def watched(step=engine.core.scheduler.step):
        nonlocal most
        finished = step()
        most = max(most, len(engine.core.scheduler.running))
        engine.core.pool.check_integrity()
        return finished

    engine.core.scheduler.step = watched
    results = engine.generate([[3 + i] * 4 for i in range(6)], params)
    assert most == 6 and all(r.new_tokens == 80 for r in results)
    check(engine)


def test_the_first_to_come_is_never_interrupted(target):
    engine, seen = engine_of(target, None, pool_tokens=128), []
    preempt = engine.core.scheduler._preempt
    engine.core.scheduler._preempt = lambda request: (seen.append(request.token_ids[0]), preempt(request))
    engine.generate([[10 + i] * 5 for i in range(4)], SamplingParams(max_new_tokens=60, ignore_eos=True))
    assert seen and 10 not in seen


def test_conversations_that_go_on_are_promised_their_pages(target):
    engine = engine_of(target, None, pool_tokens=160)
    conversation = engine.core.open_sequence_state()
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    wanted = engine_of(target, None).generate([[7] * 9], params)[0].token_ids
    others = [engine.stream([20 + i] * 6, SamplingParams(max_new_tokens=90, ignore_eos=True)) for i in range(3)]
    for other in others:
        next(other)
    assert engine.core.run(conversation, [7] * 9, params).token_ids == wanted
    assert conversation.sequence.length == len(conversation.token_ids) - 1
    texts = [list(other)[-1].result.token_ids for other in others]
    assert [len(t) for t in texts] == [90] * 3 and engine.core.scheduler.preemptions > 0
    engine.core.close_sequence_state(conversation)
    check(engine)


def test_pages_taken_from_outside_end_a_request_with_its_error(target):
    engine = engine_of(target, None, pool_tokens=128)
    stream = engine.stream([5] * 4, SamplingParams(max_new_tokens=100, ignore_eos=True))
    next(stream)
    hog = engine.core.open_sequence_state()
    hog.sequence.ensure(8 * engine.core.pool.num_free_pages, 0)
    with pytest.raises(PoolExhausted, match="open conversations"):
        list(stream)
    engine.core.close_sequence_state(hog)
    check(engine)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_runs_for_ever_beside_conversations_that_hold_pages(target, drafts, seed):
    """Requests, turns of conversations, and caches that are filled from outside, in pools too small for them: each ends, with its text or an error, in
    about as many steps as it has tokens. Who is interrupted is the last to come of those that may be."""
    rng = random.Random(seed)
    draft = ("none", "model", "head")[seed % 3]
    engine = engine_of(target, drafts[draft], pool_tokens=rng.choice([128, 160, 208]), prefix_sharing=seed % 2 == 0)
    core, scheduler, others = engine.core, engine.core.scheduler, []
    preempt, length = scheduler._preempt, 0 if draft == "none" else 2

    def watched(request):
        later = [r for r in scheduler.running if r.owns_cache and r.submitted_at > request.submitted_at]
        others.append(len(later))
        preempt(request)

    scheduler._preempt = watched
    conversations, outside, running, owed = [], [], {}, 0

    def submit(conversation, most_tokens, most_new, owns_cache):
        nonlocal owed
        tokens, new = [rng.randrange(3, 60) for _ in range(rng.randrange(1, most_tokens))], rng.randrange(2, most_new)
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, draft_length=length)
        try:
            running[core.submit(conversation, tokens, params, owns_cache=owns_cache)] = new
            owed += new + len(tokens)
        except PoolExhausted:  # it never fits, and what owns its cache is closed
            if not owns_cache:
                core.close_sequence_state(conversation)

    def step():
        core.step()
        for request in [r for r in running if r.finish_reason is not None or r.error is not None]:
            new = running.pop(request)
            assert request.error is not None or request.num_new == new
            if not request.owns_cache and request.error is None:
                conversations.append(request.conversation)
            elif not request.owns_cache:
                core.close_sequence_state(request.conversation)

    for _ in range(250):
        what = rng.random()
        if what < 0.12:
            submit(core.open_sequence_state(), 40, 60, owns_cache=True)
        elif what < 0.16 and len(conversations) < 3:
            conversations.append(core.open_sequence_state())
        elif what < 0.24 and conversations:
            submit(conversations.pop(rng.randrange(len(conversations))), 10, 20, owns_cache=False)
        elif what < 0.27 and conversations:
            core.close_sequence_state(conversations.pop())
        elif what < 0.29 and core.pool.num_free_pages:
            outside.append(core.open_sequence_state())
            outside[-1].sequence.ensure(8 * min(core.pool.num_free_pages, rng.randrange(1, 6)), 0)
        elif what < 0.33 and outside:
            core.close_sequence_state(outside.pop())
        step()
    for _ in range(owed):
        step()
    assert scheduler.idle and not running and others and not any(others)
    for conversation in [*conversations, *outside]:
        core.close_sequence_state(conversation)
    check(engine)


def test_cancelling_an_interrupted_request_leaves_nothing(target):
    engine = engine_of(target, None, pool_tokens=128)
    streams = [engine.stream([10 + i] * 5, SamplingParams(max_new_tokens=80, ignore_eos=True)) for i in range(4)]
    for stream in streams:
        next(stream)
    while not engine.core.scheduler.preemptions:
        next(streams[0])
    for stream in streams:
        stream.close()
    check(engine)


@torch.inference_mode()
def test_quantised_pools_interrupt_too(target, monkeypatch):
    means = torch.randn(3, 2, 1, 32, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("engine.engine.channel_means", lambda *_: means)
    engine = engine_of(target, None, pool_tokens=208, kv_cache_dtype="q4")
    prompts, params = requests("none", seeded=False, count=6)
    results = engine.generate(prompts, params)
    assert engine.core.scheduler.preemptions and [r.new_tokens for r in results] == [p.max_new_tokens for p in params]
    check(engine)
