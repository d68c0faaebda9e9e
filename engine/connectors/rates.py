"""What restoring and computing a prompt take in another engine, measured in its own steps, so that no restore is begun that costs more than computing.

A step's seconds are a + b n + c n (s + n / 2) for n tokens after s others: launches, products and attention. The factors are fitted to steps that
served one request alone; they are kept in the cache, so that a later process, and the scheduler's where it is another one, knows them.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256

import numpy as np

from engine.hub.cache import CacheFolder

KINDS = ("compute", "restore")
_MOST_BYTES = 1 << 16
_KEPT = 5  # steps of a size whose median counts
_SIZES = 24  # the same, of each kind
_LEAST = 2
_VERSION = 1
_REWRITE_S = 10.0  # between two writes once a size is well known: each waits for the disk, and a step for it


class StepRates:
    """Seconds of steps that compute, and of steps that restore, by their tokens.

    Args:
        parts: all that says on which machine and with which models they were measured.
    """

    def __init__(self, parts: Sequence[object]) -> None:
        self._cache = CacheFolder("rates")
        self._name = f"steps-{sha256(repr([_VERSION, *parts]).encode()).hexdigest()[:24]}.json"
        self._stamp: tuple[int, int] | None = None
        self._written_s = float("-inf")
        self._warm: set[str] = set()
        self._found: dict[str, dict[tuple[int, int], deque[tuple[int, int, float]]]] = {kind: {} for kind in KINDS}
        self._factors: dict[str, np.ndarray | None] = dict.fromkeys(KINDS)
        self.refresh()

    def refresh(self) -> None:
        """Read what another process has kept since; what cannot be read is as if it were not there."""
        path = self._cache.path(self._name)
        stamp = None
        with suppress(OSError):
            stat = None if path is None else path.stat()
            stamp = None if stat is None else (stat.st_mtime_ns, stat.st_size)
        if stamp is None or stamp == self._stamp:
            return
        self._stamp = stamp
        with suppress(ValueError, TypeError, AttributeError, RecursionError, KeyError):
            kept = json.loads(self._cache.read(self._name, _MOST_BYTES) or b"")
            found: dict[str, list[tuple[int, int, float]]] = {
                kind: [(int(n), int(s), float(took)) for n, s, took in kept[kind]] for kind in KINDS
            }
            if all(n > 0 and s >= 0 and 0 < took < 1e4 for rows in found.values() for n, s, took in rows):
                self._found = {kind: {} for kind in KINDS}
                for kind, rows in found.items():
                    self._put(kind, rows)

    def add(self, kind: str, tokens: int, start: int, took_s: float) -> None:
        """A step's seconds. The first one of a kind in a process pays for what is made at first use, and does not count."""
        if kind not in self._warm:
            self._warm.add(kind)
            return
        if tokens > 0 and start >= 0 and 0 < took_s < 1e4:
            self._put(kind, [(tokens, start, took_s)])
            now, known = time.monotonic(), self._found[kind].get(_size(tokens, start), ())
            if len(known) == _KEPT and now - self._written_s < _REWRITE_S:
                return
            self._written_s = now
            rows = {own: [row for group in groups.values() for row in group] for own, groups in self._found.items()}
            self._cache.write(self._name, (json.dumps(rows) + "\n").encode())

    def _put(self, kind: str, rows: Iterable[tuple[int, int, float]]) -> None:
        groups = self._found[kind]
        for row in rows:
            size = _size(row[0], row[1])
            if size in groups or len(groups) < _SIZES:
                groups.setdefault(size, deque(maxlen=_KEPT)).append(row)
        self._factors[kind] = self._fitted(kind)

    def _fitted(self, kind: str) -> np.ndarray | None:
        """Factors a, b, c, none below 0, by least squares of relative errors over the median of each size; None with too few steps."""
        groups = self._found[kind].values()
        if sum(map(len, groups)) < _LEAST:
            return None
        points = [sorted(group, key=lambda row: row[2] / row[0])[(len(group) - 1) // 2] for group in groups]
        took = np.array([row[2] for row in points])
        x = np.array([_terms(n, s) for n, s, _ in points]) / took[:, None]
        columns = list(range(3)) if len(points) > 3 else [0, 1] if len(points) > 1 else [1]
        while True:
            found = np.linalg.lstsq(x[:, columns], np.ones(len(took)), rcond=None)[0]
            if (found >= 0).all() or len(columns) == 1:
                break
            columns.pop(int(found.argmin()))
        factors = np.zeros(3)
        factors[columns] = found.clip(0)
        return factors

    def seconds(self, kind: str, tokens: int, start: int, most: int) -> float | None:
        """What tokens after `start` others take, at most so many a step; None where it is not known."""
        factors = self._factors[kind]
        if factors is None:
            return None
        parts = ((min(most, start + tokens - at), at) for at in range(start, start + tokens, most))
        return float(sum(factors @ _terms(*part) for part in parts))

    def restoring_pays(self, tokens: int, start: int, step_tokens: int) -> bool:
        """Whether restoring tokens is expected to take no longer than computing them in steps of `step_tokens`; True where that is not known."""
        computed = self.seconds("compute", tokens, start, step_tokens)
        restored = self.seconds("restore", tokens, start, max(tokens, 1))
        return computed is None or restored is None or restored <= computed


def _size(tokens: int, start: int) -> tuple[int, int]:
    return tokens.bit_length(), start.bit_length()


def _terms(tokens: int, start: int) -> np.ndarray:
    return np.array([1.0, tokens, tokens * (start + tokens / 2)])


_OPENED: dict[str, StepRates] = {}


def open_rates(parts: Sequence[object]) -> StepRates:
    """Those of this process with these parts, so that a scheduler and a worker in one process share them without a file."""
    found = StepRates(parts)
    return _OPENED.setdefault(found._name, found)


__all__ = ["StepRates", "open_rates"]
