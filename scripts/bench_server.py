"""The server against the library on the same model, and under load: many streams at once, clients that vanish, memory over many requests.

usage: python scripts/bench_server.py --pair smollm2 --modes overhead,streams [--json-out FILE]
       python scripts/bench_server.py --tiny --modes streams,vanish,memory
Library and server run in processes of their own, in turn; a figure is printed only when the texts are the same. `--tiny`: a random model of two
layers, whose own cost is small. Each mode ends after --limit seconds, with exit status 1 and what was missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.document import command_line
from bench.server_client import Answer, ask_all
from bench.server_processes import LibraryProcess, ServerProcess
from bench.tiny_folder import write_tiny_folder

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
QUESTIONS = (
    "Why is the sky blue?",
    "Name three rivers.",
    "How do bees find flowers?",
    "What is a prime number?",
    "Write a line about rain.",
)
MODES = ("overhead", "streams", "vanish", "memory")


def bodies_of(count: int, max_tokens: int, seed: int, *, chat: bool = True) -> list[dict[str, Any]]:
    """Requests with seeds of their own, sampled at temperature 1, of exactly max_tokens tokens."""
    common = {"max_tokens": max_tokens, "temperature": 1.0, "ignore_eos": True, "stream": True}
    found = []
    for i in range(count):
        text = QUESTIONS[i % len(QUESTIONS)]
        found.append(common | {"seed": seed + i} | ({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}))
    return found


def stats_of(url: str) -> dict[str, Any]:
    """The server's figures."""
    with urllib.request.urlopen(f"{url}/stats") as answer:
        return dict(json.load(answer))


def idle(url: str, until_s: float) -> dict[str, Any]:
    """The server's figures once nothing runs. Raises SystemExit when something still does at until_s."""
    while True:
        stats = stats_of(url)
        if not any(stats["gauges"][f"vllm:num_requests_{kind}"] for kind in ("running", "waiting")):
            return stats
        if time.monotonic() > until_s:
            raise SystemExit(f"requests were left behind: {stats['gauges']}")
        time.sleep(0.05)


def texts_of(answers: list[Answer]) -> list[str]:
    """Raises SystemExit for an answer that is no whole stream."""
    try:
        return [answer.text() for answer in answers]
    except ValueError as error:
        raise SystemExit(f"not every stream came to its end: {error}") from error


def overhead(server: ServerProcess, baseline: LibraryProcess, args: argparse.Namespace, until_s: float) -> list[dict[str, Any]]:
    """Rate, CPU time and time to first token of both, in turn; batch 1 and --batch. Rounds end when half the time is left to a batch's size."""
    rows = []
    for batch in dict.fromkeys((1, args.batch)):
        share_s = time.monotonic() + (until_s - time.monotonic()) / (2 if batch == 1 else 1)
        rounds: list[dict[str, float]] = []
        for number in range(args.rounds + 1):
            bodies = bodies_of(batch, args.new_tokens, 1000 * number)
            own = baseline.generate(bodies)
            before, began = server.usage(), time.perf_counter()
            answers = ask_all(server.url, CHAT, bodies, at_once=batch, until_s=until_s)
            seconds, after = time.perf_counter() - began, server.usage()
            if texts_of(answers) != own["texts"]:
                raise SystemExit("server and library gave different texts: no figure is printed")
            tokens = batch * args.new_tokens
            if number:  # the first warms up
                rounds.append(
                    {
                        "library_tokens_per_s": tokens / own["seconds"],
                        "server_tokens_per_s": tokens / seconds,
                        "ratio": own["seconds"] / seconds,
                        "library_cpu_ms_per_token": 1e3 * own["cpu_s"] / tokens,
                        "server_cpu_ms_per_token": 1e3 * (after["cpu_s"] - before["cpu_s"]) / tokens,
                        "http_cpu_ms_per_token": 1e3 * (after["http_cpu_s"] - before["http_cpu_s"]) / tokens,
                        "library_ttft_ms": statistics.median(own["ttft_ms"]),
                        "server_ttft_ms": statistics.median(answer.ttft_ms for answer in answers),
                    }
                )
            if rounds and time.monotonic() > share_s:
                break
        rows.append({"what": "overhead", "batch": batch, "rounds": len(rounds)} | _medians(rounds))
    return rows


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]} if rounds else {}


def streams(server: ServerProcess, baseline: LibraryProcess, args: argparse.Namespace, until_s: float) -> list[dict[str, Any]]:
    """Many streams at once; each must have the text that its seed names."""
    bodies = bodies_of(args.streams, args.stream_tokens, 5, chat=False)
    expected = baseline.generate(bodies)
    began = time.perf_counter()
    answers = ask_all(server.url, PLAIN, bodies, at_once=args.streams, until_s=until_s)
    seconds = time.perf_counter() - began
    wrong = sum(own != wanted for own, wanted in zip(texts_of(answers), expected["texts"], strict=True))
    idle(server.url, time.monotonic() + 60)
    return [
        {
            "what": "streams",
            "count": args.streams,
            "tokens_each": args.stream_tokens,
            "wrong_texts": wrong,
            "distinct_texts": len(set(expected["texts"])),
            "seconds": seconds,
            "library_seconds": expected["seconds"],
        }
    ]


