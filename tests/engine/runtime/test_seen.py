"""Drafts from what others of a namespace were answered: many are accepted, texts stay the target's, namespaces know nothing of each other."""

from __future__ import annotations

import pytest

from draft.policy import CostModel
from draft.source import NgramSource
from engine.engine import Engine
from engine.runtime.sampling import SamplingParams

QUESTION = [3, 14, 15, 9, 26, 5, 35, 8, 37, 33, 23, 44, 32, 24, 33, 43, 27, 45, 2, 48]
FREE_ROWS = CostModel(draft=((1, 0.2),), verify=((1, 1.0), (256, 1.05)), runs_last_draft=True, last=((1, 0.01),))


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0)


def engine_of(target, source, **options):
    return Engine(target, draft=source, **({"page_size": 16, "prefill_chunk": 32, "costs": FREE_ROWS} | options))


@pytest.mark.parametrize("kind", ["ngram", "exit"])
@pytest.mark.parametrize("sampling", [{}, {"seed": 5, "temperature": 1.0}])
def test_the_same_question_again_takes_few_steps(target, kind, sampling) -> None:
    params = SamplingParams(max_new_tokens=48, ignore_eos=True, **sampling)
    engine = engine_of(target, NgramSource() if kind == "ngram" else 1)
    [first], [again] = (engine.generate([QUESTION], params) for _ in range(2))
    assert again.token_ids == first.token_ids == engine_of(target, None).generate([QUESTION], params)[0].token_ids
    assert first.speculation.from_seen == 0
    m = again.speculation
    assert m.from_seen_accepted > 36 and m.steps < 10 and m.as_dict()["accepted_from_seen"] == m.from_seen_accepted
    if kind == "exit":
        off = engine_of(target, 1, ngrams=False)
        assert not any(off.generate([QUESTION], params)[0].speculation.from_seen for _ in range(2))


def test_a_conversation_that_takes_the_same_turn_elsewhere(target) -> None:
    """The answer comes again after another system prompt, as far as the model gives it: what differs is only drafted wrongly."""
    engine, params = engine_of(target, NgramSource()), SamplingParams(max_new_tokens=32, ignore_eos=True)
    engine.generate([QUESTION], params)
    other = [7, 7, 1, *QUESTION]
    assert engine.generate([other], params)[0].token_ids == engine_of(target, None).generate([other], params)[0].token_ids


def test_another_namespace_sees_nothing(target) -> None:
    engine, params = engine_of(target, NgramSource()), SamplingParams(max_new_tokens=32, ignore_eos=True)
    counts = []
    for namespace in ("one", "two", "one"):
        with engine.core.lock:
            request = engine.core.submit(engine.core.open_sequence_state(), QUESTION, params, owns_cache=True)
            request.namespace = namespace
        counts.append(engine.core.finish(request).speculation)
    assert counts[1].from_seen == 0 and counts[1].steps == counts[0].steps and counts[2].steps < counts[1].steps / 2


def test_sampled_text_has_the_targets_distribution(random_decoder, check_sampled_text) -> None:
    shape = {"vocab_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    seen = [[1, 2, 0, 3, 1], [1, 2, 0, 3, 1], [1, 2, 3, 0, 0]]
    check_sampled_text(random_decoder(3, **shape), NgramSource(), 600, seen=seen)
