"""What a stream waits for while a session of the same engine is suspended: the longest time between two of its tokens.

    python scripts/bench_suspend_gap.py --pair smollm2 --tokens 2000,5000 [--threads 1] [--repeats 3] [--json-out FILE]

One process, two threads. Sessions of texts of this project's sources are suspended beside a stream, in turn: `in pieces`, as `Session.suspend` does,
and `at once`, with the engine's lock held throughout. The files must have the same bytes, or nothing is printed and the exit status is 1. Prints one
JSON object `{"device", "versions", "command", "rows": [{"tokens", "how", "gap_s", "cpu_gap_s", "suspend_s", "cpu_suspend_s", "steps",
"stored_bytes"}]}`, medians of the repeats. gap_s: the longest time in which the stream got no token; cpu_*: the same in the process's CPU seconds over
its threads, as other programs may run; steps: tokens that the stream got meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line, measured_on, print_document
from bench.source_prompts import source_tokens
from bench_restore_gap import SHORT, clocks
from engine.engine import Engine
from engine.runtime.sampling import SamplingParams

PIECES, AT_ONCE = "in pieces", "at once"
_QUALITY = "balanced"


def run(engine: Engine, ids: list[int], file: Path, how: str) -> dict[str, Any]:
    """One suspend's figures, and the file's bytes as `file`."""
    core, ended, began = engine.core, threading.Event(), threading.Event()
    times: list[tuple[float, float]] = []

    def read() -> None:
        params = SamplingParams(max_new_tokens=core.context - 100, ignore_eos=True, draft_length=0, temperature=0.7)
        try:
            for event in engine.stream(SHORT, params):
                times.append(clocks())
                if len(times) == 8:
                    began.set()
                if ended.is_set() or event.finish_reason is not None:
                    break
        finally:
            began.set()

    with engine.session(quality=_QUALITY, log=lambda _: None) as session:
        session.generate(ids, SamplingParams(max_new_tokens=1, ignore_eos=True, draft_length=0))
        stream = threading.Thread(target=read)
        stream.start()
        began.wait()
        start = clocks()
        with core.lock if how == AT_ONCE else nullcontext():
            session.suspend(file)
        end = clocks()
        ended.set()
        stream.join()
    if core.shared_prefixes is not None:
        core.shared_prefixes.clear()  # the next session computes its text again
    marks = [start, *(at for at in times if start[0] < at[0] < end[0]), end]
    gaps = [[b[clock] - a[clock] for a, b in itertools.pairwise(marks)] for clock in (0, 1)]
    return {
        "gap_s": max(gaps[0]),
        "cpu_gap_s": max(gaps[1]),
        "suspend_s": end[0] - start[0],
        "cpu_suspend_s": end[1] - start[1],
        "steps": len(marks) - 2,
        "stored_bytes": file.stat().st_size,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what a stream waits for while a session is suspended.")
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--tokens", default="2000,5000", help="lengths of the sessions, separated by commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    lengths = [int(part) for part in args.tokens.split(",")]
    engine = Engine.from_pair(args.pair, log=lambda _: None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        warm, *texts = source_tokens(engine, [600, *lengths])
        run(engine, warm, Path(folder) / "warm", PIECES)  # makes matrices and tables
        for length, ids in zip(lengths, texts, strict=True):
            found: dict[str, list[dict[str, Any]]] = {PIECES: [], AT_ONCE: []}
            for _ in range(args.repeats):
                for how, own in found.items():
                    own.append(run(engine, ids, Path(folder) / how, how))
                if (Path(folder) / PIECES).read_bytes() != (Path(folder) / AT_ONCE).read_bytes():
                    print(f"a session of {length} tokens has other bytes {PIECES} than {AT_ONCE}", file=sys.stderr)
                    return 1
            for how, own in found.items():
                row = {name: statistics.median(each[name] for each in own) for name in own[0]}
                rows.append({"tokens": length, "how": how, **row})
                print(
                    f"{length:>7,} tokens {how:<10} longest gap {row['gap_s']:6.2f} s ({row['cpu_gap_s']:.2f} CPU s), {row['steps']:.0f} steps; "
                    f"suspended in {row['suspend_s']:.2f} s ({row['cpu_suspend_s']:.2f} CPU s)",
                    file=sys.stderr,
                )
    print_document(
        {
            **measured_on(engine.device),
            "command": command_line("bench_suspend_gap.py", argv),
            "rows": rows,
        },
        args.json_out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
