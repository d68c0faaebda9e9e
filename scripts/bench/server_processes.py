"""The library and the server in processes of their own, for benchmarks that compare them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class LibraryProcess:
    """An engine that answers JSON lines: the baseline. options: of `python -m engine.serve`, its model options alone."""

    def __init__(self, options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "bench.server_processes", *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)

    def generate(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """texts, seconds, cpu_s and ttft_ms (with the encoding of all prompts) of requests run as one batch; bodies: as the server takes them."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(list(bodies)) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(120)


class ServerProcess:
    """`python -m engine.serve` on a free port. Raises SystemExit with what it said when it does not start."""

    def __init__(self, options: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        command = [sys.executable, "-m", "engine.serve", "--port", "0", "--max-queue", "16384", *options]
        self._process = subprocess.Popen(command, stderr=self._said, cwd=ROOT, env=os.environ | (environment or {}))
        while (found := re.search(r"http://\S+:\d+", self.said())) is None:
            if self._process.poll() is not None:
                raise SystemExit(f"the server did not start: {self.said()}")
            time.sleep(0.05)
        self.url = found[0]

    def said(self) -> str:
        """Its standard error so far."""
        return os.pread(self._said.fileno(), 1 << 16, 0).decode("utf-8", "replace")

    def usage(self) -> dict[str, Any]:
        """rss_bytes, threads, files, and CPU seconds: cpu_s of all its threads, http_cpu_s of the one that serves HTTP."""
        folder = Path(f"/proc/{self._process.pid}")
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        threads = {task.name: _cpu_s(task) for task in (folder / "task").iterdir()}
        return {
            "rss_bytes": int(fields["VmRSS"].split()[0]) << 10,
            "threads": len(threads),
            "files": len(list((folder / "fd").iterdir())),
            "cpu_s": sum(threads.values()),
            "http_cpu_s": threads[str(self._process.pid)],
        }

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        self._process.wait(120)

    def close(self) -> int:
        """End it, as an operator would; its exit status."""
        self._process.terminate()
        status = self._process.wait(120)
        self._said.close()
        return status


def _cpu_s(task: Path) -> float:
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):  # it has just ended
        return 0.0


def serve_library(options: list[str]) -> None:
    """The baseline's side: a batch a line of standard input."""
    import torch

    from engine.cli.command import load
    from engine.cli.serve import parser
    from engine.runtime.sampling import SamplingParams

    args = parser().parse_args(options)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    engine = load(args)
    engine.core.measure_costs()
    for line in sys.stdin:
        bodies = json.loads(line)
        params = [
            SamplingParams(temperature=body["temperature"], seed=body["seed"], max_new_tokens=body["max_tokens"], ignore_eos=True)
            for body in bodies
        ]
        began, began_cpu = time.perf_counter(), time.process_time()
        prompts = [engine.encode(body.get("messages") or body["prompt"]) for body in bodies]
        encode_s = time.perf_counter() - began  # a caller of the library waits for it as one of the server does
        results = engine.generate(prompts, params)
        made = {"texts": [result.text for result in results], "ttft_ms": [1e3 * (encode_s + result.ttft_s) for result in results]}
        print(json.dumps(made | {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}), flush=True)


if __name__ == "__main__":
    serve_library(sys.argv[1:])
