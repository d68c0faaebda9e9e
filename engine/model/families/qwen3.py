"""Qwen 3: queries and keys are normalised by head; windows as in Qwen 2."""

from __future__ import annotations

from typing import Any

from engine.inputs import Fields
from engine.model.families.family import Family
from engine.model.families.qwen2 import QWEN, window_kinds


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    bias = fields.boolean("attention_bias", False)
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "layer_kinds": window_kinds(fields, layers)}


FAMILY = Family("qwen3", QWEN | {"head_dim": 128, "attention_bias": False}, ("num_key_value_heads", "sliding_window"), _describe)
