"""Captured steps with a draft head on the target's last states: the text of plain decoding, drafts and rows of steps that run pass by pass."""

from __future__ import annotations

import pytest
import torch

from draft.policy import StepPlan
from engine.engine import Engine
from engine.model.decoder import forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.runtime.request import SequenceState
from engine.runtime.sampling import SamplingParams
from tests.engine.runtime.test_block_runner import DEVICE, GPU, with_blocks
from tests.engine.runtime.test_state_head import LAYERS, PROMPTS, full_rows, talkative

pytestmark = [pytest.mark.gpu] if GPU else []


HEADS = {"one layer": (1, 97, "own", (LAYERS,)), "two, of three states": (2, 90, "tied", (1, 3, LAYERS))}


@pytest.fixture(scope="module")
def made(random_decoder, tmp_path_factory, make_draft_head):
    """The target, and the folders of its heads."""
    target, folders = talkative(random_decoder(0, num_hidden_layers=LAYERS, **({"head_dim": 64} if GPU else {}))), {}
    for name, (layers, size, head, states) in HEADS.items():
        folder = tmp_path_factory.mktemp("head")
        folders[name] = make_draft_head(folder, target, layers=layers, size=size, head=head, state_layers=states)
    return target.to(DEVICE), folders


@pytest.fixture(scope="module")
def target(made):
    return made[0]


@pytest.fixture(scope="module", params=list(HEADS))
def source(request, made):
    return load_draft_head(made[1][request.param], made[0])


def captured(target, source, **options):
    return with_blocks(Engine(target, draft=source, **({"page_size": 16, "pool_tokens": 4096} | options)))


def plain_texts(target, params, prompts=PROMPTS):
    engine = Engine(target, draft=None, page_size=16, pool_tokens=4096)
    return [r.token_ids for r in engine.generate(prompts, params)]


def check_rows(engine, target, source, conversation):
    """The own layers' cache is that of a plain pass over what the head has rows of."""
    state = conversation.draft_state
    assert state.num_cached == conversation.sequence.length == len(conversation.token_ids) - 1
    state.own.reserve(state.num_pending_hidden)
    engine.core.drafter.states_head.run_pending([state])
    found = source.layers.read_kv(state.own, 0, state.own.length)
    expected = full_rows(target, source, conversation.token_ids[:-1], known_from=state.num_skipped)
    assert found.shape == expected.shape and float((found - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("size", [1, 4])
def test_text_and_drafts_are_those_of_steps_run_pass_by_pass(target, source, params, size):
    each = [SamplingParams(max_new_tokens=n, stop_token_ids=(11,), draft_length=3, **params) for n in (24, 1, 17, 20)]
    plain = plain_texts(target, [SamplingParams(**{**vars(p), "draft_length": 0}) for p in each])
    engine = captured(target, source, max_batch=min(size, 2) if params else size)
    results = engine.generate(PROMPTS, each)
    assert [r.token_ids for r in results] == plain
    eager = Engine(target, draft=source, page_size=16, pool_tokens=4096).generate(PROMPTS, each)
    accepted, expected = (sum(r.speculation.accepted for r in found) for found in (results, eager))
    assert accepted > 0 and abs(accepted - expected) <= 3, "a step's last drafts may lie behind a text's end"
    assert engine.core.scheduler.blocks.num_steps > 0
    for pool in (engine.core.pool, engine.core.draft_pool):
        pool.check_integrity()
        assert pool.num_free_pages == pool.max_pages


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.0}], ids=["greedy", "seeded", "drawn"])
def test_rows_are_those_of_a_plain_pass(target, source, params):
    """Whatever lengths follow one another, and whatever was accepted."""
    engine = captured(target, source)
    conversation = engine.core.open_sequence_state()
    for n, (new, length) in enumerate((([5, 6, 7] * 14, 4), ([], 7), ([1, 2], 1), ([], 2))):
        sampling = params | ({"seed": n} if "seed" in params else {})
        engine.core.run(conversation, new, SamplingParams(max_new_tokens=13, ignore_eos=True, draft_length=length, **sampling))
        assert conversation.draft_state.num_skipped == 0
        check_rows(engine, target, source, conversation)


