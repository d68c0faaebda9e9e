"""Logits that are no numbers end the request that has them, with a named error, and no other."""

from __future__ import annotations

import math

import pytest
import torch

from engine.engine import Engine
from engine.errors import NonFiniteLogits
from engine.runtime.sampling import SamplingParams

POISON = 7
MODES = [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 3}]


@pytest.fixture(params=["none", "model", "exit"])
def poisoned(request, random_decoder):
    """An engine whose target has no numbers for one token."""
    target = random_decoder(1)
    draft = {"none": None, "model": random_decoder(2), "exit": 1}[request.param]
    target.embed_tokens.weight[POISON] = math.nan
    return Engine(target, draft=draft, page_size=16)


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "rejection", "race"])
def test_a_prompt_or_a_token_without_numbers_is_a_named_error_and_leaves_nothing_behind(poisoned, mode):
    length = 0 if poisoned.core.drafter is None else 3
    prompt_has_it = SamplingParams(max_new_tokens=8, draft_length=length, **mode)
    text_has_it = SamplingParams(max_new_tokens=8, draft_length=length, logit_bias={POISON: 100.0}, **mode)
    for prompt, params in (([1, POISON, 2], prompt_has_it), ([1, 2], text_has_it)):
        with pytest.raises(NonFiniteLogits, match="NaN or infinite"):
            poisoned.generate([prompt], params)
        with pytest.raises(NonFiniteLogits):
            list(poisoned.stream(prompt, params))
    poisoned.core.pool.check_integrity()
    assert poisoned.core.pool.num_free_pages == poisoned.core.pool.max_pages
    assert len(poisoned.generate([[1, 2]], SamplingParams(max_new_tokens=8, logit_bias={POISON: -100.0}))[0].token_ids) == 8


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "rejection", "race"])
def test_the_others_of_its_batch_go_on(poisoned, mode):
    length = 0 if poisoned.core.drafter is None else 3
    good = SamplingParams(max_new_tokens=12, draft_length=length, logit_bias={POISON: -100.0}, **mode)
    bad = SamplingParams(max_new_tokens=12, draft_length=length, logit_bias={POISON: 100.0}, **mode)
    requests = [
        poisoned.core.submit(poisoned.core.open_sequence_state(), prompt, params, owns_cache=True)
        for prompt, params in (([1, 2], good), ([1, 2], bad), ([POISON, 2], good), ([3], good))
    ]
    while not poisoned.core.scheduler.idle:
        poisoned.core.scheduler.step()
    assert [isinstance(r.error, NonFiniteLogits) for r in requests] == [False, True, True, False]
    assert [r.finish_reason for r in requests] == ["length", None, None, "length"]
    assert requests[1].token_ids == [1, 2, POISON] and requests[2].token_ids == [POISON, 2]
    poisoned.core.pool.check_integrity()
    assert poisoned.core.pool.num_free_pages == poisoned.core.pool.max_pages


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "rejection", "race"])
def test_a_draft_without_numbers_costs_its_drafts_and_no_text(random_decoder, mode):
    target, draft = random_decoder(1), random_decoder(2)
    for parameter in draft.parameters():
        parameter.fill_(math.nan)
    params = SamplingParams(max_new_tokens=10, draft_length=3, **mode)
    [found] = Engine(target, draft=draft, page_size=16).generate([[1, 2]], params)
    assert len(found.token_ids) == 10 and all(0 <= t < 97 for t in found.token_ids)
    if mode != MODES[1]:
        assert found.token_ids == Engine(target, page_size=16).generate([[1, 2]], params)[0].token_ids
    assert found.speculation.accepted <= 2, "by chance at most"
    assert torch.isfinite(target.head(torch.zeros(1, 48))).all()
