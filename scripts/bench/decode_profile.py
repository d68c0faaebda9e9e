"""Decode speed of the product path on random weights of a named shape, beside the time that reading the weights once takes.

    python scripts/bench/decode_profile.py --shape qwen2.5-1.5b --draft qwen2.5-0.5b --batches 1,8,32 --json-out decode.json

Everything goes through `Engine.generate`. Before anything is timed, texts with captured steps are compared with the decoder's own passes: the share
of equal tokens (random weights leave no near ties in float32; in bfloat16 a rounding may turn one) and the logits' distance on a fixed prefix.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.document import RowDocument, command_line, measured_on
from engine.engine import Engine
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder, forward_reserved
from engine.runtime.model_runner import GraphedDecoder
from engine.runtime.sampling import SamplingParams

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-1.5b": ("Qwen2Config", {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                                     "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True}),
    "qwen2.5-0.5b": ("Qwen2Config", {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                                     "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True}),
    "llama-8b": ("LlamaConfig", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                                 "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False}),
    "smollm2": ("LlamaConfig", {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                                "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}),
    "gemma3-1b": ("Gemma3TextConfig", {"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
                                       "head_dim": 256, "intermediate_size": 6912, "vocab_size": 262144, "sliding_window": 512}),
    "mistral-7b": ("MistralConfig", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                                     "intermediate_size": 14336, "vocab_size": 32000, "sliding_window": 4096, "tie_word_embeddings": False}),
    "tiny-window": ("Gemma3TextConfig", {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
                                         "head_dim": 32, "intermediate_size": 256, "vocab_size": 512, "sliding_window": 64}),
    "tiny": ("Qwen2Config", {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                             "intermediate_size": 256, "vocab_size": 512, "tie_word_embeddings": True}),
}  # fmt: skip


def random_decoder(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0, *, positions: int = 32768) -> Decoder:
    """A decoder of a named shape whose next tokens depend on its context: usual random weights, norms of 1. positions: most that it holds."""
    import transformers

    kind, sizes = SHAPES[shape]
    config = getattr(transformers, kind)(
        **sizes, max_position_embeddings=positions, rms_norm_eps=1e-6, eos_token_id=None, bos_token_id=None
    )
    return Decoder.from_config(DecoderConfig.from_hf(config), dtype=dtype, device=device, seed=seed)


def read_gb_per_s(device: torch.device) -> float:
    """Bandwidth of reading: the median of sums over 2 GiB, in 1e9 bytes a second."""
    data = torch.ones(1 << 30 if device.type == "cuda" else 1 << 26, dtype=torch.bfloat16, device=device).view(torch.int32)
    times = []
    for _ in range(12):
        began = moment(device)
        data.amax()
        times.append(moment(device) - began)
    return data.nbytes / sorted(times[2:])[5] / 1e9


def moment(device: torch.device) -> float:
    """Now, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_bytes(decoder: Decoder) -> int:
    """Weights that one step reads: all of them, the embedding once as the head."""
    c = decoder.config
    return decoder.weight_bytes - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size * decoder.dtype.itemsize)


