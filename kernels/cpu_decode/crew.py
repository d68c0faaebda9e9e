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
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.cpu_decode.machine_code import keeps_code

MOST_THREADS = 4  # a layer's products are cut into as many parts: of more, waiting for each other takes too large a share
LEAST_BYTES = 1 << 20  # of a layer's weights: below, one thread has multiplied them before another one is awake
_PAYS = 0.95  # of one thread's seconds, at most, that all of them may take
_JUDGED = 3  # steps
_FIRST_PAUSE, _LAST_PAUSE = 128, 4096  # steps of one thread before all are tried again: doubled each time
_INTERRUPTED_S = 1.0  # that a helper may take to notice an interrupt: some microseconds, unless it was never asked
_ALONE_EVERY = 512  # steps of all before one of one thread tells what that takes now
_ALONE_GROWS = 1.25  # what one thread was seen to take is believed to have become more by so much at most


def num_threads(layer_bytes: int) -> int:
    """Threads for a step over layers of so many bytes of weights: PyTorch's number, where it is small and the layers are not."""
    threads = torch.get_num_threads()
    return threads if keeps_code() and threads <= MOST_THREADS and layer_bytes >= LEAST_BYTES else 1


class _Helper:
    """A thread that runs what it is given, once each time."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._call: Callable[[int], None] | None = None
        self.error: BaseException | None = None
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, name=f"foretold-step-{number}", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._asked.acquire()
            try:
                assert self._call is not None
                self._call(self._number)
            except BaseException as error:
                self.error = error
            finally:
                self._call = None
                self._done.release()

    def begin(self, call: Callable[[int], None]) -> None:
        """Have it run call(number); `error` is then what that raised, if anything."""
        self._call, self.error = call, None
        self._asked.release()

    def wait(self, limit_s: float | None = None) -> None:
        """Until it has: an interrupt waits, too, as what it runs writes into memory of the caller's."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._done.acquire(timeout=limit_s)
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


@dataclass
class _Times:
    """Of steps that take as long as each other. alone: seconds with one thread. shares: of these, what the last steps of all threads took. left: steps
    until all are tried. together: steps of all since one alone."""

    alone: float = 0.0
    shares: deque[float] = field(default_factory=lambda: deque(maxlen=_JUDGED))
    left: int = 1
    pause: int = _FIRST_PAUSE
    together: int = 0


class Judge:
    """Whether several threads pay, by what steps of a key took."""

    def __init__(self) -> None:
        self._times: dict[Hashable, _Times] = {}

    def together(self, key: Hashable) -> bool:
        """Whether the next step of this key is run by all threads."""
        times = self._times.setdefault(key, _Times())
        if times.left <= 0 and times.together < _ALONE_EVERY:
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
        self._lock, self._helpers, self._process = threading.Lock(), list[_Helper](), os.getpid()

    def run(self, threads: int, key: Hashable, call: Callable[[int, int, int], None]) -> None:
        """call(part, parts, counter) for every part, at the same time, one of them here, or for one part alone where that is faster, or another step
        has the helpers. key: steps of one key take as long as each other. counter: address of what `meeting` counts in."""
        if threads == 1 or sys.is_finalizing():
            return call(0, 1, 0)
        if self._process != os.getpid():  # a copy of a process has none of its threads
            self._lock, self._helpers, self._process = threading.Lock(), [], os.getpid()
        if not self._lock.acquire(blocking=False):
            return call(0, 1, 0)
        try:
            key = (threads, key)
            together, began = self.judge.together(key), time.perf_counter()
            if together:
                self._together(threads, call)
            else:
                call(0, 1, 0)
            self.judge.observe(key, together, time.perf_counter() - began)
        finally:
            self._lock.release()

    def _together(self, threads: int, call: Callable[[int, int, int], None]) -> None:
        while len(self._helpers) < threads - 1:
            self._helpers.append(_Helper(len(self._helpers) + 1))
        meeting = np.zeros(2, np.int64)
        begun = list[_Helper]()

        def part_of(part: int) -> None:
            try:
                call(part, threads, meeting.ctypes.data)
            except BaseException:  # nobody may wait for who does not come
                meeting[1] = 1
                raise

        try:
            for helper in self._helpers[: threads - 1]:
                begun.append(helper)
                helper.begin(part_of)
            part_of(0)
        except BaseException:  # an interrupt before all have begun: nobody may wait for who does not come
            meeting[1] = 1
            for helper in begun:
                helper.wait(_INTERRUPTED_S)
            self._helpers = []  # the last one may have been asked or not
            raise
        for helper in begun:
            helper.wait()
        for helper in begun:
            if helper.error is not None:
                raise helper.error


CREW = Crew()
