"""What it brings that windowed layers keep their window alone: bytes of the KV pools and of the texts in them, and decode speed, with and without.

    python scripts/bench_windows.py --shape gemma3-1b --tokens 16448 --batch 4 --json-out windows.json
    python scripts/bench_windows.py --target gemma-3-270m.gguf --tokens 4096

One JSON line a way. pool_bytes: of pools for `batch` such texts; text_bytes: of the texts in them, at their end; peak_bytes: most that torch had
allocated since the weights (GPU). equal_tokens: of the texts, those up to the first that differs from the text with all pages. Prompts are random
tokens, kept by the engine between runs, so that decoding is timed alone: extra tokens over extra seconds of a long run against a short one, the median
of `repeats` after one that captures. Both ways take turns on one copy of the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from bench.decode_profile import SHAPES, moment, prompts_of, random_decoder
from bench.document import command_line
from engine.engine import Engine
from engine.model.decoder import Decoder
from engine.runtime.sampling import SamplingParams


def measure(target: Decoder, windows: bool, args: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]]]:
    """A row, and the greedy texts of its longest run."""
    device = target.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as without:
        for place in () if windows else ("engine.runtime.core.window_layers", "engine.runtime.memory.window_layers"):
            without.enter_context(mock.patch(place, lambda *_: ()))
        # beside each text the end of the one before it, which is kept too
        engine = Engine(target, max_batch=args.batch, pool_tokens=args.batch * (args.tokens + 2 * (args.new_tokens + 320)))
    core, held = engine.core, 0
    step = core.scheduler.step

    def watched() -> Any:
        nonlocal held
        held = max(held, sum(core.pool.bytes_of(request.sequence) for request in core.scheduler.running))
        return step()

    core.scheduler.step = watched
    prompts, short = prompts_of(args.batch, args.tokens, target.config.vocab_size), args.new_tokens // 4
    seconds: dict[int, list[float]] = {short: [], args.new_tokens: []}
    began = moment(device)
    engine.generate(prompts, SamplingParams(max_new_tokens=1, ignore_eos=True))
    first_s = moment(device) - began
    results: list[Any] = []
    for turn in range(args.repeats + 1):
        for count, times in seconds.items():
            began = moment(device)
            results = engine.generate(prompts, SamplingParams(max_new_tokens=count, ignore_eos=True))
            if turn:  # the first run captures
                times.append(moment(device) - began)
    took = median(seconds[args.new_tokens]) - median(seconds[short])
    row = {
        "windows": windows,
        "pool_bytes": core.pool.bytes,
        "text_bytes": held,
        "tokens_per_s": args.batch * (args.new_tokens - short) / took,
        "seconds": {str(count): times for count, times in seconds.items()},
        "first_tokens_s": first_s,
        "reused_tokens": results[0].reused_tokens,
        "peak_bytes": torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None,
        "plan": [str(plan) for plan in core.memory_plans],
    }
    return row, [result.token_ids for result in results]


def equal_tokens(texts: list[list[int]], wanted: list[list[int]]) -> list[int]:
    """Tokens of each text up to the first that differs."""
    found = []
    for text, other in zip(texts, wanted, strict=True):
        differing = (at for at, (a, b) in enumerate(zip(text, other, strict=True)) if a != b)
        found.append(next(differing, len(text)))
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure both ways and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=sorted(SHAPES), help="random weights")
    which.add_argument("--target", help="a folder or GGUF file")
    parser.add_argument("--tokens", type=int, default=16448, help="of each prompt")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.shape:
        target = random_decoder(args.shape, device, torch.bfloat16)
    else:
        target = Engine.from_pretrained(args.target, "none", pool_tokens=64).core.target
    if all(shape.window is None for shape in target.layer_shapes):
        parser.error("no layer of the model has a window")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "model": args.shape or Path(args.target).name,
        "tokens": args.tokens,
        "batch": args.batch,
        "new_tokens": args.new_tokens,
        "dtype": str(target.dtype).removeprefix("torch."),
        "weight_bytes": target.weight_bytes,
        "versions": {"torch": torch.__version__},
        "command": command_line("bench_windows.py", argv),
        "rows": [],
    }
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}), flush=True)
    wanted: list[list[int]] | None = None
    for windows in (False, True):
        row, texts = measure(target, windows, args)
        wanted = texts if wanted is None else wanted
        row["equal_tokens"] = equal_tokens(texts, wanted)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.json_out:
            args.json_out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