def prompts_of(batch: int, length: int, vocab: int) -> list[list[int]]:
    """Random token ids, another prompt for each request; a larger batch begins with a smaller one's."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, min(vocab, 100_000), (batch, length), generator=generator).tolist()


def rate(engine: Engine, prompts: list[list[int]], new: int, draft_length: int, repeats: int) -> tuple[float, float, Any]:
    """(tokens a second from request to last token, tokens a second beyond the first ones, a result).

    The second is extra tokens over extra seconds between a short and a long run. Each is the median of `repeats` runs, after one that captures
    what the others replay.
    """
    seconds = []
    results: list[Any] = []
    for count in (new // 4, new):
        params = SamplingParams(max_new_tokens=count, ignore_eos=True, draft_length=draft_length)
        engine.generate(prompts, params)
        times = []
        for _ in range(repeats):
            began = moment(engine.device)
            results = engine.generate(prompts, params)
            times.append(moment(engine.device) - began)
        seconds.append(sorted(times)[len(times) // 2])
    return len(prompts) * new / seconds[1], len(prompts) * (new - new // 4) / (seconds[1] - seconds[0]), results[0]


@torch.inference_mode()
def agreement(engine: Engine, decoder: Decoder) -> dict[str, float]:
    """How far a captured step's logits are from the decoder's own pass, relative RMS, for blocks of 1 and 5 tokens."""
    runner = engine.core.scheduler.target
    if not isinstance(runner, GraphedDecoder):
        return {}
    found = {}
    prompt = prompts_of(1, 300, decoder.config.vocab_size)[0]
    for count in (1, 5):
        logits = []
        for model in (decoder, runner):
            sequence = engine.core.pool.new_sequence()
            forward_reserved(decoder, torch.tensor(prompt, device=engine.device), [sequence], [len(prompt)], logits="none")
            sequence.advance(len(prompt))
            logits.append(forward_reserved(model, torch.tensor(prompt[:count], device=engine.device), [sequence], [count]).logits)
            sequence.free()
        found[f"logits_relative_rms_{count}"] = ((logits[0] - logits[1]).norm() / logits[0].norm()).item()
    return found


@torch.inference_mode()
def step_ms(engine: Engine, batch: int, length: int) -> float:
    """Milliseconds of a captured step alone, replayed over padding of the right size with real contexts of 256 tokens."""
    runner = engine.core.scheduler.target
    if not isinstance(runner, GraphedDecoder):
        return float("nan")
    sequences = [engine.core.pool.new_sequence() for _ in range(batch)]
    for sequence in sequences:
        sequence.ensure(256 + length)
    step = runner.step(batch, length, max(len(s.pages) for s in sequences), 0, runner.config.num_layers, (), True)
    step.fill([256] * batch, [length] * batch, runner.tables.rows(sequences), runner.pool.page_size)
    for _ in range(3):
        runner.replay(step)
    began = moment(engine.device)
    for _ in range(50):
        runner.replay(step)
    took = (moment(engine.device) - began) / 50
    for sequence in sequences:
        sequence.free()
    return 1e3 * took


def same_texts(target: Decoder, other: Decoder | None, count: int, new: int) -> dict[str, Any]:
    """Greedy texts in deterministic mode of `count` prompts: alone, in one batch, and in a batch with drafts of several kinds.

    The drafts come from the target itself (nearly all accepted), from an early exit and, if it is given, from another model (nearly none).
    Returns each way's seconds, tokens a step, and texts that equal those of the prompts alone.
    """
    prompts = prompts_of(count, 64, target.config.vocab_size)
    exit_layer = max(1, target.config.num_layers // 4)
    ways: dict[str, tuple[Any, bool, int]] = {
        "alone": (None, False, 0),
        "batch": (None, True, 0),
        "draft itself": (target, True, 3),
        "early exit": (exit_layer, True, 2),
        "early exit alone": (exit_layer, False, 2),
    }
    if other is not None:
        ways["other draft"] = (other, True, 2)
    found: dict[str, Any] = {"prompts": count, "new_tokens": new}
    wanted: list[list[int]] = []
    for name, (draft, together, length) in ways.items():
        engine = Engine(target, draft=draft, deterministic=True, pool_tokens=1 << 16, prefix_sharing=False)
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, draft_length=length)
        groups = [prompts] if together else [[prompt] for prompt in (prompts if draft is None else prompts[:4])]
        began = moment(engine.device)
        results = [r for group in groups for r in engine.generate(group, params)]
        seconds = moment(engine.device) - began
        texts = [r.token_ids for r in results]
        wanted = wanted or texts
        found[name] = {
            "equal": sum(a == b for a, b in zip(texts, wanted, strict=False)), "of": len(texts), "seconds": seconds,
            "tokens_per_step": results[0].speculation.tokens_per_step,
        }  # fmt: skip
        print(name, json.dumps(found[name]), flush=True)
        del engine
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when captured steps disagree with the decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=sorted(SHAPES))
    parser.add_argument("--draft", default="none", choices=["none", *sorted(SHAPES)])
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--draft-lengths", default="0", help="fixed draft lengths to time, 0 for plain decoding")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--same-texts", type=int, default=0, metavar="PROMPTS", help="only compare texts of deterministic mode")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each kind, of which the median counts (default 3)")
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target = random_decoder(args.shape, device, dtype)
    draft = None if args.draft == "none" else random_decoder(args.draft, device, dtype, seed=1)
    if args.same_texts:
        found = same_texts(target, draft, args.same_texts, args.new_tokens)
        if args.json_out:
            args.json_out.write_text(json.dumps(found, indent=1) + "\n")
        return 0 if all(way["equal"] == way["of"] for way in found.values() if isinstance(way, dict)) else 1
    engine = Engine(target, draft=draft, max_batch=max(64, *map(int, args.batches.split(","))), prefix_sharing=False)
    bandwidth = read_gb_per_s(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the read test's buffer is no part of the engine
    bound_ms = read_bytes(target) / bandwidth / 1e6
    about = {
        **measured_on(device), "command": command_line("bench/decode_profile.py", argv), "shape": args.shape, "draft": args.draft,
        "read_gb_per_s": bandwidth, "read_bound_ms": bound_ms, **agreement(engine, target),
    }  # fmt: skip
    report = RowDocument(about, args.json_out)
    if any(value > 0.05 for key, value in about.items() if key.startswith("logits_relative_rms")):
        print("captured steps disagree with the decoder; nothing is timed", file=sys.stderr)
        return 1
    for batch in map(int, args.batches.split(",")):
        prompts = prompts_of(batch, args.prompt_tokens, target.config.vocab_size)
        for length in map(int, args.draft_lengths.split(",")):
            whole, tokens_per_s, first = rate(engine, prompts, args.new_tokens, length, args.repeats)
            row = {
                "batch": batch, "draft_length": length, "tokens_per_s": tokens_per_s,
                "with_prefill_tokens_per_s": whole, "step_ms": 1e3 * batch / tokens_per_s,
                "graph_ms": step_ms(engine, batch, length + 1), "bound_share": bound_ms * tokens_per_s / batch / 1e3,
                "ttft_s": first.ttft_s, "tokens_per_step": first.speculation.tokens_per_step,
            }  # fmt: skip
            if device.type == "cuda":  # what the engine says it holds, and the most that torch had allocated or reserved so far
                beside = sum(plan.workspace_bytes + plan.captured_bytes for plan in engine.core.memory_plans)
                row["announced_bytes"] = sum(engine.core.memory().values()) + beside
                row["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
                row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            report.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
