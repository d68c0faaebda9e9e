"""A draft head on the target's last states in the engine: the target's text, rows that are those of a plain pass, texts whose states are not known."""

from __future__ import annotations

import copy

import pytest
import torch

from codec.predictor.features import FeatureBuffer
from draft.draft_head import MAX_PENDING_HIDDEN
from draft.source import StateHeadSource
from draft.state_drafter import StateHeadState
from engine.engine import Engine
from engine.errors import BadDraftHead
from engine.model.decoder import forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.runtime.request import SequenceState
from engine.runtime.sampling import SamplingParams
from tests.engine.runtime.test_draft_head import PROMPTS, check_greedy_text

LAYERS = 5


@pytest.fixture(scope="module")
def target(random_decoder):
    return talkative(random_decoder(0, num_hidden_layers=LAYERS))


def talkative(decoder, share=0.02):
    """A copy whose layers say little beside the embeddings, so that a head which was never trained is right now and then."""
    decoder = copy.deepcopy(decoder)  # others may have it, and ask for it again
    for layer in decoder.layers:
        layer.o_proj.weight.mul_(share)
        layer.down_proj.weight.mul_(share)
    return decoder


@pytest.fixture(
    scope="module", params=[(1, 97, "own", (LAYERS,)), (2, 90, "tied", (1, 3, LAYERS))], ids=["one layer", "two, of three states"]
)
def source(request, target, tmp_path_factory, make_draft_head) -> StateHeadSource:
    layers, size, head, states = request.param
    folder = make_draft_head(tmp_path_factory.mktemp("head"), target, layers=layers, size=size, head=head, state_layers=states)
    found = load_draft_head(folder, target)
    assert isinstance(found, StateHeadSource)
    return found


def engine_of(target, draft, **options):
    return Engine(target, draft=draft, **({"page_size": 16, "prefill_chunk": 32} | options))


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in engine_of(target, None).generate(PROMPTS, SamplingParams(max_new_tokens=24))]


def full_rows(target, source, token_ids, known_from=0):
    """The own layers' KV [T, D] of a plain pass over the rows of token_ids from known_from on, with all states of the target."""
    sequence, own = target.new_pool(33, 16).new_sequence(), source.layers.new_pool(33, 16).new_sequence()
    ids = torch.tensor(token_ids, device=target.device)
    taps = forward_reserved(target, ids, [sequence], [len(ids)], taps=source.join.state_layers, logits="none").taps
    fused = source.join.fused([taps[layer] for layer in source.join.state_layers])[known_from:]
    before = torch.cat([torch.zeros_like(fused[:1]), fused[:-1]])
    rows = source.join.rows(before, target.embed(ids[known_from:]))
    forward_reserved(source.layers, None, [own], [len(rows)], hidden=rows, logits="none")
    return source.layers.read_kv(own, 0, len(rows))


def own_kv(engine, source, state):
    state.own.reserve(state.num_pending_hidden)
    engine.core.drafter.states_head.run_pending([state])
    assert state.pending_hidden is None
    return source.layers.read_kv(state.own, 0, state.own.length)


@pytest.mark.parametrize("length, features", [(4, ()), ("auto", ()), (4, (1,)), (1, (0, 1))])
def test_greedy_text_equals_plain_decoding(target, source, plain, length, features):
    check_greedy_text(engine_of(target, source), length, features, plain)


def test_equal_seeds_give_equal_text_in_any_batch(target, source):
    engine = engine_of(target, source)
    params = [
        SamplingParams(max_new_tokens=14, temperature=t, top_k=k, top_p=p, min_p=m, seed=s, draft_length=3)
        for t, k, p, m, s in ((1.0, 0, 1.0, 0.0, 1), (0.7, 12, 1.0, 0.0, 2), (1.4, 0, 0.8, 0.0, 3), (1.0, 20, 0.9, 0.05, 4))
    ]
    together = engine.generate(PROMPTS, params)
    plain = engine_of(target, None).generate(PROMPTS, params)
    for prompt, own, result, expected in zip(PROMPTS, params, together, plain, strict=True):
        [alone] = engine.generate([prompt], own)
        assert alone.token_ids == result.token_ids == expected.token_ids
        assert alone.speculation.accepted_at == result.speculation.accepted_at


