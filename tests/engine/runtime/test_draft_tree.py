"""Siblings of drafts: the target's own greedy text, caches and features of a plain pass, and only where they can be."""

from __future__ import annotations

import pytest
import torch

from codec.predictor.features import FeatureBuffer
from draft.policy import CostModel
from draft.protocols import RequestProposal
from draft.tree import MAX_CHAIN, MAX_LEAVES, Leaf, TreePosition, block_positions, leaf_slot
from engine.engine import Engine
from engine.errors import InvalidOption
from engine.kv.quantized_pool import QuantizedPool
from engine.model.decoder import Decoder, forward_reserved
from engine.runtime.drafters import load_draft_head
from engine.runtime.sampling import SamplingParams
from engine.runtime.verify import verify

PROMPTS = [[3, 4, 9, 20], [7] * 33, [1], [2, 3, 5] * 25]
EXIT_LAYER = 2
GENEROUS = CostModel(draft=((1, 0.02),), verify=((1, 1.0), (256, 1.02)), runs_last_draft=True, last=((1, 0.01),))


@pytest.fixture(scope="module")
def target(random_decoder):
    return random_decoder(0, num_hidden_layers=4)


@pytest.fixture(scope="module", params=["own head", "tied head", "exit", "model"])
def draft(request, target, tmp_path_factory, make_draft_head):
    if request.param == "exit":
        return EXIT_LAYER
    if request.param == "model":
        noisy = Decoder.from_config(target.config, dtype=torch.float32, seed=0)
        generator = torch.Generator().manual_seed(1)
        for ours, theirs in zip(noisy.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs * (1 + 0.15 * torch.randn(ours.shape, generator=generator)))
        return noisy
    layers, size = (1, 60) if request.param == "own head" else (2, 90)
    folder = make_draft_head(tmp_path_factory.mktemp("head"), target, layers=layers, size=size, head=request.param.split()[0])
    return load_draft_head(folder, target)


@pytest.fixture
def adopted(monkeypatch):
    """Depths and numbers of the leaves that were accepted."""
    seen, adopt = [], RequestProposal.adopt

    def recorded(self, num_kept, number):
        seen.append((num_kept, number))
        adopt(self, num_kept, number)

    monkeypatch.setattr(RequestProposal, "adopt", recorded)
    return seen


@pytest.fixture
def num_leaves(monkeypatch):
    """Leaves of every request's proposal that was verified."""
    made = []

    def recorded(logits, proposal, *rest):
        made.extend(len(own.leaves) for own in proposal.requests)
        return verify(logits, proposal, *rest)

    monkeypatch.setattr("engine.runtime.step.verify", recorded)
    return made


def engine_of(target, draft, **options):
    return Engine(target, draft=draft, **({"page_size": 16, "prefill_chunk": 32, "costs": GENEROUS} | options))


@pytest.fixture(scope="module")
def plain(target):
    return [r.token_ids for r in engine_of(target, None).generate(PROMPTS, SamplingParams(max_new_tokens=32))]


def test_a_block_is_laid_out_behind_its_longest_chain():
    leaves = [Leaf(1, 5), Leaf(1, 6), Leaf(3, 7)]
    assert block_positions(10, 3, leaves) == TreePosition(
        [9, 10, 11, 12, 10, 10, 12], [9, 10, 11, 12, 10 + MAX_CHAIN, 11 + MAX_CHAIN, 12 + MAX_CHAIN]
    )


def test_greedy_text_equals_plain_decoding(target, draft, plain, adopted):
    engine = engine_of(target, draft)
    together = engine.generate(PROMPTS, SamplingParams(max_new_tokens=32))
    assert [r.token_ids for r in together] == plain
    assert len(adopted) > 10 and len({kept for kept, _ in adopted}) > 1 and len({number for _, number in adopted}) > 1
    for prompt, wanted, beside in list(zip(PROMPTS, plain, together, strict=True))[:2]:
        [alone] = engine.generate([prompt], SamplingParams(max_new_tokens=32))
        assert alone.token_ids == wanted and beside.speculation.accepted <= beside.speculation.proposed
    for pool in (engine.core.pool, engine.core.draft_pool):
        if pool is not None:
            pool.check_integrity()
            assert pool.num_free_pages == pool.max_pages


