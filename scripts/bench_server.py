"""The server against the library on the same model: rate and time to first token, many streams at once, clients that vanish, memory over many requests.

usage: python scripts/bench_server.py --pair smollm2 --json-out server.json [--rounds 3 --batch 8 --streams 200 --vanish 1000 --requests 10000]
Library and server run in processes of their own, in turn; a figure is printed only when the texts are the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
QUESTIONS = (
    "Why is the sky blue?",
    "Name three rivers.",
    "How do bees find flowers?",
    "What is a prime number?",
    "Write a line about rain.",
)


class LibraryProcess:
    """An engine in a process of its own that answers JSON lines: the baseline."""

    def __init__(self, options: list[str]) -> None:
        command = [sys.executable, str(Path(__file__)), "--library", *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def generate(self, jobs: list[dict[str, Any]]) -> dict[str, Any]:
        """texts, seconds and ttft_ms of jobs run as one batch."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def library(pair: str) -> None:
    """The baseline's side: a batch a line of standard input."""
    from engine.engine import Engine
    from engine.runtime.sampling import SamplingParams

    engine = Engine.from_pair(pair)
    engine.core.measure_costs()
    for line in sys.stdin:
        jobs = json.loads(line)
        params = [SamplingParams(temperature=1.0, seed=job["seed"], max_new_tokens=job["max_tokens"], ignore_eos=True) for job in jobs]
        began = time.perf_counter()
        results = engine.generate([job["messages"] for job in jobs], params)
        seconds = time.perf_counter() - began
        ttft_ms = [1e3 * result.ttft_s for result in results]
        print(json.dumps({"texts": [result.text for result in results], "seconds": seconds, "ttft_ms": ttft_ms}), flush=True)


