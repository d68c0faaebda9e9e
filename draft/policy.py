"""When to draft, and how far: the drafting policy of a request.

The best known rate is R = max over k of E(k) / t(k), in tokens a second, where E(k) = 1 + a + ... + a^k are the tokens expected of a step with k
drafts, a the acceptance rate, and t(k) = k t_draft + t_verify(k + 1) its seconds (goodput; k = 0 is no speculation). A step's length is that k, or
is found draft by draft: where c is the chance that all drafts so far are accepted, another is drafted while

    c a / (t_draft + t_verify(k + 2) - t_verify(k + 1)) >= R

that is, while the expected tokens gained per second exceed the best rate known (the marginal rule for a ratio of sums, Dinkelbach 1967). A draft that
was looked at is kept, and a leaf added beside it (see `draft.tree`), by the same rule with its own chance, and with the seconds of its row in the
verification alone. The chance of a draft comes from its confidence, the largest probability in the distribution it is drawn from: that is known
before the draw and says nothing about which token it is, so verification stays exact.

What a step costs is measured once, between two steps, and then frozen; how often drafts are accepted is counted per request from a fixed prior.
No clock is read while text is generated, and no request's counts touch another's. Text under a seed does not depend on the lengths.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from draft.protocols import CausalDecoder, Drafter, ScratchPasses
from draft.tree import MAX_CHAIN, MAX_LEAVES

MAX_AUTO_LENGTH = MAX_CHAIN
PRIOR_RATE, PRIOR_TRIALS = 0.7, 4.0  # a fresh request believes 70% of drafts are accepted, with the weight of 4 trials
RATE_MEMORY = 0.9  # weight of older trials after each speculating step
STEADY_MEMORY = 0.96  # the same where the rate is a mean of expectations, which scatter less than outcomes
HOPEFUL_RATE = 0.95  # a probe is only worth its price if speculation would pay at this acceptance rate
FIRST_PROBE, LAST_PROBE = 16, 256  # plain steps before a probe: doubled after each probe that changes nothing

TURNS = 3  # of timing every count

Curve = tuple[tuple[int, float], ...]
GREEDY_PRIOR = (0.08, 0.87)  # a greedy draft is right about as often as it is sure
SAMPLED_PRIOR = (0.35, 0.5)  # sum of min(p, q): the two share much of their mass even where neither is sure
PRIOR_WEIGHT = 24.0  # trials
ESTIMATOR_MEMORY = 0.97  # weight of older trials after each


# --- how likely is a draft accepted, and does another one pay -----------------------------------------------------------


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
        self._surplus = self._surplus * ESTIMATOR_MEMORY + accepted - self._line(confidence)
        self._trials = max(PRIOR_WEIGHT, self._trials * ESTIMATOR_MEMORY + 1)

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


# --- what steps cost ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CostModel:
    """Seconds of the forwards of one step, as curves over their number of tokens.

    draft: one drafting pass, ((tokens, seconds), ...) in rising order. verify: the target's forward (from the exit layer on).
    runs_last_draft: a block of k drafts takes k + 1 drafting passes, and a step without drafts takes one. last: what the pass over the last
    draft takes (which proposes nothing), where that is less.
    """

    draft: Curve
    verify: Curve
    runs_last_draft: bool = False
    last: Curve | None = None

    def step_seconds(self, length: int, batch: int) -> float:
        """Expected seconds of a step in which each of `batch` requests drafts `length` tokens."""
        last = _at(self.last or self.draft, batch) if self.runs_last_draft else 0.0
        return length * _at(self.draft, batch) + last + _at(self.verify, batch * (length + 1))

    def policy(self, estimator: AcceptanceEstimator, rate: float, batch: int, candidates: int = 1) -> StoppingPolicy:
        """A stopping policy over drafts each of which is accepted with probability `rate`, in a batch of so many decoding requests."""
        k = self.best_length(rate, batch)
        tokens_per_s = expected_tokens(k, rate) / self.step_seconds(k, batch)  # of each request; passes are shared by all of them
        draft, last = _at(self.draft, batch), _at(self.last or self.draft, batch) if self.runs_last_draft else 0.0
        more = [_at(self.verify, batch * (i + 2)) - _at(self.verify, batch * (i + 1)) for i in range(MAX_AUTO_LENGTH)]
        # a leaf's row in the verification and in the pass of the first layers; over many rows, as the difference between a few drowns in the noise
        curves = [self.verify, self.last or self.draft] if self.runs_last_draft else [self.verify]
        row = sum(_at(curve, 8 * batch) - _at(curve, batch) for curve in curves) / 7
        prices = [(last + seconds) * tokens_per_s for seconds in more]
        return StoppingPolicy(estimator, rate, (draft - last) * tokens_per_s, prices, row * tokens_per_s, candidates)

    def best_length(self, rate: float, batch: int, longest: int = MAX_AUTO_LENGTH) -> int:
        """The length from 0 to `longest` with the most expected tokens per second when each draft is accepted with probability `rate`."""
        return max(range(longest + 1), key=lambda k: (expected_tokens(k, rate) / self.step_seconds(k, batch), -k))


def expected_tokens(length: int, rate: float) -> float:
    """Tokens a step yields: accepted drafts up to the first rejection and the target's own, the sum of rate^i for i from 0 to length."""
    return sum(rate**i for i in range(length + 1))


