"""Shape and options of a decoder, read from a transformers config; anything our decoder does not run is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import UnsupportedArchitecture
from engine.model.rope import RopeConfig

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_REMEDY = f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}, with full attention"


@dataclass(frozen=True)
class DecoderConfig:
    """Everything the decoder needs to know of a model."""

    architecture: str  # one of SUPPORTED_ARCHITECTURES
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...] = ()
    o_bias: bool = False

    @property
    def kv_width(self) -> int:
        """Key and value channels of one layer, 2 * G * d."""
        return 2 * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Any) -> DecoderConfig:
        """Read a transformers config (of any version from 5.x, or one with the older `rope_scaling`).

        Raises:
            UnsupportedArchitecture: another architecture, sliding-window attention, an activation other than SiLU, biases in the
                feed-forward layers, quantised weights, or an unsupported RoPE scaling.
        """
        architecture = getattr(config, "model_type", None)
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedArchitecture(f"architecture {architecture!r} is not supported", _REMEDY)
        _refuse_options(config, architecture)
        heads = config.num_attention_heads
        # Llama and Qwen3 put the option's bias on all four projections; Qwen2 always has it on q, k, v and never on o
        bias = bool(getattr(config, "attention_bias", False)) and architecture in ("llama", "qwen3")
        eos = getattr(config, "eos_token_id", None)
        return cls(
            architecture=architecture,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rms_norm_eps=float(config.rms_norm_eps),
            rope=RopeConfig.from_hf(config),
            qkv_bias=bias or architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tie_word_embeddings=bool(config.tie_word_embeddings),
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else (() if eos is None else (eos,)),
            o_bias=bias,
        )


def _refuse_options(config: Any, architecture: str) -> None:
    window = getattr(config, "sliding_window", None)
    if architecture in ("qwen2", "qwen3") and not getattr(config, "use_sliding_window", False):
        window = None
    layer_types = getattr(config, "layer_types", None) or ()
    if window is not None and window >= config.max_position_embeddings:
        window = None  # never narrower than the context: the same as full attention
    elif "sliding_attention" in layer_types and window is None:
        window = getattr(config, "sliding_window", None) or 0
    if window is not None:
        raise UnsupportedArchitecture(f"{architecture} with sliding-window attention (window {window}) is not supported", _REMEDY)
    other = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if other:
        raise UnsupportedArchitecture(f"{architecture} with layers of type {other[0]!r} is not supported", _REMEDY)
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UnsupportedArchitecture(f"{architecture} with activation {config.hidden_act!r} is not supported", "supported: silu")
    if getattr(config, "mlp_bias", False):
        raise UnsupportedArchitecture(f"{architecture} with feed-forward biases is not supported", "use a model with mlp_bias false")
    if getattr(config, "quantization_config", None):
        raise UnsupportedArchitecture(f"{architecture} with quantised weights is not supported", "use a float checkpoint")
