"""The engine's lock: threads take turns in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

from engine.model.device import own_torch_modes

_LOOK_S = 1.0  # that a thread waits to be woken; where the lock is free then, whoever was to have it has gone


class Turns:
    """A lock that is handed to whoever has waited longest, and that the thread which holds it may take again. While it is held, the caller's torch
    modes are set aside (`own_torch_modes`).

    The standard library's locks are taken by luck: a thread that gives one back and asks for it again, as one that runs a step after the other does,
    has it before any that waits is awake. Here such a lock says who has it, and a queue who may try: a signal's handler or a finaliser may ask
    for it between any two instructions of these methods, and an interrupt may end them there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[threading.Lock] = deque()  # of each thread that waits, what it is woken by
        self._own = threading.local()
        self._depth, self._modes = 0, own_torch_modes()

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds it."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        self._acquire()
        try:
            if self._depth == 0:
                self._modes = own_torch_modes()
                self._modes.__enter__()
            self._depth += 1
        except BaseException:
            self._release()
            raise

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        try:
            if self._depth == 0:
                self._modes.__exit__(None, None, None)
        finally:
            self._release()

    def _acquire(self) -> None:
        if self.mine:
            self._lock.acquire()
            return
        look, gone = self._look(), None
        try:
            while True:
                if look not in self._waiting:  # again: a handler that asked within this wait has taken its place
                    self._waiting.append(look)
                first = self._first()
                if (first is look or first is gone) and self._lock.acquire(blocking=False):
                    break
                gone = None if look.acquire(timeout=_LOOK_S) else first
            if first is not look:
                self._leave(first)
            self._leave(look)
            self._let_look(look)  # the wait that a handler has interrupted
        except BaseException:  # an interrupt
            if self.mine:
                self._lock.release()
            self._leave(look)
            self._wake()
            raise

    def _release(self) -> None:
        self._lock.release()
        self._wake()

    def _look(self) -> threading.Lock:
        """What the calling thread is woken by."""
        try:
            found: threading.Lock = self._own.look
        except AttributeError:
            found = self._own.look = threading.Lock()
            found.acquire()
        return found

    def _first(self) -> threading.Lock | None:
        try:
            return self._waiting[0]
        except IndexError:
            return None

    def _leave(self, look: threading.Lock | None) -> None:
        with suppress(ValueError):
            self._waiting.remove(look)  # type: ignore[arg-type]

    def _wake(self) -> None:
        """Have the first that waits try."""
        first = self._first()
        if first is not None:
            self._let_look(first)

    @staticmethod
    def _let_look(look: threading.Lock) -> None:
        with suppress(RuntimeError):  # it is awake
            look.release()
