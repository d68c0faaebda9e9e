"""Penalties behind captured steps: what a request's own history makes of the same logits and tokens, and the same text, launched ahead."""

from __future__ import annotations

import pytest
import torch

from engine.engine import Engine
from engine.runtime.device_penalties import PenaltyRows
from engine.runtime.model_runner import GraphedDecoder, PlainDecoding
from engine.runtime.sampling import SamplingParams, TokenHistory

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 12, [8, 8]]
OPTIONS = [
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {},
    {"logit_bias": {5: 3.0, 7: -100.0}, "repetition_penalty": 0.8},
    {"presence_penalty": 2.0},
]
pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture(scope="module")
def decoder(random_decoder):
    return random_decoder(0, num_hidden_layers=2, head_dim=64).to(DEVICE)


def test_rows_count_and_penalise_as_histories_do():
    vocab, params = 31, [SamplingParams(**options) for options in OPTIONS]
    texts = [[3, 4, 3], [9, 9], [2, 2], [5, 6, 7], [1] * 4]

    def histories():
        return [
            TokenHistory(p, vocab, 2, torch.device(DEVICE)).follow(text) if p.penalised else None
            for p, text in zip(params, texts, strict=True)
        ]

    rows, generator = PenaltyRows(params, histories()), torch.Generator().manual_seed(2)
    for _ in range(6):
        logits = (torch.randn(len(params), vocab, generator=generator) * 3).to(DEVICE)
        logits[2, 4] = -torch.inf
        none = torch.empty(0, dtype=torch.int64, device=DEVICE)
        want = [row if own is None else own.penalise(row, none) for row, own in zip(logits, histories(), strict=True)]
        got = torch.cat((rows.penalise(logits[:2], slice(0, 2)), rows.penalise(logits[2:], slice(2, 5))))
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-6, atol=1e-6)  # a number and a tensor divide with other roundings
        assert (got[0] - logits[0]).abs().max() > 0.1
        tokens = torch.randint(0, vocab, (len(params),), generator=generator).to(DEVICE)
        tokens[4] = -1  # its logits were not finite
        rows.count(tokens[:3], slice(0, 3))
        rows.count(tokens[3:], slice(3, 5))
        for text, token in zip(texts[:4], tokens.tolist(), strict=False):
            text.append(token)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("most", [1, 4])
def test_text_under_penalties_is_launched_ahead_and_what_it_is_step_by_step(decoder, sampling, most, monkeypatch):
    lengths, launched = (24, 1, 17, 20, 15), []
    each = [
        SamplingParams(max_new_tokens=n, ignore_eos=True, logprobs=1 if n == 17 else None, **options, **sampling)
        for n, options in zip(lengths, OPTIONS, strict=True)
    ]
    launch = PlainDecoding._launch
    monkeypatch.setattr(PlainDecoding, "_launch", lambda self, *rest: launched.append(self._penalties is not None) or launch(self, *rest))
    found = []
    for graphed in (False, True):
        engine = Engine(decoder, page_size=16, pool_tokens=1024, max_batch=most)
        engine.core.scheduler.plain = None
        if graphed:
            runner = GraphedDecoder(decoder, engine.core.pool, capture=GPU)
            engine.core.scheduler.target, engine.core.scheduler.plain = runner, PlainDecoding(runner)
        found.append(engine.generate(PROMPTS, each))
    assert [r.token_ids for r in found[1]] == [r.token_ids for r in found[0]]
    for mine, other in zip(found[0][2].logprobs, found[1][2].logprobs, strict=True):
        assert mine.token_id == other.token_id and mine.logprob == pytest.approx(other.logprob, abs=1e-3)
    unpenalised = [SamplingParams(max_new_tokens=n, ignore_eos=True, **sampling) for n in lengths]
    assert [r.token_ids for r in engine.generate(PROMPTS, unpenalised)] != [r.token_ids for r in found[0]], "penalties change these texts"
    assert any(launched) and not all(launched)
    if most == 1:
        steps = sum(n - 1 for n in lengths)
        assert len(launched) == 2 * steps, "each step is launched once, and none is thrown away"


def test_large_deterministic_batches_under_penalties_have_the_text_of_each_alone(decoder):
    prompts = [[5 + b, *range(3, 6 + b)] for b in range(11)]
    engine = Engine(decoder, page_size=16, pool_tokens=2048, max_batch=16, deterministic=True)
    runner = GraphedDecoder(decoder, engine.core.pool, capture=GPU)
    engine.core.scheduler.target, engine.core.scheduler.plain = runner, PlainDecoding(runner)
    each = [SamplingParams(max_new_tokens=8, ignore_eos=True, seed=b, temperature=0.9, **OPTIONS[b % 5]) for b in range(11)]
    together = [r.token_ids for r in engine.generate(prompts, each)]
    assert together == [engine.generate([prompt], own)[0].token_ids for prompt, own in zip(prompts, each, strict=True)]