class ServerProcess:
    """`python -m engine.serve` on a free port."""

    def __init__(self, options: list[str]) -> None:
        command = [sys.executable, "-m", "engine.serve", "--port", "0", "--max-queue", "4096", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stderr
        for line in self._process.stderr:
            if found := re.search(r"http://\S+:\d+", line):
                self.url = found[0]
                break
        else:
            raise SystemExit("the server did not start")

    def usage(self) -> dict[str, int]:
        """rss_bytes, threads and open files of the process."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        files = len(os.listdir(f"/proc/{self._process.pid}/fd"))
        return {"rss_bytes": int(fields["VmRSS"].split()[0]) << 10, "threads": int(fields["Threads"]), "files": files}

    def close(self) -> None:
        """End it, as an operator would."""
        self._process.terminate()
        self._process.wait(60)


def jobs_of(count: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Chat requests with seeds of their own."""
    content = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    return [{"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "seed": seed + i} for i, text in enumerate(content)]


async def stream(client: httpx.AsyncClient, job: dict[str, Any]) -> tuple[str, float]:
    """(text, milliseconds to the first piece) of a streamed answer."""
    began, first, text = time.perf_counter(), 0.0, ""
    body = job | {"stream": True, "temperature": 1.0, "ignore_eos": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content")
                if piece:
                    first = first or time.perf_counter()
                    text += piece
    return text, 1e3 * (first - began)


def client_of(url: str, connections: int) -> httpx.AsyncClient:
    """A client with so many connections."""
    return httpx.AsyncClient(
        base_url=url, timeout=900, limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    )


async def streamed(url: str, jobs: list[dict[str, Any]], connections: int) -> dict[str, Any]:
    """texts, seconds and ttft_ms of jobs sent at once."""
    async with client_of(url, connections) as client:
        began = time.perf_counter()
        found = await asyncio.gather(*(stream(client, job) for job in jobs))
        return {"texts": [text for text, _ in found], "seconds": time.perf_counter() - began, "ttft_ms": [ms for _, ms in found]}


async def vanish(url: str, count: int) -> None:
    """Clients that close their connection in the middle of a long answer, some at a time."""
    gate = asyncio.Semaphore(32)

    async def one(number: int) -> None:
        async with gate, client_of(url, 1) as client:
            body = jobs_of(1, 2000, number)[0] | {"stream": True, "temperature": 1.0, "ignore_eos": True}
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    return

    await asyncio.gather(*(one(number) for number in range(count)))


def idle(url: str, seconds: float = 60.0) -> dict[str, Any]:
    """The server's figures once nothing runs. Raises SystemExit when something still does."""
    deadline = time.monotonic() + seconds
    while True:
        stats = dict(httpx.get(f"{url}/stats").json())
        if not any(stats["gauges"][f"vllm:num_requests_{kind}"] for kind in ("running", "waiting")):
            return stats
        if time.monotonic() > deadline:
            raise SystemExit(f"requests were left behind: {stats['gauges']}")
        time.sleep(0.05)


def overhead(server: ServerProcess, baseline: LibraryProcess, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rate and time to first token of both, in turn; batch 1 and --batch."""
    rows = []
    for batch in (1, args.batch):
        rates: dict[str, list[float]] = {"library": [], "server": []}
        firsts: dict[str, list[float]] = {"library": [], "server": []}
        for round_number in range(args.rounds + 1):
            jobs = jobs_of(batch, args.new_tokens, 1000 * round_number)
            made = {"library": baseline.generate(jobs), "server": asyncio.run(streamed(server.url, jobs, batch))}
            if made["library"]["texts"] != made["server"]["texts"]:
                raise SystemExit("server and library gave different texts: no figure is printed")
            for name, result in made.items():
                if round_number:  # the first warms up
                    rates[name].append(batch * args.new_tokens / result["seconds"])
                    firsts[name].append(statistics.median(result["ttft_ms"]))
        rows.append(
            {
                "what": "overhead",
                "batch": batch,
                "library_tokens_per_s": statistics.median(rates["library"]),
                "server_tokens_per_s": statistics.median(rates["server"]),
                "ratio": statistics.median(s / own for s, own in zip(rates["server"], rates["library"], strict=True)),
                "library_ttft_ms": statistics.median(firsts["library"]),
                "server_ttft_ms": statistics.median(firsts["server"]),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the measurements that are asked for; prints JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pair", default="smollm2")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--streams", type=int, default=200, help="streams at once; 0: none")
    p.add_argument("--vanish", type=int, default=1000, help="clients that go away in the middle; 0: none")
    p.add_argument("--requests", type=int, default=10000, help="short requests, to watch memory; 0: none")
    p.add_argument("--json-out", type=Path)
    p.add_argument("--library", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.library:
        library(args.pair)
        return 0
    options = ["--pair", args.pair]
    server, baseline = ServerProcess(options), LibraryProcess(options)
    rows: list[dict[str, Any]] = []
    try:
        if args.rounds:
            rows += overhead(server, baseline, args)
        if args.streams:
            jobs = jobs_of(args.streams, 24, 5)
            expected = baseline.generate(jobs)["texts"]
            made = asyncio.run(streamed(server.url, jobs, args.streams))
            wrong = sum(own != wanted for own, wanted in zip(made["texts"], expected, strict=True))
            rows.append({"what": "streams", "count": args.streams, "wrong_texts": wrong, "seconds": made["seconds"]})
            idle(server.url)
        if args.vanish:
            before = server.usage()
            asyncio.run(vanish(server.url, args.vanish))
            stats, after = idle(server.url), server.usage()
            used = stats["gauges"]["vllm:kv_cache_usage_perc"]
            rows.append({"what": "vanish", "count": args.vanish, "before": before, "after": after, "pool_share_in_use": used})
        if args.requests:
            seen = [server.usage()["rss_bytes"]]
            for part in range(10):
                asyncio.run(streamed(server.url, jobs_of(args.requests // 10, 2, part), 64))
                seen.append(server.usage()["rss_bytes"])
            rows.append({"what": "memory", "count": args.requests, "rss_bytes": seen})
    finally:
        server.close()
        baseline.close()
    command = "python scripts/bench_server.py " + " ".join(sys.argv[1:] if argv is None else argv)
    found = {"device": platform.processor() or "cpu", "pair": args.pair, "cores": os.cpu_count(), "command": command, "rows": rows}
    if args.json_out:
        args.json_out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