def test_lengths_that_change_within_a_text(target, source):
    """A shorter block has no room for all rows that a longer one may keep: it is not launched ahead."""
    engine = captured(target, source)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, draft_length=4)
    [plain] = plain_texts(target, SamplingParams(max_new_tokens=60, ignore_eos=True), [PROMPTS[3]])
    conversation = engine.core.open_sequence_state()
    request = engine.core.submit(conversation, PROMPTS[3], params, owns_cache=False)
    lengths = [4, 1, 2, 7, 1, 4, 4, 2]
    while request.finish_reason is None:
        wanted = lengths[len(request.token_ids) % len(lengths)]
        request.drafting.wanted = wanted
        object.__setattr__(request.params, "draft_length", wanted)
        engine.core.step()
    assert conversation.token_ids[len(PROMPTS[3]) :] == plain and request.metrics.accepted > 0
    assert conversation.draft_state.num_skipped == 0
    check_rows(engine, target, source, conversation)


def test_lengths_that_change_beside_padding(target, source):
    """Three requests in a step of four: the state of the one that is none moves on with every step, and is never looked at."""
    engine = captured(target, source, max_batch=3)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, draft_length=4)
    plain = plain_texts(target, SamplingParams(max_new_tokens=30, ignore_eos=True), PROMPTS[:3])
    conversations = [engine.core.open_sequence_state() for _ in range(3)]
    requests = [engine.core.submit(c, prompt, params, owns_cache=False) for c, prompt in zip(conversations, PROMPTS[:3], strict=True)]
    steps = 0
    while any(request.finish_reason is None for request in requests):
        wanted, steps = (4 if 1 < steps % 8 < 6 else 1), steps + 1
        for request in requests:
            request.drafting.wanted = wanted
            object.__setattr__(request.params, "draft_length", wanted)
        engine.core.step()
    assert [c.token_ids[len(prompt) :] for c, prompt in zip(conversations, PROMPTS, strict=False)] == plain


def test_drafts_from_the_text_leave_the_head_with_its_rows(target, source):
    """Steps with drafts from the text between steps with its own ones."""
    engine = captured(target, source)
    blocks = engine.core.scheduler.blocks
    [plain] = plain_texts(target, SamplingParams(max_new_tokens=40, ignore_eos=True), [PROMPTS[3]])
    conversation = engine.core.open_sequence_state()
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, draft_length=3)
    request = engine.core.submit(conversation, PROMPTS[3], params, owns_cache=False)
    run, kinds = blocks.step, []

    def step(requests, _, **options):
        asked = [len(kinds) + blocks.under_way(requests)]  # a step under way was planned before

        def planned():
            own, given = asked[0] % 3 != 1, plain[request.num_new : request.num_new + 2]
            asked[0] += 1
            if own or not given:
                return StepPlan([min(3, request.remaining - 1)], [[]])
            return StepPlan([0], [[*given, 1][: request.remaining - 1]])  # right ones, then a wrong one

        plan, gains = run(requests, planned, **options)
        kinds.append("given" if any(plan.given) else "model")
        return plan, gains

    blocks.step = step
    while request.finish_reason is None:
        engine.core.step()
    assert conversation.token_ids[len(PROMPTS[3]) :] == plain and set(kinds) == {"given", "model"}
    assert request.metrics.from_text_accepted > 0 and conversation.draft_state.num_skipped == 0
    check_rows(engine, target, source, conversation)


def test_a_text_whose_states_are_not_known_is_drafted_from_where_they_are(target, source):
    engine = captured(target, source)
    sequence = engine.core.pool.new_sequence()
    forward_reserved(target, torch.tensor(PROMPTS[3][:30], device=DEVICE), [sequence], [30], logits="none")
    sequence.advance(30)
    conversation = SequenceState(list(PROMPTS[3]), sequence)
    params = SamplingParams(max_new_tokens=24, draft_length=3, ignore_eos=True)
    result = engine.core.run(conversation, [], params)
    assert [result.token_ids] == plain_texts(target, params, [PROMPTS[3]]) and result.speculation.proposed > 0
    assert conversation.draft_state.num_skipped == 30
    check_rows(engine, target, source, conversation)


@pytest.mark.skipif(GPU, reason="heads of 64 channels on a GPU, few enough cells here")
def test_sampled_text_has_the_targets_distribution(random_decoder, make_draft_head, tmp_path, check_sampled_text, monkeypatch):
    shape = {"vocab_size": 5, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    target = random_decoder(3, **shape)
    source = load_draft_head(make_draft_head(tmp_path, target, size=3, state_layers=(3,)), target)
    init, seen = Engine.__init__, []

    def rewired(self, *args, **options):
        init(self, *args, **options)
        seen.append(with_blocks(self).core.scheduler.blocks)
        self.core.scheduler.max_batch = 32

    monkeypatch.setattr(Engine, "__init__", rewired)
    check_sampled_text(target, source, 400, prompt=(1, 2))
    assert seen and all(any(key.drawing.inverse for key in blocks._blocks) for blocks in seen)
