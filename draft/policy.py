"""When to draft, from which source, and how far: one policy for all requests of a step, since they share its passes.

A step in which request b is expected to gain E_b tokens takes t seconds for all of them, so plans are compared by their rate, sum of E_b over t. With k
drafts each accepted given those before with probability a_1, a_2, ..., E = 1 + a_1 + a_1 a_2 + ...; t counts the drafting passes, over as many
requests as take part in each, and the verification of all rows (goodput: Liu et al., "Optimizing Speculative Decoding for Serving Large Language
Models Using Goodput", 2024; no drafts at all is one of the plans). At the best rate R known, anything more is worth its time while

    expected tokens gained >= R (seconds added)

(the marginal rule for a ratio of sums, Dinkelbach 1967). By it drafts from the text itself (`draft.ngram`), or from others of its namespace
(`draft.seen`), are cut where they become unlikely; each
request takes the source that promises more; and where a draft can be looked at before the next one is made (on a CPU), a block is ended draft by
draft: a pass is run for those requests only whose expected gains together pay for it, a draft that was looked at is kept, and a leaf added beside it
(`draft.tree`), while it pays for its row in the verification. The chance of a draft comes from its confidence, the largest probability in the
distribution it is drawn from: that is known before the draw and says nothing about which token it is, so verification stays exact.

A step takes as long for a request that gains nothing by it: drafts of others may cost each request a small share of its time, no more (`_spares`).

A drafter that has left tokens out runs them before its first draft of a request (`BlockPolicy.caught_up`). Such an entry must be paid by what
ENTRY_TOKENS more tokens are expected to gain. What entries took, and what a drafter's drafts lost, is owed until they have gained as
much, or PAID_SHARE of plain decoding's time has paid it back. While anything is owed, no request enters or goes on after a rest, so drafts that
were for nothing cost a bounded share of all time.

What passes cost is measured once, between two steps (`measure_costs`). While text is generated each step's seconds are compared with what was expected
of them, per kind of step and number of requests, unless the costs were given. Text under a seed, and greedy text up to rounding, does not depend on
any of it.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from draft.acceptance import GREEDY_PRIOR, SAMPLED_PRIOR, AcceptanceEstimator, AcceptanceRate, MatchAcceptance, SharedRate
from draft.ngram import Match, NgramIndex, continuation
from draft.protocols import CausalDecoder, Drafter, ScratchPasses
from draft.seen import Seen, SeenByNamespace, SeenTexts
from draft.tree import MAX_CHAIN, MAX_LEAVES
from kernels.cpu_decode.stopping import Stopping

MAX_AUTO_LENGTH = MAX_CHAIN
LENGTHS = (1, 2, 3, 4, 6, 8, MAX_AUTO_LENGTH)  # of blocks that are compared
FIRST_PROBE, LAST_PROBE = 16, 512  # steps without a source before it is tried again, at least and at most
WEIGHED_EVERY = 32  # steps, whether a source that is not used could pay at all: weighing it takes the host's time
SEEN_SURE = 0.9  # share of its context from which a token seen elsewhere tells how often such tokens come again
TRIED_OF = 2  # requests of which one takes part in a trial: a draft head that begins again runs some hundred tokens for each
PROBE_SHARE = 0.005  # of all tokens that trials may cost
PAID_SHARE = 0.01  # of plain decoding's time, by which what is owed is paid back
LEFT_OUT = 32  # tokens of a request since its last draft that are run with its next one
ENTRY_TOKENS = 64  # of a request that has to pay its entry, where it may have so many more
ENTRY_MEMORY = 0.9  # of seconds that entries took
CREDIT = 8.0  # plain steps that drafts have gained, at most, which later entries may lose before anything is owed
HOPEFUL_RATE = 0.95  # a source that would not pay at this acceptance is tried a quarter as often as the rarest of others
SLOWED_SHARE = 0.01  # of its time that drafts may cost any request among others
ENTER, LEAVE = 1.03, 0.99  # a source is taken up above this share of the rate without it, and left below this one
FIRST_PLAIN, LAST_PLAIN = 2, 128  # steps of drafting before one without it, which tells what drafts save: doubled each time
RATIO_MEMORY, RATIO_STEPS = 0.9, 16.0  # of measured over expected rates; what is expected weighs as much as so many steps
COST_MEMORY, COST_STEPS = 0.95, 8.0  # of measured seconds; what was measured in the warm-up weighs as much as so many steps
CORRECT_EVERY = 8  # steps, once there are some
SLOWEST, RECENT = 2.0, 9  # a step counts as this many times the median of so many at most: compilation and other hiccups

TURNS, TURNS_CPU = 3, 2  # of timing every count

Curve = tuple[tuple[int, float], ...]
StepKind = Literal["plain", "ngram", "model"]


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

    def draft_seconds(self, requests: int) -> float:
        """A drafting pass over so many requests; 0 for none."""
        return _at(self.draft, requests) if requests else 0.0

    def verify_seconds(self, rows: int) -> float:
        """The target's forward over so many rows."""
        return _at(self.verify, rows)

    def last_seconds(self, rows: int) -> float:
        """The pass of the first layers over so many rows; 0 where the target runs all its layers itself."""
        return _at(self.last or self.draft, rows) if self.runs_last_draft and rows else 0.0

    @functools.cached_property
    def _steps(self) -> dict[tuple[int, int, int | None, int], float]:
        """What `step_seconds` has said before: plans ask for the same steps again and again."""
        return {}

    def step_seconds(self, length: int, batch: int, drafting: int | None = None, given: int = 0) -> float:
        """A step of `batch` requests of which `drafting` (default: all) draft `length` tokens each, and others have `given` drafts in all that no pass
        makes."""
        asked = (length, batch, drafting, given)
        if asked not in self._steps:
            self._steps[asked] = self._step_seconds(*asked)
        return self._steps[asked]

    def _step_seconds(self, length: int, batch: int, drafting: int | None, given: int) -> float:
        drafting = (batch if drafting is None else drafting) if length else 0
        # requests that draft nothing stand in the first pass, which runs their last tokens through the first layers
        passes = length * self.draft_seconds(drafting) + self.last_seconds(batch + given)
        return passes + self.verify_seconds(batch + given + length * drafting)

    def corrected(self, batch: int, base: float, more: float, draft: float) -> CostModel:
        """With its seconds scaled: of a step of `batch` requests without drafts, of all rows beyond these, and of drafting passes."""

        def scaled(curve: Curve) -> Curve:
            at = _at(curve, batch)
            return tuple((n, max(base * at / 10, base * at + more * (seconds - at))) for n, seconds in curve)

        last = self.last or (self.draft if self.runs_last_draft else None)
        drafts = tuple((n, draft * seconds) for n, seconds in self.draft)
        return CostModel(drafts, scaled(self.verify), self.runs_last_draft, None if last is None else scaled(last))

    def row_seconds(self, rows: int, more: int) -> float:
        """What one of `more` rows adds to a verification of `rows`, and to the first layers' pass."""
        added = self.verify_seconds(rows + more) - self.verify_seconds(rows) + self.last_seconds(rows + more) - self.last_seconds(rows)
        return added / more