def test_an_accepted_leaf_saves_a_step(target, draft, monkeypatch):
    steps = []
    for allowed in (True, False):
        engine = engine_of(target, draft)
        monkeypatch.setattr(type(engine.core.drafter), "takes_leaves", allowed)
        steps.append(sum(r.speculation.steps for r in engine.generate(PROMPTS, SamplingParams(max_new_tokens=32))))
    assert steps[0] < 0.95 * steps[1]


def test_caches_and_features_are_those_of_a_plain_pass(target, draft, adopted):
    engine, taps = engine_of(target, draft), (0, EXIT_LAYER)
    engine.core.keep_features(taps, lambda: FeatureBuffer(dtype=torch.float32))
    conversations = [engine.core.open_sequence_state() for _ in PROMPTS]
    for new in ([], [1, 2], [9]):
        for conversation, prompt in zip(conversations, PROMPTS, strict=True):
            engine.core.run(conversation, new or prompt, SamplingParams(max_new_tokens=14))
    assert len(adopted) > 5
    model = engine.core.draft_model if engine.core.drafter.exit_layer == 0 else None
    for conversation in conversations:
        tokens, state = conversation.token_ids, conversation.draft_state
        length = conversation.sequence.length
        assert length == len(tokens) - 1
        sequence = target.new_pool(20, 16).new_sequence()
        out = forward_reserved(target, torch.tensor(tokens[:length]), [sequence], [length], taps=(0, EXIT_LAYER))
        assert torch.allclose(target.read_kv(conversation.sequence, 0, length), target.read_kv(sequence, 0, length), atol=1e-3)
        if model is not None:
            own, length = model.new_pool(20, 16).new_sequence(), state.length
            out = forward_reserved(model, torch.tensor(tokens[:length]), [own], [length], taps=(0, EXIT_LAYER))
            assert torch.allclose(model.read_kv(state.sequence, 0, length), model.read_kv(own, 0, length), atol=1e-3)
        decoder = engine.core.source.head_layers
        if decoder is not None:
            own = decoder.new_pool(20, 16).new_sequence()
            forward_reserved(decoder, None, [own], [length], hidden=out.taps[EXIT_LAYER], logits="none")
            state.own.ensure(length)
            engine.core.drafter.draft_head.run_pending([state])
            assert state.own.length == length
            assert torch.allclose(decoder.read_kv(state.own, 0, length), decoder.read_kv(own, 0, length), atol=1e-3)
        rows = torch.stack([out.taps[tap] for tap in taps], 1)
        assert torch.allclose(state.features.take(0, length), rows, atol=1e-3)


def test_a_stop_inside_a_block_ends_it(target, draft, plain, adopted):
    engine = engine_of(target, draft)
    for prompt, text, place in zip(PROMPTS, plain, (11, 20, 27, 24), strict=True):
        end = text.index(text[place]) + 1
        conversation = engine.core.open_sequence_state()
        params = SamplingParams(max_new_tokens=32, stop_token_ids=(text[end - 1],))
        assert engine.core.run(conversation, prompt, params).token_ids == text[:end]
        if end < 32:
            assert engine.core.run(conversation, [], SamplingParams(max_new_tokens=32 - end)).token_ids == text[end:]
        engine.core.close_sequence_state(conversation)
    assert adopted


def test_sampled_neighbours_draw_what_they_draw_alone(target, draft, adopted):
    engine = engine_of(target, draft)
    sampled = [SamplingParams(max_new_tokens=16, temperature=0.8, seed=s) for s in (1, 2)]
    greedy = SamplingParams(max_new_tokens=32)  # steps with a seed in them are batch-invariant and have no leaves: some must come after
    together = engine.generate([PROMPTS[0], *PROMPTS], [sampled[0], greedy, sampled[1], greedy, greedy])
    assert adopted
    for prompt, params, result in ((PROMPTS[0], sampled[0], together[0]), (PROMPTS[1], sampled[1], together[2])):
        assert engine.generate([prompt], params)[0].token_ids == result.token_ids


