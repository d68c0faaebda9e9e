"""A draft head in the engine: the target's text and distribution, caches and features that agree with a plain pass, ragged batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codec.predictor.features import FeatureBuffer, FeatureSpec, join_features
from codec.spec import NUM_SINKS
from draft.source import DraftHeadSource
from engine.calibrate.recipe import feature_spec
from engine.calibrate.stream import PairStream
from engine.engine import Engine
from engine.errors import BadDraftHead, InvalidOption
from engine.loading import choose_draft
from engine.model.decoder import Decoder, forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.runtime.request import SequenceState
from engine.runtime.sampling import SamplingParams

PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 25]
EXIT_LAYER = 2


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0, num_hidden_layers=4)


@pytest.fixture(scope="module", params=[(1, 60, "own"), (2, 30, "tied")], ids=["one own layer", "two own layers, tied head"])
def trained(request, target, tmp_path_factory, make_draft_head) -> DraftHeadSource:
    layers, size, head = request.param
    return load_draft_head(make_draft_head(tmp_path_factory.mktemp("head"), target, layers=layers, size=size, head=head), target)


def engine_of(target, draft, **options):
    return Engine(target, draft=draft, **({"page_size": 16, "prefill_chunk": 32} | options))


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in engine_of(target, None).generate(PROMPTS, SamplingParams(max_new_tokens=24))]


def check_greedy_text(engine, length, features, plain):
    """The text of PROMPTS is `plain`; of a fixed number of drafts some are accepted and some are not; no page stays taken."""
    engine.core.keep_features(features, FeatureBuffer)
    results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=24, draft_length=length))
    assert [r.token_ids for r in results] == plain
    if length != "auto":
        assert 0 < sum(r.speculation.accepted for r in results) < sum(r.speculation.proposed for r in results)
    for pool in (engine.core.pool, engine.core.draft_pool):
        pool.check_integrity()
        assert pool.num_free_pages == pool.max_pages


@pytest.mark.parametrize("length, features", [(4, ()), ("auto", ()), (4, (1, 2)), (1, (0, 3))])
def test_greedy_text_equals_plain_decoding(target, trained, plain, length, features):
    check_greedy_text(engine_of(target, trained), length, features, plain)


def test_only_tokens_of_its_vocabulary_are_drafted(target, trained):
    engine, seen = engine_of(target, trained), []
    propose = engine.core.drafter.propose

    def recorded(*args):
        proposal = propose(*args)
        seen.append(proposal)
        return proposal

    engine.core.drafter.propose = recorded
    engine.generate(PROMPTS, [SamplingParams(max_new_tokens=20, temperature=t, draft_length=3, seed=1) for t in (0.0, 1.0, 0.0, 2.0)])
    allowed, vocab = set(trained.token_ids.tolist()), target.config.vocab_size
    assert allowed >= {t for proposal in seen for t in proposal.tokens.tolist()} != set()
    distributions = [q for proposal in seen for own in proposal.requests for q in own.probs if q is not None]
    outside = torch.ones(vocab).index_fill_(0, trained.token_ids, 0.0).bool()
    assert distributions and all(len(q) == vocab and abs(float(q.sum()) - 1) < 1e-4 and not q[outside].any() for q in distributions)


def test_equal_seeds_give_equal_text_in_any_batch(target, trained):
    engine = engine_of(target, trained)
    params = [
        SamplingParams(max_new_tokens=14, temperature=t, top_k=k, top_p=p, min_p=m, seed=s, draft_length=3)
        for t, k, p, m, s in ((1.0, 0, 1.0, 0.0, 1), (0.7, 12, 1.0, 0.0, 2), (1.4, 0, 0.8, 0.0, 3), (1.0, 20, 0.9, 0.05, 4))
    ]
    together = engine.generate(PROMPTS, params)
    for prompt, own, result in zip(PROMPTS, params, together, strict=True):
        [alone] = engine.generate([prompt], own)
        assert alone.token_ids == result.token_ids and alone.speculation.accepted_at == result.speculation.accepted_at


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 3, "temperature": 0.8}])
def test_sampled_text_has_the_targets_distribution(random_decoder, make_draft_head, tmp_path, filters, check_sampled_text):
    shape = {"vocab_size": 5, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    target = random_decoder(3, **shape)
    check_sampled_text(target, load_draft_head(make_draft_head(tmp_path, target, size=3), target), 500, **filters)


def test_deterministic_text_is_the_same_with_and_without_drafts(target, trained):
    texts = [
        [
            r.token_ids
            for r in engine_of(target, draft, deterministic=True).generate(PROMPTS, SamplingParams(max_new_tokens=20, draft_length=k))
        ]
        for draft, k in ((None, 0), (trained, 0), (trained, 3))
    ]
    assert texts[1:] == texts[:1] * 2


def full_pass(target, trained, token_ids):
    """The early exit's and the draft head's states [T, taps, E] after 0 to EXIT_LAYER + n layers, and the draft head's KV, of one plain pass."""
    sequence, own = target.new_pool(9, 16).new_sequence(), trained.head_layers.new_pool(9, 16).new_sequence()
    count, depth = len(token_ids), trained.config.num_layers
    taps = forward_reserved(
        target, torch.tensor(token_ids), [sequence], [count], taps=tuple(range(EXIT_LAYER + 1)), last_layer=EXIT_LAYER, logits="none"
    ).taps
    more = forward_reserved(
        trained.head_layers, None, [own], [count], hidden=taps[EXIT_LAYER], taps=tuple(range(1, depth + 1)), logits="none"
    ).taps
    states = [taps[i] for i in range(EXIT_LAYER + 1)] + [more[i] for i in range(1, depth + 1)]
    return torch.stack(states, 1), trained.head_layers.read_kv(own, 0, count)


