"""Progress of long work, shown on standard error."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Called often during long work; `done` of `total`, both in the unit of the label (bytes for downloads and conversions)."""

    def __call__(self, label: str, done: int, total: int) -> None: ...


def silent(label: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


class StderrProgress:
    """One line per label: redrawn in place on a terminal, a new line every 25% elsewhere, so that logs stay short.

    Args:
        stream: where to write; standard error of the moment of the call when None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._label: str | None = None
        self._started_s = 0.0
        self._shown_s = 0.0
        self._shown_quarter = -1

    def __call__(self, label: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if label != self._label:
            self._label, self._started_s, self._shown_s, self._shown_quarter = label, now_s, 0.0, -1
        stream = self._stream or sys.stderr
        finished = done >= total
        line = f"{label}: {done / 1e6:.0f} of {total / 1e6:.0f} MB"
        if finished:
            line += f", {now_s - self._started_s:.1f} s"
            self._label = None
        if stream.isatty():
            if finished or now_s - self._shown_s >= 0.1:
                self._shown_s = now_s
                stream.write(f"\r\x1b[2K{line}" + ("\n" if finished else ""))
                stream.flush()
            return
        quarter = 4 * done // total if total else 4
        if quarter > self._shown_quarter:
            self._shown_quarter = quarter
            stream.write(line + "\n")
            stream.flush()
