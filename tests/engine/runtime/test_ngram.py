"""Drafts from the request's own text, alone and beside another source: the same text, long blocks where it repeats."""

from __future__ import annotations

import pytest
import torch

from codec.predictor.features import FeatureBuffer
from draft.policy import CostModel
from draft.source import NgramSource
from engine.engine import Engine
from engine.loading import choose_draft
from engine.model.decoder import forward_reserved
from engine.runtime.core import MEASURED_AFTER
from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams
from engine.sessions.codec_params import pair_fingerprints

PROMPTS = [[3, 4, 9, 20] * 6, [7] * 33, [1], [2, 3, 5] * 25]
FREE_ROWS = CostModel(draft=((1, 0.2),), verify=((1, 1.0), (256, 1.05)), runs_last_draft=True, last=((1, 0.01),))


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0)


@pytest.fixture(scope="module")
def sources(target, random_decoder, tmp_path_factory, make_draft_head):
    head = load_draft_head(make_draft_head(tmp_path_factory.mktemp("head"), target, layers=1, size=60), target)
    states = load_draft_head(make_draft_head(tmp_path_factory.mktemp("states"), target, state_layers=(target.config.num_layers,)), target)
    return {"ngram": NgramSource(), "model": random_decoder(1, num_hidden_layers=1), "exit": 1, "head": head, "states": states}


def engine_of(target, source, **options):
    return Engine(target, draft=source, **({"page_size": 16, "prefill_chunk": 32, "costs": FREE_ROWS} | options))


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in engine_of(target, None).generate(PROMPTS, SamplingParams(max_new_tokens=32))]


@pytest.mark.parametrize("kind", ["ngram", "model", "exit", "head", "states"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_greedy_text_equals_plain_decoding(target, sources, plain, kind, deterministic):
    engine = engine_of(target, sources[kind], deterministic=deterministic)
    results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=32))
    assert [r.token_ids for r in results] == plain
    counts = [r.speculation for r in results]
    assert sum(m.from_text for m in counts) > 0 and sum(m.from_text_accepted for m in counts) > 0
    if kind == "ngram":
        assert all(m.proposed == m.from_text for m in counts) and engine.drafter_name == "ngram"
        fixed = engine.generate(PROMPTS, SamplingParams(max_new_tokens=32, draft_length=5))
        assert [r.token_ids for r in fixed] == plain and max(len(r.speculation.proposed_at) for r in fixed) == 5
    else:
        assert sum(m.proposed for m in counts) > sum(m.from_text for m in counts), "both sources were used"
        without = engine_of(target, sources[kind], ngrams=False).generate(PROMPTS, SamplingParams(max_new_tokens=32))
        assert [r.token_ids for r in without] == plain and not any(r.speculation.from_text for r in without)
    for pool in (engine.core.pool, engine.core.draft_pool):
        if pool is not None:
            pool.check_integrity()
            assert pool.num_free_pages == pool.max_pages


@pytest.mark.parametrize("kind", ["ngram", "model", "exit"])
def test_a_batch_of_all_kinds_of_requests(target, sources, kind):
    params = [
        SamplingParams(max_new_tokens=20),
        SamplingParams(max_new_tokens=20, temperature=0.8, seed=5),
        SamplingParams(max_new_tokens=20, temperature=0.8),
        SamplingParams(max_new_tokens=20, seed=1, temperature=1.1, repetition_penalty=1.2, draft_length=2),
    ]
    results = engine_of(target, sources[kind]).generate(PROMPTS, params)
    wanted = engine_of(target, None).generate(PROMPTS, params)
    for i in (0, 1, 3):
        assert results[i].token_ids == wanted[i].token_ids
    assert all(len(r.token_ids) == 20 for r in results)
    assert any(r.speculation.from_text for r in results)


def test_sampled_text_has_the_targets_distribution(random_decoder, check_sampled_text):
    shape = {"vocab_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    check_sampled_text(random_decoder(3, **shape), NgramSource(), 600, prompt=[1, 2, 0, 1, 2])


def test_repeated_text_takes_few_steps(random_decoder):
    # a model that says one token for ever
    target = random_decoder(2, tie_word_embeddings=True)
    for layer in target.parameters():
        layer.zero_()
    [result] = engine_of(target, NgramSource()).generate([[5, 6]], SamplingParams(max_new_tokens=100))
    assert result.token_ids == [0] * 100
    m = result.speculation
    assert m.tokens_per_step > 8 and m.acceptance_rate > 0.9 and m.as_dict()["accepted_from_text"] == m.accepted


def test_a_draft_heads_features_keep_it_to_its_own_drafts(target, sources):
    engine = engine_of(target, sources["head"])
    drafter = engine.core.drafter
    engine.core.keep_features((0,), lambda: FeatureBuffer(dtype=torch.float32))
    assert drafter.takes_given
    engine.core.keep_features((drafter.num_layers + 1,), lambda: FeatureBuffer(dtype=torch.float32))
    assert not drafter.takes_given
    [result] = engine.generate([PROMPTS[3]], SamplingParams(max_new_tokens=20))
    assert result.speculation.from_text == 0 < result.speculation.proposed


@pytest.mark.parametrize("kind", ["model", "exit", "head", "states"])
def test_caches_and_features_are_those_of_a_plain_pass(target, sources, kind):
    engine = engine_of(target, sources[kind])
    engine.core.keep_features((0, 1), lambda: FeatureBuffer(dtype=torch.float32))
    conversation = engine.core.open_sequence_state()
    found = 0
    for new in (PROMPTS[3], [2, 3, 5], [7, 7, 7, 7]):
        found += engine.core.run(conversation, new, SamplingParams(max_new_tokens=20)).speculation.from_text
    assert found > 3
    state, tokens = conversation.draft_state, conversation.token_ids
    decoder = engine.core.draft_model or target
    length = state.length
    sequence = decoder.new_pool(20, 16).new_sequence()
    taps = forward_reserved(decoder, torch.tensor(tokens[:length]), [sequence], [length], taps=(0, 1), logits="none").taps
    assert torch.allclose(state.features.take(0, length), torch.stack([taps[0], taps[1]], 1), atol=1e-3)
    whole = target.new_pool(20, 16).new_sequence()
    count = conversation.sequence.length
    forward_reserved(target, torch.tensor(tokens[:count]), [whole], [count])
    assert torch.allclose(target.read_kv(conversation.sequence, 0, count), target.read_kv(whole, 0, count), atol=1e-3)


def test_it_is_chosen_by_name_and_needs_no_codec_parameters_of_its_own(target):
    assert isinstance(choose_draft("ngram", target.config).load(target), NgramSource)
    with_, without = engine_of(target, NgramSource()), engine_of(target, None)
    assert pair_fingerprints(with_.core) == pair_fingerprints(without.core)
    assert with_.memory() == without.memory()


def test_costs_are_measured_without_a_drafter(target):
    engine = Engine(target, draft=NgramSource(), page_size=16)
    engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=MEASURED_AFTER + 1, ignore_eos=True))
    assert engine.core.cost_model is not None and len(engine.core.cost_model.verify) >= 3
