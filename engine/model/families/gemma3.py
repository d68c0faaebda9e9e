"""Gemma 3's text model: five layers of six slide and turn by a RoPE of their own; queries and keys are normalised by head."""

from __future__ import annotations

from typing import Any

from engine.errors import UnsupportedArchitecture
from engine.inputs import Fields
from engine.model.families.family import MAX_LAYERS, Family, sliding_kinds, typed_layers
from engine.model.families.gemma2 import GEMMA, NULLABLE, common_traits

_PATTERN = 6  # every so many layers one attends to everything


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    if fields.get("attn_logit_softcapping") is not None:
        raise UnsupportedArchitecture("Gemma 3 with capped attention scores is not supported", "set attn_logit_softcapping to null")
    pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, _PATTERN)
    slides = typed_layers(fields, layers, [(number + 1) % pattern != 0 for number in range(layers)])
    return common_traits(fields) | {"qk_norm": True, "layer_kinds": sliding_kinds(fields, slides, local_rope=True)}


FAMILY = Family(
    "gemma3_text",
    GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072},
    NULLABLE,
    _describe,
    activation_key="hidden_activation",
    local_rope=True,
    global_theta=1_000_000.0,
)
