"""Timing for bench_kernels: device events around replays of a captured graph, ceilings measured in the same run, gates before speed-ups."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], object]


@dataclass
class Clock:
    """What a run measures against.

    Args:
        device: where everything runs.
        copy_gb_per_s: bytes read plus written by a large device-to-device copy.
        matrix_tflops: a large bfloat16 product on random data.
        seconds: time one operation's candidates may take together.
    """

    device: torch.device
    copy_gb_per_s: float = 0.0
    matrix_tflops: float = 0.0
    seconds: float = 20.0
    captured: bool = field(default=True, init=False)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure_ceilings(self, tiny: bool) -> None:
        size = 1 << (16 if tiny else 30)
        source = torch.randint(0, 127, (size,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        self.copy_gb_per_s = 2 * size / self.ms([lambda: target.copy_(source)]) / 1e6
        n = 128 if tiny else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self.matrix_tflops = 2 * n**3 / self.ms([lambda: a @ b]) / 1e9

    def _events_ms(self, run: Call) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def ms(self, calls: Sequence[Call], repeats: int = 15) -> float:
        """Median milliseconds of one call; `calls` do the same on different data, so that no run finds its inputs in the cache."""
        for call in calls:
            call()
        self.sync()
        once = max(self._events_ms(lambda: [call() for call in calls]) / len(calls), 1e-3)
        if self.device.type != "cuda":
            return once
        rounds = max(1, min(50, int(4.0 / (once * len(calls)))))
        self.captured = True

        def loop() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        run: Call = loop
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loop()
            run = graph.replay
        except RuntimeError:
            # Some baselines read back to the host; they are timed with their launch gaps, and the row says so.
            self.captured = False
            torch.cuda.synchronize(self.device)
        run()
        self.sync()
        repeats = max(3, min(repeats, int(1500 / max(once * len(calls) * rounds, 1e-3))))
        return statistics.median(self._events_ms(run) for _ in range(repeats)) / (rounds * len(calls))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative root-mean-square error; infinite where something is not finite."""
    got, want = got.double(), want.double()
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


@dataclass
class Case:
    """One row of the table.

    Args:
        op, shape, dtype: what it is called.
        bounds: (bytes, operations).
        check: relative error of the default configuration, or 0 and infinity for exact meanings; at most bound passes.
        calls: for a candidate (None: the launcher's own choice) the same operation on different data.
        candidates: name to configuration.
        check_candidate: the error of a configuration, where there are candidates; the fastest one is checked as well.
        baselines: name to calls.
        units: further rates to print, name to how many of it one call does.
        matrix: the operations are the matrix units', so their rate is a ceiling too; else memory alone is.
    """

    op: str
    shape: str
    dtype: str
    bounds: tuple[int, int]
    check: Callable[[], float]
    bound: float
    calls: Callable[[Any], Sequence[Call]]
    candidates: dict[str, Any] = field(default_factory=dict)
    check_candidate: Callable[[Any], float] | None = None
    baselines: dict[str, Sequence[Call]] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    matrix: bool = False


def compile_all(case: Case) -> None:
    """Run every configuration once, so that a later process finds it compiled; what fails is left to that one to report."""
    for config in (None, *case.candidates.values()):
        try:
            case.calls(config)[0]()
        except Exception as failure:
            if "CUDA error" in str(failure):
                raise


def _try_candidates(case: Case, clock: Clock, tried: dict[str, Any]) -> str:
    """Fill in milliseconds (or what went wrong) by name; the name of the fastest that is right."""
    started = time.perf_counter()
    for name, candidate in case.candidates.items():
        if time.perf_counter() - started > clock.seconds:
            tried[name] = "not tried: out of time"
            continue
        try:
            tried[name] = clock.ms(case.calls(candidate))
        except Exception as failure:
            if "CUDA error" in str(failure):
                raise
            tried[name] = f"failed: {str(failure).splitlines()[0][:120]}"
    times = {name: t for name, t in tried.items() if isinstance(t, float)}
    for name in sorted(times, key=lambda name: times[name]):
        if name == "default" or case.check_candidate is None:
            return name
        error = case.check_candidate(case.candidates[name])
        if error <= case.bound:
            return name
        tried[name] = f"wrong: error {error:.2e}"
    return "default"


def measure(case: Case, clock: Clock) -> dict[str, Any]:
    """Check, then time candidates and baselines. A failed check leaves the times of neither."""
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "ms": None,
        "gb_per_s": None,
        "tflops": None,
        "ceiling_fraction": None,
        "baseline": None,
        "baseline_ms": None,
        "config": None,
    }
    error = case.check()
    row.update(error=error, bound=case.bound, correct=error <= case.bound)
    if not row["correct"]:
        return row
    row["default_ms"] = clock.ms(case.calls(None))
    row["captured"] = clock.captured
    tried: dict[str, Any] = {"default": row["default_ms"]}
    best = _try_candidates(case, clock, tried)
    moved, operations = case.bounds
    ms = tried[best]
    row.update(ms=ms, config=best, tried=tried, gb_per_s=moved / ms / 1e6, tflops=operations / ms / 1e9)
    memory_ms = moved / clock.copy_gb_per_s / 1e6
    floor_ms = max(memory_ms, operations / clock.matrix_tflops / 1e9 if case.matrix else 0.0)
    memory_bound = floor_ms == memory_ms
    row.update(ceiling_fraction=floor_ms / ms, floor_ms=floor_ms, bound_by="memory" if memory_bound else "matrix")
    row["rates"] = {name: count / ms * 1e3 for name, count in case.units.items()}
    slower: dict[str, Any] = {}
    for name, calls in case.baselines.items():
        try:
            slower[name] = clock.ms(calls)
        except Exception as failure:
            if "CUDA error" in str(failure):
                raise
            slower[name] = f"failed: {str(failure).splitlines()[0][:120]}"
    row["baselines"] = slower
    good = {name: t for name, t in slower.items() if isinstance(t, float)}
    if good:
        row["baseline"] = min(good, key=lambda name: good[name])
        row["baseline_ms"] = good[row["baseline"]]
    return row


def line(row: dict[str, Any]) -> str:
    """One line of the printed table."""
    head = f"{row['op']:<22}{row['shape']:<44}"
    if "failure" in row:
        return f"{head} FAILED {row['failure']}"
    if not row["correct"]:
        return f"{head} WRONG: error {row['error']:.2e} above {row['bound']:.0e}; no times"
    text = f"{head} {row['ms']:9.4f} ms {row['gb_per_s']:7.0f} GB/s {row['tflops']:7.1f} TF {row['ceiling_fraction']:6.1%} of {row['bound_by']}"
    for name, rate in row["rates"].items():
        text += f" {rate:.3g} {name}"
    if row["baseline"]:
        text += f" | {row['baseline_ms'] / row['ms']:.2f}x {row['baseline']} ({row['baseline_ms']:.4f})"
    return (
        text + f" [{row['config']}; default {row['default_ms']:.4f}{'' if row['captured'] else '; not captured'}; error {row['error']:.1e}]"
    )
