"""Mistral: Llama's layers; every one slides where config.json gives a window (version 0.1)."""

from __future__ import annotations

from typing import Any

from engine.inputs import Fields
from engine.model.families.family import COMMON, Family, sliding_kinds, typed_layers


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    typed_layers(fields, layers, [])  # only checked: transformers' model goes by the window alone
    return {"layer_kinds": sliding_kinds(fields, [fields.get("sliding_window") is not None] * layers)}


FAMILY = Family(
    "mistral",
    COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    ("eos_token_id", "sliding_window"),
    _describe,
)
