"""Keys before rotation and values as data: what is read is what the model projected; what is written is what it attends to."""

from __future__ import annotations

import pytest
import torch

from engine.errors import InvalidOption, PagesNotReserved
from engine.model.decoder import forward_reserved

YARN = {"rope_theta": 5000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = [("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}), ("llama", {"rope_parameters": YARN})]
IDS = ["llama", "mistral", "qwen2", "qwen3", "llama-yarn"]


@pytest.fixture
def ids():
    return torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(3))


def projections(model, ids):
    """[T, D] keys before rotation and values, recorded inside transformers' attention."""
    recorded = []
    hooks = []
    for layer in model.reference.model.layers:
        attention = layer.self_attn
        for source in (getattr(attention, "k_norm", None) or attention.k_proj, attention.v_proj):
            hooks.append(source.register_forward_hook(lambda _m, _i, output: recorded.append(output[0].flatten(1))))
    model.logits(ids)
    for hook in hooks:
        hook.remove()
    return torch.cat(recorded, dim=1)


@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
@torch.inference_mode()
def test_read_kv_returns_what_was_projected(tiny_model, ids, family, options):
    model = tiny_model(family, **options)
    sequence = model.decoder.new_pool(8, 8).new_sequence()
    forward_reserved(model.decoder, ids, [sequence], [30])
    sequence.advance(30)
    want = projections(model, ids)
    got = model.decoder.read_kv(sequence, 0, 30)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert (got - want).abs().max() < 1e-4
    part = model.decoder.read_kv(sequence, 5, 19, first_layer=1)
    assert torch.equal(part, got[5:19, model.decoder.config.kv_width :])
    assert model.decoder.read_kv(sequence, 7, 7).shape == (0, want.shape[1])


@pytest.mark.parametrize(("family", "options"), CASES, ids=IDS)
@torch.inference_mode()
def test_written_kv_continues_as_if_computed(tiny_model, ids, family, options):
    model = tiny_model(family, **options)
    pool = model.decoder.new_pool(16, 8)
    computed, written = pool.new_sequence(), pool.new_sequence()
    forward_reserved(model.decoder, ids[:24], [computed], [24])
    computed.advance(24)
    rows = model.decoder.read_kv(computed, 0, 24)
    kept = rows.clone()
    written.ensure(len(rows))
    model.decoder.write_kv(written, 0, rows[:10])
    model.decoder.write_kv(written, 10, rows[10:])
    assert torch.equal(rows, kept), "the caller's rows must not change"
    assert written.length == 0
    written.advance(24)
    got = forward_reserved(model.decoder, ids[24:], [written], [6]).logits
    assert (got - model.logits(ids)[24:]).abs().max() < 1e-4
    assert (model.decoder.read_kv(written, 0, 24) - rows).abs().max() < 1e-5


@torch.inference_mode()
def test_later_layers_alone_are_written_without_touching_the_others(tiny_model, ids):
    model = tiny_model("qwen3")
    width = model.decoder.config.kv_width
    sequence = model.decoder.new_pool(8, 8).new_sequence()
    forward_reserved(model.decoder, ids, [sequence], [30])
    sequence.advance(30)
    before = model.decoder.read_kv(sequence, 0, 30)
    model.decoder.write_kv(sequence, 4, torch.ones(9, 2 * width), first_layer=1)
    after = model.decoder.read_kv(sequence, 0, 30)
    assert (after[4:13, width:] - 1).abs().max() < 1e-5
    assert torch.equal(after[:, :width], before[:, :width])
    assert torch.equal(after[:4], before[:4]) and torch.equal(after[13:], before[13:])


@torch.inference_mode()
def test_bf16_pages_keep_kv_within_their_rounding(tiny_model, ids):
    from engine.model.decoder import Decoder

    model = tiny_model("llama")
    decoder = Decoder.from_pretrained(model.folder, dtype=torch.bfloat16)
    sequence = decoder.new_pool(8, 8).new_sequence()
    rows = torch.randn(20, 3 * decoder.config.kv_width, generator=torch.Generator().manual_seed(1))
    sequence.ensure(len(rows))
    decoder.write_kv(sequence, 0, rows)
    # a rotated pair is rounded to 8 bits of mantissa each: relative error below 2^-8 of the pair's size
    error = (decoder.read_kv(sequence, 0, 20) - rows).abs().max()
    assert 0 < error < rows.abs().max() * 2**-7


def test_rows_of_another_width_and_full_pools_are_refused(tiny_model):
    model = tiny_model("llama")
    sequence = model.decoder.new_pool(1, 8).new_sequence()
    width = model.decoder.config.kv_width
    with pytest.raises(InvalidOption, match="3 layers"):
        model.decoder.write_kv(sequence, 0, torch.zeros(2, width))
    with pytest.raises(PagesNotReserved, match="9 tokens do not fit the 0 pages"):
        model.decoder.write_kv(sequence, 0, torch.zeros(9, 3 * width))
    assert sequence.pages == []
