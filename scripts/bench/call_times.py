"""Times of calls, one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def median_and_p95(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def timed(calls: int, call: Callable[[int], object]) -> tuple[float, float]:
    """Median and 95th percentile of so many calls, seconds."""
    seconds = []
    for number in range(calls):
        began = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - began)
    return median_and_p95(seconds)
