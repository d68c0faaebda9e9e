"""Goodput and latencies under a Poisson stream of requests at rising rates.

Requests arrive at random moments (a fixed seed names them), whether or not those before are done; each asks for --new-tokens tokens of a prompt of its
own. One thread drives the engine's core. A row a rate: requests that got their first token within --slo-ttft seconds and later ones at --slo-token
seconds each, at most, count for the goodput (requests a second; Zhong et al., "DistServe", 2024). Before a row is printed it is checked that every
request came back exactly once, with as many tokens as it asked for, that none got the text of another's prompt, and that the pools' books agree. With
--exact every greedy text must be that of its prompt alone, in deterministic arithmetic; else texts may part at near ties, and `equal_texts` counts
those that do not. On failure the exit status is 1.

    python scripts/bench_load.py --pair smollm2 --rates 0.5,1,2 --requests 24 --json-out load.json
    python scripts/bench_load.py --shape qwen2.5-1.5b+qwen2.5-0.5b --rates 4,16,64 --requests 256
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.decode_profile import SHAPES, prompts_of, random_decoder
from bench.throughput_runs import PROMPTS
from check_greedy import device_name
from codec_compare import write_json
from draft.seen import SeenByNamespace
from engine.cli.command import load, print_status, quiet_libraries, versions
from engine.cli.options import Parser, report
from engine.engine import Engine
from engine.errors import ForetoldError, InvalidOption
from engine.model.device import device_named, dtype_named
from engine.runtime.request import Request
from engine.runtime.sampling import SamplingParams


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--pair", help="a known pair")
    which.add_argument("--target", metavar="DIR", help="folder or hub id of the target")
    which.add_argument("--shape", metavar="NAME[+NAME]", help=f"random weights: target and draft of {', '.join(SHAPES)}")
    p.add_argument("--draft", metavar="DIR|trunk|ngram|none")
    p.add_argument("--rates", default="1,2,4", metavar="R,R", help="requests a second")
    p.add_argument("--requests", type=int, default=32, metavar="N", help="of each rate")
    p.add_argument("--prompt-tokens", type=int, default=64, metavar="L", help="prompts cut or repeated to L tokens")
    p.add_argument("--new-tokens", type=int, default=32, metavar="N")
    p.add_argument("--draft-length", default="auto", metavar="N|auto")
    p.add_argument("--max-batch", type=int, default=64, metavar="N")
    p.add_argument("--slo-ttft", type=float, default=2.0, metavar="S")
    p.add_argument("--slo-token", type=float, default=0.2, metavar="S")
    p.add_argument("--exact", action="store_true", help="every token as alone, in deterministic arithmetic")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--json-out", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    args.deterministic = args.exact
    try:
        args.rates = [float(rate) for rate in args.rates.split(",")]
        args.draft_length = "auto" if args.draft_length == "auto" else int(args.draft_length)
    except ValueError as error:
        raise InvalidOption(f"not a number: {error}", "check --rates and --draft-length") from None
    if not all(0 < rate < 1e6 for rate in args.rates):
        raise InvalidOption("rates are above 0", "check --rates")
    if min(args.requests, args.prompt_tokens, args.max_batch) < 1 or args.new_tokens < 2 or not min(args.slo_ttft, args.slo_token) > 0:
        raise InvalidOption("requests, prompt tokens and batch are at least 1, new tokens 2, limits above 0", "check the options")
    names = args.shape.split("+") if args.shape else []
    if len(names) > 2 or any(name not in SHAPES for name in names):
        raise InvalidOption(f"--shape cannot be {args.shape!r}", f"give one or two of {', '.join(SHAPES)}, joined by +")
    SamplingParams(max_new_tokens=args.new_tokens, draft_length=args.draft_length)
    return args


def engine_of(args: argparse.Namespace) -> Engine:
    """The engine under load, with pages for a whole batch; nothing is shared with the texts that it made alone."""
    room = args.max_batch * (args.prompt_tokens + args.new_tokens + 192)
    if args.shape:
        device = device_named(args.device)
        dtype = (
            torch.bfloat16
            if args.dtype == "auto" and device.type == "cuda"
            else dtype_named("float32" if args.dtype == "auto" else args.dtype)
        )
        target, *draft = (random_decoder(name, device, dtype, seed) for seed, name in enumerate(args.shape.split("+")))
        return Engine(
            target,
            draft=draft[0] if draft else None,
            pool_tokens=room,
            max_batch=args.max_batch,
            deterministic=args.exact,
            prefix_sharing=False,
        )
    loaded = load(args, pool_tokens=64)  # the engine under load has pools of its own
    core = loaded.core
    return Engine(
        core.target,
        loaded.tokenizer,
        draft=core.source,
        pool_tokens=room,
        max_batch=args.max_batch,
        deterministic=args.exact,
        prefix_sharing=False,
        target_dir=core.config.target_dir,
    )


def prompts(engine: Engine, args: argparse.Namespace) -> list[list[int]]:
    """A prompt for each request; no two are the same."""
    vocab = engine.core.target.config.vocab_size
    if engine.tokenizer is None:
        return prompts_of(args.requests, args.prompt_tokens, vocab)
    found = []
    for number in range(args.requests):
        own = engine.encode(f"{number}. {PROMPTS[number % len(PROMPTS)]}")
        found.append((own * -(-args.prompt_tokens // len(own)))[: args.prompt_tokens])
    return found


def stream(
    engine: Engine, ids: list[list[int]], rate: float, args: argparse.Namespace
) -> tuple[list[Request], list[float], list[int], float]:
    """Serve the prompts as they arrive: (requests, seconds of arrival, number of times each was returned as finished, seconds in all)."""
    rng, core, at = random.Random(args.seed), engine.core, 0.0
    arrivals = []
    for _ in ids:
        at += rng.expovariate(rate)
        arrivals.append(at)
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, draft_length=args.draft_length)
    requests: list[Request] = []
    returned: dict[int, int] = {}
    began = time.perf_counter()
    while len(requests) < len(ids) or not core.scheduler.idle:
        now = time.perf_counter() - began
        while len(requests) < len(ids) and arrivals[len(requests)] <= now:
            own = ids[len(requests)]
            requests.append(core.submit(core.open_sequence_state(), own, params, owns_cache=True))
        if core.scheduler.idle:
            time.sleep(min(0.01, max(0.0, arrivals[len(requests)] - now)))
            continue
        for request in core.scheduler.step():
            returned[id(request)] = returned.get(id(request), 0) + 1
    return requests, [began + arrival for arrival in arrivals], [returned.get(id(r), 0) for r in requests], time.perf_counter() - began


def faults(engine: Engine, requests: list[Request], returned: list[int], alone: list[list[int]], args: argparse.Namespace) -> list[str]:
    """What went wrong; nothing, if every request came back once with the text it has alone."""
    found = []
    for number, (request, times, text) in enumerate(zip(requests, returned, alone, strict=True)):
        new = request.token_ids[request.prompt_tokens :]
        if request.error is not None or times != 1 or len(new) != args.new_tokens:
            found.append(f"request {number} came back {times} times with {len(new)} tokens and {request.error}")
        elif args.exact and new != text:
            found.append(f"request {number} has another text than alone")
        elif new[0] != text[0] and new in (other for i, other in enumerate(alone) if i != number):
            found.append(f"request {number} has the text of another")
    for pool in (engine.core.pool, engine.core.draft_pool):
        if pool is not None:
            pool.check_integrity()
    return found


def row(
    requests: list[Request], arrivals: list[float], rate: float, seconds: float, alone: list[list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one rate."""
    ttft = [r.first_token_at - arrival for r, arrival in zip(requests, arrivals, strict=True)]
    each = [(r.last_token_at - r.first_token_at) / (r.num_new - 1) for r in requests]
    good = sum(first <= args.slo_ttft and later <= args.slo_token for first, later in zip(ttft, each, strict=True))
    texts = [r.token_ids[r.prompt_tokens :] for r in requests]
    return {
        "rate": rate,
        "requests": len(requests),
        "seconds": seconds,
        "goodput": good / seconds,
        "good_share": good / len(requests),
        "tokens_per_s": sum(r.num_new for r in requests) / seconds,
        **{f"ttft_p{q}_s": quantile(ttft, q) for q in (50, 99)},
        **{f"token_p{q}_s": quantile(each, q) for q in (50, 99)},
        "acceptance_rate": sum(r.metrics.accepted for r in requests) / max(1, sum(r.metrics.proposed for r in requests)),
        "proposed": sum(r.metrics.proposed for r in requests),
        "equal_texts": sum(text == own for text, own in zip(texts, alone, strict=True)),
    }


