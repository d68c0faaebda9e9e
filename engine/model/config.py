"""Shape and options of a decoder, read from a model's config.json; anything our decoder does not run is refused by name.

What config.json leaves out takes the default of transformers' class for the architecture. The defaults are written out here, as importing that
library takes longer than loading a small model; a test compares them with transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.inputs import Fields, is_file, read_json_object, shown
from engine.model.rope import RopeConfig

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_REMEDY = f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}, with full attention"
_BAD_FIELD = "correct config.json, or download the model again"
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 4096, 1 << 14, 4096
MAX_WIDTH, MAX_VOCAB, MAX_CONTEXT = 1 << 20, 1 << 24, 1 << 31
# all that is read of a config
_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "eos_token_id",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "quantization_config",
)
_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    },
    "mistral": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
}
# of those with a default, what config.json may give as null: no value, or one derived from others
_NULLABLE = {
    "llama": ("eos_token_id",),
    "mistral": ("eos_token_id", "sliding_window"),
    "qwen2": ("num_key_value_heads", "sliding_window"),
    "qwen3": ("num_key_value_heads", "sliding_window"),
}


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
            ModelNotFound: a value is missing, of another type, or out of all bounds.
        """
        given = {name: getattr(config, name, None) for name in _KEYS}
        architecture = given["model_type"]
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedArchitecture(f"architecture {shown(architecture)} is not supported", _REMEDY)
        fields = _fields(given)
        hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
        layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        _refuse_options(fields, architecture, layers)
        heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, heads)
        if heads % kv_heads:
            raise fields.refuse("num_key_value_heads", f"it must divide the {heads} attention heads")
        head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, hidden // heads)
        if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
            raise fields.refuse(
                "num_attention_heads" if given["head_dim"] is None else "head_dim", "heads of an even number of channels are needed"
            )
        # Llama and Qwen3 put the option's bias on all four projections; Qwen2 always has it on q, k, v and never on o
        bias = fields.boolean("attention_bias", False) and architecture in ("llama", "qwen3")
        return cls(
            architecture=architecture,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size", 1, 4 * MAX_WIDTH),
            vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
            rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
            rope=RopeConfig.from_hf(config),
            qkv_bias=bias or architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            max_position_embeddings=fields.integer("max_position_embeddings", 1, MAX_CONTEXT),
            eos_token_ids=fields.ids("eos_token_id"),
            o_bias=bias,
        )


