"""Qwen 3 with a mixture of experts in most layers (Qwen3-30B-A3B and its like)."""

from __future__ import annotations

from typing import Any

from engine.inputs import Fields
from engine.model.families.family import COMMON, MAX_EXPERTS, MAX_LAYERS, ExpertNames, Family, LayerKind, sliding_kinds, typed_layers


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    bias = fields.boolean("attention_bias", False)
    typed_layers(fields, layers, [])  # only checked: the window alone decides
    slides = fields.boolean("use_sliding_window", False) and fields.get("sliding_window") is not None
    experts = fields.integer("num_experts", 0, MAX_EXPERTS)
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS)
    dense = fields.integers("mlp_only_layers", 0, MAX_LAYERS, MAX_LAYERS)
    kinds = sliding_kinds(fields, [slides] * layers) or (LayerKind(),) * layers
    mixed = [experts > 0 and number not in dense and (number + 1) % step == 0 for number in range(layers)]
    traits: dict[str, Any] = {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}
    if not any(mixed):
        return traits | {"layer_kinds": kinds if slides else ()}
    return traits | {
        "layer_kinds": tuple(kind._replace(experts=mixture) for kind, mixture in zip(kinds, mixed, strict=True)),
        "num_experts": experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 1, experts),
        "expert_size": fields.integer("moe_intermediate_size", 1, 1 << 22),
        "normalise_experts": fields.boolean("norm_topk_prob", False),
    }


FAMILY = Family(
    "qwen3_moe",
    COMMON
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    ("sliding_window",),
    _describe,
    expert_names=ExpertNames("mlp.gate.weight", "mlp.experts.{}", "gate_proj", "up_proj", "down_proj"),
    aliases={"num_local_experts": "num_experts"},
)
