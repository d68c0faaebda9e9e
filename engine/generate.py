"""`python -m engine.generate`: text from a target and its draft, streamed, with the figures of the run; sessions that come back."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

# before anything that imports our `kernels`: another package of that name would break those imports without saying why
from engine.hub.environment import kernels_package_clash, without_collection


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (docs/command.md lists them)."""
    _occupy_streams()
    before = None
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before = signal.signal(signal.SIGINT, _leave)
    try:
        if clash := kernels_package_clash():
            what, remedy = clash
            print(f"error: {what} ({remedy})", file=sys.stderr)
            return 2
        with without_collection():
            from engine.cli.command import run

        return run(argv)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _occupy_streams() -> None:
    """Give the standard descriptors that are closed to the null device: the next file opened, a session's say, would take their numbers, and whatever
    a library prints would be written into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """Ctrl-C while libraries and models load: nothing is lost, and an exception inside an import ends in whatever that library makes of it."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
