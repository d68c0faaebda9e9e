"""Captured steps without drafts beside a draft head on the target's last states: what they leave is what a plain pass gives."""

from __future__ import annotations

import pytest

from draft.state_drafter import _MOST_KEPT
from draft.step_rows import StepRows
from engine.runtime import block_runner
from engine.runtime.model_runner import _LOGGED
from engine.runtime.sampling import SamplingParams
from tests.engine.runtime.test_block_runner import GPU
from tests.engine.runtime.test_state_head import PROMPTS
from tests.engine.runtime.test_state_head_captured import captured, check_rows, made, plain_texts, source, target

__all__ = ["made", "source", "target"]
pytestmark = [pytest.mark.gpu] if GPU else []


def steps_with(engine, requests, lengths):
    """Steps until all have ended, each with as many drafts a request as `lengths` says in turn."""
    number = 0
    while any(request.finish_reason is None for request in requests):
        wanted, number = lengths[number % len(lengths)], number + 1
        for request in requests:
            request.drafting.wanted = wanted
        engine.core.step()


def submitted(engine, prompts, params):
    conversations = [engine.core.open_sequence_state() for _ in prompts]
    pairs = zip(conversations, prompts, params, strict=True)
    return conversations, [engine.core.submit(c, prompt, p, owns_cache=False) for c, prompt, p in pairs]


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0, 3], [2, 0], [4, 4, 0, 0, 0, 0, 0, 1]])
def test_rows_are_those_of_a_plain_pass(target, source, lengths):
    engine, most = captured(target, source), max(1, *lengths)
    params = SamplingParams(max_new_tokens=70, ignore_eos=True, draft_length=most)
    [conversation], requests = submitted(engine, [PROMPTS[3]], [params])
    steps_with(engine, requests, lengths)
    [plain] = plain_texts(target, SamplingParams(max_new_tokens=70, ignore_eos=True), [PROMPTS[3]])
    assert conversation.token_ids[len(PROMPTS[3]) :] == plain
    assert conversation.draft_state.knows_text and conversation.draft_state.num_skipped == 0
    check_rows(engine, target, source, conversation)


def test_requests_that_join_and_leave(target, source):
    """A request's place in the step changes, and so does the tensor that its states lie in."""
    engine = captured(target, source)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, draft_length=2) for n in (2 * _LOGGED + 5, 9, 30)]
    conversations, requests = submitted(engine, PROMPTS[:3], params)
    for _ in range(12):
        for request in requests:
            request.drafting.wanted = 0
        engine.core.step()
    more, later = submitted(engine, [PROMPTS[3]] * 4, [SamplingParams(max_new_tokens=20, ignore_eos=True, draft_length=2)] * 4)
    steps_with(engine, [*requests, *later], [0, 0, 0, 0, 0, 2, 2])
    for conversation in [*conversations, *more]:
        assert conversation.draft_state.num_skipped == 0
        check_rows(engine, target, source, conversation)


def test_what_is_kept_is_bounded(target, source):
    engine = captured(target, source)
    params = SamplingParams(max_new_tokens=3 * _MOST_KEPT, ignore_eos=True, draft_length=1)
    [conversation], [request] = submitted(engine, [PROMPTS[1]], [params])
    most, tensors = 0, 0
    while request.finish_reason is None:
        request.drafting.wanted = 0
        engine.core.step()
        state = conversation.draft_state
        most = max(most, state.num_pending_hidden)
        tensors = max(tensors, len({id(part.source) for part in state._waiting if isinstance(part, StepRows)}))
    assert _LOGGED < most < _MOST_KEPT + 8 and tensors <= _MOST_KEPT // _LOGGED + 1
    assert state.own.length >= 2 * _MOST_KEPT
    check_rows(engine, target, source, conversation)


def test_seeded_requests_in_groups(target, source):
    """Batch-invariant steps of more requests than one takes."""
    engine = captured(target, source, max_batch=12)
    params = [SamplingParams(max_new_tokens=14, ignore_eos=True, draft_length=2, temperature=0.8, seed=seed) for seed in range(11)]
    conversations, requests = submitted(engine, [PROMPTS[b % 4] + [b] for b in range(11)], params)
    steps_with(engine, requests, [0, 0, 0, 2])
    for conversation in conversations:
        assert conversation.draft_state.num_skipped == 0
        check_rows(engine, target, source, conversation)


@pytest.mark.parametrize(
    "draft_length, most, large_bytes, keeps", [(2, 16, 1 << 30, True), (0, 16, 1 << 30, False), (2, 1, 1 << 30, False), (2, 1, 1, True)]
)
def test_whose_states_are_kept(target, source, draft_length, most, large_bytes, keeps, monkeypatch):
    """Those of requests that may draft, in steps of few requests, or of more where the target is large."""
    monkeypatch.setattr(block_runner, "_MOST_KEEPING", most)
    monkeypatch.setattr(block_runner, "_LARGE_BYTES", large_bytes)
    engine = captured(target, source)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, draft_length=draft_length)
    conversations, requests = submitted(engine, PROMPTS[:2], [params] * 2)
    steps_with(engine, requests, [0])
    plain = [key for key in engine.core.scheduler.plain.target._steps if key.length == 1 and key.logits and key.embed]
    assert plain and all(key.taps == (source.join.state_layers if keeps else ()) for key in plain)
    assert all(c.draft_state.knows_text == keeps for c in conversations)
    for conversation, [expected] in zip(conversations, ([t] for t in plain_texts(target, params, PROMPTS[:2])), strict=True):
        assert conversation.token_ids[-12:] == expected


@pytest.mark.parametrize("left, keeps", [(10, True), (11, False)])
def test_texts_that_end_before_drafts_may_come_keep_nothing(target, source, left, keeps):
    """left: plain steps that are certain to come, of requests whose first token comes with their prompt."""
    engine = captured(target, source)
    engine.core.scheduler.drafting.plain_steps_left = lambda batch: left
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    conversations, requests = submitted(engine, PROMPTS[:2], [params] * 2)
    engine.core.step()
    engine.core.step()
    assert all(request.num_new == 2 for request in requests)
    assert [c.draft_state.knows_text for c in conversations] == [keeps] * 2
    for request in requests:
        engine.core.abandon(request)
