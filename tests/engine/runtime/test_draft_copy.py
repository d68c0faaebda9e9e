"""Drafts made with copies of weights in few bits: the target's text and cache to the bit, states that the draft head goes on from, ragged batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("llvmlite")

from codec.predictor.features import FeatureBuffer
from draft.early_exit import EarlyExitDrafter
from draft.exit_copy import BEGINS_AFTER, ExitCopyDrafter
from draft.policy import CostModel
from engine.engine import Engine
from engine.loading import remember_copies
from engine.model.config import DecoderConfig
from engine.model.decoder import Decoder, forward_reserved
from engine.runtime.draft_copy import CopiedDecoder, exit_copy
from engine.runtime.drafters import load_draft_head
from engine.runtime.request import SequenceState
from engine.runtime.sampling import SamplingParams
from kernels.cpu_decode.stopping import Stopping
from kernels.cpu_decode.tiles import TILES_8
from tests.engine.runtime.test_draft_head import left_by_a_restore

PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 25]
EXIT_LAYER = 2
SHAPE = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="module", autouse=True)
def compiled_always():
    """Whatever a measurement on a busy machine would say."""
    patch = pytest.MonkeyPatch()
    patch.setattr("engine.model.linear.compiled_share", lambda threads: 1.0)
    patch.setattr("draft.exit_copy.BEGINS_AFTER", 0)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def target(compiled_always, random_decoder):
    config = random_decoder(0, num_hidden_layers=4, **SHAPE).config
    assert isinstance(config, DecoderConfig)
    decoder = Decoder.from_config(config, dtype=torch.bfloat16, seed=3)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10)
    return decoder


@pytest.fixture(scope="module", params=[1, 2], ids=["one own layer", "two own layers"])
def trained(request, target, tmp_path_factory, make_draft_head):
    folder = make_draft_head(tmp_path_factory.mktemp("head"), target, layers=request.param, size=64)
    return load_draft_head(folder, target)


def engine_of(target, draft, **options):
    return Engine(target, draft=draft, **({"page_size": 16, "prefill_chunk": 32, "prefix_sharing": False} | options))


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in engine_of(target, None).generate(PROMPTS, SamplingParams(max_new_tokens=24))]


@pytest.mark.parametrize(("length", "features"), [(4, ()), ("auto", ()), (4, (1, 2)), (3, (0, 3))])
def test_greedy_text_equals_plain_decoding(target, trained, plain, length, features):
    engine = engine_of(target, trained)
    drafter = engine.core.drafter
    assert isinstance(drafter, ExitCopyDrafter) and drafter.resumes_at == 0 and not drafter.runs_last_draft
    engine.core.keep_features(features, FeatureBuffer)
    assert (drafter.resumes_at, drafter.runs_last_draft) == ((2, True) if 3 in features else (0, False)), (
        "features that only the weights give"
    )
    results = engine.generate(PROMPTS, SamplingParams(max_new_tokens=24, draft_length=length))
    assert [r.token_ids for r in results] == plain
    if length != "auto":
        assert 0 < sum(r.speculation.accepted for r in results) < sum(r.speculation.proposed for r in results)
    for pool in (engine.core.pool, engine.core.draft_pool):
        pool.check_integrity()
        assert pool.num_free_pages == pool.max_pages


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seeded_text_is_the_same_alone_in_a_batch_and_without_drafts(target, trained, temperature):
    engine = engine_of(target, trained)

    def params(length):
        return [SamplingParams(max_new_tokens=14, temperature=temperature, seed=s, draft_length=length) for s in range(len(PROMPTS))]

    together, without = (engine.generate(PROMPTS, params(length)) for length in (3, 0))
    assert [r.token_ids for r in together] == [r.token_ids for r in without]
    for prompt, own, result in zip(PROMPTS, params(3), together, strict=True):
        [alone] = engine.generate([prompt], own)
        assert alone.token_ids == result.token_ids


@pytest.mark.parametrize("length", [0, 3, "auto"])
def test_the_targets_cache_and_the_states_are_those_of_plain_decoding(target, trained, length):
    caches, texts, features = [], [], []
    for draft, own in ((None, 0), (trained, length)):
        engine = engine_of(target, draft)
        if draft is not None:
            engine.core.keep_features((1, EXIT_LAYER), lambda: FeatureBuffer(dtype=torch.bfloat16))
        conversation = engine.core.open_sequence_state()
        for new in ([5, 6, 7] * 14, [], [1, 2]):
            engine.core.run(conversation, new, SamplingParams(max_new_tokens=13, draft_length=own))
        count = conversation.sequence.length
        texts.append(conversation.token_ids)
        caches.append(target.read_kv(conversation.sequence, 0, count))
        state = conversation.draft_state
        if state is not None:
            assert count == len(conversation.token_ids) - 1 == state.features.length == state.num_cached
            features.append(state.features.take(0, count))
            state.own.reserve(state.num_pending_hidden)
            engine.core.drafter.draft_head.run_pending([state])
            kept = state.own
    assert texts[0] == texts[1] and torch.equal(caches[0], caches[1]), "drafts leave no trace"
    pool = target.new_pool(9, 16)
    runner, sequence = type(engine.core.runner)(target, pool), pool.new_sequence()
    taps = forward_reserved(
        runner, torch.tensor(texts[0][:count]), [sequence], [count], taps=(1, EXIT_LAYER), logits="none", deterministic=True
    ).taps
    wanted = torch.stack([taps[1], taps[EXIT_LAYER]], 1)
    assert (features[0].float() - wanted.float()).norm() < 0.02 * wanted.float().norm()
    heads = trained.head_layers
    own = heads.new_pool(9, 16).new_sequence()
    forward_reserved(heads, None, [own], [count], hidden=taps[EXIT_LAYER], logits="none")
    exact, found = (heads.read_kv(s, 0, count).float() for s in (own, kept))
    assert (found - exact).norm() < 0.3 * exact.norm(), "keys and values of drafts come from the copies"


def test_a_request_that_lies_behind_learns_before_it_drafts(target, trained, plain):
    engine = engine_of(target, trained, prefill_chunk=8)
    sequence = engine.core.pool.new_sequence()
    forward_reserved(engine.core.runner, torch.tensor(PROMPTS[1][:30]), [sequence], [30], logits="none")
    sequence.advance(30)
    conversation = SequenceState(list(PROMPTS[1]), sequence)
    result = engine.core.run(conversation, [], SamplingParams(max_new_tokens=24, draft_length=3))
    assert result.token_ids == plain[1] and 0 < result.speculation.proposed < 3 * result.speculation.steps
    assert conversation.draft_state.num_cached == sequence.length


def test_the_policy_is_told_what_a_prompt_took_before_its_first_draft(target, trained, monkeypatch):
    told = []
    monkeypatch.setattr("draft.policy.BlockPolicy.caught_up", lambda policy, seconds: told.append(seconds))
    for temperature in (0.0, 1.0):  # blocks in one call, and pass by pass
        engine = engine_of(target, trained, costs=CHEAP)
        result = engine.generate([[7] * 60], SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=temperature))[0]
        assert result.speculation.proposed and len(told) == 1 and 0 < told.pop() < 600
        engine.generate([[7] * 20], SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=temperature))
        assert not told, "a few tokens are run within the block"


def test_some_draft_and_others_do_not(target, trained, plain):
    engine = engine_of(target, trained)
    params = [SamplingParams(max_new_tokens=24, draft_length=length) for length in (0, 4, "auto", 1)]
    assert [r.token_ids for r in engine.generate(PROMPTS, params)] == plain


def test_copies_are_near_the_weights_and_counted(target, trained):
    engine = engine_of(target, trained)
    drafter, memory = engine.core.drafter, engine.memory()
    first, head = drafter.copy.first, drafter.copy.head.decoder
    assert isinstance(first, CopiedDecoder) and isinstance(head, CopiedDecoder)
    assert memory["draft_bytes"] == trained.head_layers.weight_bytes + first.weight_bytes + head.weight_bytes
    layers = target.layer_weights()[:EXIT_LAYER]
    copied = sum(matrix.nbytes for w in layers for matrix in (w.qkv, w.o, w.gate_up, w.down))
    assert (
        first.weight_bytes
        == copied * 9 // 32
        == sum(w.qkv.nbytes + w.o.nbytes + w.gate_up.nbytes + w.down.nbytes for w in first._layer_weights())
    )
    sequence = engine.core.pool.new_sequence()
    tokens = torch.tensor(PROMPTS[3][:20])
    sequence.reserve(20)
    eight = CopiedDecoder(engine.core.runner, EXIT_LAYER, TILES_8, with_head=False)
    exact, four_bits, eight_bits = (
        runner.forward(tokens, [sequence], [20], logits="none", last_layer=EXIT_LAYER).hidden.float()
        for runner in (engine.core.runner, first, eight)
    )
    assert 0 < 4 * (eight_bits - exact).norm() < (four_bits - exact).norm() < 0.4 * exact.norm()
    many = torch.zeros(70, dtype=torch.int64)
    sequence.reserve(70)
    assert torch.equal(*(r.forward(many, [sequence], [70], logits="none", last_layer=2).hidden for r in (engine.core.target, first)))
    sequence.free()


def test_without_whole_tiles_or_compiled_steps_drafts_are_made_with_the_weights(target, trained, random_decoder, make_draft_head, tmp_path):
    odd = load_draft_head(make_draft_head(tmp_path / "odd", target, size=60), target)
    assert type(engine_of(target, odd).core.drafter) is EarlyExitDrafter
    exact = random_decoder(0, num_hidden_layers=4, **SHAPE)
    source = load_draft_head(make_draft_head(tmp_path / "float32", exact, size=64), exact)
    engine = engine_of(exact, source)
    assert type(engine.core.drafter) is EarlyExitDrafter and engine.core.drafter.resumes_at == EXIT_LAYER
    assert exit_copy(exact, 2, source.head_layers, source.token_ids, deterministic=False) is None


def test_a_short_answer_does_not_wait_for_copies(target, trained, monkeypatch):
    """Automatic drafts begin after some tokens, and from then on with the first one; drafts that are asked for begin at once."""
    monkeypatch.setattr("draft.exit_copy.BEGINS_AFTER", BEGINS_AFTER)
    engine = engine_of(target, trained, costs=CostModel(draft=((1, 0.01),), verify=((1, 1.0), (64, 1.01))))
    copy, auto = engine.core.drafter.copy, SamplingParams(max_new_tokens=BEGINS_AFTER, ignore_eos=True)
    [result] = engine.generate([[3, 4, 9, 20]], auto)
    assert result.speculation.proposed == result.speculation.from_text and not copy.ready()
    [result] = engine.generate([[3, 4, 9, 20]], replace(auto, max_new_tokens=BEGINS_AFTER + 20))
    assert result.speculation.proposed > result.speculation.from_text and copy.ready()
    [result] = engine.generate([[5, 5, 8]], replace(auto, max_new_tokens=20))
    assert result.speculation.proposed > result.speculation.from_text + result.speculation.from_seen
    other = engine_of(target, trained)
    assert other.generate([[5, 5, 8]], replace(auto, max_new_tokens=8, draft_length=2))[0].speculation.proposed > 0


def test_copies_of_an_earlier_process_are_there_at_once(target, trained, monkeypatch, tmp_path):
    """The same copies to the byte, so the same drafts; a file that is damaged is made again, and other weights have other files."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path))
    monkeypatch.setattr("draft.exit_copy.BEGINS_AFTER", BEGINS_AFTER)
    auto, found = SamplingParams(max_new_tokens=BEGINS_AFTER, ignore_eos=True), []

    def engine_with(weight_sum):
        monkeypatch.setattr(target, "weight_sum", weight_sum)
        engine = engine_of(target, trained, costs=CHEAP)
        remember_copies(engine.core)
        return engine, engine.core.drafter.copy

    def tiles(copy):
        return [copied._made()[0][0].qkv.tiles.clone() for copied in (copy.first, copy.head.decoder)] + [copy.head.decoder._made()[1].tiles]

    for damage in (False, False, True, False):
        files = sorted((tmp_path / "copies").glob("*.tiles"))
        for file in files if damage else ():
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        engine, copy = engine_with(5)
        assert copy.ready() == bool(files)
        [result] = engine.generate([[3, 4, 9, 20]], auto)
        drafted = result.speculation.proposed > result.speculation.from_text + result.speculation.from_seen
        assert drafted == bool(files), "a short answer waits for copies only where there are none"
        found.append((result.token_ids, tiles(copy)))
    for text, own in found[1:]:
        assert text == found[0][0] and all(map(torch.equal, own, found[0][1]))
    assert not engine_with(6)[1].ready()
    other, copy = engine_with(None)
    assert not copy.ready() and other.generate([[3]], replace(auto, draft_length=2))[0].speculation.proposed
    assert len(list((tmp_path / "copies").glob("*.tiles"))) == 2


