"""Automatic drafts beside plain decoding on a CPU, also a busy one: engines over one target take steps in turn, and CPU seconds are compared.

    OMP_NUM_THREADS=1 python scripts/bench/speculation_in_turn.py --pair smollm2 --batches 1,4,8 --json-out in-turn.json

Every mode has an engine of its own over the same target: plain decoding, plain decoding once more (how far identical work scatters), automatic
drafts, and fixed numbers of drafts (--lengths). A turn is a batch of prompts, of which each mode decodes --new-tokens tokens; steps of prompts are not
counted. Within a turn the modes' steps alternate, so what slows the machine for a while hits all of them. Seconds are the process's; with several
threads (OMP_NUM_THREADS) those of the wall, as waiting threads count, too, and only a quiet machine says something. The first two turns are not
counted. `over_plain` is the median over turns. `equal_tokens`: share of plain decoding's tokens that a mode's are equal to, up to the first one that
differs; rounding may part greedy texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line, measured_on
from bench.throughput_runs import KINDS
from draft.seen import SeenByNamespace
from engine.engine import Engine
from engine.runtime.sampling import SamplingParams

UNCOUNTED = 2  # turns at first


def one_turn(modes: dict[str, tuple[Engine, Any]], prompts: list[list[int]], new_tokens: int, clock: Any) -> dict[str, dict[str, Any]]:
    """Decode the prompts once with every mode, step by step in turn: seconds, and of all requests tokens beyond the first, steps, drafts and texts."""
    requests = {}
    for name, (engine, length) in modes.items():
        engine.core.scheduler.drafting.seen = SeenByNamespace()  # nothing is drafted from another turn's answer
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, draft_length=length)
        core = engine.core
        requests[name] = [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in prompts]
        while not all(request.num_new for request in requests[name]):
            core.step()
    found = {name: {"seconds": 0.0, "steps": 0, "tokens": -sum(r.num_new for r in own)} for name, own in requests.items()}
    number = 0
    while live := [name for name, (engine, _) in modes.items() if not engine.core.scheduler.idle]:
        number += 1
        for name in live[number % len(live) :] + live[: number % len(live)]:
            began = clock()
            modes[name][0].core.step()
            found[name]["seconds"] += clock() - began
            found[name]["steps"] += 1
    for name, own in requests.items():
        metrics = [request.metrics for request in own]
        found[name] |= {
            "tokens": found[name]["tokens"] + sum(request.num_new for request in own),
            "proposed": sum(m.proposed for m in metrics), "accepted": sum(m.accepted for m in metrics),
            "texts": [request.token_ids[-request.num_new :] for request in own],
        }  # fmt: skip
    return found


def equal_tokens(texts: list[list[int]], plain: list[list[int]]) -> float:
    """Share of plain decoding's tokens up to the first that differs."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[1])) for pair in zip(texts, plain, strict=True)
    )
    return same / sum(map(len, plain))


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--pair", help="a known pair")
    model.add_argument(
        "--gguf", type=Path, help="a GGUF file, its weights kept in their blocks, with the draft head that ships for its shape"
    )
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--lengths", default="", help="fixed numbers of drafts, beside automatic ones")
    parser.add_argument("--turns", type=int, default=5, help="that are counted")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "max_batch": 64, "prefix_sharing": False, "pool_tokens": 1 << 14}
    if args.pair:
        first = Engine.from_pair(args.pair, **options)
    else:
        first = Engine.from_pretrained(args.gguf, "trunk", weights="quantized", **options)

    def another() -> Engine:
        core = first.core
        own = {name: options[name] for name in ("max_batch", "prefix_sharing", "pool_tokens")}
        return Engine(core.target, first.tokenizer, draft=core.source, target_dir=core.config.target_dir, **own)

    modes: dict[str, tuple[Engine, Any]] = {"plain": (first, 0), "plain again": (another(), 0), "automatic": (another(), "auto")}
    modes |= {f"{length} drafts": (another(), int(length)) for length in args.lengths.split(",") if length}
    modes["automatic"][0].core.measure_costs()
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    rows: list[dict[str, Any]] = []
    for kind, texts in KINDS.items():
        ids = [first.encode([{"role": "user", "content": text}]) for text in texts]
        for batch in map(int, args.batches.split(",")):
            turns = []
            for turn in range(UNCOUNTED + args.turns):
                prompts = [ids[(turn * batch + i) % len(ids)] for i in range(batch)]
                turns.append(one_turn(modes, prompts, args.new_tokens, clock))
            counted = turns[UNCOUNTED:]
            for name in modes:
                own = [turn[name] for turn in counted]
                rates = [turn["tokens"] / turn["seconds"] for turn in own]
                over = [rate / (turn["plain"]["tokens"] / turn["plain"]["seconds"]) for rate, turn in zip(rates, counted, strict=True)]
                rows.append({
                    "prompts": kind, "batch": batch, "mode": name, "tokens_per_s": statistics.median(rates),
                    "over_plain": statistics.median(over), "over_plain_least": min(over), "over_plain_most": max(over),
                    "tokens_per_step": sum(turn["tokens"] for turn in own) / sum(turn["steps"] for turn in own) / batch,
                    "proposed": sum(turn["proposed"] for turn in own), "accepted": sum(turn["accepted"] for turn in own),
                    "equal_tokens": statistics.mean(equal_tokens(turn[name]["texts"], turn["plain"]["texts"]) for turn in counted),
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    if args.json_out:
        seconds = "CPU" if threads == 1 else "wall"
        document = measured_on(first.device) | {"command": command_line("bench/speculation_in_turn.py", argv)}
        document |= {"model": args.pair or args.gguf.name, "threads": threads, "seconds": seconds, "turns": args.turns, "rows": rows}
        args.json_out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
