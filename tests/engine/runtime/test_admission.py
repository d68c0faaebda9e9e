"""Requests that wait for places begin together where their prompts would let everybody else wait one by one."""

from __future__ import annotations

import random

import pytest

from engine.engine import Engine
from engine.runtime.admission import FEW_TOKENS, Admission
from engine.runtime.sampling import SamplingParams


def learnt(pass_s, answer_s, tokens=10, count=6, clock=lambda: 0.0):
    admission = Admission(clock)
    for _ in range(count):
        admission.ran(tokens, pass_s)
        admission.answered(answer_s)
    return admission


def test_as_many_as_cost_least():
    assert learnt(0.004, 0.125).together(32) == round(32 * (0.008 / 0.125) ** 0.5) == 8
    assert learnt(0.001, 2.0).together(32) == 1
    assert learnt(1.0, 0.1).together(32) == 8, "no more than a quarter of the places is empty"
    assert learnt(1.0, 0.1).together(2) == 1

    def cost(group, places=64, pass_s=0.002, answer_s=0.3):
        return group * answer_s / (2 * places) + pass_s * places / group

    best = min(range(1, 17), key=cost)
    assert abs(learnt(0.002, 0.3).together(64) - best) <= 1


def test_nothing_waits_before_enough_is_known():
    assert learnt(1.0, 0.1, count=3).together(32) == 1
    assert learnt(1.0, 0.1, tokens=FEW_TOKENS + 1).together(32) == 1, "long prompts take their time however many there are"
    assert learnt(1.0, 0.0).together(32) == 1


def test_places_that_suffice_for_all_are_taken_at_once():
    admission = learnt(0.004, 0.125)
    assert admission.waits(3, 4, 32) and not admission.waits(3, 3, 32) and not admission.waits(8, 40, 32) and not admission.waits(0, 40, 32)


def test_a_place_waits_no_longer_than_an_answer_takes():
    """Those that run now may take much longer than those that ended, and then nobody would begin."""
    now = [5.0]
    admission = learnt(0.004, 0.125, clock=lambda: now[0])
    for _ in range(2):
        assert admission.waits(3, 40, 32)
        now[0] += 0.125
        assert admission.waits(3, 40, 32)
        now[0] += 0.01
        assert not admission.waits(3, 40, 32), "those that wait begin"
        now[0] += 9.0
    assert admission.waits(3, 40, 32) and not admission.waits(8, 40, 32)
    now[0] += 9.0
    assert admission.waits(3, 40, 32), "another place"


@pytest.mark.parametrize("draft_length", [0, 2])
def test_a_full_batch_takes_requests_in_groups(target, drafts, draft_length):
    """As many as are said together, all texts as alone, and nobody waits for ever."""
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 60) for _ in range(rng.randrange(3, 12))] for _ in range(21)]
    params = [SamplingParams(max_new_tokens=rng.randrange(3, 25), ignore_eos=True, draft_length=draft_length) for _ in prompts]
    alone = [Engine(target, draft=drafts["head"], page_size=8).generate([p], q)[0].token_ids for p, q in zip(prompts, params, strict=True)]
    engine = Engine(target, draft=drafts["head"], page_size=8, max_batch=12)
    core, scheduler = engine.core, engine.core.scheduler
    assert scheduler.admission is None, "on a CPU a prompt takes as long as it has tokens"
    scheduler.admission = learnt(1.0, 0.1, count=4000)
    requests = [core.submit(core.open_sequence_state(), p, q, owns_cache=True) for p, q in zip(prompts, params, strict=True)]
    began = []
    while not scheduler.idle:
        waiting = len(scheduler.waiting)
        core.step()
        began += [waiting - len(scheduler.waiting)] if waiting > len(scheduler.waiting) else []
    assert [r.token_ids[len(p) :] for r, p in zip(requests, prompts, strict=True)] == alone
    assert began[0] == 12 and sum(began) == 21 and all(count >= 3 for count in began[1:-1]), began
    core.pool.check_integrity()


def test_who_was_interrupted_does_not_wait(target):
    engine = Engine(target, page_size=8, max_batch=4)
    scheduler = engine.core.scheduler
    scheduler.admission = Admission()
    scheduler.admission.waits = lambda free, waiting, places: True
    core, params = engine.core, SamplingParams(max_new_tokens=8, ignore_eos=True)
    first, second = (core.submit(core.open_sequence_state(), p, params, owns_cache=True) for p in ([3, 4], [5, 6, 7]))
    core.step()
    assert first in scheduler.running and second in scheduler.running
    scheduler._preempt(second)
    core.step()
    assert second in scheduler.running
    while not scheduler.idle:
        core.step()
    assert first.finish_reason == second.finish_reason == "length"
