"""Find launch shapes of a decode step's kernels by measuring whole captured steps: one kernel's shape at a time, the others as they stand.

    python scripts/bench/decode_tune.py --shape 1.5b --rows 1,8x1,32x1,128x1 --json-out tuned.json

Compiles all candidates first, in several processes. A candidate whose logits differ from the starting plan's by more than rounding is refused.
What it finds is written down by hand in `kernels/decode_layer/plans.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from kernels.decode_attention.config import DecodeAttentionConfig
from kernels.decode_layer import triton as fused_step
from kernels.decode_layer.plans import DecodePlan, choose_plan
from kernels.decode_layer.tensors import DecodeBuffers, DecodeShape
from kernels.skinny_linear.tiles import Tile
from scripts.bench_decode_step import PAGE, SHAPES, captured, error, fill, parse_rows, random_model, run_step, timed

FIELDS = ("attention", "down", "qkv", "o", "gate_up", "head")
GAIN = 0.997  # a candidate replaces the best one only when it takes less than this share of its time
ROUNDING = 0.06  # relative RMS distance of logits of two bf16 steps


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
    """All combinations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def candidates(field: str, rows: int, shape: DecodeShape) -> list[Any]:
    """Launch shapes worth a try for a kernel at that many rows."""
    if field == "attention":
        if rows <= 8:
            options = grid(split=[32, 64, 128], block_n=[32, 64], warps=[2, 4], stages=[2], whole_block=[True, False])
        else:
            options = grid(split=[64, 256, 1024, 4096], block_n=[64], warps=[4], programs=[4, 64], stages=[2, 3])
            options += grid(split=[64, 256], programs=[4, 8, 16, 32, 64], stages=[2, 3], spread=[True])
        return [DecodeAttentionConfig(**o) for o in options if o.get("block_n", 64) <= o["split"]]
    tiles: list[Tile] = []
    if rows == 1:
        common: dict[str, Any] = {"scalar": True, "slices": 1}
        wide = field in ("gate_up", "head")
        for o in grid(
            block_n=[8, 16] if wide else [4, 8],
            block_k=[512, 1024] if field == "down" else [512],
            held=[0, 2] if field == "down" else [0, 3],
            lines=[0] if wide else [0, 16],
            stages=[3, 5],
            splits=[1, 2] if field == "down" else [1],
            warps=[4],
        ):
            tiles.append(Tile(**common, **o))
        tiles += [dataclasses.replace(t, warps=8, block_n=t.block_n * 2) for t in tiles if t.stages == 3 and t.splits == 1]
    elif rows <= 8:
        for o in grid(block_n=[16], block_k=[64, 128], slices=[4], held=[0, 1], lines=[0, 8], stages=[3, 5],
                      splits=[2, 4] if field == "down" else [1]):  # fmt: skip
            if not (field == "head" and o["held"]):
                tiles.append(Tile(**o))
        if field == "head":
            tiles += [Tile(block_n=n, block_k=128, slices=1, stages=s) for n in (32, 64, 128) for s in (3, 4, 5)]
    else:
        splits = [1, 2, 4] if field == "qkv" else [3, 5, 7] if field == "down" else [2, 4, 6] if field == "o" else [1]
        for o in grid(
            block_n=[32, 64, 128],
            block_k=[64, 128] if rows <= 32 else [64],
            splits=splits,
            stages=[3, 4],
            warps=[4] if rows <= 32 else [4, 8],
        ):
            if not (field in ("gate_up", "head") and o["block_n"] == 32) and not (field in ("qkv", "o", "down") and o["block_n"] == 128):
                tiles.append(Tile(slices=1, lines=8, **o))
    return [t for t in tiles if field != "qkv" or shape.head_dim % t.block_n == 0]


