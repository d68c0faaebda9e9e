"""Llama 1 to 3 and models in its layout, SmolLM among them."""

from __future__ import annotations

from typing import Any

from engine.errors import UnsupportedArchitecture
from engine.inputs import Fields
from engine.model.families.family import COMMON, Family, typed_layers


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    if any(typed_layers(fields, layers, [False] * layers)):
        raise UnsupportedArchitecture(
            "llama with sliding-window layers is not supported", "use a family whose layers slide, such as mistral"
        )
    bias = fields.boolean("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


FAMILY = Family(
    "llama",
    COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    },
    ("eos_token_id",),
    _describe,
)
