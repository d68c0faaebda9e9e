"""A batch that is kept full: what is counted is what was generated while it was, and every text is the one that it is alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench.full_batches import full_batch, lengths_of
from draft.source import NgramSource
from engine.engine import Engine
from engine.runtime.sampling import SamplingParams

PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 12, [8, 8], [4, 5] * 6, [9]]


@pytest.mark.parametrize("length", [0, 3, "auto"])
def test_counts_what_a_full_batch_gains(random_decoder, length, monkeypatch):
    target, now = random_decoder(0), [0.0]
    engine = Engine(target, draft=NgramSource(), max_batch=5)
    running, step, scheduler = [], engine.core.step, engine.core.scheduler

    def timed():
        step()
        now[0] += 1.0
        running.append(len(scheduler.running))

    monkeypatch.setattr(engine.core, "step", timed)
    monkeypatch.setattr("bench.full_batches.time", SimpleNamespace(perf_counter=lambda: now[0]))
    params = SamplingParams(ignore_eos=True, draft_length=length)
    found = full_batch(engine, PROMPTS, 3, 20, params)
    assert [r.new_tokens for r in found.results] == lengths_of(len(PROMPTS), 20)
    alone = [
        engine.generate([prompt], SamplingParams(max_new_tokens=n, ignore_eos=True, draft_length=0))[0].token_ids
        for prompt, n in zip(PROMPTS, lengths_of(len(PROMPTS), 20), strict=True)
    ]
    assert [r.token_ids for r in found.results] == alone
    assert max(running) == 3 and scheduler.max_batch == 5 and scheduler.idle
    assert found.step_ms == 1000.0
    if length == 0:  # three tokens a step, but for requests that run a prompt
        assert 2.0 < found.tokens_per_s <= 3.0


def test_too_few_requests_are_refused(random_decoder):
    with pytest.raises(ValueError, match="3 requests do not keep a batch of 3 full"):
        full_batch(Engine(random_decoder(0)), PROMPTS[:3], 3, 4, SamplingParams())


def test_texts_that_end_before_a_long_prompt_has_run_are_refused(random_decoder):
    engine = Engine(random_decoder(0), prefill_chunk=4)
    with pytest.raises(ValueError, match="end before the prompts of a batch of 2 have run"):
        full_batch(engine, [[7] * 60, [1], [2], [3]], 2, 1, SamplingParams(ignore_eos=True))
    assert engine.core.scheduler.idle


def test_lengths_differ_about_their_mean_and_are_the_same_in_every_run():
    lengths = lengths_of(200, 96)
    assert lengths == lengths_of(200, 96) and len(set(lengths)) > 60
    assert abs(sum(lengths) / 200 - 96) < 5 and min(lengths) >= 48 and max(lengths) <= 144
    assert min(lengths_of(9, 1)) == 1
