"""How many tokens to draft: the length with the most expected tokens per second (goodput), 0 included.

What a step costs is measured once, in a warm-up, and then frozen; how often drafts are accepted is counted per request from a fixed prior.
No clock is read while text is generated, and no request's counts touch another's. Text under a seed does not depend on the lengths.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from draft.protocols import CausalDecoder, Drafter, ScratchPasses
from draft.stopping import AcceptanceEstimator, StoppingPolicy
from draft.tree import MAX_CHAIN

MAX_AUTO_LENGTH = MAX_CHAIN
PRIOR_RATE, PRIOR_TRIALS = 0.7, 4.0  # a fresh request believes 70% of drafts are accepted, with the weight of 4 trials
MEMORY = 0.9  # weight of older trials after each speculating step
STEADY_MEMORY = 0.96  # the same where the rate is a mean of expectations, which scatter less than outcomes
HOPEFUL_RATE = 0.95  # a probe is only worth its price if speculation would pay at this acceptance rate
FIRST_PROBE, LAST_PROBE = 16, 256  # plain steps before a probe: doubled after each probe that changes nothing

TURNS = 3  # of timing every count

Curve = tuple[tuple[int, float], ...]


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
            self._hits = self._hits * MEMORY + accepted
            self._trials = self._trials * MEMORY + accepted + (accepted < proposed)


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
