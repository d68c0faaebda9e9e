"""Shape and options of a decoder, read from a model's config.json; anything our decoder does not run is refused by name.

What config.json leaves out takes the default of transformers' class for the architecture. The defaults are written out in `engine.model.families`,
as importing that library takes longer than loading a small model; a test compares them with transformers' own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.inputs import Fields, is_file, read_json_object, shown
from engine.model.families import FAMILIES, Family, LayerKind
from engine.model.families.family import ACTIVATIONS, FULL, MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, SLIDING, Activation, ExpertNames
from engine.model.rope import RopeConfig

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
_REMEDY = f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
_BAD_FIELD = "correct config.json, or download the model again"
MAX_HEADS, MAX_HEAD_DIM = 1 << 14, 4096
MAX_WIDTH, MAX_VOCAB = 1 << 20, 1 << 24
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
    "hidden_activation",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "layer_types",
    "rope_theta",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "quantization_config",
)


class LayerShape(NamedTuple):
    """What the forward pass of a layer needs to know besides its tensors."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float  # of the attention scores
    window: int | None = None  # keys that a token attends to, its own included
    softcap: float | None = None  # of the attention scores
    local_rope: bool = False
    activation: Activation = "silu"
    experts_per_token: int = 0
    normalise_experts: bool = True  # the chosen experts' weights add up to 1
    expert_names: ExpertNames | None = None  # None: a dense feed-forward part


@dataclass(frozen=True)
class DecoderConfig:
    """Everything the decoder needs to know of a model; fields with a default say in what a family differs from Llama."""

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
    layer_kinds: tuple[LayerKind, ...] = ()  # one a layer; () where all attend to everything and none has experts
    local_rope: RopeConfig | None = None  # of layers whose kind says so
    activation: Activation = "silu"
    norm_offset: bool = False  # norms multiply by 1 + weight, in float32
    sandwich_norms: bool = False  # the results of attention and feed-forward part are normalised too
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0  # feed-forward width of an expert
    normalise_experts: bool = True

    def layer_kind(self, layer: int) -> LayerKind:
        """The kind of one layer."""
        return self.layer_kinds[layer] if self.layer_kinds else LayerKind()

    def layer_shape(self, layer: int) -> LayerShape:
        """What one layer's forward pass needs to know."""
        kind = self.layer_kind(layer)
        return LayerShape(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.rms_norm_eps,
            self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale,
            kind.window,
            self.attention_softcap,
            kind.local_rope,
            self.activation,
            self.experts_per_token,
            self.normalise_experts,
            FAMILIES[self.architecture].expert_names if kind.experts else None,
        )

    @property
    def is_plain(self) -> bool:
        """Whether the layers are Llama's: those that fused kernels take."""
        return not self.traits

    @property
    def traits(self) -> dict[str, Any]:
        """The fields in which the family differs from Llama, as JSON takes them; without biases, which are fields of old."""
        differing = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in _TRAITS and getattr(self, f.name) != f.default
        }
        return {name: asdict(value) if isinstance(value, RopeConfig) else value for name, value in differing.items()}

    def last_layers(self, count: int, **changes: Any) -> DecoderConfig:
        """The config of a decoder of this one's last `count` layers. changes: of other fields."""
        return replace(self, num_layers=count, layer_kinds=self.layer_kinds[len(self.layer_kinds) - count :], **changes)

    @property
    def kv_width(self) -> int:
        """Key and value channels of one layer, 2 * G * d."""
        return 2 * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Any) -> DecoderConfig:
        """Read a transformers config (of any version from 5.x, or one with the older `rope_scaling`).

        Raises:
            UnsupportedArchitecture: another architecture or activation, biases in the feed-forward layers, quantised weights, or an unsupported
                RoPE scaling.
            ModelNotFound: a value is missing, of another type, or out of all bounds.
        """
        given = {name: getattr(config, name, None) for name in _KEYS}
        architecture = given["model_type"]
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedArchitecture(f"architecture {shown(architecture)} is not supported", _REMEDY)
        family = FAMILIES[architecture]
        for name, meant in family.aliases.items():
            given[meant] = given[name] if given[meant] is None else given[meant]
        fields = _fields(given)
        hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
        layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        activation = _activation(fields, family)
        heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, heads)
        if heads % kv_heads:
            raise fields.refuse("num_key_value_heads", f"it must divide the {heads} attention heads")
        head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, hidden // heads)
        if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
            raise fields.refuse(
                "num_attention_heads" if given["head_dim"] is None else "head_dim", "heads of an even number of channels are needed"
            )
        local = RopeConfig.from_hf(config, SLIDING, family.local_theta) if family.local_rope else None
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
            rope=RopeConfig.from_hf(config, FULL if family.local_rope else None, family.global_theta),
            local_rope=local,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            max_position_embeddings=fields.integer("max_position_embeddings", 1, MAX_CONTEXT),
            eos_token_ids=fields.ids("eos_token_id"),
            activation=activation,
            **({"qkv_bias": False, "qk_norm": False} | family.describe(fields, layers)),
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
    family = FAMILIES[kind]
    for name, meant in family.aliases.items():
        if name in kept:
            kept[meant] = kept.pop(name)
    fields, defaults = _fields(kept), family.defaults
    needed = [name for name in defaults if name not in family.nullable] + ["sliding_window_pattern"] * family.local_rope
    for name in needed:
        if name in kept and kept[name] is None:
            raise fields.refuse(name, "it needs a value")
    config = SimpleNamespace(**(defaults | kept))
    if config.__dict__.get("num_key_value_heads") is None:
        config.num_key_value_heads = config.num_attention_heads
    if kind in ("llama", "gemma2", "gemma3_text") and config.hidden_size % config.num_attention_heads:
        raise fields.refuse("hidden_size", f"it must be a multiple of the {config.num_attention_heads} attention heads")
    if kind in ("qwen2", "qwen3", "qwen3_moe"):
        config.sliding_window = config.sliding_window if config.use_sliding_window else None
        config.use_sliding_window = config.sliding_window is not None
    _take_rope(config, family)
    return config