@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "temperature": 0.8}])
def test_sampled_text_has_the_targets_distribution(random_decoder, make_draft_head, tmp_path, filters, check_sampled_text):
    shape = {"vocab_size": 5, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    target = random_decoder(3, **shape)
    folder = make_draft_head(tmp_path, target, size=3, state_layers=(3,))
    check_sampled_text(target, load_draft_head(folder, target), 500, **filters)


@pytest.mark.parametrize("temperature, length", [(0.0, 3), (1.0, 3), (0.0, 0)])
def test_rows_and_features_are_those_of_a_plain_pass(target, source, temperature, length):
    """No key or value of a guessed state stays, whatever was accepted."""
    engine = engine_of(target, source)
    engine.core.keep_features((0, 1), lambda: FeatureBuffer(dtype=torch.float32))
    conversation = engine.core.open_sequence_state()
    for n, new in enumerate(([5, 6, 7] * 14, [], [1, 2])):
        engine.core.run(conversation, new, SamplingParams(max_new_tokens=13, temperature=temperature, seed=n, draft_length=length))
    state, count = conversation.draft_state, conversation.sequence.length
    assert count == len(conversation.token_ids) - 1 == state.features.length == state.num_cached
    text = conversation.token_ids[:count]
    assert torch.allclose(own_kv(engine, source, state), full_rows(target, source, text), atol=1e-3) and state.own.length == count
    scratch = target.new_pool(9, 16).new_sequence()
    taps = forward_reserved(target, torch.tensor(text), [scratch], [count], taps=(0, 1, *source.join.state_layers), logits="none").taps
    assert torch.allclose(state.features.take(0, count), torch.stack([taps[0], taps[1]], 1), atol=1e-3)
    fused = source.join.fused([taps[layer] for layer in source.join.state_layers])
    assert torch.allclose(state.last, fused[-1], atol=1e-3)


def test_ragged_batches_with_and_without_drafts_leave_the_rows_of_a_plain_pass(target, source):
    engine = engine_of(target, source)
    conversations = [engine.core.open_sequence_state() for _ in PROMPTS]
    for turn in range(2):
        for c, prompt in zip(conversations, PROMPTS, strict=True):
            c.token_ids += [] if turn else prompt
        params = [SamplingParams(max_new_tokens=12 + b, draft_length=(b + turn) % 3 * 2, ignore_eos=True) for b in range(len(PROMPTS))]
        requests = [engine.core.submit(c, [], p, owns_cache=False) for c, p in zip(conversations, params, strict=True)]
        for request in requests:
            engine.core.finish(request)
    for c in conversations:
        assert c.draft_state.num_cached == c.sequence.length == len(c.token_ids) - 1
        assert torch.allclose(own_kv(engine, source, c.draft_state), full_rows(target, source, c.token_ids[:-1]), atol=1e-3)


def test_drafts_are_those_of_rows_run_one_by_one(target, source):
    """The first draft after a prompt, and those behind it, against passes over all rows at once."""
    engine, seen = engine_of(target, source), []
    propose = engine.core.drafter.propose
    engine.core.drafter.propose = lambda *args: seen.append(propose(*args)) or seen[-1]
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, PROMPTS[3], SamplingParams(max_new_tokens=5, draft_length=3, ignore_eos=True))
    prompt = conversation.token_ids[:76]  # and its first new token, which no model had run
    scratch = target.new_pool(9, 16).new_sequence()
    taps = forward_reserved(target, torch.tensor(prompt[:75]), [scratch], [75], taps=source.join.state_layers, logits="none").taps
    fused = source.join.fused([taps[layer] for layer in source.join.state_layers])
    before, tokens, drafts = torch.cat([torch.zeros_like(fused[:1]), fused]), list(prompt), []
    for _ in range(3):
        own = source.layers.new_pool(9, 16).new_sequence()
        rows = source.join.rows(before, target.embed(torch.tensor(tokens)))
        out = forward_reserved(source.layers, None, [own], [len(rows)], hidden=rows, logits="none").hidden[-1:]
        drafts.append(int(source.token_ids[source.layers.head(out).argmax()]))
        before, tokens = torch.cat([before, out]), [*tokens, drafts[-1]]
    assert seen[0].tokens.tolist() == drafts


def test_much_that_waits_is_run(target, source, monkeypatch):
    monkeypatch.setattr("draft.state_drafter.MAX_PENDING_HIDDEN", 64)
    assert MAX_PENDING_HIDDEN > 64
    engine, conversation = engine_of(target, source), None
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, [3] * 50, SamplingParams(max_new_tokens=40, draft_length=0))
    assert conversation.draft_state.own.length == 64 and conversation.draft_state.num_pending_hidden == 25


