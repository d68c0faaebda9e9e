"""Drafts are kept, and looked for, while they pay."""

from __future__ import annotations

import pytest
import torch

from draft.policy import (
    GREEDY_PRIOR,
    MAX_AUTO_LENGTH,
    PRIOR_WEIGHT,
    SAMPLED_PRIOR,
    AcceptanceEstimator,
    CostModel,
    LengthController,
    StoppingPolicy,
    likeliest,
)

COSTS = CostModel(draft=((1, 0.3), (4, 0.6)), verify=((1, 1.0), (2, 1.1), (3, 1.3)), runs_last_draft=True, last=((1, 0.2),))


class Exact(AcceptanceEstimator):
    """As sure as it is right."""

    def __init__(self):
        super().__init__((0.0, 1.0))


@pytest.mark.parametrize("prior", [GREEDY_PRIOR, SAMPLED_PRIOR])
def test_a_calibration_starts_at_its_prior_and_learns_the_height(prior):
    estimator = AcceptanceEstimator(prior)
    assert estimator.chance(0.6) == pytest.approx(prior[0] + 0.6 * prior[1])
    assert 0 <= estimator.chance(0.0) < estimator.chance(0.5) < estimator.chance(1.0) <= 1
    estimator.observe(0.6, True)
    assert estimator.chance(0.6) == pytest.approx(prior[0] + 0.6 * prior[1] + (1 - prior[0] - 0.6 * prior[1]) / PRIOR_WEIGHT, rel=0.01)
    generator = torch.Generator().manual_seed(0)
    for truth in (0.2, 0.9):  # the last outcomes count most
        for accepted in (torch.rand(400, generator=generator) < truth).tolist():
            estimator.observe(0.6, accepted)
        assert estimator.chance(0.6) == pytest.approx(truth, abs=0.2)
        assert 0 <= estimator.chance(0.0) <= estimator.chance(1.0) <= 1


def test_a_gate_weighs_the_whole_block():
    policy = StoppingPolicy(Exact(), rate=0.5, draft_cost=0.1, verify_costs=[0.2, 0.3])
    assert policy.select([0.9]) and policy.chance == pytest.approx(0.9)
    assert policy.should_continue(), "0.9 * 0.5 against 0.1 + 0.3"
    assert policy.select([0.8]) and policy.chance == pytest.approx(0.72)
    assert not policy.should_continue(), "0.36 is less than 0.4, the last price holding on"
    assert not policy.select([0.4]) and policy.confidences == [0.9, 0.8, 0.4]
    assert not StoppingPolicy(Exact(), 1.0, 0.0, [0.3]).select([0.29]) and StoppingPolicy(Exact(), 1.0, 0.0, [0.3]).select([0.31])


def test_leaves_are_weighed_one_by_one():
    def policy(candidates=4, keep=0.5):
        return StoppingPolicy(Exact(), rate=0.5, draft_cost=0.1, verify_costs=[keep], leaf_cost=0.1, candidates=candidates)

    assert policy().select([0.6, 0.2, 0.11, 0.09]) == 3 and policy(candidates=2).select([0.6, 0.2, 0.11]) == 2
    assert policy().select([0.35, 0.13, 0.13, 0.13]) == 0, "0.35 + 3 * 0.13 is less than 0.5 + 3 * 0.1"
    assert policy().select([0.35, 0.34, 0.01]) == 2, "together they are worth it"
    deeper = policy(keep=0.1)
    assert deeper.select([0.5, 0.3]) == 2 and deeper.chance == pytest.approx(0.5), "the chain goes on from the first alone"
    assert deeper.select([0.7, 0.22, 0.08]) == 2, "0.5 * 0.22 is worth its price, 0.5 * 0.08 is not"
    full = policy(keep=0.0)
    counts = [full.select([1.0, 0.9, 0.9, 0.9]) for _ in range(4)]
    assert counts == [4, 4, 3, 1], "eight leaves in all"


