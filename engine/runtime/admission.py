"""How many requests begin together while more wait than there are places for.

A prompt's pass lets everybody else wait, and on a GPU one of a few tokens takes as long as one of a hundred. So a free place waits for others to become
free. Of B places held for t seconds each, g become free within g t / B, and stand empty for half of it; the g prompts run in one pass of a seconds, for
which B places wait. What a request costs, g t / 2 B + a B / g, is least at g = B sqrt(2 a / t): the economic order quantity (Harris, "How Many Parts to
Make at Once", 1913).
"""

from __future__ import annotations

import time
from collections.abc import Callable

FEW_TOKENS = 128  # of a pass whose time does not depend on how many there are
MOST_EMPTY = 0.25  # of all places
_KNOWN = 4  # passes and requests that are seen before anything waits
_MEMORY = 0.9  # of seconds seen before


class _Mean:
    """A decayed mean of seconds."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self.count += 1
        self.seconds += (seconds - self.seconds) * max(1 - _MEMORY, 1 / self.count)


class Admission:
    """Learns a and t of the module, and says when a free place waits: never longer than t, as those that run may take longer than others did.

    Args:
        clock: seconds from some moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._passes, self._answers, self._clock = _Mean(), _Mean(), clock
        self._since: float | None = None  # when a place began to wait

    def ran(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens of prompts for which others waited."""
        if tokens <= FEW_TOKENS:
            self._passes.observe(seconds)

    def answered(self, seconds: float) -> None:
        """A request has held its place for so long behind its prompt."""
        self._answers.observe(seconds)

    def together(self, places: int) -> int:
        """Requests that begin at once; 1 while too little is known."""
        if min(self._passes.count, self._answers.count) < _KNOWN or self._answers.seconds <= 0:
            return 1
        best = places * (2 * self._passes.seconds / self._answers.seconds) ** 0.5
        return max(1, min(round(best), int(places * MOST_EMPTY)))

    def waits(self, free: int, waiting: int, places: int) -> bool:
        """Whether the free ones of all places stay empty for now; never where they are enough for all that wait."""
        if not 0 < free < min(waiting, self.together(places)):
            self._since = None
            return False
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - self._since <= self._answers.seconds:
            return True
        self._since = None
        return False