def test_a_text_whose_states_are_not_known_is_drafted_from_where_they_are(target, source, plain):
    engine = engine_of(target, source, prefill_chunk=8)
    sequence = engine.core.pool.new_sequence()
    forward_reserved(target, torch.tensor(PROMPTS[1][:30]), [sequence], [30], logits="none")
    sequence.advance(30)
    conversation = SequenceState(list(PROMPTS[1]), sequence)
    result = engine.core.run(conversation, [], SamplingParams(max_new_tokens=24, draft_length=3))
    state = conversation.draft_state
    assert result.token_ids == plain[1] and result.reused_tokens == 30 and result.speculation.proposed > 0
    assert state.num_skipped == 30 and state.num_cached == sequence.length and not state.shareable
    expected = full_rows(target, source, conversation.token_ids[: sequence.length], known_from=30)
    assert torch.allclose(own_kv(engine, source, state), expected, atol=1e-3)
    # and one whose cache is cut within what was never known
    del conversation.token_ids[20:]
    sequence.truncate(20)
    again = engine.core.run(conversation, [9, 9], SamplingParams(max_new_tokens=20, draft_length=3))
    [wanted] = engine_of(target, None).generate([[*PROMPTS[1][:20], 9, 9]], SamplingParams(max_new_tokens=20))
    assert again.token_ids == wanted.token_ids and state.num_skipped == 20 and state.num_cached == sequence.length


def test_what_lies_beyond_a_cut_cache_is_forgotten(target, source):
    engine = engine_of(target, source)
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, PROMPTS[3], SamplingParams(max_new_tokens=20, draft_length=3))
    del conversation.token_ids[60:]
    conversation.sequence.truncate(60)
    again = engine.core.run(conversation, [9, 9], SamplingParams(max_new_tokens=20, draft_length=3))
    [wanted] = engine_of(target, None).generate([[*PROMPTS[3][:60], 9, 9]], SamplingParams(max_new_tokens=20))
    assert again.token_ids == wanted.token_ids and conversation.draft_state.num_cached == conversation.sequence.length
    engine.core.close_sequence_state(conversation)
    assert engine.core.draft_pool.num_free_pages == engine.core.draft_pool.max_pages


def test_shared_beginnings_bring_their_rows(target, source):
    engine = engine_of(target, source, prefix_sharing=True, pool_tokens=2048)
    params = SamplingParams(max_new_tokens=12, draft_length=3, ignore_eos=True)
    first = engine.core.open_sequence_state()
    engine.core.run(first, PROMPTS[3], params)
    second = engine.core.open_sequence_state()
    result = engine.core.run(second, [*PROMPTS[3][:70], 9, 9], params)
    [wanted] = engine_of(target, None).generate([[*PROMPTS[3][:70], 9, 9]], SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert result.reused_tokens == 64 and result.token_ids == wanted.token_ids
    state = second.draft_state
    assert state.num_skipped in (0, 16) and state.num_cached == second.sequence.length
    # a page of rows whose text began elsewhere is nobody else's
    engine.core.pool.check_integrity()
    engine.core.draft_pool.check_integrity()


def test_rows_in_few_operations_are_rows(target, source):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(7, target.config.hidden_size, generator=generator)
    embeddings, out = target.embed(torch.arange(7) * 3), torch.full_like(states, float("nan"))
    source.join.rows_of(states, source.join.embedded(embeddings), out)
    assert torch.allclose(out, source.join.rows(states, embeddings), atol=1e-5) and float(out.abs().max()) > 0.1


def test_its_bytes_and_costs_are_counted(target, source):
    engine = engine_of(target, source)
    memory = engine.memory()
    assert memory["draft_bytes"] == source.layers.weight_bytes + source.join.num_bytes and engine.drafter_name == "draft head"
    assert memory["pool_bytes"] == engine.core.pool.bytes + engine.core.draft_pool.bytes
    costs = engine.core.measure_costs()
    assert not costs.runs_last_draft and costs.draft[0][1] > 0


def test_heads_that_do_not_fit_are_refused(target, random_decoder, make_draft_head, tmp_path):
    folder = make_draft_head(tmp_path, target, state_layers=(2, LAYERS))
    with pytest.raises(BadDraftHead, match="another model"):
        load_draft_head(folder, random_decoder(0, num_hidden_layers=3))
    assert load_draft_head(folder, target).fingerprint(lambda *_: "") == "trunk-1"


def test_a_gap_in_what_the_head_knows_is_told(target):
    sequence = target.new_pool(4).new_sequence()
    state = StateHeadState(sequence, None, target.new_pool(4).new_sequence())
    assert state.knows_text
    sequence.reserve(3)
    sequence.advance(3)
    assert not state.knows_text, "three tokens were run without it"
    state.skip(3)
    assert not state.knows_text and state.num_cached == 3
