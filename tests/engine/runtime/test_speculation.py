"""Speculation with the real decoder: greedy text equals plain decoding, equal seeds give equal text, batches equal single runs, caches agree."""

from __future__ import annotations

import pytest
import torch

from codec.predictor.features import FeatureBuffer
from engine.engine import Engine
from engine.model.decoder import forward_reserved
from engine.runtime.sampling import SamplingParams

PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 25]
KINDS = ["other", "itself", "exit-1", "exit-2"]


@pytest.fixture(scope="module")
def make_engine(random_decoder):
    target, other = random_decoder(0), random_decoder(1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    drafts = {"none": None, "other": other, "itself": target, "exit-1": 1, "exit-2": 2}

    def make(kind, **options):
        return Engine(target, draft=drafts[kind], page_size=16, prefill_chunk=32, **options)

    return make


@pytest.fixture(scope="module")
def plain(make_engine):
    return [r.token_ids for r in make_engine("none").generate(PROMPTS, SamplingParams(max_new_tokens=25))]


def counters(result):
    m = result.speculation
    return m.steps, m.new_tokens, m.proposed_at, m.accepted_at


@pytest.mark.parametrize("length", [1, 2, 5, "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_equals_plain_decoding(make_engine, plain, kind, length):
    engine = make_engine(kind)
    results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=25, draft_length=length))
    assert [r.token_ids for r in results] == plain
    if length != "auto":
        assert all(r.speculation.proposed > 0 for r in results)
    if kind == "itself" and length == 5:
        assert all(r.speculation.acceptance_rate == 1 for r in results)
        assert results[0].speculation.steps == 4, "24 tokens after the first, 6 a step"
    engine.core.pool.check_integrity()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages
    if engine.core.draft_pool is not None:
        engine.core.draft_pool.check_integrity()
        assert engine.core.draft_pool.num_free_pages == engine.core.draft_pool.max_pages


@pytest.mark.parametrize("kind,length", [("other", 0), *((kind, 3) for kind in KINDS), ("itself", "auto"), ("exit-2", "auto")])
def test_equal_seeds_give_equal_text_in_any_batch(make_engine, kind, length):
    # a prompt whose pages are shared is drafted for one step sooner, which changes the counters and not the text
    engine = make_engine(kind, prefix_sharing=False)
    params = [
        SamplingParams(max_new_tokens=16, temperature=t, top_k=k, top_p=p, min_p=m, seed=s, draft_length=length)
        for t, k, p, m, s in ((1.0, 0, 1.0, 0.0, 1), (0.7, 12, 1.0, 0.0, 2), (1.4, 0, 0.8, 0.0, 3), (1.0, 20, 0.9, 0.05, 2**63 - 1))
    ]
    together = engine.generate(PROMPTS, params)
    for prompt, own, result in zip(PROMPTS, params, together, strict=True):
        [alone] = engine.generate([prompt], own)
        assert alone.token_ids == result.token_ids
        # an automatic draft length looks at the load, which changes the steps and not the text
        assert length == "auto" or counters(alone) == counters(result)
    others = engine.generate(PROMPTS, [SamplingParams(max_new_tokens=16, temperature=1.0, seed=9, draft_length=length)] * 4)
    assert [r.token_ids for r in together] != [r.token_ids for r in others]


@pytest.mark.parametrize("kind", ["other", "exit-1"])
def test_sampled_text_of_the_real_decoder_has_the_targets_distribution(random_decoder, kind, check_sampled_text):
    shape = {"vocab_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    target = random_decoder(3, **shape)
    check_sampled_text(target, random_decoder(4, **shape) if kind == "other" else 1, 600, top_p=0.9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_committed_tokens_are_those_of_a_prefill(make_engine, kind, temperature):
    engine = make_engine(kind)
    engine.core.keep_features((0, 1), lambda: FeatureBuffer(dtype=torch.float32))
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, PROMPTS[3], SamplingParams(max_new_tokens=20, temperature=temperature, seed=4, draft_length=3))
    state = conversation.draft_state
    length = state.length
    assert len(conversation.token_ids) - 4 <= length <= len(conversation.token_ids) - 1
    assert state.features.length == length
    decoder = engine.core.draft_model or engine.core.target
    sequence = decoder.new_pool(8, 16).new_sequence()
    taps = forward_reserved(decoder, torch.tensor(conversation.token_ids[:length]), [sequence], [length], taps=(0, 1), logits="none").taps
    assert torch.allclose(state.features.take(0, length), torch.stack([taps[0], taps[1]], 1), atol=1e-4)
    kept = decoder.read_kv(state.sequence, 0, length)
    assert torch.allclose(kept, decoder.read_kv(sequence, 0, length), atol=1e-4)


@pytest.mark.parametrize("kind", ["other", "exit-1"])
def test_without_taps_nothing_is_kept(make_engine, kind):
    engine = make_engine(kind)
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, [1, 2], SamplingParams(max_new_tokens=5, draft_length=2))
    assert conversation.draft_state.features is None


@pytest.mark.parametrize("kind,cut", [(KINDS[(cut + i) % 4], cut) for cut in range(5) for i in (0, 2)])  # each cut after two kinds
def test_a_stop_inside_an_accepted_run_cuts_everything_together(make_engine, kind, cut):
    plain_engine, engine = make_engine("none"), make_engine(kind)
    engine.core.keep_features((1,), FeatureBuffer)
    greedy = SamplingParams(max_new_tokens=30)
    whole = plain_engine.generate([PROMPTS[0]], greedy)[0].token_ids
    # the first token new to the text from a given place on, so that steps of 5 are cut at different places of a run
    place = next(i for i in range(6 + cut, 30) if whole[i] not in whole[:i])
    stop = SamplingParams(max_new_tokens=40, stop_token_ids=(whole[place],), draft_length=4)
    used, reference = engine.core.open_sequence_state(), plain_engine.core.open_sequence_state()
    result = engine.core.run(used, PROMPTS[0], stop)
    expected = plain_engine.core.run(reference, PROMPTS[0], SamplingParams(max_new_tokens=40, stop_token_ids=(whole[place],)))
    assert result.token_ids == expected.token_ids == whole[: place + 1] and result.finish_reason == "stop"
    assert used.token_ids == reference.token_ids
    assert used.sequence.length == reference.sequence.length == len(used.token_ids) - 1
    assert used.draft_state.features.length == used.draft_state.length <= len(used.token_ids) - 1
    m = result.speculation
    assert m.new_tokens == len(result.token_ids) - 1 and sum(m.accepted_at) == m.accepted and sum(m.proposed_at) == m.proposed
    if kind == "itself":
        assert m.acceptance_rate == 1
    kv = engine.core.target.read_kv(used.sequence, 0, used.sequence.length)
    assert torch.allclose(kv, plain_engine.core.target.read_kv(reference.sequence, 0, used.sequence.length), atol=1e-4)
    # going on: the same text as a conversation that was never speculated, with and without new tokens in between
    for new in ([], [8, 1, 6]):
        following = engine.core.run(used, new, SamplingParams(max_new_tokens=10, draft_length=4))
        assert following.token_ids == plain_engine.core.run(reference, new, SamplingParams(max_new_tokens=10)).token_ids
        assert following.reused_tokens == following.prompt_tokens - len(new) - 1
    engine.core.close_sequence_state(used)
    engine.core.pool.check_integrity()
    assert engine.core.pool.num_free_pages == engine.core.pool.max_pages


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_are_cut_with_the_text(make_engine, kind):
    engine = make_engine(kind)
    params = SamplingParams(max_new_tokens=16, temperature=1.0, seed=6, draft_length=4)
    whole = engine.generate([PROMPTS[0]], params)[0].token_ids
    for length in (7, 9):
        shorter = SamplingParams(max_new_tokens=length, temperature=1.0, seed=6, draft_length=4)
        conversation = engine.core.open_sequence_state()
        assert engine.core.run(conversation, PROMPTS[0], shorter).token_ids == whole[:length]
        # from here on the text is that of a conversation which got these tokens as its prompt
        fresh = engine.core.open_sequence_state()
        wanted = engine.core.run(fresh, conversation.token_ids, params).token_ids
        assert engine.core.run(conversation, [], params).token_ids == wanted
        engine.core.close_sequence_state(conversation)
        engine.core.close_sequence_state(fresh)


def test_a_draft_with_a_shorter_context_and_a_smaller_vocabulary_only_stops_drafting(make_engine, random_decoder, plain):
    target = make_engine("none").core.target
    draft = random_decoder(5, max_position_embeddings=40, vocab_size=90)
    results = Engine(target, draft=draft, page_size=16).generate(PROMPTS, SamplingParams(max_new_tokens=25, draft_length=4))
    assert [r.token_ids for r in results] == plain
    assert results[3].speculation.proposed == 0 < results[0].speculation.proposed


def test_deterministic_greedy_text_is_the_same_with_and_without_drafts(make_engine):
    params = [SamplingParams(max_new_tokens=12, draft_length=k) for k in (0, 3)]
    texts = [
        [r.token_ids for r in make_engine(kind, deterministic=True).generate(PROMPTS, p)]
        for kind in ("none", "other", "exit-1")
        for p in params
    ]
    assert all(t == texts[0] for t in texts)
