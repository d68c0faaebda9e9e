"""Spans of captured steps: which kind comes next, how long blocks may be, and when nothing is asked at all."""

from __future__ import annotations

import itertools

import pytest

from draft.policy import CostModel
from draft.spans import CREDIT, FIRST_CHECK, FIRST_LOOK, KNOWN, LEAST_REST, MISSES, MOST_LOST, SETTLE, TRIAL, SpanPolicy

CHEAP = CostModel(draft=((1, 0.1),), verify=((1, 1.0), (128, 1.1)))
DEAR = CostModel(draft=((1, 3.0),), verify=((1, 1.0), (128, 9.0)))
NEW, ROOM = list(range(100)), 100  # a text without repetitions
REPEATED = [1, 2, 3] * 10


def policy_of(costs, *, measured=False, **options):
    return SpanPolicy(costs, measured=measured, **({"lengths": (1, 2, 4, 7), "most_rows": 128} | options))


def requests_of(policy, count, wanted="auto"):
    return [policy.request(wanted, greedy=True) for _ in range(count)]


def step(policy, requests, accepted=0, *, text=NEW, seconds=None, **options):
    """Plan and count a step of requests of which each accepts so many drafts (at most). Returns its plan; None where nothing was asked."""
    batch = len(requests)
    if policy.rests(batch) > 1:
        policy.rested(batch, seconds(0) if seconds else 1.0, chosen=True)
        return None
    plan = policy.plan(requests, [text] * batch, [ROOM] * batch, **({"drafter_room": [ROOM] * batch} | options))
    if policy.rests(batch):  # the step under way is plain; what was planned is what comes next
        policy.rested(batch, seconds(0) if seconds else 1.0, chosen=True)
        return None
    length = max([*plan.lengths, *map(len, plan.given)])
    kept = min(accepted, length)
    for request, own in zip(requests, plan.lengths, strict=True):
        request.observe([], own, min(accepted, own), None, given=False)
    policy.observe(plan, batch, batch * (1 + kept), seconds(length) if seconds else 1.0)
    return plan


def kinds(policy, requests, count, accepted=0, **options):
    plans = [step(policy, requests, accepted, **options) for _ in range(count)]
    return ["rest" if plan is None else plan.kind for plan in plans]


def test_blocks_are_padded_and_as_long_as_captured_ones_that_fit():
    policy = policy_of(CHEAP, most_rows=12)
    requests = requests_of(policy, 1)
    plans = [step(policy, requests, 7) for _ in range(80)]
    assert plans[-1].lengths == [7] and plans[-1].kind == "model"
    four = requests_of(policy, 4)
    plans = [step(policy, four, 7) for _ in range(80)]
    assert plans[-1].lengths == [2] * 4, "twelve rows hold no longer block"
    assert "model" not in kinds(policy, requests_of(policy, 7), 100, 7), "not even one draft each fits"
    plan = policy.plan(four, [NEW] * 4, [ROOM, 1, 0, ROOM], drafter_room=[ROOM, ROOM, ROOM, 0])
    assert plan.lengths == [2, 1, 0, 0]


def test_lengths_that_are_not_captured_are_not_chosen():
    policy = policy_of(CHEAP)
    requests = requests_of(policy, 1)
    plans = [step(policy, requests, 7, ready=lambda kind: (1,) if kind == "model" else ()) for _ in range(80)]
    assert max(plan.lengths[0] for plan in plans if plan) == 1
    plans = [step(policy, requests, 7, ready=lambda kind: ()) for _ in range(80)]
    assert not any(plan.drafts for plan in plans if plan)


def test_a_draft_that_can_never_pay_is_not_tried_and_asks_nothing(monkeypatch):
    policy = policy_of(DEAR)
    asked, plan = [], policy.plan
    monkeypatch.setattr(policy, "plan", lambda *args, **options: asked.append(1) or plan(*args, **options))
    assert set(kinds(policy, requests_of(policy, 2), 3000, 7)) == {"rest"} and len(asked) == 1


def test_a_trial_that_fails_is_repeated_ever_more_rarely():
    even = CostModel(draft=((1, 0.5),), verify=((1, 1.0), (128, 1.1)))
    policy = policy_of(even)
    found = kinds(policy, requests_of(policy, 1), 30000)
    begins = [i for i in range(1, len(found)) if found[i] == "model" != found[i - 1]]
    gaps = [b - a for a, b in itertools.pairwise(begins)]
    assert 3 <= len(begins) <= 8 and min(gaps) > LEAST_REST and gaps == sorted(gaps) and gaps[-1] > 3 * gaps[0]
    assert found.count("model") < 0.01 * len(found), "trials take a hundredth of the steps at most"


def answers(policy, accepted, steps=96):
    """Kinds of the steps of requests that come one after the other, each with so many accepted drafts a step."""
    found = []
    for count in accepted:
        policy.interrupted()  # its prompt
        found.append(kinds(policy, requests_of(policy, 1), steps, count))
    return found


def test_a_request_that_begins_is_tried_anew_while_nothing_is_owed():
    """Texts differ: where some gain a lot, one that loses does not keep the next ones from being drafted for."""
    policy = policy_of(CHEAP, lengths=(4,))  # four drafts cost .41 of a step
    found = answers(policy, [4, 0, 4, 0, 4])
    shares = [own.count("model") / len(own) for own in found]
    assert min(shares[::2]) > 0.8 and max(shares[1::2]) < 0.3
    assert all(own[0] == "model" for own in found[1:]), "at its first step"


def test_requests_that_begin_are_not_tried_while_something_is_owed():
    policy = policy_of(CHEAP, lengths=(4,))
    found = answers(policy, [0] * 40, steps=24)
    assert 0 < sum(own.count("model") for own in found) < 0.05 * sum(map(len, found))