@pytest.mark.parametrize(  # every pair of two of them
    "temperature,eager,length", [(0.0, False, 3), (1.0, True, 3), (1.0, False, 0), (0.0, True, 0)], ids=str
)
def test_cache_and_features_are_those_of_a_plain_pass(target, trained, eager, temperature, length):
    engine = engine_of(target, trained)
    taps = tuple(range(EXIT_LAYER + trained.config.num_layers * eager + 1))
    engine.core.keep_features(taps, lambda: FeatureBuffer(dtype=torch.float32))
    conversation = engine.core.open_sequence_state()
    for n, new in enumerate(([5, 6, 7] * 14, [], [1, 2])):
        params = SamplingParams(max_new_tokens=13, temperature=temperature, seed=n, draft_length=length)
        engine.core.run(conversation, new, params)
    state, length = conversation.draft_state, conversation.sequence.length
    assert length == len(conversation.token_ids) - 1 == state.features.length == state.num_cached
    states, kv = full_pass(target, trained, conversation.token_ids[:length])
    assert torch.allclose(state.features.take(0, length), states[:, list(taps)], atol=1e-3)
    if eager:
        assert state.own.length == length
    state.own.reserve(state.num_pending_hidden)
    engine.core.drafter.draft_head.run_pending([state])
    assert state.own.length == length and state.pending_hidden is None
    assert torch.allclose(trained.head_layers.read_kv(state.own, 0, length), kv, atol=1e-3)


def test_ragged_batches_with_and_without_drafts_leave_the_caches_of_a_plain_pass(target, trained):
    engine = engine_of(target, trained)
    conversations = [engine.core.open_sequence_state() for _ in PROMPTS]
    for turn in range(2):
        for c, prompt in zip(conversations, PROMPTS, strict=True):
            c.token_ids += [] if turn else prompt
        params = [SamplingParams(max_new_tokens=12 + b, draft_length=(b + turn) % 3 * 2, ignore_eos=True) for b in range(len(PROMPTS))]
        requests = [engine.core.submit(c, [], p, owns_cache=False) for c, p in zip(conversations, params, strict=True)]
        for request in requests:
            engine.core.finish(request)
    for c in conversations:
        state = c.draft_state
        assert state.num_cached == c.sequence.length == len(c.token_ids) - 1
        state.own.reserve(state.num_pending_hidden)
        engine.core.drafter.draft_head.run_pending([state])
        assert torch.allclose(
            trained.head_layers.read_kv(state.own, 0, state.num_cached), full_pass(target, trained, c.token_ids[:-1])[1], atol=1e-3
        )