class Tuner:
    """One model shape, one (batch, length)."""

    def __init__(self, name: str, batch: int, length: int, context: int, keys: int, layers: int | None = None) -> None:
        device = torch.device("cuda")
        pool = batch * -(-context // PAGE) * PAGE
        self.weights, self.shape = random_model(name, device, pool, layers)
        self.batch, self.length, self.context, self.keys = batch, length, context, keys
        self.expected: torch.Tensor | None = None

    def buffers(self, plan: DecodePlan) -> DecodeBuffers:
        """A plan's buffers, filled."""
        sizes = (self.shape, self.batch, self.length, self.keys // PAGE, PAGE)
        buffers = DecodeBuffers.allocate(*sizes, dtype=torch.bfloat16, device="cuda", plan=plan)
        fill(buffers, self.batch, self.length, self.context)
        return buffers

    def run(self, plan: DecodePlan) -> None:
        """Once, outside a graph: compiles."""
        run_step(fused_step, self.weights, self.buffers(plan), self.shape)
        torch.cuda.synchronize()

    def milliseconds(self, plan: DecodePlan) -> float:
        """Of a captured step; infinite where it fails or its logits are off."""
        buffers = self.buffers(plan)
        try:
            graph = captured(lambda: run_step(fused_step, self.weights, buffers, self.shape))
        except Exception as failure:
            print(f"  failed: {str(failure)[:120]}", flush=True)
            return float("inf")
        graph.replay()
        assert buffers.logits is not None
        if self.expected is None:
            self.expected = buffers.logits.clone()
        if error(buffers.logits, self.expected) > ROUNDING:
            print("  wrong logits", flush=True)
            return float("inf")
        return timed(graph, groups=5, replays=8)


def compile_some(name: str, batch: int, length: int, context: int, keys: int, plans: list[DecodePlan]) -> None:
    """Run plans once each over a single layer, in a process of its own; failures show later."""
    tuner = Tuner(name, batch, length, context, keys, layers=1)
    for plan in plans:
        try:
            tuner.run(plan)
        except Exception:
            continue


def tune(options: argparse.Namespace, batch: int, length: int, workers: int, deadline: float) -> dict[str, Any]:
    """The best plan found for so many rows, with what each step towards it gained."""
    sizes = (options.shape, batch, length, options.context, options.max_keys)
    shape = SHAPES[options.shape][1]
    rows = batch * length
    start = choose_plan(shape, rows, batch=batch)
    fields = [f for f in FIELDS if f in options.fields.split(",")]
    tried = [(f, c) for f in fields for c in candidates(f, rows, shape)]
    began = time.time()
    plans = [dataclasses.replace(start, **{f: c}) for f, c in tried]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compile_some, args=(*sizes, plans[i::workers])) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(1.0, deadline - time.time()))
        if process.is_alive():
            process.kill()
    print(f"{batch}x{length}: {len(plans)} candidates compiled in {time.time() - began:.0f} s", flush=True)
    tuner = Tuner(*sizes)
    best = start
    best_ms = first_ms = tuner.milliseconds(start)
    log = []
    for field in fields:
        found = []
        for candidate in [c for f, c in tried if f == field]:
            if time.time() > deadline:
                break
            plan = dataclasses.replace(best, **{field: candidate})
            found.append((tuner.milliseconds(plan), candidate))
        found.sort(key=lambda pair: pair[0])
        for ms, candidate in found:
            log.append({"field": field, "ms": ms, "candidate": dataclasses.asdict(candidate)})
        for ms, candidate in found[:3]:
            print(f"  {field} {ms:.4f} {short(candidate)}", flush=True)
        if found and found[0][0] < GAIN * best_ms:
            best, best_ms = dataclasses.replace(best, **{field: found[0][1]}), found[0][0]
    again = tuner.milliseconds(best)
    print(f"{batch}x{length}: {first_ms:.4f} -> {best_ms:.4f} ({again:.4f}) ms", flush=True)
    return {"rows": f"{batch}x{length}", "before_ms": first_ms, "after_ms": again, "plan": dataclasses.asdict(best), "tried": log}


def short(candidate: Any) -> str:
    """A launch shape's fields that are not the default."""
    plain = type(candidate)()
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(candidate).items() if v != getattr(plain, k))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--rows", default="1,8x1,32x1,128x1", help="BATCHxLENGTH, comma-separated")
    parser.add_argument("--fields", default=",".join(FIELDS))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-keys", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=60, help="most time for one number of rows (default 60)")
    parser.add_argument("--json-out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    results = []
    for batch, length in parse_rows(options.rows):
        results.append(tune(options, batch, length, max(1, (os.cpu_count() or 2) - 2), time.time() + options.seconds))
        if options.json_out:
            Path(options.json_out).write_text(json.dumps({"device": torch.cuda.get_device_name(), "runs": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
