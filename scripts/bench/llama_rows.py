"""Our decoding on a CPU beside llama.cpp's, of one model: tokens per CPU second of each, on one thread or some (--threads), in turns.

    python scripts/bench/llama_rows.py --gguf model.gguf --llama-python llama-env/bin/python --json-out llama.json

llama.cpp runs through llama-cpp-python in an environment of its own (--llama-python), greedily, from the same token ids; its bf16 file is made from
--gguf by its own quantiser, so both read the same weights. CPU seconds are those of decoding alone, user and system, of the process. Of several threads
they say nothing, as those that wait are counted, too: there the ratios are those of tokens a second of the wall, which need a quiet machine. Rows:
llama.cpp with bf16 and with the file's own format, ours plain and with drafts, with bf16 and with the file's own format. What drafts cost is measured
before, as an earlier answer does. With --first-token 512,2048 also what the first token of prompts of so many tokens takes, of this project's sources.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BF16 = 32  # llama.cpp's LLAMA_FTYPE_MOSTLY_BF16


def to_bf16(source: Path, target: Path) -> None:
    """Write a GGUF file's weights as bf16, by llama.cpp's own quantiser. Runs in llama.cpp's environment."""
    import llama_cpp  # type: ignore[import-not-found]

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = BF16, True, 1
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status:
        raise RuntimeError(f"llama.cpp could not convert {source.name}: status {status}")


def serve_llama(file: Path, context: int, threads: int) -> None:
    """Continue prompts that come as lines of JSON {"ids", "count"}: answers {"cpu_s", "wall_s", "tokens"} of decoding, and "first_cpu_s" and
    "first_wall_s" of the first token. Runs in its environment."""
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False)
    for line in sys.stdin:
        wanted = json.loads(line)
        model.reset()
        began = _clocks()
        stream = model.generate(wanted["ids"], temp=0.0, repeat_penalty=1.0, top_k=1)
        tokens = [next(stream)]
        first = _clocks()
        while len(tokens) < wanted["count"]:
            tokens.append(next(stream))
        print(json.dumps(_times(began, first, _clocks(), 1.0) | {"tokens": tokens}), flush=True)


def _clocks() -> tuple[float, float]:
    """Seconds of the process's threads, and of the wall."""
    return time.process_time(), time.perf_counter()


