"""The commands' first moments, before any library is imported: standard descriptors, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def occupy_streams() -> None:
    """Give the standard descriptors that are closed to the null device: the next file opened, a session's say, would take their numbers, and whatever
    a library prints would be written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


@contextmanager
def interrupts_end() -> Iterator[None]:
    """Ctrl-C ends the process at once, with 130, until something else is done with it: nothing is lost while libraries and models load, and an
    exception inside an import ends in whatever that library makes of it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)
