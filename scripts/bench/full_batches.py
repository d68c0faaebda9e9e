"""Tokens a second of a batch that is kept full, as a server under load keeps it: when a request ends the next one takes its place."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from engine.engine import Engine
from engine.runtime.request import GenerationResult
from engine.runtime.sampling import SamplingParams

# lengths of texts over the mean one, drawn evenly from these: equal ones would end, and begin, together without drafts alone
SPREAD = (0.5, 1.5)


class FullBatch(NamedTuple):
    """What a full batch did. tokens_per_s: while it was full; step_ms: of a scheduler's step then, those included that run a prompt first;
    results: of all requests, in order."""

    tokens_per_s: float
    step_ms: float
    results: list[GenerationResult]


def lengths_of(count: int, mean: int) -> list[int]:
    """New tokens of so many requests, the same in every run."""
    draw = random.Random(count)
    return [max(1, round(mean * draw.uniform(*SPREAD))) for _ in range(count)]


def full_batch(engine: Engine, prompts: Sequence[list[int]], batch: int, new_tokens: int, params: SamplingParams) -> FullBatch:
    """Serve all prompts, `batch` at a time, each for its own of `lengths_of` tokens.

    Time begins with the step after which all places are taken by requests that have their first token, and ends with the one that gives the last
    request its first: all of it is decoding in a full batch, the prompts of requests that take others' places, and nothing else.

    Raises:
        ValueError: there are no more prompts than places, or the last one has begun before all of the first ones: the batch would not be full for a
            time.
    """
    if len(prompts) <= batch:
        raise ValueError(f"{len(prompts)} requests do not keep a batch of {batch} full")
    core = engine.core
    most, core.scheduler.max_batch = core.scheduler.max_batch, batch
    try:
        each = [SamplingParams(**{**vars(params), "max_new_tokens": n}) for n in lengths_of(len(prompts), new_tokens)]
        with core.lock:
            requests = [
                core.submit(core.open_sequence_state(), prompt, own, owns_cache=True) for prompt, own in zip(prompts, each, strict=True)
            ]
        began = ended = 0.0
        late = False  # whether the last request has begun before all of the first ones
        before = tokens = steps = 0
        while not core.scheduler.idle:
            core.step()
            now, total = time.perf_counter(), sum(request.num_new for request in requests)
            if not began:
                if all(request.num_new for request in requests[:batch]):
                    began, before, late = now, total, requests[-1].num_new > 0
            elif not ended:
                steps += 1
                if requests[-1].num_new:
                    ended, tokens = now, total - before
    finally:
        core.scheduler.max_batch = most
    if late:
        raise ValueError(
            f"texts of about {new_tokens} tokens end before the prompts of a batch of {batch} have run (more tokens, or more requests)"
        )
    memory = core.memory()
    return FullBatch(tokens / (ended - began), 1e3 * (ended - began) / steps, [request.result(memory) for request in requests])