def test_no_memory_is_taken_beyond_what_was_promised(target, draft, plain):
    tokens = len(PROMPTS[0]) + 32 + MAX_CHAIN
    engine = engine_of(target, draft, pool_tokens=-(-tokens // 16) * 16)
    assert engine.core.pool.max_pages == -(-tokens // 16)
    assert engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=32))[0].token_ids == plain[0]


def test_leaves_stay_out_of_deterministic_and_sampled_text(target, draft, adopted, num_leaves):
    engine_of(target, draft, deterministic=True).generate(PROMPTS[:2], SamplingParams(max_new_tokens=20))
    engine_of(target, draft).generate(PROMPTS[:2], SamplingParams(max_new_tokens=20, temperature=1.0, seed=1))
    engine_of(target, draft).generate(PROMPTS[:2], SamplingParams(max_new_tokens=20, draft_length=3))
    assert num_leaves and not any(num_leaves) and not adopted


@pytest.mark.parametrize("scattered", [False, True])
def test_a_placed_token_sees_its_position_and_itself(target, scattered):
    pool = target.new_pool(40, 16)
    sequence, other = pool.new_sequence(), pool.new_sequence()
    prompt = torch.arange(3, 23)
    for _ in range(3):  # taking turns, their pages do not follow one another
        sequence.ensure(sequence.capacity + 16)
        other.ensure(other.capacity + 16 * scattered)
    forward_reserved(target, prompt, [sequence], [20])
    sequence.advance(20)
    leaves = [Leaf(1, 40), Leaf(2, 41), Leaf(2, 42)]
    block = [30, 31, 32, *(s.token for s in leaves)]
    out = forward_reserved(target, torch.tensor(block), [sequence], [6], tree_positions=[block_positions(21, 2, leaves)])
    assert sequence.length == 20 and sequence.capacity >= leaf_slot(21, 2) + 1

    def alone(tokens):
        fresh = target.new_pool(4, 16).new_sequence()
        return forward_reserved(target, torch.cat([prompt, torch.tensor(tokens)]), [fresh], [20 + len(tokens)], logits="last").logits[
            0
        ], fresh

    for row, tokens in enumerate(([30], [30, 31], [30, 31, 32], [30, 40], [30, 31, 41], [30, 31, 42])):
        assert torch.allclose(out.logits[row], alone(tokens)[0], atol=1e-3)
    pool.move(sequence, leaf_slot(21, 2), 22)
    sequence.advance(3)
    assert torch.allclose(target.read_kv(sequence, 0, 23), target.read_kv(alone([30, 31, 42])[1], 0, 23), atol=1e-3)


def test_pools_without_tree_positions_refuse_them(random_decoder):
    target = random_decoder(1, head_dim=32)
    means = torch.zeros(target.config.num_layers, 2, target.config.num_kv_heads, target.config.head_dim)
    pool = QuantizedPool(4, means, 4, dtype=torch.float32)
    sequence = pool.new_sequence()
    assert not pool.takes_tree_positions and target.new_pool(1).takes_tree_positions
    with pytest.raises(InvalidOption, match="without leaves"):
        forward_reserved(target, torch.tensor([1]), [sequence], [1], tree_positions=[TreePosition([0], [0])])
    with pytest.raises(NotImplementedError, match="QuantizedPool"):
        pool.move(sequence, 1, 0)


def test_there_are_never_too_many(target, draft, num_leaves):
    engine_of(target, draft).generate(PROMPTS, SamplingParams(max_new_tokens=32))
    assert 1 < max(num_leaves) <= MAX_LEAVES


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on CPU tensors in the interpreter alone")
def test_the_kernels_see_a_tree_as_the_plain_attention_does(target, monkeypatch):
    leaves = [Leaf(1, 40), Leaf(2, 41), Leaf(2, 42)]
    found = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("FORETOLD_KERNELS", kernels)
        sequence = target.new_pool(8, 16).new_sequence()
        forward_reserved(target, torch.arange(3, 23), [sequence], [20])
        sequence.advance(20)
        block = torch.tensor([30, 31, 32, *(leaf.token for leaf in leaves)])
        found.append(forward_reserved(target, block, [sequence], [6], tree_positions=[block_positions(21, 2, leaves)]).logits)
    assert torch.allclose(*found, atol=1e-4) and found[0].abs().max() > 0.1