def _take_rope(config: SimpleNamespace, family: Family) -> None:
    """Put the RoPE options where transformers 5 has them, in `rope_parameters`: older files have `rope_theta` and `rope_scaling` of their own.

    Of a family with two RoPEs, `rope_scaling` and `rope_theta` are those of its layers of full attention, `rope_local_base_freq` of the others.
    """
    if family.local_rope:
        options = dict(config.__dict__.get("rope_parameters") or {})
        for kind, theta, scaling in (
            (FULL, "rope_theta", config.__dict__.pop("rope_scaling", None)),
            (SLIDING, "rope_local_base_freq", None),
        ):
            own = _fields(options).mapping(kind) or {"rope_type": "default"}
            if scaling and options and kind not in options:
                raise _fields(options).refuse(kind, "rope_scaling needs it")
            own |= scaling or {}
            if own.get("rope_theta") is None and config.__dict__.get(theta) is not None:
                own["rope_theta"] = config.__dict__[theta]
            options[kind] = own
        config.rope_parameters = options
        return
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
    for name in ("sliding_window", "max_window_layers", "sliding_window_pattern"):
        fields.integer(name, 0, MAX_CONTEXT, 0)
    for name in ("num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"):
        fields.integer(name, 0, MAX_EXPERTS, 0)
    fields.integers("mlp_only_layers", 0, MAX_LAYERS, MAX_LAYERS)
    fields.integer("moe_intermediate_size", 1, 4 * MAX_WIDTH, 1)
    booleans = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention", "norm_topk_prob")
    for name in booleans:
        fields.boolean(name, False)
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        fields.number(name, 1e-6, 1e9, 1.0)
    fields.number("rms_norm_eps", 0.0, 1.0, 0.0)
    fields.number("partial_rotary_factor", 0.0, 1.0, 1.0)
    fields.text("hidden_act", "silu")
    fields.text("hidden_activation", "silu")
    fields.texts("layer_types", MAX_LAYERS)
    fields.ids("eos_token_id")
    fields.mapping("quantization_config")
    RopeConfig.check_types(fields)


def _activation(fields: Fields, family: Family) -> Activation:
    """The gate's activation. UnsupportedArchitecture where it, or another option of the feed-forward layers, is none that our decoder runs."""
    name = fields.text(family.activation_key, family.defaults[family.activation_key])
    if name not in ACTIVATIONS:
        what = f"{family.model_type} with activation {shown(name)} is not supported"
        raise UnsupportedArchitecture(what, f"supported: {', '.join(ACTIVATIONS)}")
    if fields.boolean("mlp_bias", False):
        raise UnsupportedArchitecture(f"{family.model_type} with feed-forward biases is not supported", "use a model with mlp_bias false")
    if fields.get("quantization_config"):
        raise UnsupportedArchitecture(f"{family.model_type} with quantised weights is not supported", "use a float checkpoint")
    return ACTIVATIONS[name]


_TRAITS = frozenset(f.name for f in dataclasses.fields(DecoderConfig) if f.default is not dataclasses.MISSING) - {"eos_token_ids", "o_bias"}
