"""What a speculative step costs on a GPU, and what acceptance it needs: random weights of named shapes, whose drafts are hardly ever accepted.

    python scripts/bench/speculation_costs.py --shape qwen2.5-1.5b --draft qwen2.5-0.5b --batches 1,8,32 --lengths 1,2,4 --json-out costs.json

For every batch and draft length k, in milliseconds: the captured step alone (`graph_ms`), of it the verification of k + 1 rows (`verify_ms`, a captured
step of its own) and the rest (`draft_ms`: k passes with their draws, acceptance); the step through `Engine.generate` (`step_ms`); the difference is the
host's gap. `needed_acceptance`: the chance of each draft, given those before, at which tokens a second are 1, 1.35 and 1.8 times those of plain
decoding (measured in the same run); None where no acceptance is enough. `itself`: the target drafts for itself, so that nearly all is accepted: a check
of the whole path at an imposed acceptance. `repeat`: a prompt that repeats itself under n-gram drafts (random weights do not repeat it: what trying
costs). `ttft`: a prompt of --prefill tokens through the engine and through the target's own forward pass.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.decode_profile import SHAPES, moment, prompts_of, random_decoder, read_bytes, read_gb_per_s
from bench.document import command_line, measured_on
from bench.full_batches import full_batch
from bench.throughput_runs import KINDS
from draft.policy import expected_tokens
from draft.seen import SeenByNamespace
from draft.source import NgramSource
from engine.engine import Engine
from engine.model.decoder import Decoder, forward_reserved
from engine.runtime.model_runner import GraphedDecoder
from engine.runtime.sampling import SamplingParams

CONTEXT = 256


def needed_acceptance(length: int, step_ms: float, plain_ms: float, gain: float) -> float | None:
    """The acceptance at which blocks of `length` drafts in steps of step_ms give `gain` times the tokens a second of steps of plain_ms."""
    wanted = gain * step_ms / plain_ms
    if wanted > length + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(length, middle) < wanted else (low, middle)
    return high


def generate_ms(engine: Engine, prompts: list[list[int]], new: int, length: int, **sampling: Any) -> tuple[float, float, float]:
    """(milliseconds of a step, tokens a request gains in one, tokens a second), decoding alone; the median of three runs after one that captures."""
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, draft_length=length, **sampling)
    engine.generate(prompts, params)
    found = []
    for _ in range(3):
        results = engine.generate(prompts, params)
        seconds = max(r.decode_s for r in results)
        steps = max(r.speculation.steps for r in results)
        found.append((1e3 * seconds / steps, sum(r.speculation.tokens_per_step for r in results) / len(results),
                      sum(r.new_tokens - 1 for r in results) / seconds))  # fmt: skip
    return sorted(found)[1]


@torch.inference_mode()
def replay_ms(run: Any, device: torch.device, count: int = 30) -> float:
    """Milliseconds of one call of `run`, which launches a captured step."""
    for _ in range(3):
        run()
    began = moment(device)
    for _ in range(count):
        run()
    return 1e3 * (moment(device) - began) / count


@torch.inference_mode()
def verify_ms(engine: Engine, batch: int, rows: int) -> float:
    """A captured step of `rows` new tokens of each request over contexts of CONTEXT tokens."""
    runner = engine.core.scheduler.target
    if not isinstance(runner, GraphedDecoder):
        return float("nan")
    sequences = [engine.core.pool.new_sequence(CONTEXT + rows) for _ in range(batch)]
    step = runner.step(batch, rows, max(len(s.pages) for s in sequences), 0, runner.config.num_layers, (), True)
    step.fill([CONTEXT] * batch, [rows] * batch, runner.tables.rows(sequences), runner.pool.page_size)
    took = replay_ms(lambda: runner.replay(step), engine.device)
    for sequence in sequences:
        sequence.free()
    return took


def block_ms(engine: Engine, batch: int, length: int) -> float:
    """The captured speculative step that a generation has just used, replayed over what its state holds (positions go on to their limits)."""
    blocks = engine.core.scheduler.blocks
    if blocks is None:
        return float("nan")
    found = [block for key, block in blocks._blocks.items() if key.length == length and key.batch >= batch and block.graph is not None]
    if not found:
        return float("nan")
    with torch.inference_mode():
        blocks.state.of("length", batch).fill_(CONTEXT)
        return replay_ms(found[-1].graph.replay, engine.device, 10)


@torch.inference_mode()
def ttft(target: Decoder, tokens: int, chunks: list[int]) -> dict[str, float]:
    """Milliseconds to the first token of a prompt through engines with several chunk sizes, and of the target's own pass with its last logits."""
    [prompt] = prompts_of(1, tokens, target.config.vocab_size)
    pool = target.new_pool(-(-tokens // 64) + 1)
    ids = torch.tensor(prompt, device=target.device)
    found = {}

    def alone() -> None:
        sequence = pool.new_sequence()
        forward_reserved(target, ids, [sequence], [tokens], logits="last").logits.argmax(-1).tolist()
        sequence.free()

    def median_ms(run: Any) -> float:
        times = []
        for _ in range(7):
            began = moment(target.device)
            run()
            times.append(moment(target.device) - began)
        return 1e3 * sorted(times[2:])[2]

    found["forward_ms"] = median_ms(alone)
    for chunk in chunks:
        engine = Engine(target, draft=None, pool_tokens=2 * tokens, prefix_sharing=False, **({"prefill_chunk": chunk} if chunk else {}))
        params = SamplingParams(max_new_tokens=1, ignore_eos=True, draft_length=0)
        found["engine_ms" if not chunk else f"engine_chunk_{chunk}_ms"] = median_ms(partial(engine.generate, [prompt], params))
        del engine
    return found


def pair_rates(args: argparse.Namespace, command: str) -> int:
    """Tokens a second of a pair through one engine with its draft and one with n-grams; a length of 0 is plain decoding.

    Common steps are captured before, as a server does (`captured`). Turns of all modes alternate, each on prompts of its own, and nothing is kept of
    the turns before; the first two are not counted. `over_plain` is the median over turns.

    A batch is served to its end: where drafts are accepted differently its last requests run alone. With --requests N it is kept full (`full_batch`),
    and what counts is the time in which it is; prompts run in it, so plain decoding is then that of the engine with n-grams, which runs no draft head's
    layers over them. `same_texts`: share of texts that are plain decoding's to the last token (greedy; the order of sums
    differs between blocks, outside of deterministic mode).
    """
    options: dict[str, Any] = {"max_batch": 64, "prefix_sharing": False}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = Engine.from_pair(args.pair, draft=args.pair_draft, device=device, pool_tokens=1 << 17, **options)
    ngrams = Engine(loaded.core.target, loaded.tokenizer, draft=NgramSource(), pool_tokens=1 << 16, **options)
    plain = ngrams if args.requests else loaded
    rows: list[dict[str, Any]] = []
    captured = {}
    for name, engine in (("draft", loaded), ("ngram", ngrams)):
        if name not in args.sources and engine is not plain:
            continue
        engine.core.measure_costs()
        found_steps = engine.core.capture_steps()
        captured[name] = found_steps and found_steps._asdict()
    print("captured", json.dumps(captured), flush=True)
    for kind, texts in KINDS.items():
        ids = [loaded.encode([{"role": "user", "content": text}]) for text in texts]
        for batch, temperature in ((int(n), t) for n in args.batches.split(",") for t in ((0.0, 1.0) if args.sampled else (0.0,))):
            modes: list[tuple[str, Engine, Any]] = [
                ("plain", plain, 0), *(("draft", loaded, int(k)) for k in args.lengths.split(",") if k.strip("0") and batch * (int(k) + 1) <= 128),
                ("draft", loaded, "auto"), ("ngram", ngrams, "auto"),
            ]  # fmt: skip
            modes = [mode for mode in modes if mode[0] in ("plain", *args.sources)]
            found: list[list[tuple[float, list[Any]]]] = [[] for _ in modes]
            count = max(batch, args.requests)
            for turn in range(args.turns + 2):
                prompts = [ids[(turn * count + i) % len(ids)] for i in range(count)]
                for own, (_, engine, length) in zip(found, modes, strict=True):
                    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, draft_length=length, temperature=temperature)
                    engine.core.scheduler.drafting.seen = SeenByNamespace()
                    if count > batch:
                        rate, _, results = full_batch(engine, prompts, batch, args.new_tokens, params)
                    else:
                        results = engine.generate(prompts, params)
                        rate = sum(r.new_tokens - 1 for r in results) / max(r.decode_s for r in results)
                    own += [(rate, results)] if turn > 1 else []
            for own, (name, _, length) in zip(found, modes, strict=True):
                s = [r.speculation for _, results in own for r in results]
                over = sorted(rate / without for (rate, _), (without, _) in zip(own, found[0], strict=True))
                pairs = [
                    (r.token_ids, p.token_ids)
                    for (_, mine), (_, undrafted) in zip(own, found[0], strict=True)
                    for r, p in zip(mine, undrafted, strict=True)
                ]
                rows.append({
                    "prompts": kind, "batch": batch, "requests": count, "temperature": temperature, "drafts": name, "draft_length": length,
                    "tokens_per_s": sorted(rate for rate, _ in own)[len(own) // 2], "over_plain": over[len(over) // 2],
                    "over_plain_least": over[0],
                    "tokens_per_step": sum(x.new_tokens for x in s) / sum(x.steps for x in s),
                    "acceptance": sum(x.accepted for x in s) / max(1, sum(x.proposed for x in s)),
                    "drafts_per_step": sum(x.proposed for x in s) / sum(x.steps for x in s),
                    "same_texts": sum(a == b for a, b in pairs) / len(pairs),
                    "ttft_ms": 1e3 * sorted(max(r.ttft_s for r in results) for _, results in own)[len(own) // 2],
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
            if args.json_out:
                about = measured_on(torch.device(device)) | {"command": command, "pair": args.pair}
                report = about | {"draft": loaded.core.drafter_name, "captured": captured, "rows": rows}
                args.json_out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=sorted(SHAPES))
    parser.add_argument("--draft", default="qwen2.5-0.5b", choices=sorted(SHAPES))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--lengths", default="1,2,4", help="fixed numbers of drafts; 0 with --pair: automatic ones alone")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument(
        "--pair", help="instead: tokens a second of a real pair on chat and code prompts, plain, with its draft and with n-grams"
    )
    parser.add_argument(
        "--pair-draft", metavar="DIR|trunk", help="with --pair: another draft than the pair's own, a trained draft head for one"
    )
    parser.add_argument("--sampled", action="store_true", help="also at temperature 1 (rejection sampling)")
    parser.add_argument("--sources", nargs="+", default=["draft", "ngram"], choices=["draft", "ngram"], help="of a pair's drafts")
    parser.add_argument("--turns", type=int, default=5, help="of every mode of a pair")
    parser.add_argument(
        "--requests",
        type=int,
        default=0,
        metavar="N",
        help="of a pair in all, of which a batch runs at a time, kept full (default: one batch)",
    )
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    if args.requests and not args.pair:
        parser.error("--requests is for a pair (give --pair)")
    if args.requests and args.requests <= max(map(int, args.batches.split(","))):
        parser.error("--requests that keep a batch full are more than it takes (four times as many, say)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.pair:
        return pair_rates(args, command_line("bench/speculation_costs.py", argv))
    target, draft = random_decoder(args.shape, device, dtype), random_decoder(args.draft, device, dtype, seed=1)
    bandwidth = read_gb_per_s(device)
    report: dict[str, Any] = {
        **measured_on(device), "command": command_line("bench/speculation_costs.py", argv), "shape": args.shape, "draft": args.draft,
        "read_gb_per_s": bandwidth, "read_bound_ms": read_bytes(target) / bandwidth / 1e6, "draft_read_bound_ms": read_bytes(draft) / bandwidth / 1e6,
        "rows": [], "repeat": [],
    }  # fmt: skip

    def keep(name: str, value: Any) -> None:
        report[name] = report[name] + [value] if isinstance(report.get(name), list) else value
        print(name, json.dumps(value), flush=True)
        if args.json_out:
            args.json_out.write_text(json.dumps(report, indent=1) + "\n")

    keep("ttft", ttft(target, args.prefill, [0, 512, 2048, args.prefill]))
    engine = Engine(target, draft=draft, max_batch=128, pool_tokens=1 << 17, prefix_sharing=False)
    for batch in map(int, args.batches.split(",")):
        prompts = prompts_of(batch, 128, target.config.vocab_size)
        plain_ms, _, plain_rate = generate_ms(engine, prompts, args.new_tokens, 0)
        keep(
            "rows",
            {"batch": batch, "draft_length": 0, "step_ms": plain_ms, "tokens_per_s": plain_rate, "graph_ms": verify_ms(engine, batch, 1)},
        )
        for length in map(int, args.lengths.split(",")):
            if batch * (length + 1) > 128:
                continue
            step_ms, gained, rate = generate_ms(engine, prompts, args.new_tokens, length)
            verified, graph = verify_ms(engine, batch, length + 1), block_ms(engine, batch, length)
            row = {
                "batch": batch, "draft_length": length, "step_ms": step_ms, "tokens_per_step": gained, "tokens_per_s": rate,
                "graph_ms": graph, "verify_ms": verified, "draft_ms": graph - verified,
                "needed_acceptance": {str(gain): needed_acceptance(length, step_ms, plain_ms, gain) for gain in (1.0, 1.35, 1.8)},
            }  # fmt: skip
            if args.sampled:
                row["sampled_step_ms"] = generate_ms(engine, prompts, args.new_tokens, length, temperature=1.0)[0]
            keep("rows", row)
    del engine
    itself = Engine(target, draft=target, max_batch=8, pool_tokens=1 << 15, prefix_sharing=False)
    step_ms, gained, rate = generate_ms(itself, prompts_of(1, 128, target.config.vocab_size), args.new_tokens, 4)
    keep("itself", {"batch": 1, "draft_length": 4, "step_ms": step_ms, "tokens_per_step": gained, "tokens_per_s": rate})
    del itself
    ngrams = Engine(target, draft=NgramSource(), max_batch=32, pool_tokens=1 << 15, prefix_sharing=False)
    for batch in (1, 8, 32):
        prompts = [prompt * 4 for prompt in prompts_of(batch, 64, target.config.vocab_size)]
        plain = generate_ms(ngrams, prompts, 192, 0)
        for length in (4, "auto"):
            if length == "auto" or batch * (length + 1) <= 128:
                step_ms, gained, rate = generate_ms(ngrams, prompts, 192, length)
                row = {"batch": batch, "draft_length": length, "step_ms": step_ms, "tokens_per_step": gained, "tokens_per_s": rate}
                keep("repeat", row | {"over_plain": rate / plain[2]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