def quantile(values: Sequence[float], percent: int) -> float:
    """Of few values the largest that is not above."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        quiet_libraries()
        engine = engine_of(args)
        captured = engine.core.capture_steps()
        ids = prompts(engine, args)
        params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, draft_length=0)
        alone = [engine.generate([own], params)[0].token_ids for own in ids]
        warm = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, draft_length=args.draft_length)
        engine.generate(ids[: min(8, len(ids))], warm)  # costs and kernels
        captured_after = None if captured is None else engine.core.capture_steps(0.0)
        document: dict[str, Any] = {
            "device": device_name(engine),
            "captured": captured and captured._asdict(),
            "captured_before_load": captured_after and captured_after.steps,
            "threads": torch.get_num_threads(),
            "pair": args.pair or args.shape or Path(args.target).name,
            "drafter": engine.drafter_name,
            **{name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "max_batch", "slo_ttft", "slo_token", "seed")},
            "versions": versions(),
            "rows": [],
        }
        print(
            f"{'rate/s':>8}{'goodput/s':>11}{'good':>7}{'tokens/s':>10}{'ttft p50':>10}{'p99':>8}{'token p50':>11}{'p99':>8}{'accepted':>10}"
        )
        for rate in args.rates:
            engine.core.scheduler.drafting.seen = SeenByNamespace()  # nothing is drafted from earlier answers to the same prompts
            requests, arrivals, returned, seconds = stream(engine, ids, rate, args)
            if wrong := faults(engine, requests, returned, alone, args):
                print_status(f"error: at {rate:g} requests a second: {'; '.join(wrong[:3])}")
                return 1
            r = row(requests, arrivals, rate, seconds, alone, args)
            document["rows"].append(r)
            print(
                f"{rate:8g}{r['goodput']:11.2f}{r['good_share']:7.0%}{r['tokens_per_s']:10.1f}{r['ttft_p50_s']:10.3f}{r['ttft_p99_s']:8.3f}"
                f"{r['token_p50_s']:11.4f}{r['token_p99_s']:8.4f}{r['acceptance_rate']:10.2f}",
                flush=True,
            )
            if args.json_out:
                write_json(args.json_out, document)
    except ForetoldError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
