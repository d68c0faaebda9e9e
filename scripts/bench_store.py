"""Cost of a store's structure: opening it, lookups that miss and that hit, insertions and evictions, at so many runs.

    python scripts/bench_store.py --runs 1000,10000,100000 [--folder DIR] [--span-bytes 12000] [--json-out FILE]

The runs are those of texts of 4,096 tokens of which the first 1,024 are shared by eight, with random bytes as spans. Files are made without syncs, as
nothing but the time of what follows matters; what is timed runs as it does in service. Prints one JSON object:
`{"device", "versions", "command", "rows": [{"runs", "op", "ms", "p95_ms"}]}`, medians of several calls (of replays, means).

With `--pair NAME` an engine works over each store, and what a prompt waits for whose first 4,096 tokens are in the pool is timed: sharing their pages,
reserving pages for its rest, and asking the store what it knows of that rest and of what follows.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bench.call_times import median_and_p95, timed
from bench.document import command_line, print_document
from engine.engine import Engine
from engine.runtime import scheduler
from engine.runtime.sampling import SamplingParams
from engine.sessions.stages import Rates
from engine.store.host_tier import HostTier
from engine.store.runs import PAGE_TOKENS, RUN_TOKENS, page_keys, root_key
from engine.store.store import RunStore

IDENTITY = {"target": "benchmark", "namespace": "default"}
TEXT_RUNS, SHARED_RUNS, SHARERS = 16, 4, 8
MEMORY_RATES = Rates(1e-3, 1e-4, 1e-3, 1e-3)  # as good as any with which restoring pays


def text(number: int) -> list[int]:
    """Token ids of a text; eight share their beginning."""
    generator = random.Random(number // SHARERS)
    ids = [generator.randrange(49_152) for _ in range(SHARED_RUNS * RUN_TOKENS)]
    generator = random.Random(-1 - number)
    return ids + [generator.randrange(49_152) for _ in range((TEXT_RUNS - SHARED_RUNS) * RUN_TOKENS)]


def fill(folder: Path, num_runs: int, span_bytes: int) -> tuple[RunStore, int]:
    """A store of about so many runs, and how many texts it holds."""
    store, texts = RunStore(folder, 1 << 50), 0
    with mock.patch("os.fsync"):
        while store.totals[0] < num_runs:
            ids = text(texts)
            store.insert(IDENTITY, ids, [os.urandom(span_bytes)] * (len(ids) // PAGE_TOKENS), saved_token_s=1e-3)
            texts += 1
    return store, texts


def measure(folder: Path, num_runs: int, span_bytes: int, calls: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    store, texts = fill(folder, num_runs, span_bytes)
    runs, root, generator = store.totals[0], root_key(IDENTITY), random.Random(1)
    known = [text(generator.randrange(texts)) for _ in range(calls)]
    fresh = [text(texts + SHARERS * (1 + number)) for number in range(calls)]
    branch = [ids[: 10 * RUN_TOKENS + 100] + other[-RUN_TOKENS:] for ids, other in zip(known, fresh, strict=True)]
    rows: list[dict[str, Any]] = []

    def row(op: str, call: Callable[[int], Any], calls: int = calls) -> None:
        median, p95 = timed(calls, call)
        rows.append({"runs": runs, "op": op, "ms": round(1e3 * median, 4), "p95_ms": round(1e3 * p95, 4)})

    opened: list[RunStore] = []
    row("open", lambda n: opened.append(RunStore(folder, 1 << 50, create=False)), min(calls, 20))
    for other in opened:
        other.close()
    row("page keys of 4,096 tokens", lambda n: page_keys(root, known[n]))
    row("lookup, miss of 4,096 tokens", lambda n: _check(store.lookup(root, fresh[n]).end_page == 0))
    row("lookup, hit of 256 tokens", lambda n: _check(store.lookup(root, known[n][:RUN_TOKENS]).end_page == 4))
    row("lookup, hit of 1,024 tokens", lambda n: _check(store.lookup(root, known[n][: 4 * RUN_TOKENS]).end_page == 16))
    row("lookup, hit of 4,096 tokens", lambda n: _check(store.lookup(root, known[n]).end_page == 64))
    row("lookup, hit inside a run (2,624 tokens)", lambda n: _check(store.lookup(root, branch[n]).end_page == 41))
    row("touch 16 runs", lambda n: store.touch(store.keys_of(root, known[n])))
    spans: list[bytes | None] = [os.urandom(span_bytes)] * (TEXT_RUNS * RUN_TOKENS // PAGE_TOKENS)
    row("insert 256 tokens", lambda n: _check(store.insert(IDENTITY, fresh[n][:RUN_TOKENS], spans[:4]).runs == 1), min(calls, 30))
    row("insert 3,840 tokens more", lambda n: _check(store.insert(IDENTITY, fresh[n], spans[4:], 4).runs == 15), min(calls, 10))
    rows += measure_memory(store, texts, runs, span_bytes, 3 * calls)
    store.limit_bytes = store.totals[1]
    other = [text(texts + SHARERS * (calls + 2 + number)) for number in range(10)]
    row("insert 4,096 tokens, evicting as many", lambda n: _check(store.insert(IDENTITY, other[n], spans).evicted >= 16), 10)
    store.close()
    return rows


def measure_memory(store: RunStore, texts: int, runs: int, span_bytes: int, requests: int) -> list[dict[str, Any]]:
    """Rows of hits of 4,096 tokens in host memory and in files, and of replays of requests by Zipf's law, one with a quarter of the texts in memory."""
    root, generator = root_key(IDENTITY), random.Random(3)
    some = [text(number) for number in generator.sample(range(texts), min(texts, 64))]
    needed = sum(len(ids) // PAGE_TOKENS * span_bytes for ids in some)
    files = {id(ids): [store.folder / "runs" / root.hex() / f"{key.hex()}.run" for key in store.keys_of(root, ids)] for ids in some}
    rows: list[dict[str, Any]] = []

    def forget(ids: list[int]) -> None:
        """Have the system read a text's files from the disk the next time."""
        for path in files[id(ids)]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def row(op: str, seconds: list[float]) -> None:
        median, p95 = median_and_p95(seconds)
        rows.append({"runs": runs, "op": op, "ms": 1e3 * median, "p95_ms": 1e3 * p95})

    def hit(ids: list[int], tier: HostTier | None) -> float:
        began = time.perf_counter()
        pages = len(ids) // PAGE_TOKENS
        found = None if tier is None else tier.lookup(root, ids)
        if found is None or found.end_page < pages:
            found = store.lookup(root, ids)
        took = time.perf_counter() - began
        _check(found.end_page == pages)
        if tier is not None:
            tier.insert(root, ids, found)
        return took

    whole = HostTier(1 << 40, MEMORY_RATES)
    for ids in some:
        hit(ids, whole)
    row("hit of 4,096 tokens in host memory", [hit(ids, whole) for ids in some])
    row("hit of 4,096 tokens in files the system has cached", [hit(ids, None) for ids in some])
    cold = []
    for ids in some:
        forget(ids)
        cold.append(hit(ids, None))
    row("hit of 4,096 tokens in files on the disk", cold)
    chosen = generator.choices(some, [1 / (1 + number) for number in range(len(some))], k=requests)
    for name, tier in (("", None), (", a quarter of the bytes in host memory", HostTier(needed // 4, MEMORY_RATES))):
        taken = []
        for ids in chosen:
            forget(ids)
            taken.append(hit(ids, tier))
        rows.append({"runs": runs, "op": f"replay of {requests} hits on the disk{name}", "ms": 1e3 * sum(taken) / requests})
        if tier is not None:
            tier.trie.check_integrity()
    for each in rows:
        each |= {name: round(each[name], 4) for name in ("ms", "p95_ms") if name in each}
    return rows


def measure_hot(engine: Engine, runs: int, calls: int) -> list[dict[str, Any]]:
    """Rows of prompts whose first 4,096 tokens are in the pool of an engine with a store, of so many runs."""
    generator = random.Random(2)
    stem = [generator.randrange(3, 49_000) for _ in range(TEXT_RUNS * RUN_TOKENS)]
    params = SamplingParams(max_new_tokens=1, draft_length=0, ignore_eos=True)
    assert engine.prefix_cache is not None
    core, seconds = engine.core, {name: [0.0] * calls for name in ("all", "pages shared", "pages reserved", "store asked")}
    with (
        mock.patch.object(engine.prefix_cache, "finished", lambda _: None),  # nothing is coded meanwhile
        mock.patch.object(core.scheduler, "_share", _timed(core.scheduler._share, seconds["pages shared"])),
        mock.patch.object(engine.prefix_cache, "restore", _timed(engine.prefix_cache.restore, seconds["store asked"])),
        mock.patch("engine.runtime.scheduler.reserve", _timed(scheduler.reserve, seconds["pages reserved"])),
    ):
        engine.generate(stem, params)
        for _ in range(calls):
            for own in seconds.values():  # the first is the call's
                own.insert(0, 0.0)
                own.pop()
            ids = [*stem, *(generator.randrange(3, 49_000) for _ in range(70))]
            _check(engine.generate(ids, params)[0].reused_tokens == len(stem))
    for number in range(calls):
        seconds["all"][number] = sum(own[number] for name, own in seconds.items() if name != "all")
    rows = []
    for name, own in seconds.items():
        median, p95 = median_and_p95(own)
        op = "hot hit of 4,096 tokens" + (f": {name}" if name != "all" else ", beyond the forward pass")
        rows.append({"runs": runs, "op": op, "ms": round(1e3 * median, 4), "p95_ms": round(1e3 * p95, 4)})
    return rows


def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The call, whose time is added to the first of `seconds`."""

    def timed_call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            seconds[0] += time.perf_counter() - began

    return timed_call


def _check(right: bool) -> None:
    if not right:
        raise SystemExit("a lookup or an insertion did something else than what was to be timed")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time a store's opening, lookups and insertions.")
    parser.add_argument("--runs", default="1000,10000,100000", help="sizes, separated by commas")
    parser.add_argument("--folder", type=Path, help="where stores are made, and removed again; default: the system's temporary folder")
    parser.add_argument("--span-bytes", type=int, default=12_000, help="bytes of a page's code; smollm2 at balanced: about 12,000")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--pair", help="of an engine over each store, for hits in its pool")
    parser.add_argument("--hot-calls", type=int, default=30)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for size in (int(part) for part in args.runs.split(",")):
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            rows += measure(folder / "store", size, args.span_bytes, args.calls)
            if args.pair is not None:
                engine = Engine.from_pair(args.pair, store=folder / "store", store_bytes=1 << 50, quality="balanced", log=lambda _: None)
                rows += measure_hot(engine, rows[-1]["runs"], args.hot_calls)
                engine.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    found = {
        "device": f"cpu {platform.machine()}",
        "versions": {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version},
        "command": command_line("bench_store.py", argv),
        "rows": rows,
    }
    for line in rows:
        print(f"{line['runs']:>8,} runs  {line['op']:<66} {line['ms']:>10.3f} ms  (95%: {line.get('p95_ms', 0):.3f})", file=sys.stderr)
    print_document(found, args.json_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
