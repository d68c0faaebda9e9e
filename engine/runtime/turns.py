"""The engine's lock: threads take turns in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque

from engine.model.device import own_torch_modes

_LOOK_S = 1.0  # after which a waiting thread looks for itself: an interrupt may have kept its holder from waking it


class Turns:
    """A lock that is handed to whoever has waited longest, and that the thread which holds it may take again. While it is held, the caller's torch
    modes are set aside (`own_torch_modes`).

    The standard library's locks are taken by luck: a thread that gives one back and asks for it again, as one that runs a step after the other does,
    has it before any that waits is awake.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()  # of holder and waiting
        self._waiting: deque[threading.Lock] = deque()  # a lock each that is held until its thread is to look
        self._holder: int | None = None
        self._depth, self._modes = 0, own_torch_modes()

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        if not self.mine:
            self._take()
        try:
            if self._depth == 0:
                self._modes = own_torch_modes()
                self._modes.__enter__()
            self._depth += 1
        except BaseException:
            if self._depth == 0:
                self._give()
            raise

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            try:
                self._modes.__exit__(None, None, None)
            finally:
                self._give()

    def _take(self) -> None:
        look = threading.Lock()
        look.acquire()
        try:
            with self._guard:
                self._waiting.append(look)
            while not self._taken(look):
                look.acquire(timeout=_LOOK_S)
        except BaseException:  # an interrupt
            if self.mine:
                self._give()
            raise
        finally:
            with self._guard:
                if look in self._waiting:
                    self._waiting.remove(look)
                    self._wake()

    def _taken(self, look: threading.Lock) -> bool:
        """Whether it is free and this thread's turn; it is taken then."""
        with self._guard:
            if self._holder is not None or self._waiting[0] is not look:
                return False
            self._holder = threading.get_ident()
            self._waiting.popleft()
            return True

    def _give(self) -> None:
        with self._guard:
            self._holder = None
            self._wake()

    def _wake(self) -> None:
        """Let the first that waits look, where there is something to be had."""
        if self._holder is None and self._waiting and self._waiting[0].locked():
            self._waiting[0].release()
