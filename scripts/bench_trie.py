"""Replay request traces through the trie under several eviction policies: hit rate at a capacity in bytes, and what the hits are worth.

    python scripts/bench_trie.py --trace conversation_trace.jsonl.gz --capacity-bytes 16G --ratio 121 --json-out rows.json --plot rows.png

`--capacity-bytes` and `--ratio` take several values, separated by commas: each pair is replayed. The row `infinite` is what an unbounded
cache would hit; `lru-sessions` evicts whole sequences, as a cache keyed by session does.

    python scripts/bench_trie.py --operations 1000,10000,100000,1000000 --json-out trie-operations-cpu.json

times the trie's operations at so many nodes instead, and

    python scripts/bench_trie.py --draw 1500 --pair smollm2 --trace drawn.jsonl.gz

draws a trace of requests from a pair's target, with the probability of every block; `value-counts` is `value` without them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.document import command_line
from bench.drawn_sessions import draw
from bench.traces import Trace, read_trace
from bench.trie_operations import measure
from bench.trie_replay import MEASURED, replay, replay_sessions, times_at
from engine.errors import ForetoldError, InvalidOption
from engine.kv.eviction import POLICIES

UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
OTHERS = ("infinite", "lru-sessions", "value-counts")


def byte_count(text: str) -> int:
    """`17179869184`, `16G`, `0.5t`: bytes, in powers of 1,024."""
    unit = UNITS.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = -1.0
    if not 1 <= value < 2**60:
        raise InvalidOption(f"{text!r} is no capacity in bytes", "give bytes, or a number with K, M, G or T")
    return int(value)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", metavar="NODES", help="time the trie's operations at these sizes instead, separated by commas")
    parser.add_argument(
        "--draw", type=int, metavar="N", help="draw so many requests from --pair's target into the file --trace, instead of a replay"
    )
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--calls", type=int, default=200, help="of each operation (default 200)")
    parser.add_argument("--trace", help="a .jsonl or .jsonl.gz file: requests with hash_ids, or sessions with runs of blocks")
    parser.add_argument("--capacity-bytes", help="bytes, K M G T allowed, several separated by commas")
    parser.add_argument("--bytes-per-token", type=int, default=28672, help="of the uncompressed KV (default 28672; an 8B model: 131072)")
    parser.add_argument("--ratio", default="1", help="how many times smaller stored KV is, several separated by commas (default 1)")
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"of {', '.join((*POLICIES, *OTHERS))}; `infinite` is always added")
    parser.add_argument("--sessions", type=int, help="only the first N sessions or, of a trace of single requests, the first N requests")
    parser.add_argument("--hours", type=float, default=8.0, help="sessions arrive uniformly in this time (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrival times")
    parser.add_argument("--half-life-s", type=float, default=1800.0, help="in which a request's count halves (default 1800)")
    parser.add_argument(
        "--times", help="JSON file of measured restore times, or one that bench_resume.py wrote (default: one H100, qwen2.5-coder)"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object on the last line")
    parser.add_argument("--json-out", help="write the JSON object to this file")
    parser.add_argument("--plot", help="draw hit rate over capacity into this file")
    options = parser.parse_args(argv)
    if options.operations is None and (options.trace is None or (options.capacity_bytes is None and options.draw is None)):
        parser.error("--trace and --capacity-bytes are needed, or --operations, or --draw and --trace")
    return options


def checked(options: argparse.Namespace) -> tuple[list[int], list[float], list[str], Mapping[str, Any]]:
    """Capacities, ratios, policies and restore times, or InvalidOption."""
    capacities = [byte_count(text) for text in options.capacity_bytes.split(",")]
    try:
        ratios = [float(text) for text in options.ratio.split(",")]
    except ValueError:
        ratios = [0.0]
    if not all(1 <= ratio < 1e6 for ratio in ratios):
        raise InvalidOption(f"--ratio {options.ratio} is not usable", "give numbers of at least 1, separated by commas")
    policies = [name for name in options.policies.split(",") if name != "infinite"]
    unknown = [name for name in policies if name not in (*POLICIES, *OTHERS)]
    if unknown:
        raise InvalidOption(f"there is no eviction policy {unknown[0]!r}", f"use {', '.join((*POLICIES, *OTHERS))}")
    least = {"--bytes-per-token": options.bytes_per_token, "--hours": options.hours, "--half-life-s": options.half_life_s}
    if options.sessions is not None:
        least["--sessions"] = options.sessions
    for name, value in least.items():
        if not value > 0:
            raise InvalidOption(f"{name} {value} is not usable", "give a number above 0")
    if options.times is None:
        return capacities, ratios, policies, MEASURED
    try:
        table = json.loads(Path(options.times).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidOption(f"--times {options.times} cannot be read: {error}", "give a JSON file of measured restore times") from error
    if not isinstance(table, dict):
        raise InvalidOption(f"--times {options.times} holds no table", "give a JSON file of measured restore times")
    times_at(table, 1.0)  # refused now, if it is
    return capacities, ratios, policies, table


def rows_of(trace: Trace, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a policy, ratio and capacity, `infinite` first."""
    capacities, ratios, policies, table = checked(options)
    half_life_s = options.half_life_s
    yield {**replay(trace, None, 1, options.bytes_per_token, 1.0, times_at(table, 1.0), half_life_s), "policy": "infinite"}
    for ratio in ratios:
        times = times_at(table, ratio)
        for capacity in capacities:
            for policy in policies:
                started = time.process_time()
                if policy == "lru-sessions":
                    row = replay_sessions(trace, capacity, options.bytes_per_token, ratio, times)
                else:
                    row = replay(trace, policy, capacity, options.bytes_per_token, ratio, times, half_life_s)
                yield {**row, "policy": policy, "ratio": ratio, "capacity_bytes": capacity}
                seconds = time.process_time() - started
                print(f"{policy:12} {capacity / 2**30:8.2f} GiB at {ratio:g}x: {row['hit_rate']:7.2%}  {seconds:.1f} s", file=sys.stderr)


