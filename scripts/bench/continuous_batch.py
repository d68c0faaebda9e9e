"""Tokens a second of requests that come all at once and of which a batch runs at a time, ours or vLLM's: the same random shape, prompts and lengths.

    python scripts/bench/continuous_batch.py --shape qwen2.5-1.5b --batches 8,32 --json-out ours.json
    python scripts/bench/continuous_batch.py --engine vllm --folder FOLDER --batches 32 --json-out vllm.json     (shape_folder.py makes FOLDER)

Prompts and texts have lengths drawn evenly from --prompt-tokens and --new-tokens, by a fixed seed: when a request ends another one takes its place, so
prompts run beside others' decoding all the time. A row for each batch and span of prompts: `tokens_per_s`, all new tokens over the seconds from the
first submission to the last token, the median of --repeats after one that is not counted; it is checked that every request came back with as many
tokens as it asked for. Of ours also the median and the 99th percentile of `ttft_ms` (with the wait for a place) and of `token_ms`, a request's seconds
of decoding over its tokens. vLLM needs one process for each batch. Greedy, no prefix is shared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.document import command_line

Results = list[tuple[int, float, float]]  # (new tokens, seconds to the first one, seconds from there) of each request


def drawn(count: int, prompt_tokens: tuple[int, int], new_tokens: tuple[int, int], vocab: int) -> tuple[list[list[int]], list[int]]:
    """(prompts, new tokens of each), the same in every run."""
    draw = random.Random(count)
    lengths = [draw.randint(*prompt_tokens) for _ in range(count)]
    return [[draw.randrange(vocab // 2) for _ in range(n)] for n in lengths], [draw.randint(*new_tokens) for _ in range(count)]


def ours(args: argparse.Namespace, batch: int) -> tuple[int, Callable[[list[list[int]], list[int]], Results]]:
    """(vocabulary, what serves requests) of an engine on the device there is, its steps captured."""
    from bench.decode_profile import random_decoder
    from engine.engine import Engine
    from engine.runtime.sampling import SamplingParams

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = random_decoder(args.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    engine = Engine(target, draft=None, max_batch=batch, pool_tokens=args.pool_tokens, prefix_sharing=False)
    engine.core.capture_steps()

    def serve(prompts: list[list[int]], lengths: list[int]) -> Results:
        params = [SamplingParams(max_new_tokens=n, ignore_eos=True, draft_length=0) for n in lengths]
        return [(r.new_tokens, r.ttft_s, r.decode_s) for r in engine.generate(prompts, params)]

    return target.config.vocab_size, serve


def theirs(args: argparse.Namespace, batch: int) -> tuple[int, Callable[[list[list[int]], list[int]], Results]]:
    """The same of vLLM, over a folder with a shape's configuration."""
    import vllm

    model = vllm.LLM(
        model=str(args.folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=batch, max_model_len=4096,
        gpu_memory_utilization=0.5, enable_prefix_caching=False,
    )  # fmt: skip
    vocab = json.loads((args.folder / "config.json").read_text())["vocab_size"]

    def serve(prompts: list[list[int]], lengths: list[int]) -> Results:
        params = [vllm.SamplingParams(max_tokens=n, ignore_eos=True, temperature=0.0, detokenize=False) for n in lengths]
        found = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [(len(own.outputs[0].token_ids), 0.0, 0.0) for own in found]

    return vocab, serve


def of_sorted(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row_of(
    args: argparse.Namespace, batch: int, prompt_tokens: tuple[int, int], vocab: int, serve: Callable[[list[list[int]], list[int]], Results]
) -> dict[str, Any]:
    """A row of the module."""
    prompts, lengths = drawn(args.requests or 4 * batch, prompt_tokens, args.new_tokens, vocab)
    rates: list[float] = []
    found: Results = []
    for _ in range(args.repeats + 1):
        began = time.perf_counter()
        found = serve(prompts, lengths)
        rates.append(sum(lengths) / (time.perf_counter() - began))
        if [count for count, _, _ in found] != lengths:
            raise SystemExit(f"requests of {lengths} tokens came back with {[count for count, _, _ in found]}")
    row: dict[str, Any] = {
        "engine": args.engine, "batch": batch, "requests": len(prompts), "prompt_tokens": prompt_tokens, "new_tokens": args.new_tokens,
        "tokens_per_s": round(statistics.median(rates[1:]), 1), "rates": [round(rate, 1) for rate in rates[1:]],
    }  # fmt: skip
    if args.engine == "ours":
        waits, paces = [1e3 * ttft for _, ttft, _ in found], [1e3 * decode / max(1, count - 1) for count, _, decode in found]
        row |= {"ttft_ms": [round(of_sorted(waits, share), 2) for share in (0.5, 0.99)]}
        row |= {"token_ms": [round(of_sorted(paces, share), 3) for share in (0.5, 0.99)]}
    return row


def span(text: str) -> tuple[int, int]:
    """24-96 -> (24, 96)."""
    low, _, high = text.partition("-")
    found = int(low), int(high or low)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is no span of tokens, as 24-96 is")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["ours", "vllm"], default="ours")
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--folder", type=Path, help="of the shape, for vLLM")
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="default: four times the batch")
    parser.add_argument("--prompt-tokens", type=span, nargs="+", default=[(24, 96), (200, 800)], metavar="N-N")
    parser.add_argument("--new-tokens", type=span, default=(48, 144), metavar="N-N")
    parser.add_argument("--pool-tokens", type=int, default=1 << 17)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.engine == "vllm" and (args.folder is None or len(batches) > 1):
        parser.error("vLLM needs --folder, and one batch a process")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {"command": command_line("bench/continuous_batch.py", argv)}
    report |= {"device": name, "shape": args.shape, "rows": []}
    for batch in batches:
        vocab, serve = (ours if args.engine == "ours" else theirs)(args, batch)
        for prompt_tokens in args.prompt_tokens:
            report["rows"].append(row_of(args, batch, prompt_tokens, vocab, serve))
            print(json.dumps(report["rows"][-1]), flush=True)
            if args.json_out:
                args.json_out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
