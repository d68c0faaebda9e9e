"""Tiny random models of every supported family, saved by transformers and loaded by our decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.decoder import Decoder

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}
_CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 5,
}


@dataclass(frozen=True)
class TinyModel:
    """transformers' model (float32, eval), the folder it was saved to, and ours loaded from there."""

    reference: Any
    folder: Path
    decoder: Decoder

    @torch.inference_mode()
    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, V] of transformers for one sequence [T]."""
        return self.reference(token_ids[None]).logits[0]


def tiny_config(family: str, **options: Any) -> Any:
    """A transformers config of the family, tiny."""
    config_class = getattr(transformers, _CLASSES[family.split("-")[0]])
    return config_class(**(_SHAPE | FAMILIES.get(family, {}) | options))


@pytest.fixture(scope="session")
def hf_config() -> Callable[..., Any]:
    """`hf_config(family, **options)` -> a tiny transformers config."""
    return tiny_config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """`tiny_model(family, **config options)` -> TinyModel, made once per session and set of options."""
    made: dict[str, TinyModel] = {}

    def make(family: str, **options: Any) -> TinyModel:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            torch.manual_seed(len(made))
            reference = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **options), dtype=torch.float32).eval()
            for parameter in reference.parameters():
                # large enough that attention is far from uniform; norms and biases away from 1 and 0
                noise = torch.randn_like(parameter.data)
                parameter.data = noise * 0.3 if parameter.dim() > 1 else parameter.data + 0.2 * noise
            folder = tmp_path_factory.mktemp("tiny")
            reference.save_pretrained(folder)
            made[key] = TinyModel(reference, folder, Decoder.from_pretrained(folder, dtype=torch.float32))
        return made[key]

    return make
