"""The contestants of bench_throughput: our engine and transformers over the same weights, the same prompts and equal token counts."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from draft.seen import SeenByNamespace
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import SamplingParams

PROMPTS = (
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain in a few sentences how a hash table works.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me a simple recipe for pancakes.",
    "Write a short, polite e-mail asking my landlord to repair the heating.",
    "What are the main differences between TCP and UDP?",
    "Tell me a short story about a lighthouse keeper and a whale.",
    "How can I fall asleep faster?",
    "Write a SQL query that counts the orders of each customer.",
    "Summarize the causes of the French Revolution in five points.",
    "Why is the sky blue? Explain it to a child.",
    "Suggest a three-day plan for a first visit to Rome.",
)


CODE_PROMPTS = (
    "Write a Python class for a bank account with deposit, withdraw and transfer, with type hints and a test for each method.",
    "Rewrite this function with a dictionary, keeping its name: def roman(n):\n    s = ''\n    while n >= 10:\n        s += 'X'; n -= 10\n    return s",
    "Write a SQL schema for a library: books, members, loans, each with a primary key and timestamps.",
    "Add a docstring and type hints to: def f(a, b=2):\n    total = 0\n    for x in a:\n        total += x ** b\n    return total",
    "Write a JavaScript function that groups an array of objects by a key, and show it on five objects.",
    "Write unit tests for a Python function is_prime(n) for the numbers from 0 to 20.",
    'Convert this JSON to YAML: {"servers": [{"host": "a", "port": 80}, {"host": "b", "port": 81}, {"host": "c", "port": 82}]}',
    "Write a C program that reads numbers from standard input and prints their sum, mean and maximum.",
)
KINDS = {"chat": PROMPTS, "code": CODE_PROMPTS}


@dataclass(frozen=True)
class Sample:
    """One batch, continued once.

    texts: new token ids of each prompt. seconds: from the call to the last token. ttft_s: to the first token of all prompts. proposed, accepted,
    steps, step_tokens: speculation summed over the prompts (all 0 without). from_text: proposals that the prompts' own text gave. draft_s, verify_s:
    host seconds of the batch's decode steps, proposing and verifying.
    """

    texts: list[list[int]]
    seconds: float
    ttft_s: float
    proposed: int = 0
    accepted: int = 0
    steps: int = 0
    step_tokens: int = 0
    from_text: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0


class Foretold:
    """Our engine. draft_length: of every request; 0 or an engine without a draft is plain decoding."""

    name = "foretold"

    def __init__(self, mode: str, engine: Engine, draft_length: int | Literal["auto"]) -> None:
        self.mode, self.engine, self.draft_length = mode, engine, draft_length

    def run(self, prompts: Sequence[list[int]], count: int, temperature: float, seed: int) -> Sample:
        """Continue the prompts by `count` tokens each, whatever they are."""
        # without a seed the automatic draft length may look at the whole batch, as it does for whoever gives none; alone it is the same
        seeds = [seed] if len(prompts) == 1 else [None] * len(prompts)
        params = [SamplingParams(count, temperature, seed=s, ignore_eos=True, draft_length=self.draft_length) for s in seeds]
        self.engine.core.scheduler.drafting.seen = (
            SeenByNamespace()
        )  # nothing is drafted from an earlier turn's answers to the same prompts
        began = time.perf_counter()
        results = self.engine.generate(prompts, params)
        seconds = time.perf_counter() - began
        s = [r.speculation for r in results]
        return Sample(
            [r.token_ids for r in results],
            seconds,
            max(r.ttft_s for r in results),
            sum(x.proposed for x in s),
            sum(x.accepted for x in s),
            sum(x.steps for x in s),
            sum(x.new_tokens for x in s),
            sum(x.from_text for x in s),
            max(x.draft_s for x in s),
            max(x.verify_s for x in s),
        )

    @torch.inference_mode()
    def logits(self, prompt: list[int], text: list[int]) -> torch.Tensor:
        """[len(text), V] float32: what the target says of each token of `text`, all run as one block."""
        target, sequence = self.engine.core.target, self.engine.core.pool.new_sequence()
        tokens = torch.tensor([*prompt, *text[:-1]], device=target.device)
        try:
            return target.head(forward_reserved(target, tokens, [sequence], [len(tokens)], logits="none").hidden[-len(text) :])
        finally:
            sequence.free()


@dataclass
class Transformers:
    """transformers' `generate`, scaled dot-product attention; prompts of a batch are padded on the left.

    mode: "plain", or "assisted" with the draft as assistant model, whose settings stay transformers' own.
    """

    mode: str
    model: Any
    assistant: Any = None
    name: str = field(default="transformers", init=False)

    def run(self, prompts: Sequence[list[int]], count: int, temperature: float, seed: int) -> Sample:
        """Continue the prompts by `count` tokens each, whatever they are. The first token's time is that of a call for one token."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        ttft_s, _ = self._generate(ids, mask, 1, temperature, seed)
        seconds, out = self._generate(ids, mask, count, temperature, seed)
        return Sample(out[:, width:].tolist(), seconds, ttft_s)

    @torch.inference_mode()
    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, count: int, temperature: float, seed: int) -> tuple[float, torch.Tensor]:
        from transformers import GenerationConfig

        # no end token: every text has the same length. The model's own distribution: its generation_config may filter or penalise.
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        )
        config = GenerationConfig(max_new_tokens=count, pad_token_id=0, **sampling)
        extra = {} if self.assistant is None else {"assistant_model": self.assistant}
        torch.manual_seed(seed)
        began = time.perf_counter()
        out = self.model.generate(ids, attention_mask=mask, generation_config=config, **extra).cpu()
        return time.perf_counter() - began, out

    @torch.inference_mode()
    def logits(self, prompt: list[int], text: list[int]) -> torch.Tensor:
        """As `Foretold.logits`."""
        tokens = torch.tensor([[*prompt, *text[:-1]]], device=self.model.device)
        return self.model(tokens, logits_to_keep=len(text)).logits[0].float()


