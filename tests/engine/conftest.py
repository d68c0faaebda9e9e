"""Tiny random models of every supported family, saved by transformers and loaded by our decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy import stats

from engine.decoder import Decoder, DecoderConfig

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


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """`random_decoder(seed, **config options)` -> a tiny Llama of ours, float32, with weights large enough to be sure of its tokens."""

    def make(seed: int, scale: float = 0.3, **options: Any) -> Decoder:
        config = DecoderConfig.from_hf(tiny_config("llama", **({"eos_token_id": None} | options)))
        decoder = Decoder.from_config(config, dtype=torch.float32, seed=seed)
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale / 0.02)
        return decoder

    return make


def _naive_probabilities(logits: list[float], params: Any) -> list[float]:
    """One row's distribution, written from the filters' definitions without tensors."""
    if params.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = [math.exp(x / params.temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[: params.top_k] if params.top_k else order
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if mass < params.top_p * total:
            nucleus.append(i)
        mass += weights[i]
    kept = [i for i in nucleus if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.fixture(scope="session")
def naive_probabilities() -> Callable[[list[float], Any], list[float]]:
    """`naive_probabilities(logits, params)` -> the distribution that temperature, top-k, top-p and min-p define."""
    return _naive_probabilities


def _chi_square_p_value(observed: dict[Any, int], expected: dict[Any, float]) -> float:
    """p-value of counts against probabilities; cells expected fewer than 5 times are merged. Anything outside the support gives 0."""
    draws = sum(observed.values())
    if any(expected.get(cell, 0.0) <= 0 for cell in observed):
        return 0.0
    large = [cell for cell, p in expected.items() if p * draws >= 5]
    wanted = [expected[cell] * draws for cell in large]
    found = [float(observed.get(cell, 0)) for cell in large]
    rest = draws - sum(wanted)
    if rest >= 5:
        wanted.append(rest)
        found.append(draws - sum(found))
    statistic = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True))
    return float(stats.chi2.sf(statistic, len(wanted) - 1)) if len(wanted) > 1 else 1.0


@pytest.fixture(scope="session")
def chi_square_p_value() -> Callable[[dict[Any, int], dict[Any, float]], float]:
    """`chi_square_p_value(counts, probabilities)` -> p-value of the counts under the probabilities."""
    return _chi_square_p_value