@pytest.mark.parametrize(("kind", "own"), [("BlockWeight", torch.Tensor), ("BlockEmbedding", torch.nn.Embedding)])
def test_weights_that_are_in_few_bits_already_are_not_copied(target, trained, kind, own, monkeypatch):
    """They were kept so to save memory."""
    assert type(engine_of(target, trained).core.drafter) is ExitCopyDrafter
    monkeypatch.setattr(f"engine.runtime.draft_copy.{kind}", own)  # as if these were
    assert type(engine_of(target, trained).core.drafter) is EarlyExitDrafter


def recorded(engine, prompts, params):
    """(results, proposals) of a generation."""
    proposals, drafter = [], engine.core.drafter
    propose = drafter.propose
    drafter.propose = lambda *args: proposals.append(propose(*args)) or proposals[-1]
    try:
        return engine.generate(prompts, params), proposals
    finally:
        del drafter.propose


@pytest.mark.parametrize("length", [1, 5])
def test_one_call_drafts_what_single_passes_do(target, trained, length):
    found, prompts = [], [[3, 4, 9, 20], [1], [2, 3, 5] * 3]  # together so few that both ways run them with the copies
    for whole in (True, False):
        engine = engine_of(target, trained)
        drafter = engine.core.drafter
        assert drafter.copy.block is not None
        drafter.copy = drafter.copy._replace(block=drafter.copy.block if whole else None)
        params = [SamplingParams(max_new_tokens=20 + 3 * b, draft_length=length - (b == 2)) for b in range(len(prompts))]
        results, proposals = recorded(engine, prompts, params)
        found.append(([r.token_ids for r in results], [(p.tokens.tolist(), [own.num_drafts for own in p.requests]) for p in proposals]))
    assert found[0] == found[1] and any(tokens for tokens, _ in found[0][1])