def test_a_prompt_is_not_held_up_and_little_waits(target, trained, monkeypatch):
    engine, runs = engine_of(target, trained, prefill_chunk=200), []
    forward = trained.head_layers.forward
    monkeypatch.setattr(trained.head_layers, "forward", lambda *args, **options: runs.append(args[2]) or forward(*args, **options))
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, [4] * 150, SamplingParams(max_new_tokens=20, draft_length=0))
    assert not runs and conversation.draft_state.num_pending_hidden == 169
    engine.core.run(conversation, [4] * 100, SamplingParams(max_new_tokens=6, draft_length=2))
    assert runs[0] == [271], "with the first pending token, once"
    assert sum(n for [n] in runs[1:]) <= 10
    monkeypatch.setattr("draft.early_exit.MAX_PENDING_HIDDEN", 64)
    long = engine.core.open_sequence_state()
    runs.clear()
    engine.core.run(long, [3] * 50, SamplingParams(max_new_tokens=14, draft_length=0))
    assert not runs
    engine.core.run(long, [3], SamplingParams(max_new_tokens=6, draft_length=0))
    assert runs == [[65]] and long.draft_state.own.length == 65 and long.draft_state.num_pending_hidden == 5


def left_by_a_restore(engine, ids, known, chunk=40):
    """A conversation of ids whose first `known` tokens were restored in such chunks, and left for the draft head's layers."""
    conversation, target = engine.core.open_sequence_state(), engine.core.target
    conversation.token_ids[:] = ids
    state = conversation.draft_state
    state.sequence.ensure(known)
    state.cache.ensure(known)
    for at in range(0, known, chunk):  # the other layers' KV comes from elsewhere
        part = ids[at : min(known, at + chunk)]
        engine.core.drafter.prefill_first_layers([state], [part])
        state.sequence.advance(len(part))
    forward_reserved(target, torch.tensor(ids[:known]), [state.sequence], [known], starts=[0], logits="none")
    assert state.num_left == state.num_pending_hidden == known == state.num_cached
    return conversation


@pytest.mark.parametrize("length", [0, 3])
def test_what_is_left_for_the_first_draft_waits_for_it(target, trained, monkeypatch, length):
    """As a restore leaves them: neither a prompt nor steps without drafts run the own layers, and drafts find their cache whole."""
    monkeypatch.setattr("draft.draft_head._PASS_ROWS", 32)
    monkeypatch.setattr("draft.early_exit.MAX_PENDING_HIDDEN", 40)
    engine, runs, known = engine_of(target, trained, prefill_chunk=8), [], 70
    ids = (PROMPTS[3] * 2)[: known + 9]
    text = engine_of(target, None).generate([ids], SamplingParams(max_new_tokens=24))[0].token_ids
    forward = trained.head_layers.forward
    monkeypatch.setattr(trained.head_layers, "forward", lambda *args, **options: runs.append(args[2]) or forward(*args, **options))
    conversation = left_by_a_restore(engine, ids, known)
    state = conversation.draft_state
    assert not runs
    result = engine.core.run(conversation, [], SamplingParams(max_new_tokens=24, draft_length=length))
    assert result.token_ids == text and result.reused_tokens == known
    if length == 0:
        assert not runs and state.num_left == known and state.num_cached == len(ids) + 23
        return
    assert runs[:3] == [[32], [32], [6]] and state.num_left == 0 and result.speculation.accepted > 0
    state.own.reserve(state.num_pending_hidden)
    engine.core.drafter.draft_head.run_pending([state])
    kv = full_pass(target, trained, conversation.token_ids[: state.sequence.length])[1]
    assert torch.allclose(trained.head_layers.read_kv(state.own, 0, state.num_cached), kv, atol=1e-3)