def test_the_likeliest_tokens_and_their_probabilities():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, 50, generator=generator)
    wanted = logits.double().softmax(-1).sort(-1, descending=True)
    probabilities, columns = likeliest(logits, [None] * 4, 3)
    assert columns == wanted.indices[:, :3].tolist() and torch.tensor(probabilities) == pytest.approx(
        wanted.values[:, :3].float(), rel=1e-5
    )
    other = torch.rand(50, generator=generator).softmax(-1)
    probabilities, columns = likeliest(logits, [None, other, None, None], 2)
    assert columns[1] == [] and probabilities[1] == pytest.approx([float(other.max())]) and columns[2] == wanted.indices[2, :2].tolist()
    assert likeliest(logits[1:2], [other], 4) == ([pytest.approx([float(other.max())])], [[]])
    assert [len(row) for row in likeliest(logits, [None] * 4, 99)[1]] == [50] * 4


def test_prices_follow_from_the_costs():
    rate = 0.8
    length = COSTS.best_length(rate, 1)
    per_second = sum(rate**i for i in range(length + 1)) / COSTS.step_seconds(length, 1)
    policy = COSTS.policy(Exact(), rate, 1)
    assert policy.rate == rate and policy.draft_cost == pytest.approx((0.3 - 0.2) * per_second)
    assert policy.verify_costs[:2] == pytest.approx([(0.2 + 0.1) * per_second, (0.2 + 0.2) * per_second])
    separate = CostModel(draft=COSTS.draft, verify=COSTS.verify).policy(Exact(), 0.0, 1)
    assert separate.draft_cost == pytest.approx(0.3) and separate.verify_costs[0] == pytest.approx(0.1), (
        "a rate of 0 means a token a second"
    )
    slope = (COSTS.step_seconds(7, 1) - COSTS.step_seconds(0, 1) - 7 * 0.3) / 7
    assert policy.leaf_cost == pytest.approx(slope * per_second) and policy.candidates == 1, (
        "its row in the early exit's pass costs nothing here"
    )
    shared = CostModel(draft=((1, 0.3), (4, 0.6)), verify=((1, 1.0), (4, 1.0), (8, 1.4))).policy(Exact(), 0.0, 4)
    assert shared.draft_cost == pytest.approx(0.6) and shared.verify_costs[0] == pytest.approx(0.4), "four requests gain a token each"


def test_the_controller_gates_blocks_of_any_length():
    controller = LengthController("auto", COSTS, Exact())
    assert controller.choose() == MAX_AUTO_LENGTH and controller.policy() is not None
    assert LengthController("auto", COSTS).policy() is None and LengthController(3, COSTS, Exact()).policy() is None
    assert LengthController("auto", None, Exact()).policy() is None


def test_what_followed_a_rejected_draft_is_not_counted():
    def after(confidences, proposed, accepted):
        controller = LengthController("auto", COSTS, Exact())
        policy = controller.policy()
        for confidence in confidences:
            policy.select([confidence])
        controller.observe(proposed, accepted, policy)
        return controller.rate, policy.estimator.chance(0.5)

    assert after([0.9, 0.8, 0.1], 3, 1) == after([0.9, 0.8, 0.99], 3, 1) != after([0.9, 0.7, 0.99], 3, 1)
    assert after([0.9, 0.1], 1, 1) != after([0.9, 0.3], 1, 1), "a draft that was not kept tells of the rate"
    assert after([0.9], 1, 1)[1] > 0.5 > after([0.9], 1, 0)[1]
    assert after([0.3], 0, 0)[1] == 0.5, "nothing was verified"


def test_an_unsure_draft_is_switched_off_and_taken_up_again():
    costs = CostModel(draft=((1, 0.5),), verify=((1, 1.0), (13, 1.1)))
    controller = LengthController("auto", costs, Exact())

    def steps(count, confidence, accepted):
        chosen = []
        for _ in range(count):
            chosen.append(controller.choose())
            policy = controller.policy() if chosen[-1] else None
            proposed = int(policy is not None and policy.select([confidence]))
            controller.observe(proposed, proposed * accepted, policy)
        return chosen

    lengths = steps(200, 0.05, 0)
    assert lengths[0] == MAX_AUTO_LENGTH and lengths[-1] == 0 and 1 in lengths, "probed now and then"
    assert steps(2000, 1.0, 1)[-1] == MAX_AUTO_LENGTH