CHEAP = CostModel(draft=((1, 0.01),), verify=((1, 1.0), (256, 1.05)))


def test_leaves_and_ends_of_blocks_are_the_policys(target, trained, plain):
    engine = engine_of(target, trained, costs=CHEAP, ngrams=False)
    few = PROMPTS[:2]  # whose drafts are verified in compiled steps
    results, proposals = recorded(engine, few, SamplingParams(max_new_tokens=24))
    assert [r.token_ids for r in results] == plain[:2]
    lengths = {own.num_drafts for p in proposals for own in p.requests}
    leaves = [leaf for p in proposals for own in p.requests for leaf in own.leaves]
    assert len(lengths) > 3 and leaves
    for own, chain in ((own, p.tokens) for p in proposals if len(p.requests) == 1 for own in p.requests):
        assert all(leaf.token != int(chain[leaf.depth - 1]) for leaf in own.leaves if leaf.depth <= own.num_drafts)
    dear = engine_of(target, trained, costs=CostModel(draft=((1, 0.01),), verify=((1, 1.0), (2, 1.55), (256, 150.0))), ngrams=False)
    results, proposals = recorded(dear, PROMPTS[:1], SamplingParams(max_new_tokens=24))
    assert [r.token_ids for r in results] == plain[:1] and max(own.num_drafts for p in proposals for own in p.requests) < max(lengths)