def test_what_is_left_is_run_a_pass_a_step_once_others_wait_behind_it(target, trained, monkeypatch):
    """A text that never drafts does not stand still for it."""
    monkeypatch.setattr("draft.draft_head._PASS_ROWS", 32)
    monkeypatch.setattr("draft.early_exit.MAX_PENDING_HIDDEN", 40)
    engine, runs, known = engine_of(target, trained), [], 70
    forward = trained.head_layers.forward
    monkeypatch.setattr(trained.head_layers, "forward", lambda *args, **options: runs.append(args[2]) or forward(*args, **options))
    conversation = left_by_a_restore(engine, (PROMPTS[3] * 2)[: known + 1], known, chunk=known)
    state = conversation.draft_state
    request = engine.core.submit(conversation, [], SamplingParams(max_new_tokens=60, ignore_eos=True, draft_length=0), owns_cache=False)
    seen = []
    while request.finish_reason is None:
        before = len(runs)
        engine.core.step()
        seen += [len(runs) - before]
    assert max(seen) == 2 and sum(seen) == 4 and runs[:3] == [[32], [32], [6]] and state.num_left == 0
    state.own.reserve(state.num_pending_hidden)
    engine.core.drafter.draft_head.run_pending([state])
    kv = full_pass(target, trained, conversation.token_ids[: state.sequence.length])[1]
    assert torch.allclose(trained.head_layers.read_kv(state.own, 0, state.num_cached), kv, atol=1e-3)


@pytest.mark.parametrize("eager", [False, True])
def test_a_cache_filled_from_outside_is_learnt_before_drafting(target, trained, plain, eager):
    engine = engine_of(target, trained, prefill_chunk=8)
    engine.core.keep_features((EXIT_LAYER + 1,) if eager else (), FeatureBuffer)
    sequence = engine.core.pool.new_sequence()
    forward_reserved(target, torch.tensor(PROMPTS[1][:30]), [sequence], [30], logits="none")
    sequence.advance(30)
    conversation = SequenceState(list(PROMPTS[1]), sequence)
    result = engine.core.run(conversation, [], SamplingParams(max_new_tokens=24, draft_length=3))
    assert result.token_ids == plain[1] and result.reused_tokens == 30
    assert 0 < result.speculation.proposed < 3 * result.speculation.steps, "no drafts while it learns, eight tokens a step"
    state = conversation.draft_state
    assert state.num_cached == sequence.length
    state.own.reserve(state.num_pending_hidden)
    engine.core.drafter.draft_head.run_pending([state])
    kv = full_pass(target, trained, conversation.token_ids[: sequence.length])[1]
    assert torch.allclose(trained.head_layers.read_kv(state.own, 0, sequence.length), kv, atol=1e-3)
    if eager:
        assert state.features.length == sequence.length and state.features.take(0, 34) is None
        assert state.features.take(sequence.length - 5, sequence.length) is not None


def test_what_lies_beyond_a_cut_cache_is_forgotten(target, trained):
    engine = engine_of(target, trained)
    conversation, fresh = engine.core.open_sequence_state(), engine.core.open_sequence_state()
    engine.core.run(conversation, PROMPTS[3], SamplingParams(max_new_tokens=20, draft_length=3))
    del conversation.token_ids[60:]
    conversation.sequence.truncate(60)
    again = engine.core.run(conversation, [9, 9], SamplingParams(max_new_tokens=20, draft_length=3))
    wanted = engine.core.run(fresh, [*PROMPTS[3][:60], 9, 9], SamplingParams(max_new_tokens=20, draft_length=3))
    assert again.token_ids == wanted.token_ids and again.speculation.accepted_at == wanted.speculation.accepted_at
    engine.core.close_sequence_state(conversation)
    engine.core.close_sequence_state(fresh)
    assert engine.core.draft_pool.num_free_pages == engine.core.draft_pool.max_pages


