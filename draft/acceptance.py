"""How likely a draft is accepted: estimates for each source of drafts, from what verification said so far.

Counts are decayed, and drawn towards what is known of other requests until a request has outcomes of its own. Text does not depend on them: they
choose how many drafts are verified, never what is kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

PRIOR_RATE = 0.6  # before anything is known, 60% of drafts are believed to be accepted
PRIOR_TRIALS = 8.0  # of a request's own trials that weigh as much as the rate of all requests
RATE_MEMORY = 0.93  # weight of older trials after each speculating step
STEADY_MEMORY = 0.96  # the same where the rate is a mean of expectations, which scatter less than outcomes
SHARED_MEMORY, SHARED_TRIALS = 0.98, 8.0  # of all requests' trials
POSITION_TRIALS = 2.0  # trials at a position that weigh as much as the rate of all positions

GREEDY_PRIOR = (0.08, 0.87)  # a greedy draft is right about as often as it is sure
SAMPLED_PRIOR = (0.35, 0.5)  # sum of min(p, q): the two share much of their mass even where neither is sure
PRIOR_WEIGHT = 24.0  # trials
ESTIMATOR_MEMORY = 0.97  # weight of older trials after each

MATCH_LENGTHS = (2, 3, 4, 6, 9, 16)  # shortest match of each class
MATCH_RATES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # believed of each before anything is known
MATCH_MEMORY, MATCH_TRIALS = 0.95, 3.0


class SharedRate:
    """Acceptance over all requests of an engine, which a new request starts from."""

    def __init__(self, rate: float = PRIOR_RATE) -> None:
        self._hits, self._trials = rate * SHARED_TRIALS, SHARED_TRIALS

    @property
    def rate(self) -> float:
        """Share of drafts accepted, given that all before them in their block were."""
        return self._hits / self._trials

    def observe(self, hits: float, trials: float) -> None:
        """Count one request's step."""
        self._hits, self._trials = self._hits * SHARED_MEMORY + hits, self._trials * SHARED_MEMORY + trials


class AcceptanceRate:
    """One request's acceptance by position in a block.

    Args:
        shared: what is known of all requests; its own trials join it.
        longest: positions kept apart.
    """

    def __init__(self, shared: SharedRate | None = None, longest: int = 12) -> None:
        self._shared = shared or SharedRate()
        self._hits = self._trials = 0.0
        self._at = [[0.0, 0.0] for _ in range(longest)]  # hits and trials by position

    @property
    def rate(self) -> float:
        """Probability that a draft is accepted, given that all before it were, at any position."""
        return (self._shared.rate * PRIOR_TRIALS + self._hits) / (PRIOR_TRIALS + self._trials)

    @property
    def untried(self) -> bool:
        """Whether none of the request's own drafts has been verified."""
        return self._trials == 0

    def chain(self) -> list[float]:
        """For each position the probability that its draft and all before it are accepted, falling."""
        overall, chance, found = self.rate, 1.0, []
        for hits, trials in self._at:
            chance *= (hits + POSITION_TRIALS * overall) / (trials + POSITION_TRIALS)
            found.append(chance)
        return found

    def observe(self, proposed: int, accepted: int) -> None:
        """Count a block's outcome: each accepted draft is a hit, the first rejected one a miss, those after it say nothing."""
        trials = accepted + (accepted < proposed)
        self._count(accepted, trials, RATE_MEMORY)
        left = accepted
        for here in self._at[:trials]:
            here[0] = here[0] * RATE_MEMORY + (left > 0)
            here[1] = here[1] * RATE_MEMORY + 1
            left -= 1

    def expect(self, chances: Sequence[float]) -> None:
        """Count drafts by their estimated chances instead of their outcomes, where only likely ones were proposed."""
        self._count(sum(chances), len(chances), STEADY_MEMORY)

    def _count(self, hits: float, trials: float, memory: float) -> None:
        if trials:
            self._hits, self._trials = self._hits * memory + hits, self._trials * memory + trials
            self._shared.observe(hits, trials)


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

    @property
    def line(self) -> tuple[float, float]:
        """Height and slope of the line that gives `chance`, before it is cut to 0 to 1."""
        return self.prior[0] + self._surplus / self._trials, self.prior[1]

    def observe(self, confidence: float, accepted: bool) -> None:
        """Count one draft that was verified after an accepted prefix."""
        self._surplus = self._surplus * ESTIMATOR_MEMORY + accepted - self._line(confidence)
        self._trials = max(PRIOR_WEIGHT, self._trials * ESTIMATOR_MEMORY + 1)

    def leaf_chance(self, probability: float) -> float:
        """Estimated probability that a token that is not the likeliest is the target's."""
        return self.prior[1] * probability

    def _line(self, confidence: float) -> float:
        return self.prior[0] + self.prior[1] * confidence


class MatchAcceptance:
    """Chance that the token which followed an earlier occurrence of the last n tokens follows them again, by n in a few classes.

    A draft's own n grows with its place in the block: those before it were accepted. Outcomes are counted after every step, whether or not the drafts
    were proposed, as the text that came says what would have become of them.
    """

    def __init__(self) -> None:
        self._hits = [rate * MATCH_TRIALS for rate in MATCH_RATES]
        self._trials = [MATCH_TRIALS] * len(MATCH_RATES)

    def chance(self, length: int) -> float:
        """After a match of so many tokens."""
        number = self._class(length)
        return self._hits[number] / self._trials[number]

    def observe(self, length: int, drafts: Sequence[int], tokens: Sequence[int]) -> None:
        """drafts: what would follow a match of `length` tokens. tokens: what did follow."""
        for i, (draft, token) in enumerate(zip(drafts, tokens, strict=False)):
            number = self._class(length + i)
            self._hits[number] = self._hits[number] * MATCH_MEMORY + (draft == token)
            self._trials[number] = self._trials[number] * MATCH_MEMORY + 1
            if draft != token:
                break

    def _class(self, length: int) -> int:
        return max(0, bisect_right(MATCH_LENGTHS, length) - 1)
