"""Logits equal transformers' within 1e-4 (float32) for every family and RoPE kind, however the tokens are fed."""

from __future__ import annotations

import pytest
import torch

from engine.model.decoder import forward_reserved

FAMILIES = [
    "llama",
    "llama-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "mistral-window",
    "qwen2-window",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
]
BOUND = 1e-4
LENGTH = 45

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-given": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8, "beta_fast": 4.0},
    "yarn-mscale": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-smooth": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False, "beta_slow": 0.5},
}


def feed(decoder, sequence, ids, sizes):
    """Logits [T, V] of ids fed in chunks of the given sizes."""
    rows, start = [], 0
    for size in sizes:
        rows.append(forward_reserved(decoder, ids[start : start + size], [sequence], [size]).logits)
        sequence.advance(size)
        start += size
    assert start == len(ids)
    return torch.cat(rows)


@pytest.fixture
def ids():
    return torch.randint(0, 97, (LENGTH,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sizes",
    [[LENGTH], [16, 16, 13], [7, 20, 1, 17], [1] * LENGTH, [5] * 9, [30] + [5] * 3],
    ids=["prefill", "page-chunks", "odd-chunks", "steps", "blocks", "prefill-blocks"],
)
@torch.inference_mode()
def test_logits_match_transformers(tiny_model, ids, family, sizes):
    model = tiny_model(family)
    pool = model.decoder.new_pool(4, 16)
    got = feed(model.decoder, pool.new_sequence(), ids, sizes)
    assert got.dtype == torch.float32
    assert (got - model.logits(ids)).abs().max() < BOUND
    pool.check_integrity()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", ROPES)
@torch.inference_mode()
def test_rope_kinds_match_transformers(tiny_model, ids, family, rope):
    model = tiny_model(family, rope_parameters={"rope_theta": 5000.0, **ROPES[rope]})
    plain = tiny_model(family, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    got = feed(model.decoder, model.decoder.new_pool(4, 16).new_sequence(), ids, [30, 1, 5, 9])
    assert (got - model.logits(ids)).abs().max() < BOUND
    # the option must matter, or the comparison above shows nothing
    assert not torch.equal(model.decoder.rope.slice(0, LENGTH)[0], plain.decoder.rope.slice(0, LENGTH)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [4, 16])
@torch.inference_mode()
def test_ragged_batches_match_each_request_alone(tiny_model, family, page_size):
    """Requests of different context lengths, with different numbers of new tokens each round, in interleaved pages."""
    model = tiny_model(family)
    rounds = [[3, 17, 1], [5, 1, 4], [1, 1, 1], [2, 9, 6]]
    totals = [sum(column) for column in zip(*rounds, strict=True)]
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, 97, (total,), generator=generator) for total in totals]
    expected = [model.logits(text) for text in texts]
    pool = model.decoder.new_pool(-(-sum(totals) // page_size) + 3, page_size)
    sequences = [pool.new_sequence() for _ in texts]
    for lens in rounds:
        spans = [(s.length, s.length + n) for s, n in zip(sequences, lens, strict=True)]
        flat = torch.cat([text[a:b] for text, (a, b) in zip(texts, spans, strict=True)])
        everything = forward_reserved(model.decoder, flat, sequences, lens).logits
        last = forward_reserved(model.decoder, flat, sequences, lens, logits="last").logits
        want = torch.cat([rows[a:b] for rows, (a, b) in zip(expected, spans, strict=True)])
        want_last = torch.stack([rows[b - 1] for rows, (_, b) in zip(expected, spans, strict=True)])
        assert (everything - want).abs().max() < BOUND
        assert last.shape == want_last.shape and (last - want_last).abs().max() < BOUND
        for sequence, n in zip(sequences, lens, strict=True):
            sequence.advance(n)
        pool.check_integrity()


@torch.inference_mode()
def test_long_prompt_crosses_attention_tiles(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(9))
    got = feed(model.decoder, model.decoder.new_pool(20, 16).new_sequence(), ids, [290, 10])
    assert (got - model.logits(ids)).abs().max() < BOUND


@torch.inference_mode()
def test_scattered_pages_are_gathered(tiny_model, ids):
    """A shared page keeps a sequence from being moved together, so attention must gather."""
    model = tiny_model("mistral")
    pool = model.decoder.new_pool(12, 4)
    sequence, other = pool.new_sequence(), pool.new_sequence()
    rows = [feed(model.decoder, sequence, ids[:8], [8])]
    pool.retain(sequence.pages)
    other.pages = [page + 2 for page in sequence.pages]
    for page in other.pages:
        pool._references[page] += 1
    pool._num_free -= len(other.pages)
    rows.append(feed(model.decoder, sequence, ids[8:30], [1, 7, 14]))
    assert not sequence.is_contiguous
    assert (torch.cat(rows) - model.logits(ids)[:30]).abs().max() < BOUND


@torch.inference_mode()
def test_rollback_is_not_advancing(tiny_model, ids):
    model = tiny_model("qwen3")
    pool = model.decoder.new_pool(4, 16)
    sequence = pool.new_sequence()
    feed(model.decoder, sequence, ids[:20], [20])
    wrong = (ids[20:28] + 1) % 97
    forward_reserved(model.decoder, wrong, [sequence], [8])  # a rejected block: not committed
    forward_reserved(model.decoder, torch.cat([ids[20:22], wrong[2:6]]), [sequence], [6])
    sequence.advance(2)  # two of six accepted
    rest = feed(model.decoder, sequence, ids[22:], [1, 22])
    assert (rest - model.logits(ids)[22:]).abs().max() < BOUND
    sequence.truncate(5)
    pool.check_integrity()
    again = feed(model.decoder, sequence, ids[5:], [40])
    assert (again - model.logits(ids)[5:]).abs().max() < BOUND


@torch.inference_mode()
def test_explicit_starts_rewrite_earlier_tokens(tiny_model, ids):
    model = tiny_model("llama")
    sequence = model.decoder.new_pool(4, 16).new_sequence()
    feed(model.decoder, sequence, (ids + 1) % 97, [LENGTH])
    got = forward_reserved(model.decoder, ids, [sequence], [LENGTH], starts=[0]).logits
    assert (got - model.logits(ids)).abs().max() < BOUND
    assert sequence.length == LENGTH


def test_gradients_are_never_recorded(tiny_model, ids):
    model = tiny_model("llama")
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())
    out = forward_reserved(model.decoder, ids, [model.decoder.new_pool(4, 16).new_sequence()], [LENGTH])
    assert not out.logits.requires_grad
