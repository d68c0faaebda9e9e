"""Mixtral: Mistral's attention over a mixture of experts in every layer (Jiang et al., 2024, arXiv 2401.04088)."""

from __future__ import annotations

from typing import Any

from engine.inputs import Fields
from engine.model.families.family import COMMON, MAX_EXPERTS, ExpertNames, Family, LayerKind, sliding_kinds, typed_layers


def _describe(fields: Fields, layers: int) -> dict[str, Any]:
    typed_layers(fields, layers, [])  # only checked: the window alone decides
    experts = fields.integer("num_local_experts", 1, MAX_EXPERTS)
    kinds = sliding_kinds(fields, [fields.get("sliding_window") is not None] * layers) or (LayerKind(),) * layers
    return {
        "layer_kinds": tuple(kind._replace(experts=True) for kind in kinds),
        "num_experts": experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 1, experts),
        "expert_size": fields.integer("intermediate_size", 1, 1 << 22),
        "normalise_experts": True,
    }


FAMILY = Family(
    "mixtral",
    COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "eos_token_id": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    ("eos_token_id",),
    _describe,
    global_theta=1_000_000.0,
    expert_names=ExpertNames("block_sparse_moe.gate.weight", "block_sparse_moe.experts.{}", "w1", "w3", "w2"),
    aliases={"num_experts": "num_local_experts"},
)
