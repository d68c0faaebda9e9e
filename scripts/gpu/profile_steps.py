"""Where the time of decode steps goes on a GPU: kernels by name, gaps between them, and the host's part.

    PYTHONPATH=.:scripts python scripts/gpu/profile_steps.py --pair smollm2 [--draft DIR] --batches 1,8,32 --lengths 0,2 --json-out steps.json

For every batch and fixed number of drafts (0: plain decoding), of steps in which all requests decode: `step_us`, one step by the clock; `busy_us`,
time of it in which a kernel or a copy runs; `gap_us`, the rest; `kernels`, by name how many a step has and what they take (a kernel that is launched
early counts its wait for the one before it as well, so these add up to more than `busy_us`); `calls`, launches and copies that the host makes
(torch.profiler, which makes steps longer: `profiled_us`); and `host_us`, CPU microseconds of the host in a step whose passes cost nothing (their graphs
are replaced, and every request is told that it gained the same tokens), beside `host_calls`, the torch operations in it by name. --hotspots prints
the functions that take most of it.
--join-every N keeps the batch full besides while a request ends every N steps or so and another one takes its place: `joining_us`, medians by the clock
of the steps that only decode, of those that run its prompt, and of those behind these, and `joining_host_us`, the same of the host's CPU time where
captured steps, those of prompts among them, cost nothing.
Without a GPU the host's part alone is measured, over the runners that a GPU has. Takes a minute a draft source.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.decode_profile import moment
from bench.document import command_line
from bench.throughput_runs import KINDS
from draft.source import DraftSource
from draft.spans import SpanPolicy
from engine.cli.options import Parser, report
from engine.engine import Engine
from engine.errors import ForetoldError
from engine.runtime.block_runner import block_decoding
from engine.runtime.core import EngineCore
from engine.runtime.model_runner import CAPTURED_LENGTHS, MAX_ROWS, GraphedDecoder, PlainDecoding
from engine.runtime.sampling import SamplingParams

_WARM_STEPS = 6
_PAGES = 1024  # of a CPU's pools
_NAMES = 24  # kernels that are told by name
_TOKEN = 7  # what steps say that requests gain where they launch nothing


class Still:
    """A graph that launches nothing."""

    def replay(self) -> None:
        """Nothing."""


class Operations(TorchDispatchMode):
    """Counts torch operations that reach the dispatcher; views launch nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def use_captured_runners(core: EngineCore) -> None:
    """Give a CPU's engine the runners that it has on a GPU, without graphs, and pools that neither grow nor move pages in the middle of a text."""
    for pool in filter(None, (core.pool, core.draft_pool)):
        pool.resize(max(pool.num_pages, min(pool.max_pages, _PAGES)))
        pool.settle = lambda sequence: None  # type: ignore[method-assign]
    runner = GraphedDecoder(core.target, core.pool, capture=False)
    source: DraftSource | None = core.source
    if source is not None:
        cached = None if source.cached_decoder is None else GraphedDecoder(source.cached_decoder, core.draft_pool, capture=False)  # type: ignore[arg-type]
        core.drafter = source.drafter(runner, core.draft_pool, cached=cached, deterministic=core.deterministic)
    scheduler = core.scheduler
    scheduler.target, scheduler.drafter, scheduler.plain = runner, core.drafter, PlainDecoding(runner)
    scheduler.blocks = block_decoding(runner, core.drafter)
    scheduler.drafting = SpanPolicy(scheduler.drafting.costs, ngrams=False, lengths=CAPTURED_LENGTHS, most_rows=MAX_ROWS)


