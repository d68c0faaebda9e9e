"""What is read from a config, in the new and the old spelling, and what is refused by name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.model.decoder import Decoder, DecoderConfig
from engine.model.families import LayerKind
from engine.model.rope import RopeConfig

OLD = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_theta": 20000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}


def test_older_spelling_of_rope_options_is_read():
    """`rope_theta` and `rope_scaling` with `type`, as configs had them before transformers 5."""
    config = DecoderConfig.from_hf(SimpleNamespace(**OLD))
    assert config.rope == RopeConfig("linear", 20000.0, factor=2.0, original_context=4096)
    assert (config.head_dim, config.num_kv_heads, config.kv_width, config.eos_token_ids) == (8, 2, 32, ())
    plain = DecoderConfig.from_hf(SimpleNamespace(**(OLD | {"rope_scaling": None})))
    assert plain.rope == RopeConfig("default", 20000.0)


def test_both_spellings_give_the_same_config(hf_config):
    new = hf_config(
        "llama", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}
    )
    read = DecoderConfig.from_hf(new).rope
    old = SimpleNamespace(
        **(OLD | {"rope_theta": 500.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}})
    )
    assert DecoderConfig.from_hf(old).rope == read
    assert read.attention_factor == pytest.approx(1.1386294)


def test_families_differ_where_they_should(hf_config):
    read = {family: DecoderConfig.from_hf(hf_config(family)) for family in ("llama", "llama-bias", "mistral", "qwen2", "qwen3")}
    assert {f: (c.qkv_bias, c.o_bias, c.qk_norm) for f, c in read.items()} == {
        "llama": (False, False, False),
        "llama-bias": (True, True, False),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (False, False, True),
    }
    assert read["qwen3"].head_dim == 16 and read["qwen3"].tie_word_embeddings and not read["qwen2"].tie_word_embeddings
    assert read["llama"].eos_token_ids == (5,)
    assert DecoderConfig.from_hf(hf_config("llama", eos_token_id=[5, 7])).eos_token_ids == (5, 7)


def test_layers_differ_where_they_should(hf_config):
    kinds = {
        family: DecoderConfig.from_hf(hf_config(family)).layer_kinds for family in ("mistral-window", "qwen2-window", "gemma2", "gemma3")
    }
    full = LayerKind()
    assert kinds == {
        "mistral-window": (LayerKind(7),) * 3,
        "qwen2-window": (full, full, LayerKind(12)),
        "gemma2": (LayerKind(9), full, LayerKind(9)),
        "gemma3": (LayerKind(6, local_rope=True), full, LayerKind(6, local_rope=True)),
    }
    experts = [DecoderConfig.from_hf(hf_config(family)) for family in ("mixtral", "qwen3_moe")]
    assert [[kind.experts for kind in config.layer_kinds] for config in experts] == [[True] * 3, [True, False, True]]
    assert [(c.num_experts, c.experts_per_token, c.expert_size) for c in experts] == [(5, 2, 80), (6, 3, 24)]
    gemma = DecoderConfig.from_hf(hf_config("gemma3"))
    assert (gemma.rope.kind, gemma.rope.theta, gemma.local_rope.theta) == ("linear", 10000.0, 100.0)
    assert gemma.layer_shape(0).scale == 256**-0.5 and not gemma.is_plain
    assert gemma.last_layers(2).layer_kinds == gemma.layer_kinds[1:]
    assert all(DecoderConfig.from_hf(hf_config(family)).is_plain for family in ("llama", "llama-bias", "mistral", "qwen2", "qwen3"))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "sliding-window layers without a sliding_window",
        ),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "llama with sliding-window layers"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "capped attention scores"),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma2", {"hidden_activation": "gelu"}, "activation 'gelu'"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"mlp_bias": True}, "feed-forward biases"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "RoPE scaling 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial rotation"),
    ],
)
def test_options_our_decoder_does_not_run_are_refused(hf_config, family, options, message):
    with pytest.raises(UnsupportedArchitecture, match=message):
        DecoderConfig.from_hf(hf_config(family, **options))


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor"])
def test_rope_options_that_are_missing_are_named(missing):
    options = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    del options[missing]
    with pytest.raises(UnsupportedArchitecture, match=missing):
        RopeConfig.from_hf(SimpleNamespace(rope_parameters=options, max_position_embeddings=64))


def test_a_window_never_narrower_than_the_context_is_full_attention(hf_config):
    assert DecoderConfig.from_hf(hf_config("mistral", sliding_window=512)).architecture == "mistral"
    assert DecoderConfig.from_hf(hf_config("qwen2", use_sliding_window=False, sliding_window=64)).architecture == "qwen2"


def test_other_architectures_are_refused_with_the_supported_ones_listed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedArchitecture) as error:
        Decoder.from_pretrained(tmp_path, dtype=None)
    assert "'gpt2'" in error.value.what
    assert all(name in error.value.remedy for name in ("llama", "mistral", "qwen2", "qwen3"))
    with pytest.raises(UnsupportedArchitecture, match="'gemma3'"):
        DecoderConfig.from_hf(SimpleNamespace(model_type="gemma3"))


def test_folders_without_a_readable_config_are_refused(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        Decoder.from_pretrained(tmp_path, dtype=None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not valid JSON"):
        Decoder.from_pretrained(tmp_path, dtype=None)
