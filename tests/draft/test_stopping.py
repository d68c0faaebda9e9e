"""Drafts are kept, and looked for, while they pay."""

from __future__ import annotations

import pytest
import torch

from draft.acceptance import GREEDY_PRIOR, PRIOR_WEIGHT, SAMPLED_PRIOR, AcceptanceEstimator
from draft.policy import MAX_AUTO_LENGTH, BlockPolicy, CostModel, DraftingPolicy, RequestDrafting, likeliest

ROOM, NEW = 100, [1, 2, 3, 4]
COSTS = CostModel(draft=((1, 0.1), (4, 0.4)), verify=((1, 1.0), (2, 1.2), (3, 1.5), (13, 4.5)))


class Exact(AcceptanceEstimator):
    """As sure as it is right."""

    def __init__(self):
        super().__init__((0.0, 1.0))


class Certain(RequestDrafting):
    """Half of whose drafts are accepted."""

    def __init__(self, wanted="auto", estimator=True):
        super().__init__(wanted, Exact() if estimator else None)
        for _ in range(200):
            self.acceptance.expect([0.5])


def block(*requests, costs=COSTS, rate=1.0, most_tokens=None):
    return BlockPolicy(costs, rate, len(requests), requests, most_tokens or [1] * len(requests))


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


def test_a_block_is_weighed_as_a_whole():
    policy = block(Certain())
    assert policy.select([0], [[0.9]]) == [1] and policy.rows == 2
    assert policy.onward([0]) == {0}, "0.9 * 0.5 against 0.1 and 0.3 for its row"
    assert policy.select([0], [[0.8]]) == [1] and policy.rows == 3
    assert not policy.onward([0]), "0.72 * 0.5 is less than 0.4"
    assert policy.select([0], [[0.3]]) == [0] and policy.confidences == {0: [0.9, 0.8, 0.3]} and policy.passes == [1, 1, 1]
    assert block(Certain()).select([0], [[0.19]]) == [0] and block(Certain()).select([0], [[0.21]]) == [1]
    assert block(Certain(), rate=2.0).select([0], [[0.39]]) == [0], "where tokens come twice as fast a row costs twice as many"


def test_requests_draft_on_where_they_pay_for_the_pass_together():
    costs = CostModel(draft=((1, 0.6),), verify=((1, 1.0), (2, 1.0)))
    alone, together = block(Certain(), costs=costs), block(Certain(), Certain(), Certain(), costs=costs)
    assert alone.select([0], [[1.0]]) == [1] and not alone.onward([0]), "0.5 for a pass of 0.6"
    assert together.select([0, 1, 2], [[1.0], [0.01], [0.9]]) == [1, 1, 1]
    assert together.onward([0, 1, 2]) == {0, 1, 2}, "where the pass is run anyway the third comes along"
    dear = block(Certain(), Certain(), Certain(), costs=CostModel(draft=((1, 0.6),), verify=((1, 1.0), (2, 1.05))))
    assert dear.select([0, 1, 2], [[1.0], [0.01], [0.9]]) == [1, 0, 1] and dear.onward([0, 2]) == {0, 2} and dear.rows == 5
    assert not dear.onward([0])


def test_a_fixed_block_is_left_alone_and_shares_its_passes():
    costs = CostModel(draft=((1, 0.6), (2, 0.7)), verify=((1, 1.0), (2, 1.05)))
    policy = block(Certain(), Certain(3), Certain(estimator=False), costs=costs)
    assert [policy.looks_at(b) for b in range(3)] == [True, False, False]
    assert policy.select([0, 1, 2], [[1.0], [0.001], [0.001]]) == [1, 1, 1] and policy.rows == 6 and set(policy.confidences) == {0}
    assert policy.onward([0, 1]) == {0, 1} and policy.onward([0]) == set()


def test_leaves_are_weighed_one_by_one():
    def policy(most=4, keep=0.5, leaf=0.1):
        # one row costs `keep`, eight 8 * leaf
        return block(Certain(), costs=CostModel(((1, 0.0),), ((1, 1.0), (2, 1.0 + keep), (9, 1.0 + 8 * leaf))), most_tokens=[most])

    assert policy().select([0], [[0.6, 0.2, 0.11, 0.09]]) == [3] and policy(most=2).select([0], [[0.6, 0.2, 0.11]]) == [2]
    assert policy().select([0], [[0.35, 0.13, 0.13, 0.13]]) == [0], "0.35 + 3 * 0.13 is less than 0.5 + 3 * 0.1"
    assert policy().select([0], [[0.35, 0.34, 0.01]]) == [2], "together they are worth it"
    deeper = policy(keep=0.1)
    assert deeper.select([0], [[0.5, 0.3]]) == [2] and deeper.rows == 3
    assert deeper.select([0], [[0.7, 0.22, 0.08]]) == [2], (
        "the chain goes on from the first: 0.5 * 0.22 is worth its row, 0.5 * 0.08 is not"
    )
    full = policy(keep=0.0, leaf=0.0)
    counts = [full.select([0], [[1.0, 0.9, 0.9, 0.9]])[0] for _ in range(4)]
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


def plan_of(policy, requests):
    return policy.plan(requests, [NEW] * len(requests), [ROOM] * len(requests), drafter_room=[ROOM] * len(requests), most_tokens=None)


def test_blocks_of_any_length_end_draft_by_draft():
    policy = DraftingPolicy(COSTS)
    request = policy.request("auto", greedy=True)
    plan = plan_of(policy, [request])
    assert plan.lengths == [MAX_AUTO_LENGTH] and plan.block is not None and plan.block.rows == 1
    assert plan.block.rate == pytest.approx(max(plan.tokens / plan.seconds, 1.0))
    assert plan_of(policy, [policy.request(3, greedy=True)]).block is None
    unseen = DraftingPolicy(COSTS, draft_by_draft=False)
    assert plan_of(unseen, [unseen.request("auto", greedy=True)]).block is None


def test_what_followed_a_rejected_draft_is_not_counted():
    def after(confidences, proposed, accepted):
        request = RequestDrafting("auto", Exact())
        request.observe([], proposed, accepted, confidences, given=False)
        return request.acceptance.rate, request.estimator.chance(0.5)

    assert after([0.9, 0.8, 0.1], 3, 1) == after([0.9, 0.8, 0.99], 3, 1) != after([0.9, 0.7, 0.99], 3, 1)
    assert after([0.9, 0.1], 1, 1) != after([0.9, 0.3], 1, 1), "a draft that was not kept tells of the rate"
    assert after([0.9], 1, 1)[1] > 0.5 > after([0.9], 1, 0)[1]
    assert after([0.3], 0, 0)[1] == 0.5, "nothing was verified"


def test_an_unsure_draft_is_switched_off_and_taken_up_again():
    policy = DraftingPolicy(CostModel(draft=((1, 0.3),), verify=((1, 1.0), (13, 1.1))))
    request = RequestDrafting("auto", Exact())

    def steps(count, confidence, accepted):
        chosen = []
        for _ in range(count):
            plan = plan_of(policy, [request])
            chosen.append(plan.lengths[0])
            proposed = int(plan.block is not None and plan.block.select([0], [[confidence]])[0] > 0)
            looked_at = None if plan.block is None else plan.block.confidences[0]
            request.observe([], proposed, proposed * accepted, looked_at, given=False)
        return chosen

    lengths = steps(200, 0.05, 0)
    assert lengths[0] == MAX_AUTO_LENGTH and lengths[-1] == 0 and 1 in lengths, "probed now and then"
    assert steps(2000, 1.0, 1)[-1] == MAX_AUTO_LENGTH
