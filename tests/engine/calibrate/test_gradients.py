"""Gradients at the cache: the differentiable forward agrees with the decoder's, and gradients with finite differences."""

from __future__ import annotations

import pytest
import torch

from codec.spec import NUM_SINKS, KvLayout
from engine.calibrate.gradients import Sensitivity, _cached, _continue, cache_gradients
from engine.model.decoder import forward_reserved


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_differentiable_forward_gives_the_decoders_logits(tiny_model, family: str) -> None:
    decoder = tiny_model(family).decoder
    c, split = decoder.config, 20
    ids = torch.randint(0, c.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    pool = decoder.new_pool(4)
    expected = forward_reserved(decoder, ids.flatten(), [pool.new_sequence() for _ in ids], [32, 32]).logits.reshape(2, 32, -1)[:, split:]
    found = _continue(decoder, ids, split, _cached(decoder, ids[:, :split]))
    assert (found - expected).abs().max() < 1e-4


def test_fisher_block_predicts_the_divergence_of_a_small_error(tiny_model) -> None:
    decoder = tiny_model("qwen2").decoder
    c, split = decoder.config, 16
    layout = KvLayout(c.num_layers, c.num_kv_heads, c.head_dim)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, c.vocab_size, (1, 24), generator=generator)
    cache = _cached(decoder, ids[:, :split])
    base = _continue(decoder, ids, split, cache).log_softmax(-1)
    error = torch.zeros_like(cache)
    error[:, NUM_SINKS + 3] = 0.02 * torch.randn(cache.shape[2:], generator=generator)
    moved = _continue(decoder, ids, split, cache + error).log_softmax(-1)
    divergence = float((base.exp() * (base - moved)).sum())
    draws = [cache_gradients(decoder, ids, split, layout, generator)[0, 3] for _ in range(300)]
    predicted = 0.5 * float(torch.stack([(g @ error[0, NUM_SINKS + 3].flatten()) ** 2 for g in draws]).mean())
    print(f"divergence {divergence:.3e}, half e^T F e {predicted:.3e}")
    assert predicted == pytest.approx(divergence, rel=0.3)


def test_weighting_inverts_and_leaves_out_uncoded_layers(tiny_model) -> None:
    decoder = tiny_model("llama").decoder
    c = decoder.config
    layout = KvLayout(c.num_layers, c.num_kv_heads, c.head_dim, first_layer=1)
    generator = torch.Generator().manual_seed(2)
    sums = Sensitivity(layout)
    for _ in range(3):
        ids = torch.randint(0, c.vocab_size, (2, 40), generator=generator)
        grad = cache_gradients(decoder, ids, 30, layout, generator)
        assert grad.shape == (2, 30 - NUM_SINKS, layout.dim) and bool(grad.abs().sum(-1).gt(0).all())
        sums.add(grad)
    weighting = sums.weighting()
    eye = torch.eye(c.head_dim).expand_as(weighting.sensitivity_sqrt)
    assert torch.allclose(weighting.sensitivity_sqrt @ weighting.inverse, eye, atol=1e-3)
