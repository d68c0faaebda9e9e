"""Drafts as long as they pay: a draft is kept, and another looked for, by how sure the draft model was of those before it.

Lengths fixed before a block spend passes on branches that the draft itself does not believe in. Here the chance that all drafts so far are accepted
is known after each pass, and compared with what the next pass costs (the marginal rule for a ratio of sums, Dinkelbach 1967: a part is worth its
seconds if it brings more tokens than the best known rate would in them). Confidence is the largest probability in the distribution a draft is drawn
from, which is known before the draw: whether a draft is kept says nothing about which token it is, so verification stays exact. Greedy drafts may bring
leaves (see `draft.tree`), each of which is weighed by its own probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from draft.tree import MAX_LEAVES

GREEDY_PRIOR = (0.08, 0.87)  # a greedy draft is right about as often as it is sure
SAMPLED_PRIOR = (0.35, 0.5)  # sum of min(p, q): the two share much of their mass even where neither is sure
PRIOR_WEIGHT = 24.0  # trials
MEMORY = 0.97  # weight of older trials after each


class AcceptanceEstimator:
    """Chance that a draft is accepted, from its confidence: a line with a fixed slope whose height is learned from the request's own outcomes.

    Args:
        prior: (height, slope) of the line before anything is known.
    """

    def __init__(self, prior: tuple[float, float] = GREEDY_PRIOR) -> None:
        self.prior = prior
        self._surplus, self._trials = 0.0, PRIOR_WEIGHT

    def chance(self, confidence: float) -> float:
        """Estimated probability of acceptance, given that all drafts before were accepted."""
        return min(1.0, max(0.0, self._line(confidence) + self._surplus / self._trials))

    def observe(self, confidence: float, accepted: bool) -> None:
        """Count one draft that was verified after an accepted prefix."""
        self._surplus = self._surplus * MEMORY + accepted - self._line(confidence)
        self._trials = max(PRIOR_WEIGHT, self._trials * MEMORY + 1)

    def leaf_chance(self, probability: float) -> float:
        """Estimated probability that a token that is not the likeliest is the target's."""
        return self.prior[1] * probability

    def _line(self, confidence: float) -> float:
        return self.prior[0] + self.prior[1] * confidence


@dataclass
class StoppingPolicy:
    """Decides for one request in one step, draft by draft.

    estimator: from confidence to chance. rate: the chance of a draft whose confidence is not known yet. draft_cost, verify_costs: what looking for
    another draft costs, and keeping the i-th (the last price holds for all further ones), in tokens that the best known rate yields in that time.
    leaf_cost: the same for a leaf beside a draft that is kept. candidates: most tokens at one depth; 1 is none but the draft.
    confidences: of all drafts looked at, kept or not.
    """

    estimator: AcceptanceEstimator
    rate: float
    draft_cost: float
    verify_costs: Sequence[float]
    leaf_cost: float = 1.0
    candidates: int = 1
    chance: float = field(default=1.0, init=False)
    confidences: list[float] = field(default_factory=list, init=False)
    _num_leaves: int = field(default=0, init=False)

    def select(self, probabilities: Sequence[float]) -> int:
        """How many tokens are proposed at the depth just looked at, likeliest first: 0 ends the block here, 1 is the draft alone.

        probabilities: of the likeliest tokens, descending; only the first is needed where `candidates` is 1.
        """
        self.confidences.append(probabilities[0])
        before = self.chance
        self.chance *= self.estimator.chance(probabilities[0])
        worth, price, count = self.chance, self._verify_cost(len(self.confidences) - 1), 1
        for probability in probabilities[1 : min(self.candidates, 1 + MAX_LEAVES - self._num_leaves)]:
            gain = before * self.estimator.leaf_chance(probability)
            if gain < self.leaf_cost:
                break
            worth, price, count = worth + gain, price + self.leaf_cost, count + 1
        if worth < price:
            return 0
        self._num_leaves += count - 1
        return count

    def should_continue(self) -> bool:
        """Whether another draft is looked for after those kept."""
        return self.chance * self.rate >= self.draft_cost + self._verify_cost(len(self.confidences))

    def _verify_cost(self, position: int) -> float:
        return self.verify_costs[min(position, len(self.verify_costs) - 1)]


def likeliest(logits: Tensor, distributions: Sequence[Tensor | None], count: int) -> tuple[list[list[float]], list[list[int]]]:
    """The largest probabilities of each row of logits [n, V], descending, and their columns: `count` of softmax(logits) for a greedy row, which has no
    distribution (None), else the largest of the distribution it was drawn from, without its column."""
    if any(q is None for q in distributions):
        top = logits.softmax(-1).topk(min(count, logits.shape[-1]))
        probabilities, columns = top.values.tolist(), top.indices.tolist()
    else:
        probabilities, columns = [[] for _ in distributions], [[] for _ in distributions]
    for i, q in enumerate(distributions):
        if q is not None:
            probabilities[i], columns[i] = [float(q.amax())], []
    return probabilities, columns
