"""Requests drawn from a real model, with the probability of every token: a trace on which a prior can be judged before anything was counted."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np

from engine.engine import Engine
from engine.errors import InvalidOption
from engine.runtime.sampling import SamplingParams

BLOCK_TOKENS = 2  # what longer texts share of what a model draws is nothing
DRAWN_TOKENS = 16
BATCH = 64
OPENINGS = (
    "The best way to",
    "How do I",
    "Write a Python function that",
    "Once upon a time",
    "The capital of",
    "Dear Sir or Madam,",
    "Explain the difference between",
    "In this paper we",
    "Translate into French:",
    "import numpy as np\n",
    "Give me a list of",
    "The meeting began with",
    "What is the",
    "Summarize the following text:",
    "My favourite recipe for",
    "According to the report,",
)


def draw(file: Path, num_requests: int, pair: str, seed: int) -> None:
    """Write a trace of requests that each go on from an opening, which are chosen by Zipf's law, by tokens drawn from the pair's target.

    A line is {"timestamp" (ms; Poisson arrivals, 4 a second), "input_length", "output_length", "block_tokens", "hash_ids", "log2_p"}: an id a whole
    block, equal for equal texts up to its end; log2_p of each whole block given what is before it, under the target.

    Raises:
        InvalidOption: less than one request. CacheNotWritable and others as of `Engine.from_pair`.
    """
    if num_requests < 1:
        raise InvalidOption(f"--draw {num_requests} requests", "give a whole number above 0")
    generator = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, len(OPENINGS) + 1)
    chosen = generator.choice(len(OPENINGS), num_requests, p=shares / shares.sum())
    arrivals = generator.exponential(250.0, num_requests).cumsum()
    engine = Engine.from_pair(pair)
    openings = [engine.encode(text) for text in OPENINGS]
    params = SamplingParams(max_new_tokens=DRAWN_TOKENS, temperature=1.0, draft_length=0, logprobs=0, ignore_eos=True)
    ids: dict[tuple[int, ...], int] = {}
    with gzip.open(file, "wt", encoding="utf-8") as out:
        for first in range(0, num_requests, BATCH):
            some = chosen[first : first + BATCH].tolist()
            results = engine.generate([openings[number] for number in some], params)
            for number, arrival_ms, result in zip(some, arrivals[first : first + BATCH].tolist(), results, strict=True):
                assert result.logprobs is not None
                tokens = openings[number] + result.token_ids
                bits = [0.0] * len(openings[number]) + [token.logprob / math.log(2) for token in result.logprobs]
                ends = range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
                line = {
                    "timestamp": round(arrival_ms),
                    "input_length": len(ends) * BLOCK_TOKENS,
                    "output_length": 0,
                    "block_tokens": BLOCK_TOKENS,
                    "hash_ids": [ids.setdefault(tuple(tokens[:end]), len(ids)) for end in ends],
                    "log2_p": [round(min(0.0, sum(bits[end - BLOCK_TOKENS : end])), 4) for end in ends],
                }
                out.write(json.dumps(line) + "\n")
            out.flush()