def _times(began: tuple[float, float], first: tuple[float, float], end: tuple[float, float], share: float) -> dict[str, float]:
    """Of a first token, and `share` times what the others took."""
    return {
        "cpu_s": (end[0] - first[0]) * share,
        "wall_s": (end[1] - first[1]) * share,
        "first_cpu_s": first[0] - began[0],
        "first_wall_s": first[1] - began[1],
    }


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, file: Path, context: int, threads: int) -> None:
        command = [str(python), __file__, "--serve", str(file), "--context", str(context), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def run(self, ids: list[int], count: int) -> dict[str, Any]:
        """See `serve_llama`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"ids": ids, "count": count}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended without an answer: check --llama-python and --gguf")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def ours(engine: Any, ids: list[int], count: int, length: int | str) -> dict[str, Any]:
    """As `serve_llama` answers; decoding is what lies beyond the first token."""
    from draft.seen import SeenByNamespace
    from engine.runtime.sampling import SamplingParams

    engine.core.scheduler.drafting.seen = SeenByNamespace()  # nothing is drafted from another way's answer to the same prompt
    params = SamplingParams(max_new_tokens=count, ignore_eos=True, draft_length=length)  # type: ignore[arg-type]
    core, tokens, number = engine.core, list[int](), 0
    began = first = _clocks()
    request = core.submit(core.open_sequence_state(), ids, params, owns_cache=True)
    for event in core.events(request):
        tokens += event.token_ids
        if not number and tokens:
            first, number = _clocks(), len(tokens)
    return _times(began, first, _clocks(), (count - 1) / max(1, len(tokens) - number)) | {"tokens": tokens}


def first_tokens(ways: dict[str, Any], ids: list[int]) -> list[dict[str, Any]]:
    """A row for each way: the median of three, in turns, of what the first token of a prompt takes."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(3):
        for name, run in ways.items():
            found[name].append(run(ids, 1))
    return [
        {
            "way": name, "prompt_tokens": len(ids), "first_token_cpu_s": statistics.median(s["first_cpu_s"] for s in samples),
            "first_token_s": statistics.median(s["first_wall_s"] for s in samples),
            "equal_to_llama_bf16": samples[0]["tokens"] == found["llama.cpp bf16"][0]["tokens"],
        }
        for name, samples in found.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", help="whose target the file is, and whose draft is used, instead of the file and --draft")
    parser.add_argument("--draft", default="trunk", help="of the file's model, as python -m engine.generate takes it")
    parser.add_argument("--gguf", type=Path, help="the model's GGUF file")
    parser.add_argument("--llama-python", type=Path, help="interpreter of an environment that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument(
        "--first-token", type=lambda text: [int(n) for n in text.split(",")], default=[], help="lengths of prompts, in tokens"
    )
    parser.add_argument("--json-out", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--convert", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, default=1024, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.convert:
        to_bf16(*args.convert)
        return 0
    if args.serve:
        serve_llama(args.serve, args.context, args.threads)
        return 0
    if args.gguf is None or args.llama_python is None:
        parser.error("give --gguf and --llama-python")
    import torch

    from bench.document import command_line
    from bench.source_prompts import source_tokens
    from bench.throughput_runs import CODE_PROMPTS, PROMPTS
    from engine.engine import Engine
    from engine.text.templates import has_template

    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "prefix_sharing": False}  # each way computes its prompts
    engine = Engine.from_pair(args.pair, **options) if args.pair else Engine.from_pretrained(args.gguf, args.draft, **options)
    quantized = Engine.from_pretrained(args.gguf, args.draft, weights="quantized", **options)
    for own in (engine, quantized):
        own.core.measure_costs()
    texts = [text for both in zip(PROMPTS, CODE_PROMPTS, strict=False) for text in both][: args.prompts]
    chat = has_template(engine.tokenizer)
    prompts = [engine.encode([{"role": "user", "content": text}] if chat else text) for text in texts]
    context = max([args.context, *(n + 64 for n in args.first_token)])
    long = source_tokens(engine, args.first_token)
    with tempfile.TemporaryDirectory() as folder:
        bf16 = Path(folder) / "bf16.gguf"
        subprocess.run([str(args.llama_python), __file__, "--convert", str(args.gguf), str(bf16)], check=True, capture_output=True)
        llamas = {
            "llama.cpp bf16": Llama(args.llama_python, bf16, context, args.threads),
            "llama.cpp file": Llama(args.llama_python, args.gguf, context, args.threads),
        }
        ways: dict[str, Any] = {name: llama.run for name, llama in llamas.items()}
        ways |= {
            "ours plain": lambda ids, count: ours(engine, ids, count, 0),
            "ours drafts": lambda ids, count: ours(engine, ids, count, "auto"),
            "ours file plain": lambda ids, count: ours(quantized, ids, count, 0),
            "ours file drafts": lambda ids, count: ours(quantized, ids, count, "auto"),
        }
        for run in ways.values():
            run(prompts[0], 24)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for number, ids in enumerate(prompts):
            for name in list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]:
                found[name].append(ways[name](ids, args.new_tokens))
        plain = {name: run for name, run in ways.items() if not name.endswith("drafts")}
        prompt_rows = [row for ids in long for row in first_tokens(plain, ids)]
        for llama in llamas.values():
            llama.close()
    rows = []
    for name, samples in found.items():
        same = [
            sum(a == b for a, b in zip(s["tokens"], o["tokens"], strict=False))
            for s, o in zip(samples, found["llama.cpp bf16"], strict=True)
        ]
        rows.append({
            "way": name, "tokens_per_cpu_s": statistics.median((args.new_tokens - 1) / s["cpu_s"] for s in samples),
            "tokens_per_s": statistics.median((args.new_tokens - 1) / s["wall_s"] for s in samples),
            "equal_to_llama_bf16": sum(same) / (len(same) * args.new_tokens),
        })  # fmt: skip
    for row in rows:
        rate = "tokens_per_cpu_s" if args.threads == 1 else "tokens_per_s"
        row["over_llama_bf16"] = row[rate] / rows[0][rate]
        row["over_llama_file"] = row[rate] / rows[1][rate]
    for row in [*rows, *prompt_rows]:
        print(json.dumps(row), flush=True)
    if args.json_out:
        document = {"pair": args.pair, "gguf": args.gguf.name, "draft": args.pair or args.draft, "threads": args.threads, "rows": rows}
        document |= {"first_tokens": prompt_rows, "command": command_line("bench/llama_rows.py", argv)}
        args.json_out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
