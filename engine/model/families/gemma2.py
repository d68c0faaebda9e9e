"""Gemma 2: every other layer slides, scores and logits are capped, norms stand on both sides of attention and feed-forward part."""

from __future__ import annotations

from typing import Any

from engine.errors import UnsupportedArchitecture
from engine.inputs import Fields
from engine.model.families.family import Family, sliding_kinds, typed_layers

_MAX_SCALAR = 1e9

GEMMA: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "eos_token_id": 1,
}
NULLABLE = ("eos_token_id", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping")


def common_traits(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common: fields of `DecoderConfig`."""
    if fields.boolean("use_bidirectional_attention", False):
        raise UnsupportedArchitecture("Gemma with bidirectional attention is not supported", "use a model that generates text")
    bias = fields.boolean("attention_bias", False)
    hidden = fields.integer("hidden_size", 1, 1 << 20)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "norm_offset": True,
        "sandwich_norms": True,
        "embedding_scale": hidden**0.5,
        "attention_scale": fields.number("query_pre_attn_scalar", 1e-6, _MAX_SCALAR) ** -0.5,
        "logit_softcap": softcap(fields, "final_logit_softcapping"),
    }


def softcap(fields: Fields, name: str) -> float | None:
    """A soft cap, None where there is none."""
    return None if fields.get(name) is None else fields.number(name, 1e-3, _MAX_SCALAR)


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    slides = typed_layers(fields, layers, [number % 2 == 0 for number in range(layers)])
    return common_traits(fields) | {
        "layer_kinds": sliding_kinds(fields, slides),
        "attention_softcap": softcap(fields, "attn_logit_softcapping"),
    }


FAMILY = Family(
    "gemma2",
    GEMMA | {"vocab_size": 256000, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    NULLABLE,
    _describe,
    activation_key="hidden_activation",
)
