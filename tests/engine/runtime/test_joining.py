"""Requests that join a batch which decodes with drafts: the others go on from what the device has of them, and only the new ones are uploaded."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch

from draft.draft_head import DraftHeadState
from draft.policy import StepPlan
from draft.state_drafter import StateHeadState
from engine.engine import Engine
from engine.runtime import block_runner
from engine.runtime.block_runner import BlockDecoding
from engine.runtime.device_sampling import Drawing
from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams
from tests.engine.runtime.conftest import SHAPE
from tests.engine.runtime.test_state_head import talkative

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.skipif(GPU, reason="counts and texts of float32 on a CPU; the runners are those of a GPU, without graphs")]
KINDS = ["model", "head", "states"]
NUMBERS = random.Random(5)
PROMPTS = [[NUMBERS.randrange(3, 90) for _ in range(n)] for n in (4, 33, 1, 20, 2, 41, 7, 1, 12, 9)]
NEW = (9, 14, 22, 1, 17, 30, 12, 8, 25, 16)


@pytest.fixture(scope="module")
def target(random_decoder):
    return talkative(random_decoder(1, **SHAPE))


@pytest.fixture(scope="module")
def drafts(target, random_decoder, make_draft_head, tmp_path_factory):
    """Of whose drafts many are right."""
    head = load_draft_head(make_draft_head(tmp_path_factory.mktemp("head"), target, exit_layer=1, size=90), target)
    states = load_draft_head(make_draft_head(tmp_path_factory.mktemp("states"), target, size=90, state_layers=(1, 3)), target)
    return {"model": talkative(random_decoder(1, **SHAPE)), "head": head, "states": states}


def each_with(**options):
    return [SamplingParams(max_new_tokens=n, ignore_eos=True, **options) for n in NEW]


@pytest.fixture(scope="module")
def alone(target):
    """`alone(params)`: the text of each prompt, decoded alone and without drafts."""
    texts = {}

    def of(each):
        engine = Engine(target, page_size=16)
        for prompt, params in zip(PROMPTS, each, strict=True):
            key = tuple(prompt), params
            if key not in texts:
                texts[key] = engine.generate([prompt], replace(params, draft_length=0))[0].token_ids
        return [texts[tuple(prompt), params] for prompt, params in zip(PROMPTS, each, strict=True)]

    return of


@pytest.fixture
def uploads(monkeypatch):
    """The columns that each upload of a step of the drafter's own drafts was told."""
    seen, upload = [], BlockDecoding._upload

    def recorded(self, requests, columns, key, sent):
        if key.source == "model":
            seen.append(list(columns))
        return upload(self, requests, columns, key, sent)

    monkeypatch.setattr(BlockDecoding, "_upload", recorded)
    return seen


def joins(scheduler, requests):
    """What a scheduler knows: others have run their prompts, or wait for a place."""
    return len(scheduler.running) == len(requests)


SCHEDULES = {
    "where nobody joins": joins,
    "never": lambda scheduler, requests: False,
    "now and then": lambda scheduler, requests: sum(len(r.token_ids) for r in requests) % 2 == 0,
}


def check_state(blocks, requests, key):
    """What the device has of each request before a step of the drafter's is what the host would upload."""
    state, drafter = blocks.state, blocks.drafter
    for b, request in enumerate(requests):
        own, length = request.draft_state, request.sequence.length
        number = {name: int(state.of(name, key.batch)[b]) for name in state.NAMES}
        assert (number["length"], number["previous"], number["last"]) == (length, *request.token_ids[-2:])
        if isinstance(own, StateHeadState):
            waiting = own.num_pending_hidden
            assert waiting <= key.length and (number["first"], number["skipped"]) == (own.num_cached - waiting, own.num_skipped)
            expected = drafter.next_rows([own], torch.tensor(request.token_ids[-1:]))
            expected = expected if own.pending_hidden is None else torch.cat([own.pending_hidden, expected])
            assert torch.allclose(state.rows[b, : waiting + 1], expected, atol=1e-4)
        elif request.params.draft_length != 0 or isinstance(own, DraftHeadState):
            assert length - 1 <= number["first"] <= own.num_cached <= length
            if isinstance(own, DraftHeadState) and own.pending_hidden is not None:
                assert number["first"] == length - 1 and torch.allclose(state.hidden[b], own.pending_hidden[-1], atol=1e-4)