def _at(curve: Curve, tokens: int) -> float:
    """Linear interpolation; beyond the last point the last slope goes on."""
    if len(curve) == 1:
        return curve[0][1]
    right = next((i for i, (n, _) in enumerate(curve) if n >= tokens), len(curve) - 1)
    (n0, s0), (n1, s1) = curve[max(right, 1) - 1], curve[max(right, 1)]
    return max(s0 + (s1 - s0) * (tokens - n0) / (n1 - n0), min(s0, s1) if tokens < n0 else s0)


class LengthController:
    """Chooses one request's draft length step by step.

    Args:
        wanted: a fixed length, or "auto".
        costs: the frozen cost model; only needed for "auto", None then means no speculation.
        estimator: with one, "auto" decides draft by draft: `choose` gives the longest length allowed, `policy` ends the block earlier.
    """

    def __init__(self, wanted: int | Literal["auto"], costs: CostModel | None = None, estimator: AcceptanceEstimator | None = None) -> None:
        self.wanted, self.costs, self.estimator = wanted, costs, estimator
        self._hits, self._trials = PRIOR_RATE * PRIOR_TRIALS, PRIOR_TRIALS
        self._plain_steps, self._probe_after = 0, FIRST_PROBE

    @property
    def rate(self) -> float:
        """Estimated probability that a draft is accepted, given that all before it in its block were."""
        return self._hits / self._trials

    def choose(self, batch: int = 1) -> int:
        """Draft length of the next step, in a batch of so many decoding requests."""
        if self.wanted != "auto":
            return self.wanted
        if self.costs is None:
            return 0
        best = self.costs.best_length(self.rate, batch)
        if best > 0:
            self._plain_steps, self._probe_after = 0, FIRST_PROBE
            return best if self.estimator is None else MAX_AUTO_LENGTH
        self._plain_steps += 1
        if self._plain_steps >= self._probe_after and self.costs.best_length(HOPEFUL_RATE, batch) > 0:
            self._plain_steps, self._probe_after = 0, min(2 * self._probe_after, LAST_PROBE)
            return 1
        return 0

    def policy(self, batch: int = 1, candidates: int = 1) -> StoppingPolicy | None:
        """What may end the next step's block early, and add leaves where `candidates` is above 1; None where the chosen length stands."""
        if self.wanted != "auto" or self.costs is None or self.estimator is None:
            return None
        return self.costs.policy(self.estimator, self.rate, batch, candidates)

    def observe(self, proposed: int, accepted: int, policy: StoppingPolicy | None = None) -> None:
        """Count a step's outcome: each accepted draft is a hit, the first rejected one a miss, those after it say nothing. A leaf is no hit.

        Under a stopping policy only likely drafts are proposed, so the rate is that of all drafts looked at, as their confidence lets expect. Those
        that followed a rejected one are left out: they tell of random numbers that will be used again, and a choice of drafts must not know these.
        """
        if policy is not None:
            chances = [policy.estimator.chance(confidence) for confidence in policy.confidences[: accepted + 1]]
            if chances:
                self._hits = self._hits * STEADY_MEMORY + sum(chances)
                self._trials = self._trials * STEADY_MEMORY + len(chances)
            for i, confidence in enumerate(policy.confidences[: min(accepted + 1, proposed)]):
                policy.estimator.observe(confidence, i < accepted)
        elif proposed:
            self._hits = self._hits * RATE_MEMORY + accepted
            self._trials = self._trials * RATE_MEMORY + accepted + (accepted < proposed)