def still(core: EngineCore) -> None:
    """Let every captured step launch nothing, those built from now on as well, and say that a request gains one draft and one token of the target's, or
    one token without drafts; and a prompt's pass, that no token is likelier than another."""
    blocks, runner = core.scheduler.blocks, core.scheduler.target
    assert blocks is not None and isinstance(runner, GraphedDecoder)
    build_block = blocks._build

    def still_block(block: Any) -> Any:
        block.graph = Still()
        block.out.fill_(_TOKEN)
        block.out[:, 0] = min(2, block.key.length + 1)
        return block

    def still_step(step: Any) -> Any:
        step.graph = Still()
        if step.drawn is not None:
            step.drawn.fill_(_TOKEN)
        if step.buffers.logits is not None:
            step.buffers.logits.zero_()
        return step

    def still_steps(of: GraphedDecoder) -> None:
        build = of._build
        for step in of._steps.values():
            still_step(step)
        of._build = lambda key, weights: still_step(build(key, weights))  # type: ignore[method-assign]

    for block in blocks._blocks.values():
        still_block(block)
    blocks._build = lambda key: still_block(build_block(key))  # type: ignore[method-assign]
    for own in filter(None, (runner, blocks.draft)):
        still_steps(own)


def decoding(core: EngineCore, prompts: Sequence[list[int]], length: int, new_tokens: int) -> list[Any]:
    """Requests of which each has its first tokens, so that all of the next steps decode."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, draft_length=length)
    requests = [core.submit(core.open_sequence_state(), prompt, params, owns_cache=True) for prompt in prompts]
    while any(request.num_uncomputed for request in requests):
        core.step()
    for _ in range(_WARM_STEPS):
        core.step()
    return requests


def with_steps(
    core: EngineCore, prompts: Sequence[list[int]], length: int, count: int, within: Callable[[], AbstractContextManager[Any]]
) -> Any:
    """Run `count` decode steps inside what `within` opens; returns that."""
    requests = decoding(core, prompts, length, (count + 2 * _WARM_STEPS) * (length + 1) + 32)
    with within() as found:
        for _ in range(count):
            core.step()
        if core.device.type == "cuda":
            torch.cuda.synchronize()
    assert all(request.finish_reason is None for request in requests), "a request ended within the steps that are measured"
    for request in requests:
        core.abandon(request)
    return found


def host_part(core: EngineCore, prompts: Sequence[list[int]], length: int, count: int, hotspots: int) -> dict[str, Any]:
    """`host_us` and `host_calls` of the module."""
    for request in decoding(core, prompts, length, 32 * (length + 1)):  # the steps are there
        core.abandon(request)
    still(core)
    times = []
    for _ in range(5):
        requests = decoding(core, prompts, length, (count + 2 * _WARM_STEPS) * (length + 1) + 32)
        began = time.process_time()
        for _ in range(count):
            core.step()
        times.append(1e6 * (time.process_time() - began) / count)
        for request in requests:
            core.abandon(request)
    operations = with_steps(core, prompts, length, count, Operations)
    if hotspots:
        pstats.Stats(with_steps(core, prompts, length, count, cProfile.Profile), stream=sys.stderr).sort_stats("tottime").print_stats(
            hotspots
        )
    calls = {name: round(number / count, 2) for name, number in operations.counts.most_common()}
    return {"host_us": round(min(times), 1), "host_median_us": round(sorted(times)[2], 1), "host_calls": calls}


def joining(
    core: EngineCore, prompts: Sequence[list[int]], length: int, count: int, every: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Medians over `count` steps, in microseconds of `clock`, of steps that only decode, that run a prompt, and that come after such a one."""
    batch, submitted = len(prompts), 0
    took: dict[str, list[float]] = {"decoding": [], "prompt": [], "after": []}

    def submit() -> None:
        nonlocal submitted
        # of the first ones, one ends every so many steps; two tokens a step, or one without drafts
        new_tokens = every * (1 + min(length, 1)) * (1 + min(submitted, batch)) + 2
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, draft_length=length)
        core.submit(core.open_sequence_state(), prompts[submitted % batch], params, owns_cache=True)
        submitted += 1

    scheduler, kind = core.scheduler, "prompt"
    for number in range(_WARM_STEPS + count):
        while len(scheduler.running) + len(scheduler.waiting) < batch:
            submit()
        new = bool(scheduler.waiting) or any(request.num_uncomputed for request in scheduler.running)
        kind = "prompt" if new else "after" if kind == "prompt" else "decoding"
        began = clock()
        core.step()
        if number >= _WARM_STEPS:
            took[kind].append(1e6 * (clock() - began))
    for request in [*scheduler.running, *scheduler.waiting]:
        core.abandon(request)
    return {name: round(sorted(own)[len(own) // 2], 1) for name, own in took.items() if own} | {"prompts": len(took["prompt"])}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of what spans (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def device_part(core: EngineCore, prompts: Sequence[list[int]], length: int, count: int) -> dict[str, Any]:
    """The figures of the module that need a GPU."""
    with_steps(core, prompts, length, count, nullcontext)
    requests = decoding(core, prompts, length, (count + 2 * _WARM_STEPS) * (length + 1) + 32)
    began = moment(core.device)
    for _ in range(count):
        core.step()
    step_us = 1e6 * (moment(core.device) - began) / count
    for request in requests:
        core.abandon(request)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    profile = with_steps(core, prompts, length, count, lambda: torch.profiler.profile(activities=activities))
    kernels: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    ran: list[tuple[float, float]] = []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += event.time_range.elapsed_us()
            numbers[event.name] += 1
            ran.append((event.time_range.start, event.time_range.end))
        elif event.name.startswith("cuda"):
            calls[event.name] += 1
    busy_us, profiled_us = covered(ran) / count, (max(end for _, end in ran) - min(start for start, _ in ran)) / count
    return {
        "step_us": round(step_us, 1), "busy_us": round(busy_us, 1), "gap_us": round(step_us - busy_us, 1), "profiled_us": round(profiled_us, 1),
        "kernels_a_step": round(sum(numbers.values()) / count, 1),
        "kernels": {name: {"count": round(numbers[name] / count, 2), "us": round(us / count, 2)} for name, us in kernels.most_common(_NAMES)},
        "calls": {name: round(number / count, 2) for name, number in calls.most_common()},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a user's mistake."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--draft", metavar="DIR|trunk", help="another draft than the pair's own, a trained draft head for one")
    parser.add_argument("--batches", default="1,8,32", metavar="B,B")
    parser.add_argument("--lengths", default="0,2", metavar="K,K", help="fixed numbers of drafts; 0: plain decoding")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="prompts cut to so many tokens (default: whole ones)")
    parser.add_argument("--steps", type=int, default=40, help="that are measured at a time")
    parser.add_argument("--join-every", type=int, metavar="N", help="steps after which a request ends and another one joins")
    parser.add_argument("--hotspots", type=int, default=0, metavar="N", help="functions of the host's part to print")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json-out", type=Path, metavar="FILE")
    try:
        args = parser.parse_args(arguments)
        document: dict[str, Any] = {"command": command_line("gpu/profile_steps.py", arguments)}
        for batch in map(int, args.batches.split(",")):
            for length in map(int, args.lengths.split(",")):
                # a CPU's bf16 weights are laid out for its own products, which the runners of a GPU do not know
                dtype = "bfloat16" if torch.cuda.is_available() and args.device != "cpu" else "float32"
                engine = Engine.from_pair(
                    args.pair, draft=args.draft, device=args.device, dtype=dtype, max_batch=batch, pool_tokens=1 << 16, prefix_sharing=False
                )
                core, gpu = engine.core, engine.device.type == "cuda"
                texts = [engine.encode([{"role": "user", "content": text}]) for text in KINDS["chat"]]
                prompts = [texts[i % len(texts)][: args.prompt_tokens] for i in range(batch)]
                if not gpu:
                    use_captured_runners(core)
                name = torch.cuda.get_device_name() if gpu else "cpu"
                document |= {"pair": args.pair, "draft": core.drafter_name, "device": name, "torch": torch.__version__}
                row = {"batch": batch, "draft_length": length}
                row |= device_part(core, prompts, length, args.steps) if gpu else {}
                several = 5 * args.join_every if args.join_every else 0  # joins, at least
                if gpu and several:
                    joining(core, prompts, length, several, args.join_every, time.perf_counter)  # the steps are there
                    row["joining_us"] = joining(core, prompts, length, several * 8, args.join_every, time.perf_counter)
                row |= host_part(core, prompts, length, args.steps, args.hotspots)
                if several:
                    row["joining_host_us"] = joining(core, prompts, length, several * 8, args.join_every, time.process_time)
                document.setdefault("rows", []).append(row)
                print(json.dumps(row), flush=True)
                if args.json_out:
                    args.json_out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except ForetoldError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
