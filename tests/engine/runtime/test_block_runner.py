"""Steps captured whole give the text of plain decoding, sample the target's distribution, and leave every cache as step by step decoding does."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from draft.policy import StepPlan
from draft.source import NgramSource
from draft.spans import SpanPolicy
from engine.engine import Engine
from engine.runtime import block_runner
from engine.runtime.block_runner import BlockDecoding
from engine.runtime.device_sampling import Drawing
from engine.runtime.drafters import load_draft_head
from engine.runtime.model_runner import CAPTURED_LENGTHS, MAX_ROWS, GraphedDecoder, PlainDecoding, places_of, sizes_up_to
from engine.runtime.sampling import SamplingParams

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 12, [8, 8]]
pytestmark = [pytest.mark.gpu] if GPU else []
KINDS = ["itself", "model", "head", "ngram"]


def with_blocks(engine):
    """The engine with the runners that it has on a GPU, here without graphs."""
    core = engine.core
    runner = GraphedDecoder(core.target, core.pool, capture=GPU)
    source, cached = core.source, None
    if source is not None and source.cached_decoder is not None:
        cached = GraphedDecoder(source.cached_decoder, core.draft_pool, capture=GPU)
    core.drafter = source.drafter(runner, core.draft_pool, cached=cached, deterministic=core.deterministic)
    scheduler = core.scheduler
    scheduler.target, scheduler.drafter, scheduler.plain = runner, core.drafter, PlainDecoding(runner)
    scheduler.blocks = block_runner.block_decoding(runner, core.drafter)
    old = scheduler.drafting
    scheduler.drafting = SpanPolicy(old.costs, measured=old.measured, ngrams=old.ngrams, lengths=CAPTURED_LENGTHS, most_rows=MAX_ROWS)
    assert scheduler.blocks is not None
    return engine


@pytest.fixture(scope="module")
def sources(random_decoder, make_draft_head, tmp_path_factory):
    sizes = {"head_dim": 64} if GPU else {}
    target = random_decoder(0, num_hidden_layers=4, **sizes)
    folder = make_draft_head(tmp_path_factory.mktemp("head"), target)
    target.to(DEVICE)
    return target, {
        "itself": target,
        "model": random_decoder(7, num_hidden_layers=2, vocab_size=90, **sizes).to(DEVICE),  # of a smaller vocabulary
        "head": load_draft_head(folder, target),
        "ngram": NgramSource(),
    }


def texts_of(sources, kind, params, prompts=PROMPTS, **options):
    target, drafts = sources
    engine = Engine(target, draft=None if kind == "plain" else drafts[kind], page_size=16, pool_tokens=2048, **options)
    if kind != "plain":
        with_blocks(engine)
    results = engine.generate(prompts, params)
    for pool in filter(None, (engine.core.pool, engine.core.draft_pool)):
        pool.check_integrity()
        assert pool.num_free_pages == pool.max_pages
    return engine, results


@pytest.fixture
def launched(monkeypatch):
    """Keys of the steps that were launched."""
    seen, launch = [], BlockDecoding._launch

    def recorded(self, requests, plan, key, *, ahead=False):
        flight = launch(self, requests, plan, key, ahead=ahead)
        seen.append((flight.source, flight.length, len(requests), ahead))
        return flight

    monkeypatch.setattr(BlockDecoding, "_launch", recorded)
    return seen


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_plain_decoding(sources, kind, params, launched):
    if kind == "ngram" and params:
        params = params | {"temperature": 1e-4}  # a text that repeats itself
    # requests end at different steps and others take their place; batches of deterministic steps have 8 rows at most
    each = [SamplingParams(max_new_tokens=n, stop_token_ids=(11,), draft_length=3, **params) for n in (24, 1, 11, 17, 20)]
    size = 2 if "seed" in params else 4
    _, plain = texts_of(sources, "plain", [SamplingParams(**{**vars(p), "draft_length": 0}) for p in each], max_batch=size)
    _, drafted = texts_of(sources, kind, each, max_batch=size)
    assert [(r.token_ids, r.finish_reason) for r in drafted] == [(r.token_ids, r.finish_reason) for r in plain]
    accepted, proposed = (sum(getattr(r.speculation, name) for r in drafted) for name in ("accepted", "proposed"))
    assert 0 < accepted <= proposed and (accepted < proposed or kind == "itself")
    assert {source for source, *_ in launched} <= ({"given"} if kind == "ngram" else {"model", "given"})
    assert any(ahead for *_, ahead in launched) == (kind != "ngram")
    if kind == "itself" and not params:
        assert accepted > 0.9 * proposed


@pytest.mark.parametrize("kind", KINDS)
def test_automatic_lengths_rest_on_costs_of_captured_passes(sources, kind, launched, monkeypatch):
    monkeypatch.setattr("engine.runtime.core.MEASURED_AFTER", 1)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    _, plain = texts_of(sources, "plain", params)
    engine, drafted = texts_of(sources, kind, params)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    costs = engine.core.cost_model
    assert costs.verify_seconds(4) > 0 and costs.runs_last_draft == (kind == "head")
    assert (costs.draft_seconds(2) > 0) == (kind != "ngram")
    assert all(length in (0, 1, 2, 4, 7) for _, length, *_ in launched)


def test_a_draft_head_that_nobody_asks_is_left_behind_and_catches_up(sources, launched, monkeypatch):
    each = [SamplingParams(max_new_tokens=30, ignore_eos=True, draft_length=2) for _ in PROMPTS[:2]]
    _, plain = texts_of(sources, "plain", each, PROMPTS[:2])
    target, drafts = sources
    engine = with_blocks(Engine(target, draft=drafts["head"], page_size=16, pool_tokens=2048))
    core, states, late = engine.core, [], []
    prefill = core.drafter.prefill
    monkeypatch.setattr(core.drafter, "prefill", lambda states, tokens: late.append(len(states)) or prefill(states, tokens))
    requests = [core.submit(core.open_sequence_state(), p, q, owns_cache=True) for p, q in zip(PROMPTS[:2], each, strict=True)]
    while not core.scheduler.idle:
        for request in requests:  # they have the pages for drafts all the time
            request.drafting.wanted = 2 if len(states) >= 12 else 0
        core.step()
        states.append([r.sequence.length - r.draft_state.num_cached for r in core.scheduler.running])
    assert max(map(max, states[:12])) >= 10 and states[-2] == [0] * len(states[-2])
    assert [r.token_ids[len(p) :] for r, p in zip(requests, PROMPTS, strict=False)] == [r.token_ids for r in plain]
    assert sum(r.metrics.accepted for r in requests) > 0 and any(source == "model" for source, *_ in launched)
    assert late == [2], "the first step with drafts runs what the draft lacks, and is captured all the same"


@pytest.mark.parametrize("kind", ["model", "head"])
def test_automatic_drafts_far_behind_are_not_asked_in_many_requests_at_once(sources, kind, launched, monkeypatch):
    """A step that cannot be captured is none that the policy may choose: it would run operation by operation."""
    monkeypatch.setattr(block_runner, "_MOST_BEHIND", 20)
    target, drafts = sources
    core = with_blocks(Engine(target, draft=drafts[kind], page_size=16, pool_tokens=4096)).core
    blocks, params = core.scheduler.blocks, SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [core.submit(core.open_sequence_state(), [7] * 15, params, owns_cache=True) for _ in range(3)]
    core.step()
    if kind == "head":
        for request in requests:
            request.draft_state.pending_hidden, request.draft_state.own.length = None, 0
    lacking = blocks._num_behind(requests)
    assert lacking > 20 and blocks.ready(requests, False, "model") == () and blocks.ready(requests[:1], False, "model") == CAPTURED_LENGTHS
    assert blocks._takes(requests, StepPlan([2, 2, 2], [[], [], []]), False) is None
    for request in requests:
        core.abandon(request)


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_steps_captured_beforehand_are_those_that_requests_take(sources, kind):
    target, drafts = sources
    engine = with_blocks(Engine(target, draft=drafts[kind], page_size=16, pool_tokens=2048, max_batch=3))
    core = engine.core
    core.runner = core.scheduler.target
    core.capture_steps(limit_s=600.0)  # on a GPU that many tests share
    steps, blocks = set(core.runner._steps), set(core.scheduler.blocks._blocks)
    assert {key.batch for key in steps if key.length > 1} == {1, 2, 4} and all(key.drawing.greedy for key in steps)
    assert {key.batch for key in steps if key.length == 1} == set(sizes_up_to(MAX_ROWS)), "prompts may run beside"
    assert len(blocks) == (24 if kind == "model" else 12)
    assert {key.length for key in steps} == {1, 16, 32, 64, 128} and all(key.batch * key.length <= MAX_ROWS for key in steps)
    params = [SamplingParams(max_new_tokens=12, ignore_eos=True, draft_length=n) for n in (0, 4)]
    texts = [[r.token_ids for r in engine.generate(PROMPTS, own)] for own in params]
    assert texts[0] == texts[1] and set(core.runner._steps) == steps, "decoding and its prompts captured nothing more"
    assert set(core.scheduler.blocks._blocks) == blocks


def test_a_draft_head_catches_up_in_steps_that_were_captured_beforehand(sources):
    target, drafts = sources
    core = with_blocks(Engine(target, draft=drafts["head"], page_size=16, pool_tokens=2048, max_batch=2)).core
    core.runner = core.scheduler.target
    core.capture_steps(limit_s=600.0)
    runners = core.runner, core.scheduler.blocks.draft
    known = [set(runner._steps) for runner in runners]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=0)
    requests = [core.submit(core.open_sequence_state(), p, params, owns_cache=True) for p in PROMPTS[:2]]
    while not core.scheduler.idle:
        core.step()
        if requests[0].num_new == 25:
            for request in requests:
                request.drafting.wanted = 2
                object.__setattr__(request.params, "draft_length", 2)
    assert sum(r.metrics.proposed for r in requests) > 0 and [set(runner._steps) for runner in runners] == known


def test_automatic_lengths_are_those_whose_padded_rows_fit_and_whose_capture_is_due(sources, monkeypatch):
    target, drafts = sources
    core = with_blocks(Engine(target, draft=drafts["ngram"], page_size=16, pool_tokens=4096, max_batch=64)).core
    blocks, params = core.scheduler.blocks, SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [core.submit(core.open_sequence_state(), [3, 4, n], params, owns_cache=True) for n in range(33)]
    core.step()
    assert blocks.ready(requests, False, "ngram") == (1,), "33 requests are padded to 48"
    assert blocks.ready(requests[:2], True, "ngram") == (1, 2) and blocks.ready(requests[:2], False, "ngram") == CAPTURED_LENGTHS
    blocks.capture_common(4, Drawing.of([params], target.config.vocab_size), until_s=0.0)
    monkeypatch.setattr(blocks.target, "captures", True)
    assert blocks.ready(requests[:2], False, "ngram") == CAPTURED_LENGTHS, "the first capture is always due"
    blocks._captured_at, blocks._capture_s = time.perf_counter(), 1e6
    assert blocks.ready(requests[:2], False, "ngram") == ()
    monkeypatch.setattr(blocks.target, "captures", False)
    blocks._block(replace(blocks._key(requests[:2], "given", False), length=4))
    monkeypatch.setattr(blocks.target, "captures", True)
    blocks._captured_at, blocks._capture_s = time.perf_counter(), 1e6
    assert blocks.ready(requests[:2], False, "ngram") == (4,) and blocks.ready(requests[:2], False, "model") == ()
    given = StepPlan([0, 0], [[5, 6], [7]])
    assert blocks._takes(requests[:2], given, False).length == 4, "a captured step is rather taken than a shorter one that is not"
    blocks._captured_at -= 60e6
    assert blocks.ready(requests[:2], False, "ngram") == CAPTURED_LENGTHS
    for request in requests:
        core.abandon(request)


@pytest.mark.parametrize("kind", ["model", "head"])
def test_requests_of_several_kinds_share_a_step(sources, kind, launched):
    each = [
        SamplingParams(max_new_tokens=12, draft_length=3, temperature=t, seed=s)
        for t, s in ((0.0, None), (0.8, 4), (1.3, 5), (0.0, 1), (0.7, 6))
    ]
    plain = [texts_of(sources, "plain", p, [prompt])[1][0].token_ids for p, prompt in zip(each, PROMPTS, strict=True)]
    _, drafted = texts_of(sources, kind, each, max_batch=2)
    assert [r.token_ids for r in drafted] == plain
    assert any(batch == 2 and length == 3 for _, length, batch, _ in launched)


@pytest.mark.skipif(GPU, reason="heads of 64 channels on a GPU, few enough cells here")
@pytest.mark.parametrize("kind", ["model", "head", "ngram"])
def test_sampled_text_has_the_targets_distribution(kind, random_decoder, make_draft_head, tmp_path, check_sampled_text, monkeypatch):
    shape = {"vocab_size": 5, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    target = random_decoder(3, **shape)
    source = {"ngram": NgramSource(), "model": random_decoder(5, **shape)}.get(kind)
    if kind == "head":
        source = load_draft_head(make_draft_head(tmp_path, target, size=3), target)
    init, seen = Engine.__init__, []

    def rewired(self, *args, **options):
        init(self, *args, **options)
        seen.append(with_blocks(self).core.scheduler.blocks)
        self.core.scheduler.max_batch = 32

    monkeypatch.setattr(Engine, "__init__", rewired)
    check_sampled_text(target, source, 400, prompt=(1, 2, 3, 1, 2) if kind == "ngram" else (1, 2))
    assert seen and all(any(key.drawing.inverse for key in blocks._blocks) for blocks in seen)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", ["plain", "itself", "model", "head"])
def test_requests_that_stay_take_the_step_that_was_launched_with_others(sources, kind, params, launched, monkeypatch):
    """Nothing is launched twice when requests end at different steps, and no state is uploaded anew."""
    each = [
        SamplingParams(max_new_tokens=n, ignore_eos=True, draft_length=0 if kind == "plain" else 2, **params) for n in (9, 30, 12, 19, 19)
    ]
    target, drafts = sources
    engine = with_blocks(Engine(target, draft=drafts["itself" if kind == "plain" else kind], page_size=16, pool_tokens=2048))
    core, plain, rows = engine.core, PlainDecoding._launch, []
    monkeypatch.setattr(PlainDecoding, "_launch", lambda self, sequences, *a: rows.append(len(sequences)) or plain(self, sequences, *a))
    requests = [core.submit(core.open_sequence_state(), p, q, owns_cache=True) for p, q in zip(PROMPTS, each, strict=True)]
    steps = -1  # the first one runs the prompts
    while not core.scheduler.idle:
        core.step()
        steps += 1
    assert [r.num_new for r in requests] == [9, 30, 12, 19, 19]
    if kind == "plain":
        assert rows == sorted(rows, reverse=True) and len(rows) == steps, "one that ends for certain has no part in the next step"
    else:
        assert steps <= len(launched) <= steps + 1, "where the last ones end cannot be known"
        assert [ahead for *_, ahead in launched] == [False] + [True] * (len(launched) - 1)
    if not params:
        _, expected = texts_of(sources, "plain", [SamplingParams(**{**vars(p), "draft_length": 0}) for p in each])
        assert [r.token_ids[len(p) :] for r, p in zip(requests, PROMPTS, strict=True)] == [r.token_ids for r in expected]


@pytest.mark.parametrize("length", [0, 2], ids=["plain", "drafts"])
def test_a_text_that_ends_unforeseen_leaves_the_step_under_way_to_the_others(sources, length, launched, monkeypatch):
    """Its last token is known once the next step was launched, whose tokens for the others are theirs."""
    target, drafts = sources
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, draft_length=length)
    _, alone = texts_of(sources, "plain", params)
    stop = alone[1].token_ids[11]
    each = [replace(params, stop_token_ids=(stop,)) if b == 1 else params for b in range(len(PROMPTS))]
    engine = with_blocks(Engine(target, draft=drafts["model"], page_size=16, pool_tokens=2048))
    plain, began = PlainDecoding._launch, []
    monkeypatch.setattr(PlainDecoding, "_launch", lambda self, *a: began.append(len(a) < 8) or plain(self, *a))
    results = engine.generate(PROMPTS, each)
    assert results[1].finish_reason == "stop" and len(results[1].token_ids) <= 12
    assert [r.token_ids for b, r in enumerate(results) if b != 1] == [r.token_ids for b, r in enumerate(alone) if b != 1]
    assert sum(began) == 1 if not length else sum(not ahead for *_, ahead in launched) == 1


@pytest.mark.parametrize("at", [11, 13])
@pytest.mark.parametrize("kind", ["plain", "model", "head"])
def test_the_step_under_way_is_forgotten_with_a_request_s_pages(sources, kind, at):
    """Interrupted behind whole pages that are all still known, it decodes at once, at the length of the step under way: but in other pages."""
    target, drafts = sources
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, draft_length=0 if kind == "plain" else 2)
    _, [alone] = texts_of(sources, "plain", replace(params, draft_length=0), PROMPTS[:1])
    draft = NgramSource() if kind == "plain" else drafts[kind]
    core = with_blocks(Engine(target, draft=draft, page_size=4, pool_tokens=512, prefix_sharing=True)).core
    request = core.submit(core.open_sequence_state(), PROMPTS[0], params, owns_cache=True)
    while request.num_new < at or request.sequence.length % 4:
        core.step()
    runner, own = (core.scheduler.plain, [request.sequence]) if kind == "plain" else (core.scheduler.blocks, [request])
    assert runner.under_way(own)
    length = request.sequence.length
    core.scheduler._preempt(request)
    others = core.pool.new_sequence(40)
    request.sequence.length = length
    assert not runner.under_way(own)
    request.sequence.length = 0
    while not core.scheduler.idle:
        core.step()
    assert request.token_ids[len(PROMPTS[0]) :] == alone.token_ids
    others.free()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 2], ids=["plain", "drafts"])
def test_costs_that_are_measured_between_steps_leave_texts_as_they_are(sources, kind, length):
    """The steps that are timed may be under way, or have the page table row of a sequence that has ended and of one that took its row."""
    target, drafts = sources
    each = [SamplingParams(max_new_tokens=n, ignore_eos=True, draft_length=length) for n in (6, 19, 9, 24, 14)]
    _, expected = texts_of(sources, "plain", [replace(params, draft_length=0) for params in each])
    for size in (1, 2):
        core = with_blocks(Engine(target, draft=drafts[kind], page_size=16, pool_tokens=2048, max_batch=size)).core
        requests = [core.submit(core.open_sequence_state(), p, q, owns_cache=True) for p, q in zip(PROMPTS, each, strict=True)]
        steps = 0
        while not core.scheduler.idle:
            core.step()
            steps += 1
            if steps % 3 == 0:
                core.scheduler.blocks.measure_costs([1, 2])
        assert [r.token_ids[len(p) :] for r, p in zip(requests, PROMPTS, strict=True)] == [r.token_ids for r in expected]


def test_the_places_of_objects_are_those_of_the_same_order():
    first, second, third = object(), object(), object()
    assert list(places_of([first, second], [first, second])) == [0, 1] and places_of([], [first]) == []
    assert places_of([first, third], [first, second, third]) == [0, 2]
    assert places_of([third, first], [first, second, third]) is None and places_of([first, object()], [first, second]) is None


@pytest.mark.parametrize("kind", ["itself", "model", "head"])
@pytest.mark.parametrize("lengths", [(0, 2), (2, 0), ("auto", 0, 2)], ids=str)
def test_requests_without_drafts_share_steps_with_others(sources, kind, lengths, launched):
    """A separate draft has no pages for them, and runs nothing of theirs."""
    each = [SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=n) for n in lengths]
    _, plain = texts_of(sources, "plain", [replace(params, draft_length=0) for params in each], PROMPTS[: len(each)])
    _, drafted = texts_of(sources, kind, each, PROMPTS[: len(each)])
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert any(source == "model" and batch == len(each) for source, _, batch, _ in launched)
    assert [r.speculation.proposed for r, n in zip(drafted, lengths, strict=True) if n == 0] == [0]
