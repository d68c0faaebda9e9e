"""Threads that run a compiled step together with the one that asks for it. They wait without using a processor between steps.

Together they are slower than one wherever others use the processors: each meeting waits for whoever is not running. So what a step took with one thread
is kept beside what it takes with all, and while that is hardly less, one thread runs them; now and then all are tried again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch

from kernels.cpu_decode.machine_code import keeps_code

MOST_THREADS = 4  # a layer's products are cut into as many parts: of more, waiting for each other takes too large a share
LEAST_BYTES = 1 << 20  # of a layer's weights: below, one thread has multiplied them before another one is awake
_PAYS = 0.95  # of one thread's seconds, at most, that all of them may take
_JUDGED = 3  # steps
_FIRST_PAUSE, _LAST_PAUSE = 128, 4096  # steps of one thread before all are tried again: doubled each time
_ALONE_EVERY = 512  # steps of all before one of one thread tells what that takes now
_ALONE_GROWS = 1.25  # what one thread was seen to take is believed to have become more by so much at most


def num_threads(layer_bytes: int) -> int:
    """Threads for a step over layers of so many bytes of weights: PyTorch's number, where it is small and the layers are not."""
    threads = torch.get_num_threads()
    return threads if keeps_code() and threads <= MOST_THREADS and layer_bytes >= LEAST_BYTES else 1


class _Helper:
    """A thread that runs what it is given, in order.

    Every call has a ticket, and its answer comes back under it: an answer that an interrupt kept from being read is passed over by the next step.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._calls: SimpleQueue[tuple[object, Callable[[int], None]]] = SimpleQueue()
        self._answers: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._run, name=f"foretold-step-{number}", daemon=True).start()

    def _run(self) -> None:
        while True:
            ticket, call = self._calls.get()
            raised: BaseException | None = None
            try:
                call(self._number)
            except BaseException as error:
                raised = error
            self._answers.put((ticket, raised))
            del call, raised  # and what they hold

    def begin(self, ticket: object, call: Callable[[int], None]) -> None:
        """Have it run call(number)."""
        self._calls.put((ticket, call))

    def finish(self, ticket: object) -> BaseException | None:
        """Wait until it has run all that it was given, and say what that raised. An interrupt waits, too, and is what is said then: the thread writes
        into memory of the caller's."""
        interrupt, raised = None, None
        while True:
            try:
                while True:
                    which, error = self._answers.get()
                    raised = raised or error
                    if which is ticket:
                        return interrupt or raised
            except BaseException as error:  # it may have taken an answer with it: another one is asked for
                interrupt, ticket = error, object()
                self.begin(ticket, _nothing)


def _nothing(_: int) -> None:
    """A call that is only waited for."""


@dataclass
class _Times:
    """Of steps that take as long as each other. alone: seconds with one thread. shares: of these, what the last steps of all threads took. left: steps
    until all are tried. together: steps of all since one alone."""

    alone: float = 0.0
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=_JUDGED))
    left: int = 2  # the first one may be cold
    pause: int = _FIRST_PAUSE
    together: int = 0


class Judge:
    """Whether several threads pay, by what steps of a key took."""

    def __init__(self) -> None:
        self._times: dict[Hashable, _Times] = {}

    def together(self, key: Hashable) -> bool:
        """Whether the next step of this key is run by all threads."""
        times = self._times.setdefault(key, _Times())
        if times.alone and times.left <= 0 and times.together < _ALONE_EVERY:
            return True
        times.left, times.together = max(0, times.left - 1), 0
        return False

    def observe(self, key: Hashable, together: bool, seconds: float) -> None:
        """A step of this key was run."""
        times = self._times[key]
        if not together:
            times.alone = min(seconds, _ALONE_GROWS * times.alone) if times.alone else seconds
            return
        times.together += 1
        times.shares.append(seconds / times.alone)
        if len(times.shares) == _JUDGED and sorted(times.shares)[_JUDGED // 2] > _PAYS:
            times.left, times.pause = times.pause, min(_LAST_PAUSE, 2 * times.pause)
            times.shares.clear()
        elif times.together == _FIRST_PAUSE:
            times.pause = _FIRST_PAUSE


class Crew:
    """The helpers of a process, made when they are first needed; one step at a time has them."""

    def __init__(self) -> None:
        self.judge = Judge()
        self._helpers, self._process = list[_Helper](), os.getpid()
        # the thread whose step has the helpers; its own next step has them, too, if an interrupt left it so
        self._holder: dict[str, int] = {}
        self._alone = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Steps are run by one thread meanwhile: while they are timed, say."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    def run(self, threads: int, key: Hashable, call: Callable[[int, int, int], None]) -> None:
        """call(part, parts, counter) for every part, at the same time, one of them here, or for one part alone where that is faster, or another step
        has the helpers. key: steps of one key take as long as each other. counter: address of what `meeting` counts in. `call` holds the memory that it
        writes into."""
        if threads == 1 or self._alone or sys.is_finalizing():
            return call(0, 1, 0)
        if self._process != os.getpid():  # a copy of a process has none of its threads
            self._holder, self._helpers, self._process = {}, [], os.getpid()
        here = threading.get_ident()
        if self._holder.setdefault("step", here) != here:
            return call(0, 1, 0)
        try:
            key = (threads, key)
            together, began = self.judge.together(key) and self._has(threads - 1), time.perf_counter()
            if together:
                self._together(threads, call)
            else:
                call(0, 1, 0)
            self.judge.observe(key, together, time.perf_counter() - began)
        finally:
            self._holder.pop("step", None)

    def _has(self, count: int) -> bool:
        """Whether there are so many helpers, made now if there were not."""
        try:
            while len(self._helpers) < count:
                self._helpers.append(_Helper(len(self._helpers) + 1))
        except RuntimeError:  # no more threads may be started
            return False
        return True

    def _together(self, threads: int, call: Callable[[int, int, int], None]) -> None:
        meeting, ticket, helpers = np.zeros(2, np.int64), object(), self._helpers[: threads - 1]
        raised: BaseException | None = None

        def part_of(part: int) -> None:
            try:
                call(part, threads, meeting.ctypes.data)
            except BaseException:  # nobody may wait for who does not come
                meeting[1] = 1
                raise

        try:
            for helper in helpers:
                helper.begin(ticket, part_of)
            part_of(0)
        except BaseException as error:
            meeting[1] = 1
            raised, ticket = error, object()
            for helper in helpers:  # which of them were asked before is not known
                helper.begin(ticket, _nothing)
        for helper in helpers:
            raised = helper.finish(ticket) or raised
        if raised is not None:
            raise raised


CREW = Crew()
