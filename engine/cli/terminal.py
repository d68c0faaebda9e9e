"""The command's outside: standard streams that are closed, full, narrow or gone, signals, and text that a terminal may be shown."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from engine.errors import ForetoldError

_ENDING = ("SIGTERM", "SIGHUP")
_LOOKS_S = 0.1  # between two looks for a signal


class OutputLost(ForetoldError):
    """Standard output cannot be written. status: the exit status that says so."""

    status = 2


class ReaderGone(OutputLost):
    """Nobody reads standard output any more."""

    status = 141


class Ended(BaseException):
    """The process was asked to end. status: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(number)


def prepare_streams() -> None:
    """Standard streams that are closed become ones that hold nothing; characters that an encoding lacks are written as escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            if name == "stdout":
                setattr(sys, name, _Closed())
            else:
                setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Closed:
    """Standard output of a command that was started without one."""

    encoding = "utf-8"

    def write(self, _text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")

    def flush(self) -> None:
        return None

    def isatty(self) -> bool:
        return False


def harmless(text: str) -> str:
    """The text with control characters, but newlines and tabs, as escapes: what a model or a file name says does not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(f"\\x{ord(c):02x}" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)


def stream_text(text: str) -> None:
    """A piece of the answer on standard output, at once. Raises OutputLost, ReaderGone."""
    out: TextIO | Any = sys.stdout
    try:
        out.write(harmless(text) if out.isatty() else text)
        out.flush()
    except BrokenPipeError as error:
        _discard_output()
        raise ReaderGone("nobody reads standard output any more", "leave its reader running") from error
    except (OSError, ValueError) as error:
        _discard_output()
        why = getattr(error, "strerror", None) or error
        raise OutputLost(f"standard output cannot be written: {why}", "free space, or send it elsewhere") from error


def print_status(text: str) -> None:
    """Anything but the answer, on standard error; lost without a word where that cannot be written."""
    with suppress(OSError, ValueError):
        print(harmless(text), file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Send what is left of standard output nowhere, or the interpreter would try to write it once more at exit."""
    with suppress(OSError, ValueError, AttributeError):
        number = sys.stdout.fileno()
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise Ended; those that were ignored stay so (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}

    def end(number: int, _frame: FrameType | None) -> None:
        raise Ended(number)

    for name in ("SIGINT", *_ENDING):
        number = getattr(signal, name, None)
        if number is None or signal.getsignal(number) in (signal.SIG_IGN, None):
            continue
        before[number] = signal.signal(number, signal.default_int_handler if name == "SIGINT" else end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_seen() -> Iterator[None]:
    """A signal's handler runs within a tenth of a second, though the main thread waits for input. The system may hand a signal to another thread, or
    to this one just before it begins to wait: neither ends the wait, and Python's handlers run in the main thread alone. So a timer ends it again and
    again, after which Python goes on waiting."""
    alarm = getattr(signal, "SIGALRM", None)
    main = threading.current_thread() is threading.main_thread()
    if alarm is None or not main or signal.getsignal(alarm) not in (signal.SIG_DFL, _look):  # somebody else's
        yield
        return
    # for good: the last alarm may reach a thread later than its timer's end, and the system's own handler ends the process
    signal.signal(alarm, _look)
    signal.setitimer(signal.ITIMER_REAL, _LOOKS_S, _LOOKS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _look(_number: int, _frame: FrameType | None) -> None:
    """A handler; those of other signals that have come run as well."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and requests to end wait until the block is done, a write of seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before: dict[int, Any] = {}
    for name in ("SIGINT", *_ENDING):
        number = getattr(signal, name, None)
        if number is not None and callable(signal.getsignal(number)):
            before[number] = signal.signal(number, lambda n, frame: came.append((n, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in came[:1]:
        before[number](number, frame)