def _at(curve: Curve, tokens: int) -> float:
    """Linear interpolation; beyond the last point the last slope goes on."""
    if len(curve) == 1:
        return curve[0][1]
    right = next((i for i, (n, _) in enumerate(curve) if n >= tokens), len(curve) - 1)
    (n0, s0), (n1, s1) = curve[max(right, 1) - 1], curve[max(right, 1)]
    return max(s0 + (s1 - s0) * (tokens - n0) / (n1 - n0), min(s0, s1) if tokens < n0 else s0)


def expected_tokens(length: int, rate: float) -> float:
    """Tokens a step yields: accepted drafts up to the first rejection and the target's own, the sum of rate^i for i from 0 to length."""
    return sum(rate**i for i in range(length + 1))


@functools.cache
def step_clock(device: torch.device) -> Callable[[], float]:
    """Seconds by which steps are compared. On a CPU those of the calling thread, which takes part in every forward: what other processes take meanwhile
    is no cost of the step. Elsewhere, and where threads have no fine clock, those of the wall."""
    if device.type == "cpu" and time.get_clock_info("thread_time").resolution < 1e-4:
        return time.thread_time
    return time.perf_counter


# --- one request --------------------------------------------------------------------------------------------------------


class RequestDrafting:
    """What a request wants of speculation, and what is known of its drafts.

    Args:
        wanted: a fixed number of drafts a step, or "auto".
        estimator: from the confidence of a draft to its chance, where drafts are looked at one by one; None where a block is drafted unseen.
        shared: acceptance over all requests.
        ngrams: whether drafts may come from the request's own tokens.

    seen: texts that others of its namespace left, from which drafts may come as well. seconds: of its steps with others beside it. behind: of these, by
    how much drafts, its own and the others', are expected to have slowed it down; negative where they have sped it up.
    """

    def __init__(
        self,
        wanted: int | Literal["auto"],
        estimator: AcceptanceEstimator | None = None,
        *,
        shared: SharedRate | None = None,
        ngrams: bool = False,
    ) -> None:
        self.wanted, self.estimator = wanted, estimator
        self.acceptance = AcceptanceRate(shared, MAX_AUTO_LENGTH)
        self.matches = MatchAcceptance()
        self.index = NgramIndex() if ngrams else None
        self.seconds = self.behind = 0.0
        self.seen: SeenTexts | None = None
        self.from_seen = False  # whether the last drafts that were looked up came from there
        self.drafted_at = 0  # tokens of its text when it drafted last
        self._match: Match | None = None
        self._follows: list[int] = []
        self._seen: Seen | None = None

    @property
    def looks(self) -> bool:
        """Whether what comes next was looked up, and the next `observe` tells whether it came."""
        return self._match is not None or self._seen is not None

    def look_up(self, tokens: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Up to `count` drafts that followed the last of `tokens` before, in this text or in another one, whichever promises more; and for each the
        chance that it and all before it are accepted."""
        longest = MAX_AUTO_LENGTH if self.wanted == "auto" else self.wanted
        self._match, self._follows = None if self.index is None else self.index.match(tokens), []
        self._seen = None if self.seen is None else self.seen.match(tokens, longest)
        own: list[float] = []
        if self._match is not None:
            self._follows = continuation(tokens, self._match, longest)
            own = [self.matches.chance(self._match.length + i) for i in range(len(self._follows))]
        others: list[float] = []
        if self._seen is not None and self.seen is not None:
            others = [self.seen.acceptance.chance(self._seen.length + i) for i in range(len(self._seen.tokens))]
            others[0] *= self._seen.share
        found = [list(itertools.accumulate(chances, float.__mul__))[:count] for chances in (own, others)]
        self.from_seen = self._seen is not None and sum(found[1]) > sum(found[0])
        drafts = self._seen.tokens if self._seen is not None and self.from_seen else self._follows
        return drafts[:count], found[self.from_seen]

    def observe(self, tokens: Sequence[int], proposed: int, accepted: int, confidences: Sequence[float] | None, *, given: bool) -> None:
        """Count a step's outcome.

        tokens: what it gained. proposed, accepted: drafts; a leaf is none. confidences: of all drafts looked at, kept or not (None: drafted unseen).
        given: the drafts came from the text itself, or from other texts.

        Where drafts are looked at only likely ones are proposed, so the rate is that of all drafts looked at, as their confidence lets expect. Those
        that followed a rejected one are left out: they tell of random numbers that will be used again, and a choice of drafts must not know these.
        """
        if self._match is not None:
            self.matches.observe(self._match.length, self._follows, tokens)
            self._match = None
        if self._seen is not None and self.seen is not None:
            if self._seen.share >= SEEN_SURE:
                self.seen.acceptance.observe(self._seen.length, self._seen.tokens, tokens)
            self._seen = None
        if given:
            return
        if confidences is not None and self.estimator is not None:
            self.acceptance.expect([self.estimator.chance(confidence) for confidence in confidences[: accepted + 1]])
            for i, confidence in enumerate(confidences[: min(accepted + 1, proposed)]):
                self.estimator.observe(confidence, i < accepted)
        elif proposed:
            self.acceptance.observe(proposed, accepted)


# --- ending a block draft by draft --------------------------------------------------------------------------------------


@dataclass
class BlockPolicy:
    """Decides in one step which drafts are kept and which requests draft on. Requests without an estimator draft their whole length.

    costs: of passes. rate: tokens a second, over all requests, that one second must bring. rows: of the verification so far. requests: by their
    number in the batch. most_tokens: per request the most tokens proposed at one depth, the draft included (1: no leaves). confidences: of the drafts
    looked at. passes: requests in each drafting pass so far. entry_s: seconds that tokens left out took before the block.
    """

    costs: CostModel
    rate: float
    rows: int
    requests: Sequence[RequestDrafting]
    most_tokens: Sequence[int]
    confidences: dict[int, list[float]] = field(default_factory=dict, init=False)
    passes: list[int] = field(default_factory=list, init=False)
    entry_s: float = field(default=0.0, init=False)
    _chances: dict[int, float] = field(default_factory=dict, init=False)
    _leaves: dict[int, int] = field(default_factory=dict, init=False)

    @property
    def candidates(self) -> int:
        """Most tokens at one depth of any request."""
        return max(self.most_tokens)

    def looks_at(self, b: int) -> bool:
        """Whether it has a say in request b's block."""
        return self.requests[b].estimator is not None and self.requests[b].wanted == "auto"

    def caught_up(self, seconds: float) -> None:
        """Tokens that the drafter had left out were run before the block."""
        self.entry_s += seconds

    def stopping(self, batch: Sequence[int]) -> Stopping:
        """The same decisions for a compiled call that drafts for the requests of `batch`, without leaves: `select` is told of its drafts afterwards."""
        found = Stopping.never(len(batch))
        for i, b in enumerate(batch):
            estimator = self.requests[b].estimator
            if self.looks_at(b) and estimator is not None:
                found.heights[i], found.slopes[i] = estimator.line
                found.rates[i] = self.requests[b].acceptance.rate
        passes = [self.rate * self.costs.draft_seconds(count) for count in range(len(batch) + 1)]
        return found._replace(row=self.rate * self.costs.row_seconds(self.rows, 4 * len(batch)), passes=np.array(passes, np.float32))

    def select(self, batch: Sequence[int], probabilities: Sequence[Sequence[float]]) -> list[int]:
        """How many tokens each request of `batch` proposes at the depth just looked at, likeliest first: 0 ends its block here, 1 is the draft alone.

        probabilities: per request those of the likeliest tokens, descending; of one without leaves only the first is needed.
        """
        self.passes.append(len(batch))
        counts, before = [1] * len(batch), [self._chances.get(b, 1.0) for b in batch]
        looked_at = [i for i, b in enumerate(batch) if self.looks_at(b)]
        for i in looked_at:
            estimator = self.requests[batch[i]].estimator
            assert estimator is not None
            self.confidences.setdefault(batch[i], []).append(probabilities[i][0])
            self._chances[batch[i]] = before[i] * estimator.chance(probabilities[i][0])
        self.rows += len(batch) - len(looked_at)
        # the likeliest first: a row more never costs less for there being others
        for i in sorted(looked_at, key=lambda i: -self._chances[batch[i]]):
            counts[i] = self._count(batch[i], before[i], probabilities[i])
            self.rows += counts[i]
        return counts

    def _count(self, b: int, before: float, probabilities: Sequence[float]) -> int:
        estimator = self.requests[b].estimator
        assert estimator is not None
        row = self.rate * self.costs.row_seconds(self.rows, 1)
        # over many rows, as the difference between a few drowns in the noise
        leaf = self.rate * self.costs.row_seconds(self.rows, 8)
        worth, price, count = self._chances[b], row, 1
        for probability in probabilities[1 : min(self.most_tokens[b], 1 + MAX_LEAVES - self._leaves.get(b, 0))]:
            gain = before * estimator.leaf_chance(probability)
            if gain < leaf:
                break
            worth, price, count = worth + gain, price + leaf, count + 1
        if worth < price:
            return 0
        self._leaves[b] = self._leaves.get(b, 0) + count - 1
        return count

    def onward(self, batch: Sequence[int]) -> set[int]:
        """Those of `batch` for which another draft is looked for: the ones that together gain most beyond what the pass and their rows cost."""
        fixed = [b for b in batch if not self.looks_at(b)]
        asking = [b for b in batch if self.looks_at(b)]
        gains = {b: self._chances.get(b, 1.0) * self.requests[b].acceptance.rate for b in asking}
        asking.sort(key=lambda b: -gains[b])
        base = self.costs.draft_seconds(len(fixed)) + self.costs.verify_seconds(self.rows + len(fixed))
        best, chosen, worth = 0.0, 0, 0.0
        for count, b in enumerate(asking, 1):
            worth += gains[b]
            requests = len(fixed) + count
            seconds = self.costs.draft_seconds(requests) + self.costs.verify_seconds(self.rows + requests) - base
            if worth - self.rate * seconds > best:
                best, chosen = worth - self.rate * seconds, count
        return {*fixed, *asking[:chosen]}


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


# --- a step -------------------------------------------------------------------------------------------------------------


@dataclass
class StepPlan:
    """What a step does. lengths: drafts that each request's drafter may make. given: drafts of each request from its own text, instead. block: ends
    blocks early; None where lengths stand. kind: its dearest part. seconds, tokens: expected of it; 0 s: it tells nothing of others.
    left_out: tokens that the drafter has to run before, as far as the policy knows."""

    lengths: list[int]
    given: list[list[int]]
    block: BlockPolicy | None = None
    kind: StepKind = "plain"
    seconds: float = 0.0
    tokens: float = 0.0
    left_out: int = 0
    gains: dict[int, float] = field(default_factory=dict)  # tokens that requests are expected to gain by drafts nobody asked them for

    @property
    def drafts(self) -> bool:
        """Whether any request has some."""
        return any(self.lengths) or any(self.given)

    def of(self, requests: Sequence[int]) -> StepPlan:
        """The part of these requests, by their number, in a step without a block policy."""
        return replace(self, lengths=[self.lengths[b] for b in requests], given=[self.given[b] for b in requests])


class _Ratio:
    """Measured over expected rate of one kind of step, in decayed sums."""

    def __init__(self) -> None:
        self.tokens = self.expected = 0.0

    def observe(self, tokens: float, expected: float) -> None:
        self.tokens = self.tokens * RATIO_MEMORY + tokens
        self.expected = self.expected * RATIO_MEMORY + expected

    def value(self, believed: float) -> float:
        """believed: before anything is measured, in tokens of so many."""
        return (self.tokens + believed) / (self.expected + believed) if self.expected + believed else 1.0


class _Scales:
    """What a step's base, rows beyond it and drafting passes take, over what the warm-up says.

    The base is told by steps without drafts alone, as these are rare while drafts pay; the others by least squares over what is beyond it. Weights
    decay, and the estimates are drawn to 1.
    """

    def __init__(self) -> None:
        self._base, self._plain = COST_STEPS, COST_STEPS  # sums of ratios, and of weights
        self._squares = [COST_STEPS, 0.0, COST_STEPS]  # of rows; of rows and passes; of passes
        self._products = [COST_STEPS, COST_STEPS]
        self.steps = 0

    @property
    def base(self) -> float:
        """Of a step without drafts."""
        return self._base / self._plain

    def observe(self, base: float, more: float, draft: float, seconds: float) -> None:
        """seconds: what was measured; the others: by the warm-up."""
        self.steps += 1
        believed = COST_STEPS * (1 - COST_MEMORY)  # what is believed is not forgotten
        if not more and not draft:
            self._base = self._base * COST_MEMORY + believed + seconds / base
            self._plain = self._plain * COST_MEMORY + believed + 1
            return
        total = more + draft
        rows, passes, beyond = more / total, draft / total, max(0.0, seconds - self.base * base) / total
        for i, value in enumerate((rows * rows, rows * passes, passes * passes)):
            self._squares[i] = self._squares[i] * COST_MEMORY + believed * (i != 1) + value
        for i, value in enumerate((rows * beyond, passes * beyond)):
            self._products[i] = self._products[i] * COST_MEMORY + believed + value

    def solve(self) -> tuple[float, float, float]:
        """Scales of base, rows and passes, none below a tenth or above ten."""
        a, b, c = self._squares
        x, y = self._products
        found = self.base, (c * x - b * y) / (a * c - b * b), (a * y - b * x) / (a * c - b * b)
        first, second, third = (min(10.0, max(0.1, scale)) for scale in found)
        return first, second, third


@dataclass
class _Load:
    """What is known of steps with about so many requests. costs: as corrected last. seen: rows that were verified before; requests in drafting passes,
    negative. owed: seconds that entries took and drafts lost, and nothing has paid back; negative where drafts have gained more."""

    costs: CostModel
    scales: _Scales = field(default_factory=_Scales)
    ratios: dict[StepKind, _Ratio] = field(default_factory=lambda: {"ngram": _Ratio(), "model": _Ratio()})
    on: dict[StepKind, bool] = field(default_factory=lambda: {"ngram": False, "model": False})
    waited: dict[StepKind, int] = field(default_factory=lambda: {"plain": 0, "ngram": 0, "model": 0})
    patience: dict[StepKind, int] = field(default_factory=lambda: {"plain": FIRST_PLAIN, "ngram": FIRST_PROBE, "model": FIRST_PROBE})
    recent: dict[StepKind, deque[float]] = field(
        default_factory=lambda: {"plain": deque(maxlen=RECENT), "ngram": deque(maxlen=RECENT), "model": deque(maxlen=RECENT)}
    )
    corrected_at: int = 0
    left: int = 0  # steps without a plan
    plain_s: dict[int, float] = field(default_factory=dict)  # of a step without drafts by its requests, as corrected last
    seen: set[int] = field(default_factory=set)
    owed: float = 0.0


class DraftingPolicy:
    """Plans the steps of an engine. See the module.

    Args:
        costs: of passes; None is no speculation for requests that leave it to the policy.
        measured: whether steps are timed and `costs` corrected by it.
        draft_by_draft: look at each draft before the next one (on a CPU); else lengths are chosen per block, so that nothing is read back while a
            block is drafted (on a GPU).
        ngrams: whether drafts may come from requests' own tokens, and from those of earlier ones.
        lengths: of blocks that are compared.
    """

    def __init__(
        self,
        costs: CostModel | None = None,
        *,
        measured: bool = False,
        draft_by_draft: bool = True,
        ngrams: bool = False,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        self.costs, self.measured, self.draft_by_draft, self.ngrams = costs, measured, draft_by_draft, ngrams
        self.lengths = tuple(lengths)
        self.shared = SharedRate()
        self.seen = SeenByNamespace()
        self._loads: dict[int, _Load] = {}
        self._entry_s = self._entry_tokens = 0.0  # of entries, decayed sums

    def request(self, wanted: int | Literal["auto"], *, greedy: bool) -> RequestDrafting:
        """The state of a new request."""
        estimator = AcceptanceEstimator(GREEDY_PRIOR if greedy else SAMPLED_PRIOR) if self.draft_by_draft else None
        return RequestDrafting(wanted, estimator, shared=self.shared, ngrams=self.ngrams)

    def begin(self, request: RequestDrafting, namespace: str) -> None:
        """A request of a namespace runs from now on: its drafts may come from what others of that namespace left."""
        if self.ngrams:
            request.seen = self.seen[namespace]

    def end(self, tokens: Sequence[int], prompt_tokens: int, namespace: str) -> None:
        """A request has ended: leave its new tokens to others of its namespace."""
        if self.ngrams and len(tokens) > prompt_tokens:
            self.seen[namespace].add(tokens, prompt_tokens)

    # --- planning -------------------------------------------------------------------------------------------------------

    def plan(
        self,
        requests: Sequence[RequestDrafting],
        tokens: Sequence[Sequence[int]],
        room: Sequence[int],
        *,
        drafter_room: Sequence[int] | None = None,
        most_tokens: Sequence[int] | None = None,
        ngrams: bool = True,
        ready: Callable[[StepKind], Sequence[int]] | None = None,
    ) -> StepPlan:
        """The step with the best expected rate.

        tokens: each request's own, the last one pending. room: drafts each may have at most. drafter_room: those of the drafter; None without one.
        most_tokens: see `BlockPolicy`. ngrams: whether drafts may come from the text in this step. ready: lengths of blocks from a source that a
        captured step of these requests may have now; None: all of `lengths` whose rows are not too many.
        """
        batch = len(requests)
        plan, model_room, auto = self._fixed(requests, tokens, room, drafter_room, ngrams)
        if not auto or self.costs is None:
            return plan
        load = self._load(batch)
        plan.seconds, plan.tokens = self._undrafted_seconds(load, batch), float(batch)
        lengths: dict[StepKind, tuple[int, ...]] = {
            kind: self.lengths if ready is None else tuple(ready(kind)) for kind in ("model", "ngram")
        }
        if self.measured and any(load.on.values()) and load.waited["plain"] >= load.patience["plain"]:
            load.waited["plain"], load.patience["plain"] = 0, min(LAST_PLAIN, 2 * load.patience["plain"])
            return plan
        left_out = self._left_out(requests, tokens)
        rate = self._choose_model(plan, requests, [b for b in auto if model_room[b] > 0], model_room, load, lengths["model"], left_out)
        if ngrams and self.ngrams:
            self._choose_ngrams(plan, requests, tokens, auto, room, load, rate, lengths["ngram"])
        asked = any(r.wanted not in ("auto", 0) for r in requests)
        slows = batch > 1 and self.measured and not asked and plan.drafts and not self._spares(requests, load, plan.seconds, plan.gains)
        if slows:
            plan = StepPlan([0] * batch, [[] for _ in requests], seconds=self._undrafted_seconds(load, batch), tokens=float(batch))
        drafting = [b for b in auto if plan.lengths[b]]
        for b in drafting:
            plan.left_out += left_out.get(b, 0)
            requests[b].drafted_at = len(tokens[b])
        plan.kind = "model" if drafting else "ngram" if any(plan.given) else "plain"
        if drafting and self.draft_by_draft:
            given = sum(map(len, plan.given))
            plan.block = BlockPolicy(load.costs, rate, batch + given, requests, most_tokens or [1] * batch)
        if batch > 1 and plan.kind == "plain":
            load.left = CORRECT_EVERY - 1 if slows or not any(load.on.values()) else 1
        if asked:
            plan.seconds = 0.0  # drafts that nobody weighed: such steps tell nothing of the others
        return plan

    def rest(self, batch: int) -> StepPlan | None:
        """A step of `batch` requests that all leave drafts to the policy, without any, where no source paid when it was planned last and it is not time
        to plan again: weighing drafts and looking through texts takes the host's time, request by request. None: it must be planned. One
        request's steps always are."""
        load = self._loads.get(batch.bit_length())
        if load is None or load.left <= 0:
            return None
        load.left -= 1
        for kind in ("ngram", "model"):
            load.waited[kind] += 1
        return StepPlan([0] * batch, [[] for _ in range(batch)], seconds=self._undrafted_seconds(load, batch), tokens=float(batch))

    def _spares(self, requests: Sequence[RequestDrafting], load: _Load, seconds: float, gains: Mapping[int, float]) -> bool:
        """Whether a step of so many seconds and such gains slows no request down by more than a small share of its time: it takes as long for those
        that gain nothing by it."""
        token_s = self._undrafted_seconds(load, len(requests))
        return all(
            request.behind + seconds - token_s * (1 + gains.get(b, 0.0)) <= SLOWED_SHARE * (request.seconds + seconds)
            for b, request in enumerate(requests)
        )

    def _fixed(
        self,
        requests: Sequence[RequestDrafting],
        tokens: Sequence[Sequence[int]],
        room: Sequence[int],
        drafter_room: Sequence[int] | None,
        ngrams: bool,
    ) -> tuple[StepPlan, list[int], list[int]]:
        """(the drafts of requests that ask for a number of them, drafts that the drafter has room for, requests that leave it to the policy)."""
        model_room = [0] * len(requests) if drafter_room is None else list(map(min, room, drafter_room))
        fixed = [0 if r.wanted == "auto" else r.wanted for r in requests]
        plan = StepPlan(list(map(min, fixed, model_room)), [[] for _ in requests])
        if ngrams and drafter_room is None:
            for b, (request, wanted) in enumerate(zip(requests, fixed, strict=True)):
                if wanted and room[b]:
                    plan.given[b] = request.look_up(tokens[b], min(wanted, room[b]))[0]
        return plan, model_room, [b for b, r in enumerate(requests) if r.wanted == "auto" and room[b] > 0]

    def _choose_model(
        self,
        plan: StepPlan,
        requests: Sequence[RequestDrafting],
        able: list[int],
        room: Sequence[int],
        load: _Load,
        lengths: Sequence[int],
        left_out: Mapping[int, int],
    ) -> float:
        """Set `plan.lengths` to what the drafter should make. Returns the best rate known, in tokens a second as `costs` count them."""
        costs, batch = load.costs, len(requests)
        assert self.costs is not None
        plain_rate = batch / plan.seconds
        if load.owed > 0:
            able = [b for b in able if b not in left_out]
        if not able or not lengths:
            load.on["model"] = load.on["model"] and load.owed <= 0
            return plain_rate
        waited = load.waited["model"]
        if batch == 1 and not load.on["model"] and waited and (waited + 1) % CORRECT_EVERY:
            load.waited["model"] += 1
            return plain_rate  # nothing new is known of drafts that nobody makes
        chains = {b: requests[b].acceptance.chain() for b in able}
        able = sorted(able, key=lambda b: -chains[b][0])
        best, length, count, expected = self._best(costs, chains, able, batch, lengths)
        if self.measured and count < len(able):
            gains = {b: sum(chains[b][:length]) for b in able[:count]}
            if not self._spares(requests, load, costs.step_seconds(length, batch, count), gains):  # all together may slow none down
                best, length, count, expected = self._best(costs, chains, able, batch, lengths, (len(able),))
        entry_s = self._entry_seconds(left_out[b] for b in able[:count] if b in left_out)
        paying = max((min(ENTRY_TOKENS, room[b]) for b in able[:count]), default=0) * plan.seconds
        relative = best / plain_rate * self._ratio("model", load, batch) / (1 + entry_s / paying)
        probing = False
        if not self._switch("model", load, relative):
            # some requests' drafts tell what the passes take, while the others' draft caches stay behind
            probing, length, count = True, lengths[0], -(-len(able) // TRIED_OF)
            expected = batch + sum(chains[b][0] for b in able[:count])
            entry_s = self._entry_seconds(left_out[b] for b in able[:count] if b in left_out)
            lost = (costs.step_seconds(length, batch, count) + entry_s) / plan.seconds - expected / batch
            if not self._probe("model", load, lost, functools.partial(self._able_to_pay, load, able, batch, lengths)):
                return plain_rate
        chosen = able[:count]
        unbounded = self.draft_by_draft and not probing
        for b in chosen:
            plan.lengths[b] = min(room[b], MAX_AUTO_LENGTH if unbounded else length)
            plan.gains[b] = sum(chains[b][:length])
        plan.seconds, plan.tokens = costs.step_seconds(length, batch, count), expected
        return plain_rate if probing else plain_rate * max(1.0, relative)

    def _able_to_pay(self, load: _Load, able: Sequence[int], batch: int, lengths: Sequence[int]) -> bool:
        """Whether the drafter would pay at HOPEFUL_RATE."""
        assert self.costs is not None
        hopeful = {b: [HOPEFUL_RATE ** (i + 1) for i in range(MAX_AUTO_LENGTH)] for b in able}
        return any(
            self._best(costs, hopeful, able, batch, lengths)[0] * costs.step_seconds(0, batch) > ENTER * batch
            for costs in (load.costs, self.costs)
        )

    def _left_out(self, requests: Sequence[RequestDrafting], tokens: Sequence[Sequence[int]]) -> dict[int, int]:
        """Tokens of each request that a draft has to be preceded by, where they are many."""
        found = {b: len(tokens[b]) - request.drafted_at for b, request in enumerate(requests)}
        return {b: count for b, count in found.items() if count > LEFT_OUT}

    def _entry_seconds(self, left_out: Iterable[int]) -> float:
        """That running so many tokens of each request takes, as it did before."""
        return sum(left_out) * self._entry_s / self._entry_tokens if self._entry_tokens else 0.0

    def _best(
        self,
        costs: CostModel,
        chains: dict[int, list[float]],
        able: Sequence[int],
        batch: int,
        lengths: Sequence[int],
        counts: Sequence[int] = (),
    ) -> tuple[float, int, int, float]:
        """(rate, length, requests, tokens of a step) of the best plan in which the first so many of `able` draft equally long blocks. counts: so
        many alone."""
        number = len(able)
        counts = counts or (range(1, number + 1) if number <= 4 else sorted({-(-number * i // 4) for i in range(1, 5)}))
        best = (0.0, lengths[0], number, 0.0)
        sums = {length: list(itertools.accumulate(sum(chains[b][:length]) for b in able)) for length in lengths}
        for length, gained in sums.items():
            for count in counts:
                tokens = batch + gained[count - 1]
                rate = tokens / costs.step_seconds(length, batch, count)
                if rate > best[0]:
                    best = (rate, length, count, tokens)
        return best

    def _choose_ngrams(
        self,
        plan: StepPlan,
        requests: Sequence[RequestDrafting],
        tokens: Sequence[Sequence[int]],
        auto: Sequence[int],
        room: Sequence[int],
        load: _Load,
        rate: float,
        lengths: Sequence[int],
    ) -> None:
        """Set `plan.given` where the request's own text promises more than the drafter, and take those requests' lengths back."""
        costs, batch = load.costs, len(requests)
        drafting = [b for b in auto if plan.lengths[b]]
        row = rate * costs.row_seconds(batch, 4 * batch)  # over many rows, as the difference between a few drowns in the noise
        if row >= HOPEFUL_RATE:
            return
        share = rate * costs.draft_seconds(len(drafting)) / max(1, len(drafting))
        found: dict[int, tuple[list[int], float]] = {}
        for b in auto:
            drafts, chances = requests[b].look_up(tokens[b], room[b])
            count = sum(chance >= row for chance in chances)
            if not self.draft_by_draft:
                count = max((n for n in lengths if n <= count), default=0)  # lengths that captured steps have
            value = sum(chances[:count]) - count * row
            chain = requests[b].acceptance.chain() if plan.lengths[b] else []
            by_model = max((sum(chain[:k]) - k * (row + share) for k in range(1, len(chain) + 1)), default=0.0)
            if count > 0 and value > max(0.0, by_model):
                found[b] = drafts[:count], sum(chances[:count])
        if not found:
            return
        rows, gained = sum(len(drafts) for drafts, _ in found.values()), sum(gain for _, gain in found.values())
        before = costs.step_seconds(0, batch)
        relative = (batch + gained) * before / (batch * costs.step_seconds(0, batch, given=rows)) * self._ratio("ngram", load, batch)
        if not self._switch("ngram", load, relative) and not self._probe("ngram", load, 1 - relative, lambda: True):
            return
        for b, (drafts, _) in found.items():
            plan.given[b], plan.lengths[b], plan.gains[b] = drafts, 0, found[b][1]
        left = [b for b in drafting if plan.lengths[b]]
        gains = sum(requests[b].acceptance.rate for b in left)
        if left and gains < rate * (costs.draft_seconds(len(left)) + len(left) * costs.row_seconds(batch + rows, len(left))):
            left = []  # the pass is not worth while for those that still want it
            for b in drafting:
                plan.lengths[b] = 0
                if b not in found:
                    del plan.gains[b]
        length = max((plan.lengths[b] for b in left), default=0) if not self.draft_by_draft else int(bool(left))
        plan.seconds = costs.step_seconds(length, batch, len(left), rows)
        plan.tokens = batch + gained + sum(sum(requests[b].acceptance.chain()[:length]) for b in left)

    # --- measured against expected --------------------------------------------------------------------------------------

    def _load(self, batch: int) -> _Load:
        """Of so many requests, its costs up to date with what was measured."""
        assert self.costs is not None
        load = self._loads.get(batch.bit_length())
        if load is None:
            load = self._loads[batch.bit_length()] = _Load(self.costs)
        steps = load.scales.steps
        if steps != load.corrected_at and (steps < RECENT or steps >= load.corrected_at + CORRECT_EVERY):
            load.costs, load.corrected_at = self.costs.corrected(batch, *load.scales.solve()), steps
            load.plain_s.clear()
        return load

    def _undrafted_seconds(self, load: _Load, batch: int) -> float:
        """Of a step without drafts."""
        if batch not in load.plain_s:
            load.plain_s[batch] = load.costs.step_seconds(0, batch)
        return load.plain_s[batch]

    def _ratio(self, kind: StepKind, load: _Load, batch: int) -> float:
        """The rate of such steps beside what was expected: drafts chosen one by one are better than the average that plans count with."""
        return load.ratios[kind].value(RATIO_STEPS * batch) if self.measured else 1.0

    def _switch(self, kind: StepKind, load: _Load, relative: float) -> bool:
        """Whether a source is used whose steps have `relative` times the rate of plain ones: with hysteresis."""
        was = load.on[kind]
        load.on[kind] = relative > (LEAVE if was else ENTER)
        if load.on[kind] and not was:
            load.waited[kind], load.patience[kind] = 0, FIRST_PROBE
        return load.on[kind]

    def _probe(self, kind: StepKind, load: _Load, lost: float, hopeful: Callable[[], bool]) -> bool:
        """Whether a source that is not used is tried once more. lost: plain steps that it would cost. hopeful: whether it could pay at all."""
        load.waited[kind] += 1
        waited = load.waited[kind]
        if waited < load.patience[kind]:
            return False
        wanted = min(LAST_PROBE, max(FIRST_PROBE, math.ceil(lost / PROBE_SHARE)))
        if waited >= wanted and waited < 4 * LAST_PROBE and not hopeful():
            wanted = 4 * LAST_PROBE
        if waited < wanted:
            load.patience[kind] = min(wanted, waited + WEIGHED_EVERY)
            return False
        load.waited[kind], load.patience[kind] = 0, FIRST_PROBE
        return True

    def rests(self, batch: int) -> int:
        """Steps of `batch` requests that are plain from now on whatever comes, this one included; 0: it must be planned."""
        return 0

    def plain_steps_left(self, batch: int) -> int:
        """Steps of `batch` requests without drafts of the drafter that come at least before the next one with some."""
        return 0

    def interrupted(self) -> None:
        """Something else than a decode step has run, as it would have whatever the plan."""

    def joined(self) -> None:
        """A prompt has run in a pass of its own that would have run beside a step without drafts: the next step takes that time, too."""

    def took(self, began_at: float, ended_at: float) -> float:
        """Seconds of a step that began and ended so on `step_clock`."""
        return ended_at - began_at

    def rested(self, batch: int, seconds: float, *, chosen: bool) -> None:
        """A step without a plan was carried out: one token for each of `batch` requests. chosen: by the policy, else no request may have drafts."""

    def observe(self, plan: StepPlan, batch: int, tokens: int, seconds: float, requests: Sequence[RequestDrafting] = ()) -> None:
        """A step that was carried out: what it gained over all requests, its seconds (`took`), and the requests."""
        costs = self.costs
        if not self.measured or costs is None or not plan.seconds:
            return
        load = self._load(batch)
        token_s = self._undrafted_seconds(load, batch)
        if plan.block is not None:
            rows, passes = plan.block.rows, plan.block.passes
        else:
            rows = batch + sum(map(len, plan.given)) + sum(plan.lengths)
            passes = [sum(length > i for length in plan.lengths) for i in range(max(plan.lengths))]
        shapes = {rows, *(-size for size in passes)}
        new = not shapes <= load.seen  # a shape's first pass compiles, allocates and reads weights that later ones find in the cache
        entry_s = 0.0 if plan.block is None else plan.block.entry_s
        seconds -= entry_s
        spent = token_s if plan.kind == "plain" else min(seconds, SLOWEST * plan.seconds)
        if new and seconds > spent:
            spent = plan.seconds
        self._keep_account(load, plan, entry_s, spent, tokens / batch * token_s)
        if batch > 1:
            for b, request in enumerate(requests):
                # what was expected: one that drafts is not behind for one rejected draft, and rates tell whether drafts pay at all
                request.seconds += spent
                request.behind += spent - token_s * (1 + plan.gains.get(b, 0.0))
        if plan.kind != "plain":
            load.waited["plain"] += 1
        if new:
            load.seen |= shapes
            return
        base, more = costs.step_seconds(0, batch), 0.0
        if rows > batch:
            more = costs.verify_seconds(rows) + costs.last_seconds(rows) - costs.verify_seconds(batch) - costs.last_seconds(batch)
        parts = (base, max(0.0, more), sum(map(costs.draft_seconds, passes)))
        recent = load.recent[plan.kind]
        recent.append(seconds / sum(parts))
        typical = statistics.median([load.scales.base, load.scales.base, *recent])
        seconds = min(recent[-1], SLOWEST * typical) * sum(parts)
        load.scales.observe(*parts, seconds)
        if plan.kind != "plain":
            load.ratios[plan.kind].observe(tokens, plan.tokens / plan.seconds * seconds)

    def _keep_account(self, load: _Load, plan: StepPlan, entry_s: float, spent: float, saved: float) -> None:
        """Count what a step has cost beyond plain decoding. spent: seconds after its entries. saved: those of plain decoding of as many tokens."""
        if entry_s and plan.left_out:
            self._entry_s = self._entry_s * ENTRY_MEMORY + entry_s
            self._entry_tokens = self._entry_tokens * ENTRY_MEMORY + plan.left_out
        if plan.kind == "model":
            most = CREDIT * saved
            load.owed = max(min(load.owed, -most), load.owed + entry_s + spent - saved)
        elif plan.kind == "plain" and load.owed > 0:
            load.owed = max(0.0, load.owed - PAID_SHARE * spent)


# --- measuring ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_costs(
    target: CausalDecoder,
    drafter: Drafter | None,
    new_sequence: Callable[[], Any],
    scratch: ScratchPasses | None,
    *,
    token_counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    budget_s: float = 2.0,
    deterministic: bool = False,
) -> CostModel:
    """Time a few forwards of target and draft (the warm-up).

    new_sequence: makes a sequence of the target's, for scratch use. scratch: the drafter's passes, closed here; None without a drafter.
    Counts take turns, TURNS times, and the best of each is kept (at least three are timed, and none after the budget is spent). Curves never fall.
    On a CPU, where a text waits meanwhile and nothing is compiled for a number of rows, they take fewer turns, and only the first count is run before.
    """
    first, device = drafter.resumes_at if drafter else 0, target.device
    sequence = new_sequence()

    def verify(count: int) -> None:
        tokens = torch.zeros(count, dtype=torch.int64, device=device)
        hidden = torch.zeros(count, target.config.hidden_size, dtype=target.dtype, device=device) if first else None
        sequence.reserve(count)
        target.forward(tokens, [sequence], [count], first_layer=first, hidden=hidden, deterministic=deterministic)

    last = None if scratch is None else scratch.last
    timed = [verify, *([] if scratch is None else [scratch.draft]), *([] if last is None else [last])]
    best: list[dict[int, float]] = [{} for _ in timed]
    on_cpu = device.type == "cpu"
    began, clock = time.perf_counter(), step_clock(device)
    try:
        for turn in range(TURNS_CPU if on_cpu else TURNS):
            # in turns: what slows the machine down for a while must not hit one count alone
            for count in token_counts if turn == 0 else list(best[0]):
                if len(best[0]) >= 3 and time.perf_counter() - began > budget_s:
                    break
                if turn == 0 and (count == token_counts[0] or not on_cpu):
                    for run in timed:
                        run(count)  # caches, lazily built tables, kernels compiled and graphs captured for the shape
                for run, found in zip(timed, best, strict=True):
                    if run is last:
                        verify(1)  # as in a step, the first layers' weights must come from memory, not from a cache
                    _synchronize(device)
                    start = clock()
                    run(count)
                    _synchronize(device)
                    found[count] = min(found.get(count, math.inf), clock() - start)
    finally:
        sequence.free()
        if scratch is not None:
            scratch.close()
    curves = [_rising(found) for found in best]
    if drafter is None or scratch is None:
        return CostModel(((1, 0.0),), curves[0])
    return CostModel(curves[1], curves[0], drafter.runs_last_draft, None if last is None else curves[2])


def _rising(seconds: dict[int, float]) -> Curve:
    """Points in the order of their counts, none below one before it."""
    return tuple(zip(seconds, itertools.accumulate(seconds.values(), max), strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