def decoded(as_on_a_gpu, target, draft, each, *, ahead=joins, lengths=None, cancel=(), plan=None, headroom=64, fails=(), **options):
    """The engine and the requests of PROMPTS once all have ended. ahead: whether steps are launched ahead. lengths: of drafts, step by step. cancel:
    (step, request) to be dropped before it. plan: of the drafts of requests' next step; None: the policy's. fails:
    what steps may fail with, which are run again."""
    engine = as_on_a_gpu(Engine(target, draft=draft, **({"page_size": 16, "prefill_chunk": 16, "pool_tokens": 2048} | options)))
    core, blocks = engine.core, engine.core.scheduler.blocks
    core.scheduler.headroom, run = headroom, blocks.step
    for batch in (1, 2, 4) if lengths else ():  # a step that was captured is rather taken than a shorter one
        blocks.capture_common(batch, Drawing.of(each, target.config.vocab_size), deterministic=each[0].seed is not None)

    def step(requests, planned, **own):
        own["ahead"] = ahead(core.scheduler, requests)
        return run(requests, planned if plan is None else partial(plan, requests), **own)

    blocks.step, launch, block, launched = step, blocks._launch, blocks._block, []

    def launching(requests, plan, key, *, ahead=False):
        launched[:] = [] if ahead or key.source == "given" else [requests]
        return launch(requests, plan, key, ahead=ahead)

    def checked(key):
        for batch in launched:
            check_state(blocks, batch, key)
        return block(key)

    blocks._launch, blocks._block = launching, checked
    requests = [core.submit(core.open_sequence_state(), p, q, owns_cache=True) for p, q in zip(PROMPTS, each, strict=True)]
    steps = 0
    while not core.scheduler.idle:
        for request in requests if lengths else ():
            request.drafting.wanted = lengths[steps % len(lengths)]
        for step, number in cancel:
            if step == steps and requests[number].finish_reason is None:
                core.abandon(requests[number])
        with suppress(fails):
            core.step()
        steps += 1
    for pool in filter(None, (core.pool, core.draft_pool)):
        pool.check_integrity()
        assert pool.num_free_pages == pool.max_pages
    return engine, requests


def texts(requests):
    return [r.token_ids[len(p) :] for r, p in zip(requests, PROMPTS, strict=True)]


def accepted(requests):
    return [(r.metrics.proposed, r.metrics.accepted) for r in requests]


