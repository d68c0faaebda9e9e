"""Taps, observed queries, and forward passes over some of the layers."""

from __future__ import annotations

import pytest
import torch

from engine.errors import InvalidOption
from engine.model.decoder import forward_reserved

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def ids():
    return torch.randint(0, 97, (21,), generator=torch.Generator().manual_seed(3))


def fresh(model):
    return model.decoder.new_pool(4, 8).new_sequence()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_taps_are_transformers_hidden_states(tiny_model, ids, family):
    model = tiny_model(family)
    states = model.reference(ids[None], output_hidden_states=True).hidden_states
    out = forward_reserved(model.decoder, ids, [fresh(model)], [21], taps=(0, 1, 2, 3))
    assert sorted(out.taps) == [0, 1, 2, 3]
    for i in range(3):
        assert (out.taps[i] - states[i][0]).abs().max() < 1e-4
    # transformers' last hidden state is after the final norm, ours before
    assert (model.reference.model.norm(out.taps[3]) - states[3][0]).abs().max() < 1e-4
    assert torch.equal(out.taps[3], out.hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@torch.inference_mode()
def test_two_partial_passes_equal_the_full_one(tiny_model, ids, family, cut):
    """The first layers, then the rest from their states; also for a later block whose context came from a full pass."""
    model = tiny_model(family)
    decoder = model.decoder
    whole, split = fresh(model), fresh(model)
    for start, count in ((0, 13), (13, 8)):
        block = ids[start : start + count]
        full = forward_reserved(decoder, block, [whole], [count])
        lower = forward_reserved(decoder, block, [split], [count], last_layer=cut, logits="none" if cut < 3 else "all")
        assert cut == 3 or lower.logits is None
        upper = forward_reserved(decoder, None, [split], [count], first_layer=cut, hidden=lower.hidden)
        assert torch.equal(upper.logits, full.logits)
        whole.advance(count)
        split.advance(count)
    assert torch.equal(decoder.read_kv(whole, 0, 21), decoder.read_kv(split, 0, 21))
    assert (full.logits - model.logits(ids)[13:]).abs().max() < 1e-4


@torch.inference_mode()
def test_head_and_embed_are_the_ends_of_a_forward_pass(tiny_model, ids):
    model = tiny_model("qwen2")
    out = forward_reserved(model.decoder, ids, [fresh(model)], [21], taps=(0,))
    assert torch.equal(model.decoder.embed(ids), out.taps[0])
    assert torch.equal(model.decoder.head(out.hidden), out.logits)
    assert forward_reserved(model.decoder, ids, [fresh(model)], [21], logits="none").logits is None


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_observe_sees_queries_before_rotation_and_the_stream_after(tiny_model, ids, family):
    model = tiny_model(family)
    config = model.decoder.config
    projected = []
    attention = [layer.self_attn for layer in model.reference.model.layers]
    sources = [getattr(a, "q_norm", None) or a.q_proj for a in attention]
    hooks = [source.register_forward_hook(lambda _m, _i, output: projected.append(output)) for source in sources]
    model.logits(ids)
    for hook in hooks:
        hook.remove()
    seen = []
    out = forward_reserved(model.decoder, ids, [fresh(model)], [21], taps=(1, 2, 3), observe=lambda *args: seen.append(args))
    assert [layer for layer, _, _ in seen] == [0, 1, 2]
    for layer, queries, stream in seen:
        assert queries.shape == (21, config.num_heads, config.head_dim)
        assert (queries - projected[layer].view(queries.shape)).abs().max() < 1e-4
        assert torch.equal(stream, out.taps[layer + 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_lens": [20]}, "21 rows"),
        ({"query_lens": [0]}, "at least 1"),
        ({"query_lens": [21, 1]}, "per sequence"),
        ({"starts": [0, 1]}, "start"),
        ({"starts": [-1]}, "start"),
        ({"first_layer": 1}, "hidden"),
        ({"token_ids": None}, "hidden"),
        ({"last_layer": 4}, "layers 0 to 4"),
        ({"taps": (3,), "last_layer": 2}, "taps"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tiny_model, ids, changes, message):
    model = tiny_model("llama")
    arguments = {"token_ids": ids, "sequences": [fresh(model)], "query_lens": [21]} | changes
    with pytest.raises(InvalidOption, match=message):
        model.decoder(**arguments)