def test_a_block_tells_the_likeliest_tokens_and_stops_where_it_is_told(target, trained):
    engine = engine_of(target, trained)
    first, head, _, block = engine.core.drafter.copy
    prompts, pools = [[3, 4, 9, 20, 6], [7, 8]], (engine.core.pool, engine.core.draft_pool)
    sequences, own, pending = [pools[0].new_sequence() for _ in prompts], [pools[1].new_sequence() for _ in prompts], []
    for prompt, sequence, own_sequence in zip(prompts, sequences, own, strict=True):
        count = len(prompt)
        hidden = forward_reserved(
            engine.core.runner, torch.tensor(prompt), [sequence], [count], logits="none", last_layer=EXIT_LAYER
        ).hidden
        sequence.advance(count)
        sequence.reserve(8)
        own_sequence.reserve(count + 8)
        pending.append(hidden)

    def run(stopping, lengths=(3, 2), pending=pending):
        return block(sequences, own, [11, 12], pending, list(lengths), 3, stopping)

    drafted = run(Stopping.never(2))
    assert drafted.counts.tolist() == [3, 2]
    for b, prompt in enumerate(prompts):
        tokens = torch.tensor([11 + b, *drafted.tokens[b, : drafted.counts[b] - 1, 0].tolist()])
        hidden = first.forward(tokens, [sequences[b]], [len(tokens)], logits="none", last_layer=EXIT_LAYER).hidden
        states = head.forward([own[b]], torch.cat((pending[b], hidden)), [len(prompt) + len(tokens)], [0], ()).hidden
        top = head.head(states[len(prompt) :]).softmax(-1).topk(3)
        assert torch.equal(trained.token_ids[top.indices], torch.from_numpy(drafted.tokens[b, : len(tokens)]))
        assert torch.allclose(top.values, torch.from_numpy(drafted.probabilities[b, : len(tokens)]), rtol=1e-5)
    told = Stopping.never(2)
    assert run(told._replace(row=2e30)).counts.tolist() == [1, 1], "no row is worth that"
    assert run(told._replace(rates=np.array([1e30, 1.0], np.float32), row=1.5)).counts.tolist() == [3, 1]
    half = told._replace(heights=np.full(2, 0.5, np.float32), rates=np.ones(2, np.float32))
    assert run(half._replace(row=0.3), (3, 3)).counts.tolist() == [2, 2], "chances of .5 and .25"
    assert run(half._replace(row=0.3, passes=np.array([0, 0, 0.5], np.float32)), (3, 3)).counts.tolist() == [1, 1], (
        "a pass too dear for both"
    )
    certain = float(drafted.probabilities[0, 0, 0])
    sloped = half._replace(heights=np.zeros(2, np.float32), slopes=np.ones(2, np.float32), row=certain)
    assert run(sloped._replace(row=certain * 1.001), (3, 1)).counts[0] == 1 < run(sloped._replace(row=certain * 0.999), (3, 1)).counts[0]
    for sequence in (*sequences, *own):
        sequence.free()