Contestant = Foretold | Transformers


def prompt_ids(engine: Engine, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of the prompts: through the chat template, or raw at a fixed length."""
    texts: Sequence[str] = KINDS[args.prompt_kind]
    if args.prompt_file is not None:
        try:
            texts = [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(f"{args.prompt_file} cannot be read: {error}", "give a UTF-8 text file") from error
    if not texts or len(texts) < (args.prompts or 1):
        raise InvalidOption(f"there are only {len(texts)} prompts", "lower --prompts, or give a --prompt-file with more lines")
    texts = texts[: args.prompts]
    if args.prompt_tokens is None:
        ids = [engine.encode([{"role": "user", "content": text}]) for text in texts]
    else:
        ids = [engine.encode(text) for text in texts]
        ids = [(own * -(-args.prompt_tokens // len(own)))[: args.prompt_tokens] for own in ids]
    longest = max(map(len, ids)) + args.new_tokens
    if longest > engine.context:
        raise InvalidOption(f"prompt and new tokens are up to {longest}, the model's context is {engine.context}", "lower one of them")
    return ids


def in_batches(ids: list[list[int]], size: int) -> list[list[list[int]]]:
    """The prompts in batches of one size; the last is filled up from the first prompts on."""
    return [[ids[(start + i) % len(ids)] for i in range(size)] for start in range(0, len(ids), size)]


def load_transformers(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model of a folder, ready to generate. Its generation_config is emptied: `generate` would fill in what a call leaves unset."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    kept = {name: getattr(model.generation_config, name) for name in ("num_assistant_tokens", "assistant_confidence_threshold")}
    model.generation_config = GenerationConfig(pad_token_id=0, **{name: value for name, value in kept.items() if value is not None})
    return model


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of a GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def copy_gb_per_s(device: torch.device, num_bytes: int) -> float:
    """Bytes read plus written by the fastest of seven copies of a large buffer, in 10^9 a second."""
    source = torch.ones(num_bytes, dtype=torch.int8, device=device)
    into, best = torch.zeros_like(source), float("inf")
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        into.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * num_bytes / best / 1e9
