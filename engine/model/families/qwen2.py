"""Qwen 2 and 2.5: biases on queries, keys and values; layers from `max_window_layers` on slide where `use_sliding_window` is set."""

from __future__ import annotations

from typing import Any

from engine.inputs import Fields
from engine.model.families.family import COMMON, MAX_CONTEXT, Family, LayerKind, sliding_kinds, typed_layers

QWEN = COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def window_kinds(fields: Fields, layers: int) -> tuple[LayerKind, ...]:
    """Kinds of the layers of a Qwen 2 or 3."""
    uses, first = fields.boolean("use_sliding_window", False), fields.integer("max_window_layers", 0, MAX_CONTEXT, 0)
    slides = typed_layers(fields, layers, [uses and fields.get("sliding_window") is not None and n >= first for n in range(layers)])
    return sliding_kinds(fields, slides)


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    return {"qkv_bias": True, "layer_kinds": window_kinds(fields, layers)}


FAMILY = Family("qwen2", QWEN, ("num_key_value_heads", "sliding_window"), _describe)
