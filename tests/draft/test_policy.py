"""The drafting policy: the plan of a step is the one with the best expected rate, and what was measured corrects it."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch

from draft.acceptance import PRIOR_RATE, AcceptanceRate, MatchAcceptance, SharedRate
from draft.policy import (
    CORRECT_EVERY,
    FIRST_PROBE,
    LAST_PROBE,
    MAX_AUTO_LENGTH,
    PROBE_SHARE,
    CostModel,
    DraftingPolicy,
    RequestDrafting,
    expected_tokens,
    measure_costs,
    step_clock,
)
from draft.protocols import ScratchPasses

FLAT = ((1, 1.0), (64, 1.1))  # a memory-bound target: a block costs hardly more than a token
LINEAR = ((1, 1.0), (2, 2.0))  # a compute-bound one
ROOM = 100
NEW = [1, 2, 3, 4]  # a text without repetitions


def block_policy(draft, verify, **options):
    return DraftingPolicy(CostModel(draft=draft, verify=verify), draft_by_draft=False, **options)


def steps(policy, count, accepted_of, batch=1, tokens=NEW):
    """Plan and observe steps of `batch` requests; accepted_of(length) -> accepted drafts. Returns the lengths of the first."""
    requests = [policy.request("auto", greedy=True) for _ in range(batch)]
    lengths = []
    for _ in range(count):
        plan = policy.plan(requests, [tokens] * batch, [ROOM] * batch, drafter_room=[ROOM] * batch)
        lengths.append(plan.lengths[0])
        for request, length in zip(requests, plan.lengths, strict=True):
            request.observe([], length, accepted_of(length), None, given=False)
    return lengths


def test_expected_tokens():
    assert expected_tokens(0, 0.5) == 1
    assert expected_tokens(3, 1.0) == 4
    assert expected_tokens(2, 0.5) == 1.75


def test_costs_are_interpolated_and_extrapolated():
    costs = CostModel(draft=((1, 0.1),), verify=((1, 1.0), (4, 2.5), (8, 3.0)))
    assert costs.step_seconds(0, 1) == pytest.approx(1.0)
    assert costs.step_seconds(1, 1) == pytest.approx(0.1 + 1.5)
    assert costs.step_seconds(3, 4) == pytest.approx(0.3 + 3.0 + 8 * 0.125)
    assert costs.step_seconds(2, 4, 2) == pytest.approx(0.2 + 3.0), "two of four requests draft"
    assert costs.step_seconds(0, 1, given=3) == pytest.approx(2.5)
    assert costs.row_seconds(4, 4) == pytest.approx(0.125)
    early_exit = CostModel(draft=((1, 0.1), (4, 0.4)), verify=((1, 1.0), (4, 2.5)), runs_last_draft=True, last=((1, 0.05), (3, 0.15)))
    assert early_exit.step_seconds(0, 1) == pytest.approx(1.05)
    assert early_exit.step_seconds(1, 1) == pytest.approx(0.1 + 0.05 + 1.5)
    assert early_exit.step_seconds(1, 3, 1) == pytest.approx(0.1 + 0.15 + 2.5), (
        "those that draft nothing run their last token in the first pass"
    )


def test_rates_by_position_fall_back_on_the_request_and_then_on_all():
    shared = SharedRate()
    one, other = AcceptanceRate(shared, 3), AcceptanceRate(shared, 3)
    assert one.chain() == pytest.approx([PRIOR_RATE, PRIOR_RATE**2, PRIOR_RATE**3])
    for _ in range(60):
        one.observe(3, 1)  # the first always, the second never
    first, second, third = one.chain()
    assert first > 0.85 and second < 0.3 * first and third / second == pytest.approx(one.rate)
    assert 0.45 < one.rate < 0.55 and abs(other.rate - 0.5) < 0.05, "a request without outcomes of its own has those of the others"
    one.observe(0, 0)
    assert one.chain() == [first, second, third]


def test_matches_are_believed_by_their_length_and_learn():
    matches = MatchAcceptance()
    chances = [matches.chance(n) for n in range(2, 33)]
    assert chances == sorted(chances) and matches.chance(1) == matches.chance(2)
    for _ in range(100):
        matches.observe(2, [5, 6, 7], [5, 9])
    assert matches.chance(2) > 0.95 and matches.chance(3) < 0.05 and matches.chance(4) == chances[2], "what follows a miss says nothing"


def test_a_useless_draft_is_switched_off_and_probed_as_rarely_as_its_price_asks():
    lengths = steps(block_policy(((1, 0.25),), FLAT), 1500, lambda k: 0)
    assert lengths[0] > 0, "the prior is hopeful"
    first_zero = lengths.index(0)
    assert first_zero <= 8
    probes = [i for i in range(first_zero, 1500) if lengths[i] > 0]
    gaps = [b - a for a, b in itertools.pairwise(probes)]
    assert set(lengths[first_zero:]) == {0, 1} and len(probes) > 10 and min(gaps) >= FIRST_PROBE and max(gaps) <= LAST_PROBE
    assert 0.2 * len(probes) < 1.2 * PROBE_SHARE * 1500, "a probe takes a quarter of a plain step, and is accepted now and then at most"


def test_a_perfect_cheap_draft_gets_the_longest_blocks():
    assert steps(block_policy(((1, 0.02),), FLAT), 20, lambda k: k)[-1] == MAX_AUTO_LENGTH


def test_a_middling_draft_gets_a_middling_length():
    rng = random.Random(0)

    def accepted(length):
        return next((i for i in range(length) if rng.random() > 0.6), length)

    lengths = steps(block_policy(((1, 0.2),), FLAT), 200, accepted)[50:]
    assert 1 <= sum(lengths) / len(lengths) <= 4


def test_a_draft_that_can_never_pay_is_hardly_probed():
    assert set(steps(block_policy(((1, 3.0),), FLAT), 600, lambda k: k)) == {0}
    lengths = steps(block_policy(((1, 0.05),), LINEAR), 4 * LAST_PROBE, lambda k: k)
    assert not any(lengths[:-1]) and lengths[-1] == 1, "but now and then, as costs may have been measured wrongly"


def test_a_draft_that_became_good_is_taken_up_again():
    policy = block_policy(((1, 0.1),), FLAT)
    assert steps(policy, 60, lambda k: 0)[-1] == 0
    assert steps(policy, 200, lambda k: k)[-1] > 4


def test_a_large_batch_switches_speculation_off():
    verify = ((1, 1.0), (8, 1.1), (32, 2.0), (64, 4.0))
    policy = block_policy(((1, 0.2), (32, 0.6)), verify)
    assert steps(policy, 1, lambda k: k)[0] > 0
    assert set(steps(policy, 10, lambda k: k, batch=64)) == {0}


def test_only_those_draft_whose_drafts_are_accepted():
    policy = block_policy(((1, 0.1), (2, 0.4), (4, 0.8)), ((1, 1.0), (2, 1.1), (64, 9.0)))
    good, bad = (policy.request("auto", greedy=True) for _ in range(2))
    for _ in range(40):
        good.observe([], 1, 1, None, given=False)
        bad.observe([], 1, 0, None, given=False)
    plan = policy.plan([bad, good], [NEW] * 2, [ROOM] * 2, drafter_room=[ROOM] * 2)
    assert plan.lengths[0] == 0 < plan.lengths[1] and plan.kind == "model" and plan.tokens > 2.9


def test_several_requests_without_drafts_are_planned_in_every_eighth_step(monkeypatch):
    policy = block_policy(((1, 3.0),), FLAT, ngrams=True)
    requests, looks, chains = [policy.request("auto", greedy=True) for _ in range(3)], [], []
    for request in requests:
        monkeypatch.setattr(request, "look_up", lambda tokens, count: looks.append(count) or ([], []))
        monkeypatch.setattr(request.acceptance, "chain", lambda: chains.append(1) or [0.1] * MAX_AUTO_LENGTH)

    def step(batch, text=NEW):
        plan = policy.rest(batch)
        rested = plan is not None
        plan = plan or policy.plan(requests[:batch], [text] * batch, [ROOM] * batch, drafter_room=[ROOM] * batch)
        assert plan.kind == "plain" and plan.seconds == policy.costs.step_seconds(0, batch) and plan.tokens == batch and not plan.drafts
        return rested

    assert [step(3) for _ in range(24)] == ([False] + [True] * (CORRECT_EVERY - 1)) * 3
    assert len(looks) == 9 and len(chains) == 9
    assert not any(step(1) for _ in range(20)), "one request's text is looked through in every step, which costs it little"
    monkeypatch.undo()
    repeated = [1, 2, 3] * 10
    plans = [policy.rest(3) or policy.plan(requests, [repeated] * 3, [ROOM] * 3, drafter_room=[ROOM] * 3) for _ in range(CORRECT_EVERY + 3)]
    first = next(number for number, plan in enumerate(plans) if plan.drafts)
    assert first < CORRECT_EVERY and all(plan.kind == "ngram" for plan in plans[first:]), "what pays is used in every step"


def test_half_of_the_requests_take_part_in_a_trial():
    policy = block_policy(((1, 0.25),), FLAT)
    requests, trials = [policy.request("auto", greedy=True) for _ in range(5)], []
    for _ in range(600):
        plan = policy.rest(5) or policy.plan(requests, [NEW] * 5, [ROOM] * 5, drafter_room=[ROOM] * 5)
        trials.append(sum(map(bool, plan.lengths)))
        for request, length in zip(requests, plan.lengths, strict=True):
            request.observe([], length, 0, None, given=False)
    assert set(trials[20:]) == {0, 3} and 3 <= sum(map(bool, trials[20:])) <= 600 / FIRST_PROBE


def test_fixed_lengths_are_kept_and_no_costs_mean_no_drafts():
    fixed = DraftingPolicy()
    plan = fixed.plan([RequestDrafting(5), RequestDrafting("auto")], [NEW] * 2, [ROOM, ROOM], drafter_room=[3, ROOM])
    assert plan.lengths == [3, 0] and plan.given == [[], []] and plan.block is None
    alone = DraftingPolicy(ngrams=True)
    plan = alone.plan([alone.request(4, greedy=True), alone.request(0, greedy=True)], [[1, 2, 3, 1, 2]] * 2, [ROOM] * 2)
    assert plan.given == [[3, 1, 2, 3], []] and plan.lengths == [0, 0]
    assert alone.plan([alone.request(4, greedy=True)], [[1, 2, 3, 1, 2]], [ROOM], drafter_room=[ROOM]).given == [[]]


def test_the_text_is_drafted_from_where_it_promises_more_than_the_model():
    costs = CostModel(draft=((1, 0.1),), verify=((1, 1.0), (256, 1.5)))
    policy = DraftingPolicy(costs, ngrams=True)
    requests = [policy.request("auto", greedy=True) for _ in range(2)]
    repeated = [*range(40), *range(30)]
    plan = policy.plan(requests, [NEW, repeated], [ROOM, 5], drafter_room=[ROOM] * 2)
    assert plan.lengths[0] > 0 and plan.lengths[1] == 0 and plan.given == [[], [30, 31, 32, 33, 34]] and plan.kind == "model"
    assert plan.block is not None and plan.block.rows == 7
    for _ in range(40):  # what followed before never follows again
        policy.plan(requests, [NEW, repeated], [ROOM, 5], drafter_room=[ROOM] * 2)
        requests[1].observe([99], 5, 0, None, given=True)
    plan = policy.plan(requests, [NEW, repeated], [ROOM, 5], drafter_room=[ROOM] * 2)
    assert plan.given == [[], []] and plan.lengths[1] > 0
    for _ in range(40):  # and is believed again once it would have been right, though nobody proposed it
        policy.plan(requests, [NEW, repeated], [ROOM, 5], drafter_room=[ROOM] * 2)
        requests[1].observe([30, 31], 1, 1, [0.9], given=False)
    assert policy.plan(requests, [NEW, repeated], [ROOM, 5], drafter_room=[ROOM] * 2).given[1]


class Machine:
    """Steps of a simulated machine: what they really cost, and how often drafts are really accepted."""

    def __init__(self, real, acceptance, seed=0, hiccups=0.0, first=1.0):
        self.real, self.acceptance, self.rng, self.hiccups, self.first, self.seen = (
            real,
            acceptance,
            random.Random(seed),
            hiccups,
            first,
            set(),
        )

    def run(self, policy, batch, count):
        """(tokens a second of `count` steps, share of steps with drafts)."""
        requests = [policy.request("auto", greedy=True) for _ in range(batch)]
        gained, seconds, drafting = 0, 0.0, 0
        for _ in range(count):
            plan = policy.rest(batch) or policy.plan(requests, [NEW] * batch, [ROOM] * batch, drafter_room=[ROOM] * batch)
            drafting += any(plan.lengths)
            tokens = []
            for request, length in zip(requests, plan.lengths, strict=True):
                kept = next((i for i in range(length) if self.rng.random() > self.acceptance), length)
                request.observe([], length, kept, None, given=False)
                tokens.append(1 + kept)
            spent = self.real.step_seconds(max(plan.lengths), batch, sum(map(bool, plan.lengths))) * self.rng.uniform(0.9, 1.1)
            rows = batch + sum(plan.lengths)
            slower = self.first if rows not in self.seen else 20 if self.rng.random() < self.hiccups else 1
            self.seen.add(rows)
            policy.observe(plan, batch, sum(tokens), spent * slower, requests)
            gained, seconds = gained + sum(tokens), seconds + spent
        return gained / seconds, drafting / count


def over_plain(believed, real, acceptance, batch, **options):
    """(rate over plain decoding's, share of steps with drafts)."""
    policy = DraftingPolicy(believed, measured=True, draft_by_draft=False)
    rate, share = Machine(real, acceptance, **options).run(policy, batch, 700)
    return rate / batch * real.step_seconds(0, batch), share


CHEAP = CostModel(draft=((1, 0.1),), verify=((1, 1.0), (64, 1.6)))
DEAR = CostModel(draft=((1, 0.35), (8, 0.5)), verify=((1, 1.0), (8, 1.1), (16, 1.6), (64, 5.0)))


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("acceptance", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(
    ("believed", "real"), [(CHEAP, CHEAP), (DEAR, DEAR), (CHEAP, DEAR), (DEAR, CHEAP)], ids=["cheap", "dear", "dearer", "cheaper"]
)
def test_no_load_is_slower_than_plain_decoding(believed, real, acceptance, batch):
    ratio, _ = over_plain(believed, real, acceptance, batch)
    assert ratio > (0.98 if believed is real else 0.97), "700 steps in which costs wrong threefold are corrected"
    best = max(expected_tokens(k, acceptance) / real.step_seconds(k, batch) for k in range(13)) * real.step_seconds(0, batch)
    if believed is real:
        assert ratio > 0.9 * best, "and near the best there is"


STAIRS = CostModel(draft=((1, 0.2), (8, 0.3)), verify=((1, 1.0), (4, 1.2), (8, 1.5), (16, 3.0)))  # rows beyond eight are dear


def answers_beside_each_other(policy, costs, copied, acceptance, rng, new=64):
    """Seconds of each of some answers of `new` tokens, drafted for together: copied[b] tokens of each were said before, the drafter's drafts of it are
    accepted with acceptance[b]."""
    batch = len(copied)
    requests, seconds, ended = [policy.request("auto", greedy=True) for _ in copied], 0.0, [0.0] * batch
    said = [[rng.randrange(1 << 20) for _ in range(40)] for _ in copied]
    wanted = [[*text[5 : 5 + count], *(rng.randrange(1 << 20) for _ in range(200))] for text, count in zip(said, copied, strict=True)]
    texts = [[*text, *text[3:5]] for text in said]
    while not all(ended):
        plan = policy.rest(batch) or policy.plan(requests, texts, [ROOM] * batch, drafter_room=[ROOM] * batch)
        gained = []
        for b, request in enumerate(requests):
            own, rest = plan.given[b], wanted[b][len(texts[b]) - 42 :]
            if own:
                kept = next((i for i, (draft, token) in enumerate(zip(own, rest, strict=False)) if draft != token), len(own))
            else:
                kept = next((i for i in range(plan.lengths[b]) if rng.random() > acceptance[b]), plan.lengths[b])
            request.observe(rest[: kept + 1], len(own) or plan.lengths[b], kept, None, given=bool(own))
            gained.append(kept + 1)
            texts[b] += rest[: kept + 1]
        spent = costs.step_seconds(max(plan.lengths), batch, sum(map(bool, plan.lengths)), sum(map(len, plan.given))) * rng.uniform(
            0.97, 1.03
        )
        policy.observe(plan, batch, sum(gained), spent, requests)
        seconds += spent
        ended = [end or seconds * (len(text) - 42 >= new) for end, text in zip(ended, texts, strict=True)]
    return ended


@pytest.mark.parametrize("costs", [CHEAP, DEAR, STAIRS], ids=["cheap", "dear", "stairs"])
@pytest.mark.parametrize("copied", [(30, 0, 0, 0), (30, 30, 30, 30), (8, 0, 8, 0)])
@pytest.mark.parametrize("acceptance", [(0.0, 0.0, 0.0, 0.0), (0.9, 0.1, 0.1, 0.1), (0.7, 0.7, 0.7, 0.7)])
def test_no_request_is_slowed_down_by_anothers_drafts(costs, copied, acceptance):
    """Whichever copies its text or drafts well: those beside it take hardly longer than without any drafts."""
    policy, rng, plain = (
        DraftingPolicy(costs, measured=True, draft_by_draft=False, ngrams=True),
        random.Random(0),
        64 * costs.step_seconds(0, 4),
    )
    slowest = [max(answers_beside_each_other(policy, costs, copied, acceptance, rng)) / plain for _ in range(12)]
    assert max(slowest) < 1.06 and sum(slowest) / len(slowest) < 1.03
    if min(copied) == 30 or min(acceptance) > 0.5:
        assert sum(slowest) / len(slowest) < 0.98, "and where all gain all draft"


def test_hiccups_of_the_machine_do_not_decide():
    assert over_plain(DEAR, DEAR, 0.5, 8, hiccups=0.03)[0] > 0.98
    ratio, share = over_plain(CHEAP, CHEAP, 0.8, 1, hiccups=0.03)
    assert ratio > 1.8 and share > 0.75


def test_first_steps_of_a_shape_do_not_decide():
    policy = DraftingPolicy(CHEAP, measured=True, draft_by_draft=False)
    assert Machine(CHEAP, 0.7, first=3.0).run(policy, 1, 40)[1] > 0.6, "a new process drafts from the beginning"


def test_a_busy_machine_is_no_cost_of_a_step():
    clock, counted = step_clock(torch.device("cpu")), []
    for _ in range(5):  # a machine that stands still counts as one that computes
        began, began_at = time.perf_counter(), clock()
        time.sleep(0.02)
        counted.append(clock() - began_at)
        assert time.perf_counter() - began >= 0.02
    assert min(counted) < 0.01, counted


def test_a_source_is_not_taken_up_and_left_by_turns():
    even = CostModel(draft=((1, 0.4),), verify=((1, 1.0), (64, 1.01)))  # a draft costs what it brings
    policy, machine = DraftingPolicy(even, measured=True, draft_by_draft=False), Machine(even, 0.4)
    requests, used = [policy.request("auto", greedy=True)], []
    for _ in range(800):
        plan = policy.plan(requests, [NEW], [ROOM], drafter_room=[ROOM])
        used.append(policy._loads[1].on["model"])
        kept = next((i for i in range(plan.lengths[0]) if machine.rng.random() > 0.4), plan.lengths[0])
        requests[0].observe([], plan.lengths[0], kept, None, given=False)
        policy.observe(plan, 1, 1 + kept, even.step_seconds(plan.lengths[0], 1))
    assert sum(a != b for a, b in itertools.pairwise(used)) < 25


class SlowDecoder:
    """Takes 2 ms and 0.2 ms a token; counts its calls."""

    device, dtype = torch.device("cpu"), torch.float32

    class config:
        hidden_size = 4

    def __init__(self):
        self.calls = []

    def forward(self, tokens, sequences, query_lens, **options):
        self.calls.append((query_lens, options))
        ends = step_clock(self.device)() + 0.002 + 0.0002 * query_lens[0]
        while step_clock(self.device)() < ends:
            pass
        return type("Out", (), {"hidden": torch.zeros(len(tokens), 4)})

    def head(self, hidden, *, deterministic=False):
        return hidden


@pytest.mark.parametrize("exit_layer", [0, 2, None])
def test_costs_are_measured_on_scratch_sequences_within_a_budget(exit_layer):
    target, draft, freed = SlowDecoder(), SlowDecoder(), []
    drafter = None if exit_layer is None else type("D", (), {"resumes_at": exit_layer, "runs_last_draft": bool(exit_layer)})

    class Sequence:
        def reserve(self, n):
            self.reserved = n

        def free(self):
            freed.append(self)

    def measure(budget_s):
        own = Sequence()
        passes = ScratchPasses(lambda count: draft.forward([0] * count, [own], [count]), None, own.free)
        return measure_costs(target, drafter, Sequence, None if drafter is None else passes, token_counts=(1, 2, 4, 64), budget_s=budget_s)

    costs = measure(10)
    assert len(freed) == 1 + (drafter is not None) and costs.runs_last_draft == bool(exit_layer) and costs.last is None
    if drafter is None:
        assert costs.draft_seconds(4) == 0 == costs.last_seconds(4)
    for curve in (costs.verify,) if drafter is None else (costs.draft, costs.verify):
        assert [n for n, _ in curve] == [1, 2, 4, 64]
        seconds = [s for _, s in curve]
        assert seconds == sorted(seconds) and seconds[0] >= 0.0022 and seconds[-1] >= 0.0148
    assert all(
        options["first_layer"] == (exit_layer or 0) and (options["hidden"] is None) == (not exit_layer) for _, options in target.calls
    )
    hurried = measure(0)
    assert len(hurried.verify) == 3


def answers_with_entries(costs, acceptance, entry_s, answers, batch=4, new=64, prompt=60):
    """(seconds over plain decoding's, entries) of answers of `new` tokens: a request's first draft runs its prompt first, which takes entry_s.
    acceptance: of the answers in turn."""
    policy, rng = DraftingPolicy(costs, measured=True), random.Random(0)
    seconds = entries = 0
    for answer in range(answers):
        requests, texts, entered = (
            [policy.request("auto", greedy=True) for _ in range(batch)],
            [[*range(prompt)] for _ in range(batch)],
            set(),
        )
        while min(map(len, texts)) < prompt + new:
            plan = policy.rest(batch) or policy.plan(requests, texts, [ROOM] * batch, drafter_room=[ROOM] * batch)
            lengths = [min(1, length) for length in plan.lengths]  # each block ends after its first draft
            drafting = [b for b, length in enumerate(lengths) if length]
            spent = costs.step_seconds(max(lengths), batch, len(drafting)) * rng.uniform(0.98, 1.02)
            if drafting:
                assert plan.block is not None
                if late := [b for b in drafting if b not in entered]:
                    plan.block.caught_up(len(late) * entry_s)
                    spent, entries, entered = spent + len(late) * entry_s, entries + 1, entered.union(late)
                plan.block.passes, plan.block.rows = [len(drafting)], batch + len(drafting)
            kept = [rng.random() < acceptance[answer % len(acceptance)] for _ in drafting]
            for b, text in enumerate(texts):
                hit = b in drafting and kept[drafting.index(b)]
                if b in drafting:
                    requests[b].observe([0] * (1 + hit), 1, int(hit), [0.6], given=False)
                text += [0] * (1 + hit)
            policy.observe(plan, batch, batch + sum(kept), spent, requests)
            seconds += spent
    return seconds / (answers * new * costs.step_seconds(0, batch)), entries


def test_entries_that_are_for_nothing_cost_little():
    costs = CostModel(draft=((1, 0.2), (4, 0.25)), verify=((1, 1.0), (4, 1.05), (8, 1.2)))
    over, entries = answers_with_entries(costs, [0.1], 0.7, 60)
    assert over < 1.015 and entries < 10, "each of them takes a twentieth of an answer's time"
    over, entries = answers_with_entries(costs, [0.9], 0.7, 20)
    assert over < 0.85 and entries >= 20, "where they pay every answer has its own"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("entry_s", [0.0, 0.3])
def test_texts_that_are_hard_to_draft(batch, entry_s):
    """They cost a bounded share of their time, and where beginning is free they do not keep others from being drafted for."""
    costs = CostModel(draft=((1, 0.12), (4, 0.14)), verify=((1, 1.0), (4, 1.05), (8, 1.2)))
    assert answers_with_entries(costs, [0.05], entry_s, 48, batch)[0] < 1.02
    over, entries = answers_with_entries(costs, [0.05, 0.05, 0.95, 0.95], entry_s, 48, batch)
    assert over < (0.94 if entry_s == 0 else 1.02) and (entry_s or entries > 30)


def test_drafts_that_may_not_enter_are_no_source_in_use():
    """Steps then rest without a plan, as where nothing pays."""
    costs = CostModel(draft=((1, 0.12), (4, 0.14)), verify=((1, 1.0), (4, 1.05), (8, 1.2)))
    for owed, rests in ((1.0, True), (0.0, False)):
        policy = DraftingPolicy(costs, measured=True)
        load = policy._load(4)
        load.owed, load.on["model"] = owed, True
        requests, texts = [policy.request("auto", greedy=True) for _ in range(4)], [[*range(100)] for _ in range(4)]
        plan = policy.plan(requests, texts, [ROOM] * 4, drafter_room=[ROOM] * 4)
        assert (plan.kind == "plain") == rests == (not load.on["model"]) and (policy.rest(4) is not None) == rests
