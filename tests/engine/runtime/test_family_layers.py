"""Captured steps of families whose layers are not Llama's: what the decoder says, in every kind of step, and the same text."""

from __future__ import annotations

import pytest
import torch

from engine.engine import Engine
from engine.model.decoder import forward_reserved
from engine.runtime.model_runner import GraphedDecoder, PlainDecoding
from engine.runtime.sampling import SamplingParams

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FAMILIES = ("mistral-window", "qwen2-window", "gemma2", "gemma3", "mixtral", "qwen3_moe")
PROMPTS = [[3, 4, 9, 20], [7] * 23, [1], [2, 3, 5] * 6, [8, 8]]
pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tiny_model):
    return tiny_model(request.param).decoder.to(DEVICE)


def pair_of(decoder, prompts):
    """The decoder and its runner, each with sequences of its own that hold the prompts."""
    sides = []
    for graphed in (False, True):
        pool = decoder.new_pool(40, 8)
        sequences = [pool.new_sequence() for _ in prompts]
        forward_reserved(decoder, torch.tensor([t for p in prompts for t in p], device=DEVICE), sequences, [len(p) for p in prompts])
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.advance(len(prompt))
        sides.append((GraphedDecoder(decoder, pool, capture=GPU) if graphed else decoder, sequences))
    return sides


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("counts", [[1], [3, 1, 2], [2] * 5], ids=str)
@torch.inference_mode()
def test_a_step_says_what_the_decoder_says(decoder, counts, deterministic):
    prompts = [list(range(3, 6 + 5 * (b + 1))) for b in range(len(counts))]
    tokens, outputs = torch.arange(sum(counts), device=DEVICE) % 90, []
    for runner, sequences in pair_of(decoder, prompts):
        own = forward_reserved(runner, tokens, sequences, counts, taps=(0, 2), logits="all", deterministic=deterministic)
        rest = forward_reserved(runner, None, sequences, counts, first_layer=2, hidden=own.taps[2], deterministic=deterministic)
        last = forward_reserved(runner, tokens, sequences, counts, logits="last", deterministic=deterministic)
        kv = [decoder.read_kv(s, 0, s.length + n) for s, n in zip(sequences, counts, strict=True)]
        outputs.append([own.logits, rest.logits, last.logits, own.hidden, own.taps[0], own.taps[2], *kv])
    for want, got in zip(*outputs, strict=True):
        assert want.shape == got.shape
        assert ((want - got).norm() / want.norm()).item() < 1e-4


@torch.inference_mode()
def test_padding_writes_no_page_and_an_infinite_logit_is_told(decoder):
    pool = decoder.new_pool(40, 8)
    runner, sequences = GraphedDecoder(decoder, pool, capture=GPU), [pool.new_sequence() for _ in range(3)]
    pool.kv.fill_(7.0)
    step = runner.step(3, 2, 4, 0, decoder.config.num_layers, (), True)
    runner.replay(step)
    assert bool((pool.kv == 7.0).all()), "a step of padding alone"
    for sequence in sequences:
        sequence.reserve(2)
    step.fill([0, 0, 0], [1, 2, 1], runner.tables.rows(sequences), 8)
    runner.replay(step)
    written = [sequence.pages[0] * 8 + at for sequence, count in zip(sequences, (1, 2, 1), strict=True) for at in range(count)]
    rows = pool.layer(0)[0].flatten(0, 1)
    untouched = torch.ones(len(rows), dtype=torch.bool, device=DEVICE)
    untouched[written] = False
    assert bool((rows[untouched] == 7.0).all()) and not bool((rows[~untouched] == 7.0).all(-1).any())
    assert step.buffers.next_tokens[[0, 2, 3, 4]].tolist() == step.buffers.logits[[0, 2, 3, 4]].argmax(-1).tolist()
    kept = decoder.final_norm.data.clone()
    try:
        decoder.final_norm.data.fill_(float("nan"))
        decoder._output_norm = None
        runner.replay(step)
        if not GPU:  # what a graph holds of the norm with its offset is a copy
            assert step.buffers.next_tokens[[0, 2, 3, 4]].tolist() == [-1] * 4
    finally:
        decoder.final_norm.data.copy_(kept)
        decoder._output_norm = None


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_text_is_that_of_the_decoder_with_drafts_and_without(decoder, params, as_on_a_gpu, monkeypatch):
    each = [SamplingParams(max_new_tokens=n, ignore_eos=True, draft_length=2, **params) for n in (17, 1, 9, 14, 12)]
    plain = [SamplingParams(**{**vars(p), "draft_length": 0}) for p in each]
    eager = Engine(decoder, page_size=8, pool_tokens=2048)
    eager.core.scheduler.plain = None
    want = [r.token_ids for r in eager.generate(PROMPTS, plain)]
    replayed = []
    replay = PlainDecoding._replay
    monkeypatch.setattr(PlainDecoding, "_replay", lambda self, *rest: replayed.append(1) or replay(self, *rest))
    assert [
        r.token_ids for r in as_on_a_gpu(Engine(decoder, page_size=8, pool_tokens=2048, max_batch=2)).generate(PROMPTS, plain)
    ] == want and replayed
    drafted = as_on_a_gpu(Engine(decoder, draft=decoder, page_size=8, pool_tokens=2048, max_batch=2)).generate(PROMPTS, each)
    assert [r.token_ids for r in drafted] == want
    assert sum(r.speculation.accepted for r in drafted) > 0.8 * sum(r.speculation.proposed for r in drafted) > 0
