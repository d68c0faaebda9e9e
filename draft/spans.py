"""When to draft where steps are captured and launched ahead (on a GPU): spans of steps of one kind, compared by what they really took.

A plain step is launched while the one before it runs, so one plain step between two that draft says nothing of plain decoding, and each change of
kind waits for the device. So kinds take turns in spans of several steps, whose first ones are not counted. Plain decoding is measured first. While it
goes on, a step asks nothing but whether the span goes on (`rests`): no request is planned for, no text is looked through, no draft follows.

A source of drafts is used while its tokens a second, by acceptance so far and by the seconds that such steps took, exceed those of plain decoding: for
the request whose drafts are accepted least more than for all together, and with what begins anew where requests come and go. What
a span of drafts loses against plain decoding is owed: plain steps pay it back with LOST_SHARE of their time before drafts are tried again, and each
trial that fails doubles the wait. So trials cost a bounded share of all time, whatever the costs are; what is known is kept by size of batch, across
requests. What spans have gained stands against later losses, up to CREDIT: texts differ, so requests that begin are tried anew while nothing is owed.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from draft.policy import HOPEFUL_RATE, MAX_AUTO_LENGTH, RECENT, SLOWEST, CostModel, DraftingPolicy, RequestDrafting, StepKind, StepPlan

SETTLE = 2  # steps after a change of kind, of requests, or after a prompt, that are not counted
KNOWN = 6  # counted plain steps before drafts are compared with them
TRIAL = 16  # steps of a source before it is judged, unless it loses too much
JUDGED_EVERY = 8  # steps of drafting
ENTER, LEAVE = 1.03, 1.0  # a source is taken up above this rate over plain decoding's, and left below this one
LONGER = 1.03  # another length of blocks is taken when it promises so much more
LOST_SHARE = 0.01  # of plain decoding's time that trials may cost, halved by every one that failed
MOST_LOST = 8.0  # plain steps that a span of drafts may lose before it is ended
LEAST_REST, LAST_REST = 64, 1 << 16  # plain steps between two trials of the drafter
MOST_DOUBLINGS = 5
CREDIT = 32.0  # plain steps that drafts have gained, at most, which later trials may lose before anything is owed
FIRST_CHECK, LAST_CHECK = 64, 2048  # steps of drafting before plain decoding is measured anew: doubled each time
FIRST_LOOK, LAST_LOOK = 16, 128  # steps between two looks at texts that repeat nothing
LOOKED_AT = 4  # requests of a batch whose texts stand for all, unless texts are drafted from
MISSES = 8  # steps without a promising match that end a span of drafts from texts
MOST_COUNTED = 16.0  # plain steps as which a step that begins counts at most in what is lost: captures come once
UNSEEN_GAP = 0.4  # of a plain step that one is believed to wait for the host whose drafts are looked up once the step before is read
MEMORY = 0.95  # of seconds measured before
_CHANGED = -1  # in place of a length: the first plain step after requests came or went
LEAST_SHARE = 0.75  # of a rate that is that of the request whose drafts are accepted least
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # of batches that are told apart


class _Clock:
    """Seconds of one kind of step: a decayed mean in which hiccups are clipped."""

    def __init__(self) -> None:
        self.count = 0
        self._seconds = self._weight = 0.0
        self._first: deque[float] = deque(maxlen=RECENT)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self._seconds / self._weight

    def observe(self, seconds: float) -> None:
        """Count a step."""
        self.count += 1
        if self.count <= RECENT:
            self._first.append(seconds)
            typical = statistics.median(self._first)
            clipped = [min(value, SLOWEST * typical) for value in self._first]
            self._seconds, self._weight = sum(clipped), float(len(clipped))
            return
        clipped_s = min(seconds, SLOWEST * self._seconds / self._weight)
        self._seconds, self._weight = self._seconds * MEMORY + clipped_s, self._weight * MEMORY + 1


@dataclass
class _Load:
    """What is known of one size of batch, and the span under way.

    clocks: by kind and length of blocks. kind, length: of the span's steps. resting: plain steps until the next plan. in_span, judged: steps of the
    span, and since the last judgement. lost, owed: seconds lost against plain decoding by the span, and by all together and not paid back (below 0:
    gained). try_at,
    look_at: steps (`steps` counts all) from which on the drafter, and texts, are tried. check_at: steps of a span after which plain decoding is
    measured again. returns: to drafting, after such a check. failures: of the drafter's spans, in a row. misses: steps in a row without a promising
    match. looked_up: lengths of blocks from texts that were run once.
    """

    clocks: dict[tuple[StepKind, int], _Clock] = field(default_factory=dict)
    kind: StepKind = "plain"
    length: int = 0
    steps: int = 0
    resting: int = 0
    in_span: int = 0
    judged: int = 0
    lost: float = 0.0
    owed: float = 0.0
    try_at: int = 0
    look_at: int = 0
    look_wait: int = FIRST_LOOK
    check_at: int = FIRST_CHECK
    returns: bool = False
    failures: int = 0
    misses: int = 0
    looked_up: set[int] = field(default_factory=set)

    def clock(self, kind: StepKind, length: int) -> _Clock:
        """Of such steps."""
        return self.clocks.setdefault((kind, length), _Clock())

    def begin(self, kind: StepKind, length: int) -> None:
        """Another span."""
        self.kind, self.length, self.in_span, self.judged, self.lost, self.misses = kind, length, 0, 0, 0.0, 0
        self.resting = 0

    def rest(self, steps: int) -> None:
        """Plain decoding for so many steps more, the one under way not counted."""
        if self.kind != "plain":
            self.begin("plain", 0)
        self.resting += max(1, steps)


class SpanPolicy(DraftingPolicy):
    """Plans spans of steps. See the module.

    Args:
        costs: of passes, from which steps that were never made are estimated; None is no speculation for requests that leave it to the policy.
        measured: whether steps are timed; else they take what `costs` say.
        ngrams: whether drafts may come from requests' own tokens, and from those of earlier ones.
        lengths: of blocks that are captured. most_rows: of a verification: every request's block is padded to the longest.
    """

    def __init__(
        self, costs: CostModel | None = None, *, measured: bool = False, ngrams: bool = False, lengths: Sequence[int], most_rows: int
    ) -> None:
        super().__init__(costs, measured=measured, draft_by_draft=False, ngrams=ngrams, lengths=lengths)
        self.most_rows = most_rows
        self._by_size: dict[int, _Load] = {}
        self._ended_at: float | None = None
        self._last: tuple[int, StepKind, StepKind, int] | None = None
        self._settled = 0  # steps since something changed
        self._news = False  # whether requests may have begun since the last plan

    # --- between steps --------------------------------------------------------------------------------------------------

    def rests(self, batch: int) -> int:
        """Steps of `batch` requests that are plain from now on whatever comes, this one included; 0: it must be planned."""
        if self.costs is None:
            return 2
        load = self._of(batch)
        return load.resting if load.kind == "plain" and not (self._news and self._may_begin(load, batch)) else 0

    def plain_steps_left(self, batch: int) -> int:
        """See `DraftingPolicy.plain_steps_left`."""
        if self.costs is None:
            return LAST_REST
        load = self._of(batch)
        plain_s = self._plain_seconds(load, batch)
        if load.kind == "model" or load.returns or plain_s is None:
            return 0
        return max(load.try_at - load.steps, math.ceil(load.owed / (LOST_SHARE * plain_s)) if load.owed > 0 else 0)

    def interrupted(self) -> None:
        """Something else than a decode step has run."""
        self._ended_at = None
        self.joined()

    def joined(self) -> None:
        """See `DraftingPolicy.joined`."""
        self._last = None
        self._news = True

    def took(self, began_at: float, ended_at: float) -> float:
        """Seconds of a step: from the end of the one before it, if nothing else has run, as the device may have been at work since then."""
        since = began_at if self._ended_at is None else self._ended_at
        self._ended_at = ended_at
        return ended_at - since

    def rested(self, batch: int, seconds: float, *, chosen: bool) -> None:
        """See `DraftingPolicy.rested`."""
        if self.costs is None:
            return
        if chosen:
            return self._count(batch, "plain", 0, batch, seconds)
        if self._settles((batch, "plain", "plain", 0)) and self.measured:
            self._of(batch).clock("plain", 0).observe(seconds)

    def observe(self, plan: StepPlan, batch: int, tokens: int, seconds: float, requests: Sequence[RequestDrafting] = ()) -> None:
        """See `DraftingPolicy.observe`."""
        if self.costs is None or not plan.seconds:
            self._last = None
            return
        length = max([*plan.lengths, *map(len, plan.given)])
        self._count(batch, plan.kind, length, tokens, seconds)

    def _count(self, batch: int, kind: StepKind, length: int, tokens: int, seconds: float) -> None:
        load, last = self._of(batch), self._last
        settled, changed = self._settles((batch, load.kind, kind, length)), last is None or last[0] != batch
        load.steps += 1
        load.in_span += 1
        if not self.measured:
            assert self.costs is not None
            rows = batch * length if kind == "ngram" else 0
            seconds = self.costs.step_seconds(length if kind == "model" else 0, batch, given=rows)
        if load.kind == kind == "plain":
            load.resting = max(0, load.resting - 1)
            if settled:
                load.clock("plain", 0).observe(seconds)
            elif changed and load.in_span > 1:
                load.clock("plain", _CHANGED).observe(seconds)
            load.owed = max(min(0.0, load.owed), load.owed - LOST_SHARE * seconds)
            return
        plain_s = self._plain_seconds(load, batch)
        if plain_s is None:
            return
        load.judged += 1
        if kind != "plain" and not (settled if kind == "model" else length in load.looked_up):
            # what it takes to begin is owed, but says nothing of going on; where requests came or went plain decoding has to begin anew, too
            lost = min(seconds, MOST_COUNTED * plain_s) - tokens / batch * plain_s
            load.owed += max(0.0, lost)
            load.looked_up |= {length} if kind == "ngram" else set()
            if changed and load.in_span > SETTLE + 1:
                clock = load.clock("plain", _CHANGED)
                load.lost += lost - max(0.0, clock.seconds - plain_s if clock.count else 0.0)
        elif kind != "plain" or load.kind == "ngram":
            clock = load.clock(kind, length)
            if kind != "plain":
                clock.observe(seconds)
            usual_s = clock.seconds if clock.count else plain_s  # without a match, where no step is timed
            lost = min(seconds, SLOWEST * usual_s) - tokens / batch * plain_s
            load.owed = max(-CREDIT * plain_s, load.owed + lost)
            load.lost = max(load.lost + lost, -MOST_LOST * plain_s)  # gains of long ago do not make up for losses of now
        if load.kind == "ngram":
            load.misses = 0 if kind == "ngram" else load.misses + 1
        if load.lost > MOST_LOST * plain_s or load.misses >= MISSES:
            load.judged = JUDGED_EVERY

    def _settles(self, what: tuple[int, StepKind, StepKind, int]) -> bool:
        """Whether a step like the last ones tells what such steps take."""
        self._settled = self._settled + 1 if what == self._last else 1
        self._last = what
        return self._settled > SETTLE

    def _of(self, batch: int) -> _Load:
        size = next((size for size in SIZES if size >= batch), batch)
        load = self._by_size.get(size)
        if load is None:
            load = self._by_size[size] = _Load()
        return load

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
        """The next step; asked before the one under way is read, too, and as often as one likes. See `DraftingPolicy.plan`."""
        batch, drafter = len(requests), drafter_room is not None
        news, self._news = self._news, False
        plan, model_room, auto = self._fixed(requests, tokens, room, drafter_room, ngrams)
        if not auto or self.costs is None:
            return plan
        plan.seconds, plan.tokens = self.costs.step_seconds(0, batch), float(batch)
        load = self._of(batch)
        able = [b for b in auto if model_room[b] > 0]

        def lengths(kind: StepKind) -> list[int]:
            if kind == "model" and not (drafter and able):
                return []
            return [k for k in (self.lengths if ready is None else ready(kind)) if batch * (1 + k) <= self.most_rows]

        looks = ngrams and self.ngrams
        fresh = news and all(requests[b].acceptance.untried for b in auto)
        begins = fresh and self._may_begin(load, batch)
        if fresh and load.kind == "model":
            load.lost = max(0.0, load.lost)  # other texts' gains say nothing of these
        if begins or (load.resting <= 1 if load.kind == "plain" else load.judged >= JUDGED_EVERY):
            load.judged = 0
            self._judge(load, requests, tokens, room, auto, lengths, looks, begins)
        if load.kind == "model":
            length = load.length if load.length in lengths("model") else 0
            for b in able:
                plan.lengths[b] = min(length, model_room[b])
        elif load.kind == "ngram" and looks and not any(plan.lengths):
            found = {b: requests[b].look_up(tokens[b], room[b]) for b in auto}
            gains = [chances for _, chances in found.values()]
            relative, length = self._from_texts(load, batch, gains, 1.0, lengths("ngram"))
            for b, (drafts, _) in found.items() if relative > LEAVE else ():
                plan.given[b] = drafts[:length]
        plan.kind = "model" if any(plan.lengths[b] for b in auto) else "ngram" if any(plan.given[b] for b in auto) else "plain"
        if len(auto) < batch and any(requests[b].wanted not in ("auto", 0) for b in range(batch)):
            plan.seconds = 0.0  # drafts that nobody weighed: such steps tell nothing of the others
        return plan

    def _judge(
        self,
        load: _Load,
        requests: Sequence[RequestDrafting],
        tokens: Sequence[Sequence[int]],
        room: Sequence[int],
        auto: Sequence[int],
        lengths: Callable[[StepKind], list[int]],
        looks: bool,
        begins: bool,
    ) -> None:
        """Choose the next span, or go on with the one under way. begins: whether all requests have just begun, and nothing is owed."""
        batch = len(requests)
        plain_s = self._plain_seconds(load, batch)
        if plain_s is None:
            return load.rest(SETTLE + KNOWN + 1)
        lost_too_much = load.lost > MOST_LOST * plain_s
        if load.kind == "ngram":
            if not lost_too_much and load.misses < MISSES and (load.in_span < TRIAL or load.lost <= 0):
                return None
            lost = load.lost > 0
            load.look_wait = min(LAST_LOOK, 2 * load.look_wait) if lost else FIRST_LOOK
            load.begin("plain", 0)
            pause = load.owed / (LOST_SHARE * plain_s) if lost else 0.0
            load.look_at = load.steps + max(load.look_wait, math.ceil(pause))
            return self._rest(load)
        if looks and load.steps >= load.look_at and not lost_too_much and self._looks_well(load, requests, tokens, room, auto, lengths):
            load.returns = load.returns or load.kind == "model"
            return load.begin("ngram", 0)
        chains = [requests[b].acceptance.chain() for b in auto]
        relative, length = self._from_drafter(load, batch, chains, lengths("model"))
        if load.kind == "model":
            return self._go_on(load, relative, length, lost_too_much, plain_s)
        if not length:
            load.try_at = max(load.try_at, load.steps + LEAST_REST)
        elif load.returns and relative > LEAVE:
            return load.begin("model", length)
        elif begins or (load.steps >= load.try_at and load.owed <= 0):
            hopeful = [[HOPEFUL_RATE ** (i + 1) for i in range(MAX_AUTO_LENGTH)]] * len(auto)
            if relative > ENTER:
                return load.begin("model", length)
            tried = [k for k in lengths("model") if ("model", k) in load.clocks]  # a trial on mere hope captures nothing new
            hope, length = self._from_drafter(load, batch, hopeful, tried or lengths("model"))
            if hope > ENTER:
                return load.begin("model", length)
            load.try_at = load.steps + LAST_REST  # it would not pay if nearly all drafts were accepted
        load.returns = False
        return self._rest(load) if load.resting <= 1 else None

    def _may_begin(self, load: _Load, batch: int) -> bool:
        """Whether requests that have just begun could be drafted for at once: plain steps are known, and nothing is owed."""
        return load.kind == "plain" and load.owed <= 0 and self._plain_seconds(load, batch) is not None

    def _go_on(self, load: _Load, relative: float, length: int, lost_too_much: bool, plain_s: float) -> None:
        """Judge a span of the drafter's steps."""
        # acceptance of the last steps is a noisy estimate: a span that has gained goes on until it has lost some of it
        pays = relative > LEAVE or load.lost < -MOST_LOST * plain_s / 2
        if length and not lost_too_much and (load.in_span < TRIAL or pays):
            load.failures = 0 if load.in_span >= 2 * TRIAL and load.lost <= 0 else load.failures
            if load.in_span >= load.check_at:
                load.check_at, load.returns = min(LAST_CHECK, 2 * load.check_at), True
                load.clocks.pop(("plain", 0), None)  # what it took when the machine was busier makes drafts look cheap
                return load.rest(SETTLE + KNOWN + 1)
            load.length = length if load.in_span >= TRIAL else load.length
            return None
        failed = load.lost > 0 or load.in_span < 2 * TRIAL
        load.begin("plain", 0)
        wait = LEAST_REST
        if failed:
            wait = max(wait, math.ceil(load.owed / (LOST_SHARE * plain_s))) << min(load.failures, MOST_DOUBLINGS)
            load.failures += 1
        load.try_at, load.returns, load.check_at = load.steps + min(LAST_REST, wait), False, FIRST_CHECK
        return self._rest(load)

    def _rest(self, load: _Load) -> None:
        """Plain decoding until something is to be tried."""
        ends = [load.try_at, *([load.look_at] if self.ngrams else [])]
        load.rest(max(FIRST_LOOK, min(ends) - load.steps))

    def _looks_well(
        self,
        load: _Load,
        requests: Sequence[RequestDrafting],
        tokens: Sequence[Sequence[int]],
        room: Sequence[int],
        auto: Sequence[int],
        lengths: Callable[[StepKind], list[int]],
    ) -> bool:
        """Whether texts promise more than what is done now; a few stand for all."""
        looked_at = auto[:LOOKED_AT]
        gains = [requests[b].look_up(tokens[b], room[b])[1] for b in looked_at]
        relative, _ = self._from_texts(load, len(requests), gains, len(auto) / len(looked_at), lengths("ngram"))
        least = ENTER
        if load.kind == "model":
            chains = [requests[b].acceptance.chain() for b in auto]
            least *= max(1.0, self._from_drafter(load, len(requests), chains, [load.length])[0])
        load.look_wait = FIRST_LOOK if any(gains) else min(LAST_LOOK, 2 * load.look_wait)
        load.look_at = load.steps + load.look_wait
        return relative > least

    # --- rates over plain decoding's ------------------------------------------------------------------------------------

    def _plain_seconds(self, load: _Load, batch: int) -> float | None:
        """Of a plain step; None before it is known."""
        assert self.costs is not None
        if not self.measured:
            return self.costs.step_seconds(0, batch)
        clock = load.clock("plain", 0)
        return clock.seconds if clock.count >= KNOWN else None

    def _seconds(self, load: _Load, kind: StepKind, length: int, batch: int, plain_s: float) -> float:
        """Of a step with blocks of this length, as measured; before that, as lengths that were measured and the costs of passes let expect."""
        assert self.costs is not None
        clock = load.clocks.get((kind, length))
        if self.measured and clock is not None and clock.count >= SETTLE:
            return clock.seconds

        def more(k: int) -> float:
            assert self.costs is not None
            drafted = self.costs.step_seconds(k, batch) if kind == "model" else self.costs.step_seconds(0, batch, given=batch * k)
            return max(1e-9, drafted - self.costs.step_seconds(0, batch))

        if not self.measured:
            return plain_s + more(length)
        gap = UNSEEN_GAP * plain_s if kind == "ngram" else 0.0
        known = [(k, c.seconds) for (own, k), c in load.clocks.items() if own == kind and k and c.count >= SETTLE]
        if not known:
            return plain_s + gap + more(length)
        nearest, seconds = min(known, key=lambda pair: abs(pair[0] - length))
        return max(plain_s, plain_s + (seconds - plain_s) * (gap + more(length)) / (gap + more(nearest)))

    def _from_drafter(self, load: _Load, batch: int, chains: Sequence[Sequence[float]], lengths: Sequence[int]) -> tuple[float, int]:
        """(rate over plain decoding's, length) of the best blocks; (0, 0) where there are none. The length in use is kept unless another is better.

        The rate is mostly that of the request whose drafts are accepted least, as a step takes all of them equally long. In part it is that of all: of
        many acceptances that few steps have told the least one is too low.
        """
        plain_s = self._plain_seconds(load, batch)
        assert plain_s is not None
        best = (0.0, 0)
        for length in lengths:
            each = [sum(chain[:length]) for chain in chains]
            gained = (1 - LEAST_SHARE) * sum(each) + LEAST_SHARE * len(each) * min(each)
            relative = (1 + gained / batch) * plain_s / self._seconds(load, "model", length, batch, plain_s)
            weighed = relative if length == load.length else relative / LONGER
            if weighed > best[0]:
                best = (weighed, length)
        return (best[0] if best[1] == load.length else best[0] * LONGER), best[1]

    def _from_texts(
        self, load: _Load, batch: int, gains: Sequence[Sequence[float]], each: float, lengths: Sequence[int]
    ) -> tuple[float, int]:
        """The same of drafts from texts; each: requests that one of `gains` stands for."""
        plain_s = self._plain_seconds(load, batch)
        if plain_s is None or not any(gains):
            return 0.0, 0
        best = (0.0, 0)
        for length in lengths:
            gained = each * sum(sum(chances[:length]) for chances in gains)
            best = max(best, ((1 + gained / batch) * plain_s / self._seconds(load, "ngram", length, batch, plain_s), length))
        return best