def test_plain_steps_that_are_certain_to_come_before_drafts():
    policy = policy_of(CHEAP, lengths=(4,))
    requests = requests_of(policy, 1)
    found = kinds(policy, requests, 2 * TRIAL)
    assert found[-1] == "rest" and policy.plain_steps_left(1) > 0
    left = policy.plain_steps_left(1)
    assert "model" not in kinds(policy, requests, left), "nothing is certain too early"
    assert policy.plain_steps_left(1) == 0 and policy_of(None).plain_steps_left(1) > 1000
    measured = policy_of(CHEAP, measured=True)
    assert measured.plain_steps_left(1) == 0, "nothing is known before plain decoding is measured"


def test_gains_stand_against_losses_up_to_a_bound():
    policy = policy_of(CHEAP, lengths=(4,))
    answers(policy, [4] * 20)
    assert policy._of(1).owed == pytest.approx(-CREDIT * policy.costs.step_seconds(0, 1))
    found = answers(policy, [0] * 60)
    assert sum(own.count("model") for own in found) < 0.1 * sum(map(len, found)), "what was gained long ago is used up"
    assert found[0].count("model") <= 2 * TRIAL, "gains of other texts do not keep up drafts of this one"


def test_a_span_that_loses_too_much_is_ended_before_its_trial_is_over():
    policy = policy_of(CHEAP, measured=True)
    requests = requests_of(policy, 1)
    found = kinds(policy, requests, 200, seconds=lambda length: 1.0 + 2.0 * (length > 0))
    drafted = found.count("model")
    assert SETTLE < drafted < TRIAL and drafted <= SETTLE + MOST_LOST / 2 + 2


def test_plain_decoding_is_measured_first_and_its_first_steps_are_not_counted():
    policy = policy_of(CHEAP, measured=True)
    requests = requests_of(policy, 1)
    spent = iter([50.0] * SETTLE + [1.0] * 1000)
    found = [step(policy, requests, 7, seconds=lambda length: next(spent)) for _ in range(SETTLE + KNOWN + 4)]
    drafted = [plan is not None and plan.kind == "model" for plan in found]
    assert not any(drafted[: SETTLE + KNOWN]) and drafted[-1]
    assert policy._of(1).clock("plain", 0).seconds == 1.0
    other = policy_of(CHEAP, measured=True)
    for _ in range(SETTLE + KNOWN):
        other.rested(1, 1.0, chosen=False)  # of requests that want no drafts
    assert step(other, requests_of(other, 1), 7).kind == "model", "what others measured is known"


def test_plain_decoding_that_was_measured_on_a_busy_machine_is_measured_anew():
    """Drafts that lose a third look cheap beside plain steps that took three times as long as they do: that ends with the first check."""
    policy = policy_of(CHEAP, measured=True, lengths=(1,))
    requests = requests_of(policy, 1)
    for _ in range(SETTLE + 4 * KNOWN):
        policy.rested(1, 3.0, chosen=False)
    found = kinds(policy, requests, 400, 1, seconds=lambda length: 1.0 + 2.0 * (length > 0))
    assert found.count("model") <= FIRST_CHECK + 2 * TRIAL and "model" not in found[FIRST_CHECK + 3 * TRIAL : 300]


def test_seconds_count_from_the_end_of_the_step_before_unless_something_else_ran():
    policy = policy_of(CHEAP, measured=True)
    assert policy.took(1.0, 2.0) == 1.0 and policy.took(2.5, 3.0) == 1.0
    policy.interrupted()
    assert policy.took(5.0, 5.5) == 0.5


def test_repeating_texts_are_found_and_left_when_they_repeat_nothing():
    policy = policy_of(DEAR, ngrams=True, measured=True)
    requests = requests_of(policy, 1)
    for _ in range(SETTLE + KNOWN):
        policy.rested(1, 1.0, chosen=False)
    found = kinds(policy, requests, 3 * FIRST_LOOK, 4, text=REPEATED, seconds=lambda length: 1.0)
    assert "ngram" in found and found[-1] == "ngram"
    found = kinds(policy, requests, MISSES + 20, 0, text=NEW)
    assert found[-1] == "rest" and "ngram" not in found


@pytest.mark.parametrize("count", [1, 32])
def test_texts_that_repeat_nothing_are_looked_through_rarely_and_of_few_requests(monkeypatch, count):
    policy = policy_of(DEAR, ngrams=True)
    requests, looks = requests_of(policy, count), []
    for request in requests:
        monkeypatch.setattr(request, "look_up", lambda tokens, most, own=request: looks.append(own) or ([], []))
    kinds(policy, requests, 1000)
    assert len(looks) <= min(count, 4) * 12 and len(set(map(id, looks))) == min(count, 4)


def test_fixed_lengths_stand_beside_automatic_ones():
    policy = policy_of(CHEAP)
    requests = [policy.request(3, greedy=True), policy.request("auto", greedy=True)]
    plan = policy.plan(requests, [NEW] * 2, [ROOM] * 2, drafter_room=[ROOM] * 2)
    assert plan.lengths[0] == 3 and plan.seconds == 0.0, "such a step tells nothing of the policy's own"
    assert SpanPolicy(lengths=(1,), most_rows=8).rests(4) > 1, "without costs nothing is drafted"


def test_texts_that_cease_to_repeat_where_costs_are_given_end_a_span():
    """No step is timed then, so nothing is known of plain ones but what they cost."""
    policy = policy_of(CHEAP, ngrams=True)
    requests = requests_of(policy, 1)
    assert "ngram" in kinds(policy, requests, 2 * FIRST_LOOK, 3, text=REPEATED, drafter_room=None)
    assert kinds(policy, requests, 2 * MISSES, text=NEW, drafter_room=None)[-1] == "rest"
