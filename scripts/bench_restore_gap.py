"""What running requests wait for while another one's stored prefix is restored, or its prompt computed: the longest time between two steps of a stream.

    python scripts/bench_restore_gap.py --pair smollm2 --tokens 2000,5000 [--threads 1] [--prefill-chunk N] [--repeats 3] [--json-out FILE]

One process. Texts of this project's sources are kept in a store once; then, in turn, each is restored by an engine without others (`restored alone`),
by one that is answering another request (`restored beside`), and computed beside such a one without the store (`computed beside`). Prints one JSON
object `{"device", "versions", "command", "rows": [{"tokens", "how", "gap_s", "cpu_gap_s", "ttft_s", "cpu_ttft_s", "steps", "restored_tokens"}]}`,
medians of the repeats. gap_s: the longest time in which the stream got no token, null alone; ttft_s: from the request's submission to its first token;
cpu_*: the same in the process's CPU seconds over its threads, as other programs may run; steps: tokens that the stream got meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line, measured_on, print_document
from bench.source_prompts import source_tokens
from engine.engine import Engine
from engine.runtime.sampling import SamplingParams

WARM_TOKENS = 600
SHORT = "Write a long story about a river that"
ALONE, BESIDE, COMPUTED = "restored alone", "restored beside", "computed beside"


def clocks() -> tuple[float, float]:
    """Wall seconds, and CPU seconds over threads."""
    return time.perf_counter(), time.process_time() / torch.get_num_threads()


def run(engine: Engine, ids: list[int], beside: bool) -> dict[str, Any]:
    """One request's figures, in an engine that serves nobody else or one stream."""
    core = engine.core

    def submit(tokens: list[int], count: int) -> Any:
        params = SamplingParams(max_new_tokens=count, ignore_eos=True, draft_length=0, temperature=0.7)
        return core.submit(core.open_sequence_state(), tokens, params, owns_cache=True)

    stream = None
    with core.lock:
        if beside:
            stream = submit(engine.encode(SHORT), 4000)
            while stream.num_new < 8:
                core.step()
        request, began = submit(ids, 1), clocks()
        last, steps, gaps = began, 0, (0.0, 0.0)
        while request.finish_reason is None:
            before = 0 if stream is None else stream.num_new
            core.step()
            if stream is not None and stream.num_new > before:
                now = clocks()
                gaps = max(gaps[0], now[0] - last[0]), max(gaps[1], now[1] - last[1])
                last, steps = now, steps + stream.num_new - before
        ended = clocks()
        if stream is not None:
            core.abandon(stream)
    return {
        "gap_s": gaps[0] if beside else None,
        "cpu_gap_s": gaps[1] if beside else None,
        "ttft_s": ended[0] - began[0],
        "cpu_ttft_s": ended[1] - began[1],
        "steps": steps,
        "restored_tokens": request.restored_tokens,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time what others wait for while a stored prefix is restored.")
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--tokens", default="2000,5000", help="lengths of the prompts, separated by commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prefill-chunk", type=int, help="as of `python -m engine.serve`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    lengths = [int(part) for part in args.tokens.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:

        def engine(**options: Any) -> Engine:
            chunk = {} if args.prefill_chunk is None else {"prefill_chunk": args.prefill_chunk}
            return Engine.from_pair(args.pair, log=lambda _: None, **chunk, **options)

        stored = {"store": Path(folder) / "store", "quality": "balanced"}
        first = engine(**stored)
        device = first.core.device
        warm, *texts = source_tokens(first, [WARM_TOKENS, *lengths])
        for ids in (warm, *texts):
            run(first, ids, beside=False)
            first.flush()
        first.close()
        plain = engine()
        for length, ids in zip(lengths, texts, strict=True):
            found: dict[str, list[dict[str, Any]]] = {ALONE: [], BESIDE: [], COMPUTED: []}
            for number in range(args.repeats + 1):
                for how, own in found.items():
                    used = plain if how == COMPUTED else engine(**stored)
                    if used is not plain:
                        run(used, warm, beside=False)  # makes matrices and tables
                    one = run(used, ids, how != ALONE)
                    if (one["restored_tokens"] > 0) != (how != COMPUTED):
                        raise SystemExit(f"{how}: {one['restored_tokens']} tokens were restored")
                    own += [one] if number else []  # the first pays for what a process makes once
                    if used is not plain:
                        used.close()
                    elif used.core.shared_prefixes is not None:
                        used.core.shared_prefixes.clear()
            for how, own in found.items():
                names = own[0]
                row = {name: None if own[0][name] is None else statistics.median(each[name] for each in own) for name in names}
                rows.append({"tokens": length, "how": how, **row})
                gap = (
                    ""
                    if row["gap_s"] is None
                    else f"longest gap {row['gap_s']:6.2f} s ({row['cpu_gap_s']:.2f} CPU s), {row['steps']} steps; "
                )
                print(
                    f"{length:>7,} tokens {how:<16} {gap}first token {row['ttft_s']:.2f} s ({row['cpu_ttft_s']:.2f} CPU s)", file=sys.stderr
                )
        plain.close()
    print_document(
        {
            **measured_on(device),
            "command": command_line("bench_restore_gap.py", argv),
            "rows": rows,
        },
        args.json_out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