def vanish(server: ServerProcess, _baseline: LibraryProcess, args: argparse.Namespace, until_s: float) -> list[dict[str, Any]]:
    """Clients that close their connection in the middle of a long answer, 32 at a time; what the server holds before and after."""
    ask_all(server.url, CHAT, bodies_of(32, 900, 1), at_once=32, until_s=until_s, leave_after_bytes=600)
    idle(server.url, until_s)
    before = server.usage()
    began = time.perf_counter()
    answers = ask_all(server.url, CHAT, bodies_of(args.vanish, 900, 100), at_once=32, until_s=until_s, leave_after_bytes=600)
    stats = idle(server.url, until_s + 60)
    after, deadline = server.usage(), time.monotonic() + 60
    while after["files"] > before["files"] and time.monotonic() < deadline:  # sockets close a moment later
        time.sleep(0.05)
        after = server.usage()
    return [
        {
            "what": "vanish",
            "count": sum(answer.status == 200 for answer in answers),
            "asked": args.vanish,
            "seconds": time.perf_counter() - began,
            "before": before,
            "after": after,
            "pool_share_in_use": stats["gauges"]["vllm:kv_cache_usage_perc"],
            "cancelled": stats["totals"]["cancelled"],
        }
    ]


def memory(server: ServerProcess, _baseline: LibraryProcess, args: argparse.Namespace, until_s: float) -> list[dict[str, Any]]:
    """Short requests, 64 at a time, in ten parts; the process's resident bytes after each (the first part warms up)."""
    seen, done, began = [], 0, time.perf_counter()
    for part in range(10):
        bodies = bodies_of(args.requests // 10, 2, 1000 * part)
        answers = ask_all(server.url, CHAT, bodies, at_once=64, until_s=until_s)
        texts_of(answers)
        done += len(answers)
        seen.append(server.usage()["rss_bytes"])
    growth = (seen[-1] - seen[0]) / max(1, done - args.requests // 10)
    return [
        {
            "what": "memory",
            "count": done,
            "seconds": time.perf_counter() - began,
            "rss_bytes": seen,
            "growth_bytes_per_request": growth,
            "files": server.usage()["files"],
        }
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the modes that are asked for; prints JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = p.add_mutually_exclusive_group()
    model.add_argument("--pair", help="default smollm2")
    model.add_argument("--tiny", action="store_true", help="a random model of two layers")
    p.add_argument("--modes", default="overhead", metavar="A,B", help=f"of {', '.join(MODES)}; default overhead")
    p.add_argument("--limit", type=float, default=120.0, metavar="S", help="longest time of a mode, in seconds; default 120")
    p.add_argument("--rounds", type=int, default=5, help="overhead: at most so many pairs")
    p.add_argument("--batch", type=int, default=8, help="overhead: conversations at once, beside one alone")
    p.add_argument("--new-tokens", type=int, default=64, help="overhead: tokens an answer")
    p.add_argument("--streams", type=int, default=200, help="streams: so many at once")
    p.add_argument("--stream-tokens", type=int, default=12, help="streams: tokens of each")
    p.add_argument("--vanish", type=int, default=1000, help="vanish: clients")
    p.add_argument("--requests", type=int, default=10000, help="memory: requests")
    p.add_argument("--threads", type=int, help="threads for arithmetic, of both processes")
    p.add_argument("--json-out", type=Path)
    args = p.parse_args(argv)
    modes = args.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        p.error(f"unknown mode {unknown[0]!r}: choose from {', '.join(MODES)}")
    if args.requests < 10 or min(args.rounds, args.batch, args.new_tokens, args.streams, args.stream_tokens, args.vanish) < 1:
        p.error("counts must be at least 1, requests at least 10")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        options = ["--pair", args.pair or "smollm2"]
        if args.tiny:
            options = ["--target", str(write_tiny_folder(Path(folder))), "--draft", "ngram", "--dtype", "float32", "--device", "cpu"]
        if args.threads is not None:
            options += ["--threads", str(args.threads)]
        baseline = LibraryProcess(options)
        server = ServerProcess(options)
        try:
            for mode in modes:
                run = {"overhead": overhead, "streams": streams, "vanish": vanish, "memory": memory}[mode]
                rows += run(server, baseline, args, time.monotonic() + args.limit)
                print(json.dumps(rows[-1]), file=sys.stderr)
        finally:
            server.close()
            baseline.close()
    found = {
        "device": platform.processor() or "cpu",
        "model": "tiny" if args.tiny else args.pair or "smollm2",
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "command": command_line("bench_server.py", argv),
        "rows": rows,
    }
    if args.json_out:
        args.json_out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