@pytest.mark.parametrize("schedule", ["where nobody joins", "never"])
@pytest.mark.parametrize("length, size", [(1, 4), (2, 3), (4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_text_and_drafts_are_those_without_what_the_device_keeps(
    as_on_a_gpu, target, drafts, alone, uploads, kind, length, size, schedule, monkeypatch
):
    """Drafts rest on the state that is moved: were it another, fewer would be right."""
    each = each_with(draft_length=length)
    _, found = decoded(as_on_a_gpu, target, drafts[kind], each, ahead=SCHEDULES[schedule], max_batch=size)
    assert texts(found) == alone(each)
    beside = [columns for columns in uploads if -1 in columns and max(columns) >= 0]
    moved = any(column not in (-1, b) for columns in beside for b, column in enumerate(columns))
    assert beside and moved
    assert any(-1 not in columns for columns in uploads) or schedule != "never"
    if kind == "model":  # the target itself
        assert all(right == drafted for drafted, right in accepted(found))
    monkeypatch.setattr(BlockDecoding, "_kept", lambda self, requests, *_: [-1] * len(requests))
    _, whole = decoded(as_on_a_gpu, target, drafts[kind], each, ahead=SCHEDULES[schedule], max_batch=size)
    assert accepted(whole) == accepted(found) and sum(right for _, right in accepted(found)) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["where nobody joins", "now and then"])
@pytest.mark.parametrize("length, size", [(1, 4), (3, 2)])
def test_seeded_text_is_that_of_each_request_alone(as_on_a_gpu, target, drafts, alone, uploads, kind, length, size, schedule):
    """Eight rows a deterministic step: 4 requests of a draft each, or two of up to three."""
    each = each_with(draft_length=length, temperature=0.9, seed=3)
    _, found = decoded(as_on_a_gpu, target, drafts[kind], each, ahead=SCHEDULES[schedule], max_batch=size)
    assert texts(found) == alone(each)
    assert any(-1 in columns and max(columns) >= 0 for columns in uploads) or schedule == "now and then"


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["never", "now and then"])
def test_lengths_that_change_while_requests_join_and_leave(as_on_a_gpu, target, drafts, alone, uploads, kind, params, schedule):
    """Among them none at all, and shorter ones than rows wait for; some requests are dropped in the step in which others join."""
    expected = alone(each_with(**params))
    cancel = [(5, 1), (9, 4), (9, 5)]
    lengths = [1, 7, 1, 4, 1, 2, 7, 1, 1, 0] if not params else [1, 3, 1, 2, 1, 3, 0]
    size = 2 if params else 3
    options = {"lengths": lengths, "cancel": cancel, "max_batch": size, "ahead": SCHEDULES[schedule]}
    each = each_with(draft_length=7, **params)  # they have the pages for so many
    _, found = decoded(as_on_a_gpu, target, drafts[kind], each, **options)
    for text, whole, request in zip(texts(found), expected, found, strict=True):
        assert text == whole[: len(text)] and (len(text) == len(whole) or request.finish_reason is None)
    assert sum(request.finish_reason is None for request in found) <= len(cancel)
    assert any(-1 in columns and max(columns) >= 0 for columns in uploads)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_several_lengths_join_one_another(as_on_a_gpu, target, drafts, alone, uploads, kind, params):
    """Among them some that ask for no drafts: a separate draft runs nothing of theirs, and a head goes along."""
    expected = alone(each_with(**params))
    each = [replace(own, draft_length=(2, 0, 1, 2)[b % 4]) for b, own in enumerate(each_with(**params))]
    _, found = decoded(as_on_a_gpu, target, drafts[kind], each, max_batch=2 if params else 4)
    assert texts(found) == expected and sum(right for _, right in accepted(found)) > 0
    assert all(not drafted for (drafted, _), own in zip(accepted(found), each, strict=True) if own.draft_length == 0)
    assert any(-1 in columns and max(columns) >= 0 for columns in uploads)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_are_interrupted_come_back_as_new_ones(as_on_a_gpu, target, drafts, alone, uploads, kind, params):
    """Whatever length they come back at: their pages and their draft's state are others."""
    each = each_with(draft_length=1 if params else 2, **params)
    options = {"max_batch": 4, "page_size": 4, "pool_tokens": 88, "prefill_chunk": 8, "prefix_sharing": True}
    engine, found = decoded(as_on_a_gpu, target, drafts[kind], each, headroom=1, **options)
    assert texts(found) == alone(each) and engine.core.scheduler.preemptions > 0
    assert any(-1 in columns and max(columns) >= 0 for columns in uploads)


@pytest.mark.parametrize("kind", ["model", "head"])
def test_drafts_that_lie_far_behind_join_once_they_have_caught_up(as_on_a_gpu, target, drafts, alone, uploads, kind, monkeypatch):
    """A step in which more than so many tokens are to be caught up with is not captured: the others go on from what it leaves on the host."""
    monkeypatch.setattr(block_runner, "_MOST_BEHIND", 15)
    each = each_with(draft_length=2)
    _, found = decoded(as_on_a_gpu, target, drafts[kind], each, max_batch=3)
    assert texts(found) == alone(each)
    if kind == "model":
        assert all(right == drafted for drafted, right in accepted(found))


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_from_the_text_between_steps_in_which_requests_join(as_on_a_gpu, target, drafts, alone, uploads, kind):
    """Such a step leaves the drafter's state on the device behind that of the host."""
    each = each_with(draft_length=2)
    expected = {tuple(p): text for p, text in zip(PROMPTS, alone(each), strict=True)}
    kinds = []

    def plan(requests):
        kinds.append("given" if len(kinds) % 5 == 2 else "model")
        if kinds[-1] == "model":
            return StepPlan([min(2, r.remaining - 1) for r in requests], [[] for _ in requests])
        follow = [expected[tuple(r.token_ids[: r.prompt_tokens])][r.num_new :] for r in requests]
        wrong_last = [[*own[:-2], (own[-2] + 1) % 97] if len(own) == 3 else own[:-1] for own in (text[:3] for text in follow)]
        return StepPlan([0] * len(requests), [own[: max(0, r.remaining - 1)] for own, r in zip(wrong_last, requests, strict=True)])

    _, found = decoded(as_on_a_gpu, target, drafts[kind], each, max_batch=3, plan=plan)
    assert texts(found) == list(expected.values()) and {"given", "model"} == set(kinds)
    assert sum(r.metrics.from_text_accepted for r in found) > 0 and sum(right for _, right in accepted(found)) > 0
    assert any(-1 in columns and max(columns) >= 0 for columns in uploads)


@pytest.mark.parametrize("schedule", ["where nobody joins", "never"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_fails_once_it_runs_is_begun_anew(as_on_a_gpu, target, drafts, alone, kind, schedule, monkeypatch):
    """The device has moved on then, and the host has not."""
    calls, copy_out = [], block_runner.copy_out

    def failing(tokens, *stream):
        calls.append(len(tokens))
        if len(calls) % 4 == 3:
            raise MemoryError("no room for a copy")
        return copy_out(tokens, *stream)

    monkeypatch.setattr(block_runner, "copy_out", failing)
    each = each_with(draft_length=2)
    _, found = decoded(as_on_a_gpu, target, drafts[kind], each, max_batch=3, ahead=SCHEDULES[schedule], fails=MemoryError)
    assert texts(found) == alone(each) and len(calls) > 20
    if kind == "model":
        assert all(right == drafted for drafted, right in accepted(found))


@pytest.mark.parametrize("size", [3, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_uploaded_for_one_that_joins_does_not_grow_with_those_that_are_there(
    as_on_a_gpu, target, drafts, uploads, kind, size, monkeypatch
):
    """The page tables of both models, what the draft's pass over the prompt reads, and one copy of all else."""
    counts, tensor, launch, copies = [], torch.tensor, BlockDecoding._launch, []

    def counted(self, requests, plan, key, *, ahead=False):
        copies.clear()
        uploads.clear()
        flight = launch(self, requests, plan, key, ahead=ahead)
        counts.extend(len(copies) for columns in uploads if columns.count(-1) == 1 and len(columns) == size)
        return flight

    monkeypatch.setattr(BlockDecoding, "_launch", counted)
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: copies.append(args) or tensor(*args, **options))
    each = [replace(params, max_new_tokens=12 + 5 * b) for b, params in enumerate(each_with(draft_length=2))]
    engine = as_on_a_gpu(Engine(target, draft=drafts[kind], page_size=16, pool_tokens=4096, max_batch=size))
    core = engine.core
    for prompt, params in zip(PROMPTS * 2, each * 2, strict=True):
        core.submit(core.open_sequence_state(), prompt, params, owns_cache=True)
    while not core.scheduler.idle:
        core.step()
    assert len(counts) >= 2 and max(counts) <= 6, counts
