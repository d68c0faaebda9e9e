"""The decoder families: one file each, which says in plain data what its layers are; `engine.model.layers` runs them all."""

from __future__ import annotations

from typing import Final

from engine.model.families import gemma2, gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from engine.model.families.family import Family, LayerKind

__all__ = ["FAMILIES", "Family", "LayerKind"]

_MODULES = (llama, mistral, qwen2, qwen3, gemma2, gemma3, mixtral, qwen3_moe)
FAMILIES: Final[dict[str, Family]] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