def new_controller(wanted: int | Literal["auto"], costs: CostModel | None, *, greedy: bool, draft_by_draft: bool) -> LengthController:
    """What chooses a request's draft lengths.

    draft_by_draft: "auto" looks at each draft (on a CPU), else it chooses per block, where nothing is read back while a block is drafted (on a GPU).
    """
    return LengthController(wanted, costs, AcceptanceEstimator(GREEDY_PRIOR if greedy else SAMPLED_PRIOR) if draft_by_draft else None)


# --- measuring ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_costs(
    target: CausalDecoder,
    drafter: Drafter,
    new_sequence: Callable[[], Any],
    scratch: ScratchPasses,
    *,
    token_counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    budget_s: float = 2.0,
    deterministic: bool = False,
) -> CostModel:
    """Time a few forwards of target and draft (the warm-up).

    new_sequence: makes a sequence of the target's, for scratch use. scratch: the drafter's passes, closed here.
    Counts take turns, TURNS times, and the best of each is kept (at least three are timed, and none after the budget is spent). Curves never fall.
    """
    first, device = drafter.exit_layer, target.device
    sequence = new_sequence()

    def verify(count: int) -> None:
        tokens = torch.zeros(count, dtype=torch.int64, device=device)
        hidden = torch.zeros(count, target.config.hidden_size, dtype=target.dtype, device=device) if first else None
        target.forward(tokens, [sequence], [count], first_layer=first, hidden=hidden, deterministic=deterministic)

    timed = [verify, scratch.draft] if scratch.last is None else [verify, scratch.draft, scratch.last]
    best: list[dict[int, float]] = [{} for _ in timed]
    began = time.perf_counter()
    try:
        for run in timed:
            run(token_counts[0])  # caches, lazily built tables, kernel compilation
        for turn in range(TURNS):
            # in turns: what slows the machine down for a while must not hit one count alone
            for count in token_counts if turn == 0 else list(best[0]):
                if len(best[0]) >= 3 and time.perf_counter() - began > budget_s:
                    break
                for run, found in zip(timed, best, strict=True):
                    if run is scratch.last:
                        verify(1)  # as in a step, the first layers' weights must come from memory, not from a cache
                    _synchronize(device)
                    start = time.perf_counter()
                    run(count)
                    _synchronize(device)
                    found[count] = min(found.get(count, math.inf), time.perf_counter() - start)
    finally:
        sequence.free()
        scratch.close()
    curves = [_rising(found) for found in best]
    return CostModel(curves[1], curves[0], drafter.runs_last_draft, None if scratch.last is None else curves[2])


def _rising(seconds: dict[int, float]) -> Curve:
    """Points in the order of their counts, none below one before it."""
    return tuple(zip(seconds, itertools.accumulate(seconds.values(), max), strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