def test_calibration_sees_the_features_that_decoding_keeps(target, trained):
    last = EXIT_LAYER + trained.config.num_layers
    assert feature_spec(None, EXIT_LAYER, head_layers=trained.head_layers).taps == (2, last) and feature_spec(None, EXIT_LAYER).taps == (2,)
    documents = [[5, 6, 7] * 14, [9, 1] * 9]
    for taps in ((0, EXIT_LAYER, last), (last,), (1,)):
        batch = PairStream(target, None, FeatureSpec(taps), EXIT_LAYER, trained.head_layers).run(documents)
        rows = torch.cat([full_pass(target, trained, d)[0][NUM_SINKS:, list(taps)] for d in documents])
        embedded = torch.cat([target.embed(torch.tensor(d))[NUM_SINKS:] for d in documents])[:, None]
        assert torch.allclose(batch.features, join_features(rows, embedded), atol=1e-3)


def test_its_bytes_and_costs_are_counted(target, trained):
    engine = engine_of(target, trained)
    memory, c = engine.memory(), target.config
    matrices = c.hidden_size * (c.num_heads + 2 * c.num_kv_heads + c.num_heads) * c.head_dim + 3 * c.hidden_size * c.intermediate_size
    layer = matrices + 2 * c.hidden_size
    assert memory["draft_bytes"] == 4 * (trained.config.num_layers * layer + c.hidden_size * (trained.config.vocab_size + 1))
    assert memory["pool_bytes"] == engine.core.pool.bytes + engine.core.draft_pool.bytes and engine.drafter_name == "draft head"
    costs = engine.core.measure_costs()
    assert costs.runs_last_draft and costs.last[0][1] < costs.draft[0][1]
    assert costs.step_seconds(0, 1) == costs.last[0][1] + costs.verify[0][1]


def test_draft_heads_that_do_not_fit_are_refused(target, random_decoder, make_draft_head, tmp_path):
    folder = make_draft_head(tmp_path / "a", target)
    with pytest.raises(BadDraftHead, match="another model"):
        load_draft_head(folder, random_decoder(0))
    (folder / "adapter.safetensors").write_bytes((folder / "adapter.safetensors").read_bytes()[:-7])
    with pytest.raises(BadDraftHead, match="cannot be read"):
        load_draft_head(folder, target)
    make_draft_head(folder, target)
    config = replace(target.config, vocab_size=20)
    with pytest.raises(BadDraftHead):
        load_draft_head(folder, Decoder.from_config(config, dtype=torch.float32))
    with pytest.raises(BadDraftHead, match="there is no"):
        load_draft_head(tmp_path / "none", target)
    with pytest.raises(InvalidOption, match="exit_layer"):
        choose_draft(folder, target.config, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("features", [(), (1, 3)], ids=["lazy", "eager"])
def test_on_a_gpu_the_text_and_the_cache_are_the_same(random_decoder, make_draft_head, tmp_path, features):
    target = random_decoder(0, num_hidden_layers=4, head_dim=32, num_attention_heads=4)
    folder = make_draft_head(tmp_path, target)
    there = Decoder.from_config(target.config, dtype=torch.float32, device="cuda")
    for name, place in there.hf_tensors().items():
        place.copy_(target.hf_tensors()[name])
    trained = load_draft_head(folder, there)
    texts = []
    for draft, length in ((None, 0), (trained, 3)):
        engine = engine_of(there, draft, deterministic=True, page_size=64)
        if draft is not None:
            engine.core.keep_features(features, lambda: FeatureBuffer(dtype=torch.float32))
        results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=24, draft_length=length))
        texts.append([r.token_ids for r in results])
    assert texts[0] == texts[1] and 0 < sum(r.speculation.accepted for r in results) < sum(r.speculation.proposed for r in results)
    sampled = SamplingParams(max_new_tokens=30, draft_length=3, temperature=1.0, seed=5)
    conversation = engine.core.open_sequence_state()
    engine.core.run(conversation, PROMPTS[1], sampled)
    state, count = conversation.draft_state, conversation.sequence.length
    state.own.reserve(state.num_pending_hidden)
    engine.core.drafter.draft_head.run_pending([state])
    here = load_draft_head(folder, target)
    states, kv = full_pass(target, here, conversation.token_ids[:count])
    assert (trained.head_layers.read_kv(state.own, 0, count).cpu() - kv).norm() < 0.02 * kv.norm()
    if features:
        wanted = states[:, list(features)]
        assert (state.features.take(0, count).cpu() - wanted).norm() < 0.02 * wanted.norm()