def read_config(folder: Path) -> SimpleNamespace:
    """The config of a model folder as `DecoderConfig.from_hf` takes it: the values of config.json, checked, over the architecture's defaults.

    Raises:
        ModelNotFound: no folder, no readable config.json in it, or a value of another type or out of all bounds.
        UnsupportedArchitecture: the architecture is none that our decoder runs.
    """
    path = folder / "config.json"
    if not is_file(path):
        raise ModelNotFound(f"{folder} has no config.json", "give a Hugging Face model folder")
    raw = read_json_object(path, ModelNotFound, "download or convert the model again")
    kind = raw.get("model_type")
    if kind not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedArchitecture(f"architecture {shown(kind)} is not supported", f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    kept = {name: raw[name] for name in _KEYS if name in raw}
    _check_types(kept)
    fields, defaults = _fields(kept), _DEFAULTS[kind]
    for name in defaults:
        if name in kept and kept[name] is None and name not in _NULLABLE[kind]:
            raise fields.refuse(name, "it needs a value")
    config = SimpleNamespace(**(defaults | kept))
    if config.__dict__.get("num_key_value_heads") is None:
        config.num_key_value_heads = config.num_attention_heads
    if kind == "llama" and config.hidden_size % config.num_attention_heads:
        raise fields.refuse("hidden_size", f"it must be a multiple of the {config.num_attention_heads} attention heads")
    if kind in ("qwen2", "qwen3"):
        config.sliding_window = config.sliding_window if config.use_sliding_window else None
        config.use_sliding_window = config.sliding_window is not None
    _take_rope(config)
    return config


def _take_rope(config: SimpleNamespace) -> None:
    """Put the RoPE options where transformers 5 has them, in `rope_parameters`: older files have `rope_theta` and `rope_scaling` of their own."""
    options = dict(config.__dict__.pop("rope_scaling", None) or config.__dict__.get("rope_parameters") or {})
    theta = config.__dict__.pop("rope_theta", None)
    if options.get("rope_theta") is None and theta is not None:
        options["rope_theta"] = theta
    config.rope_parameters = options


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """End-of-text ids of generation_config.json, which count instead of config.json's as they do for transformers; () where it names none.

    Raises:
        ModelNotFound: the file cannot be read, or names something else than ids.
    """
    path = folder / "generation_config.json"
    if not is_file(path):
        return ()
    remedy = "correct it, or download the model again"
    return Fields(read_json_object(path, ModelNotFound, remedy), str(path), ModelNotFound, remedy).ids("eos_token_id")


def _fields(values: dict[str, Any]) -> Fields:
    return Fields(values, "config.json", ModelNotFound, _BAD_FIELD)


def _check_types(kept: dict[str, Any]) -> None:
    """Types and bounds of every value that is given; what is absent takes the architecture's default."""
    fields = _fields(kept)
    whole = {
        "num_hidden_layers": MAX_LAYERS,
        "hidden_size": MAX_WIDTH,
        "num_attention_heads": MAX_HEADS,
        "num_key_value_heads": MAX_HEADS,
        "head_dim": MAX_HEAD_DIM,
        "intermediate_size": 4 * MAX_WIDTH,
        "vocab_size": MAX_VOCAB,
        "max_position_embeddings": MAX_CONTEXT,
    }
    for name, high in whole.items():
        fields.integer(name, 1, high, 1)
    for name in ("sliding_window", "max_window_layers"):
        fields.integer(name, 0, MAX_CONTEXT, 0)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        fields.boolean(name, False)
    fields.number("rms_norm_eps", 0.0, 1.0, 0.0)
    fields.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    fields.text("hidden_act", "silu")
    fields.texts("layer_types", MAX_LAYERS)
    fields.ids("eos_token_id")
    fields.mapping("quantization_config")
    RopeConfig.check_types(fields)


def _refuse_options(fields: Fields, architecture: str, layers: int) -> None:
    _refuse_windows(fields, architecture, layers)
    if fields.text("hidden_act", "silu") != "silu":
        what = f"{architecture} with activation {shown(fields.get('hidden_act'))} is not supported"
        raise UnsupportedArchitecture(what, "supported: silu")
    if fields.boolean("mlp_bias", False):
        raise UnsupportedArchitecture(f"{architecture} with feed-forward biases is not supported", "use a model with mlp_bias false")
    if fields.get("quantization_config"):
        raise UnsupportedArchitecture(f"{architecture} with quantised weights is not supported", "use a float checkpoint")


def _refuse_windows(fields: Fields, architecture: str, layers: int) -> None:
    """UnsupportedArchitecture when some layer looks back over less than the context; settings that no layer uses say nothing."""
    layer_types = fields.texts("layer_types", MAX_LAYERS)
    other = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if other:
        raise UnsupportedArchitecture(f"{architecture} with layers of type {shown(other[0])} is not supported", _REMEDY)
    if layer_types and len(layer_types) != layers:
        raise fields.refuse("layer_types", f"there are {layers} layers")
    window = fields.integer("sliding_window", 0, MAX_CONTEXT, 0)
    if layer_types:
        slides = "sliding_attention" in layer_types
    elif architecture in ("qwen2", "qwen3"):
        slides = fields.boolean("use_sliding_window", False) and fields.integer("max_window_layers", 0, MAX_CONTEXT, 0) < layers
    else:
        slides = architecture == "mistral" and fields.get("sliding_window") is not None
    # never narrower than the context is the same as full attention
    if slides and window < fields.integer("max_position_embeddings", 1, MAX_CONTEXT):
        raise UnsupportedArchitecture(f"{architecture} with sliding-window attention (window {window}) is not supported", _REMEDY)