def test_what_was_left_is_forgotten_once_drafts_have_run_it(target, trained):
    """Few tokens that a restore left; steps without drafts; then a step that catches up beside a request that lacks more."""
    engine = engine_of(target, trained, prefill_chunk=8)
    ids, known = PROMPTS[1][:25], 20
    conversation, other = left_by_a_restore(engine, ids, known), engine.core.open_sequence_state()
    state = conversation.draft_state
    for new, count, length in (([], 3, 1), ([5], 6, 0)):
        engine.core.run(conversation, new, SamplingParams(max_new_tokens=count, draft_length=length, ignore_eos=True))
        assert state.num_left == 0
    engine.core.run(other, [7] * 40, SamplingParams(max_new_tokens=2, draft_length=0, ignore_eos=True))
    params = SamplingParams(max_new_tokens=30, draft_length=3, ignore_eos=True)
    requests = [engine.core.submit(c, [9], params, owns_cache=False) for c in (conversation, other)]
    while any(r.finish_reason is None and r.error is None for r in requests):
        engine.core.step()
    assert [r.error for r in requests] == [None, None] and all(r.num_new == 30 for r in requests)


@pytest.mark.parametrize("seed", [3, None])
def test_a_shared_prompt_without_states_is_run_again_as_its_text_asks(target, trained, monkeypatch, seed):
    """The pages of a request that never drafted are shared; one that drafts runs the target's first layers over them anew, for a seeded text in the
    same bits."""
    engine, runs, prefill = engine_of(target, trained, prefix_sharing=True), [], EarlyExitDrafter._prefill
    monkeypatch.setattr(
        EarlyExitDrafter, "_prefill", lambda self, *args, **options: runs.append(self.deterministic) or prefill(self, *args, **options)
    )
    params = {"max_new_tokens": 12, "temperature": 0.9, "seed": seed, "ignore_eos": True}
    prompt = PROMPTS[3] * 2
    first, second = (engine.generate([prompt], SamplingParams(draft_length=length, **params))[0] for length in (0, 3))
    assert second.reused_tokens >= 128 and second.speculation.proposed > 0
    assert runs and set(runs) == {seed is not None}
    assert first.token_ids == second.token_ids or seed is None