def plot(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Hit rate over capacity, one line a policy and ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    lines: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for row in rows:
        if row["policy"] != "infinite":
            lines.setdefault((row["policy"], row["ratio"]), []).append((row["capacity_bytes"] / 2**30, 100 * row["hit_rate"]))
    for (policy, ratio), points in lines.items():
        x, y = np.array(sorted(points)).T
        axes.plot(x, y, marker="o", markersize=3, label=f"{policy}, {ratio:g}x")
    axes.axhline(100 * rows[0]["hit_rate"], color="grey", linestyle=":", label="infinite")
    axes.set(xscale="log", xlabel="capacity, GiB", ylabel="prompt tokens hit, %", title=title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def operations(options: argparse.Namespace, given: list[str]) -> None:
    """Print the JSON object of `--operations`, and write it after every size. Raises InvalidOption."""
    try:
        sizes = [int(text) for text in options.operations.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1 or options.calls < 1:
        raise InvalidOption(f"--operations {options.operations} with {options.calls} calls is not usable", "give whole numbers above 0")
    rows: list[dict[str, Any]] = []
    found = {
        "device": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": command_line("bench_trie.py", given),
        "rows": rows,
    }
    for size in sizes:
        new = measure(size, options.calls)
        rows += new
        for row in new:
            print(f"{row['nodes']:>9,} nodes  {row['op']:<42} {row['us']:>12,.1f} us", file=sys.stderr)
        if options.json_out is not None:
            Path(options.json_out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    options = arguments(given)
    try:
        if options.operations is not None:
            operations(options, given)
            return 0
        if options.draw is not None:
            draw(Path(options.trace), options.draw, options.pair, options.seed)
            return 0
    except ForetoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        capacities, _, _, table = checked(options)
        trace = read_trace(options.trace, options.sessions, options.hours, options.seed)
    except ForetoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    result = {
        "trace": Path(options.trace).name,
        "capacity_bytes": capacities[0],
        "bytes_per_token": options.bytes_per_token,
        "sessions": trace.num_sessions,
        "restore_times": Path(options.times).name if "rows" in table else dict(table),
        "device": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": command_line("bench_trie.py", given),
        "rows": rows,
    }
    for row in rows_of(trace, options):
        rows.append(row)
        if options.json_out:
            Path(options.json_out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot, f"{result['trace']}, {options.bytes_per_token:,} bytes a token uncompressed")
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.exit(main())
