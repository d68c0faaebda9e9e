"""What a family file gives: the defaults of its config.json, and a description of its layers read from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from engine.errors import UnsupportedArchitecture
from engine.inputs import Fields, shown

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # by their names in config.json
MAX_LAYERS, MAX_CONTEXT, MAX_EXPERTS = 4096, 1 << 31, 4096
FULL, SLIDING = "full_attention", "sliding_attention"


class LayerKind(NamedTuple):
    """What may differ from layer to layer.

    window: keys that a token attends to, its own included; None for all before it. local_rope: keys and queries turn by the config's `local_rope`.
    experts: the feed-forward part is a mixture of experts.
    """

    window: int | None = None
    local_rope: bool = False
    experts: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: its name in config.json.
        defaults: of what config.json leaves out, those of transformers' class.
        nullable: of these, what config.json may give as null.
        describe: (config.json's fields, number of layers) -> the fields of `DecoderConfig` in which a family differs from Llama.
        activation_key: the field that names the activation.
        local_rope: windowed layers have RoPE options of their own, under "sliding_attention" in rope_parameters.
        global_theta, local_theta: RoPE bases where config.json gives none.
        expert_names: of a mixture's tensors within a layer: the router's, and the prefix of an expert's three matrices with their own names.
        aliases: other names of config.json's fields -> the names used here.
    """

    model_type: str
    defaults: dict[str, Any]
    nullable: tuple[str, ...]
    describe: Callable[[Fields, int], dict[str, Any]]
    activation_key: str = "hidden_act"
    local_rope: bool = False
    global_theta: float = 10_000.0
    local_theta: float = 10_000.0
    expert_names: ExpertNames | None = None
    aliases: dict[str, str] = field(default_factory=dict)


class ExpertNames(NamedTuple):
    """Hugging Face names of a mixture of experts within a layer; `expert` takes the expert's number."""

    router: str
    expert: str
    gate: str
    up: str
    down: str

    def matrices(self, number: int) -> tuple[str, str, str]:
        """Names of one expert's gate, up and down matrices."""
        prefix = self.expert.format(number)
        return f"{prefix}.{self.gate}.weight", f"{prefix}.{self.up}.weight", f"{prefix}.{self.down}.weight"


COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def sliding_kinds(fields: Fields, slides: list[bool], **options: bool) -> tuple[LayerKind, ...]:
    """Kinds of layers of which those marked attend to config.json's `sliding_window` keys. options: further fields of a windowed layer's kind.

    Raises:
        UnsupportedArchitecture: layers slide and the config gives no window.
    """
    if not any(slides):
        return ()
    window = fields.integer("sliding_window", 0, MAX_CONTEXT, 0)
    if window < 1:
        raise UnsupportedArchitecture("sliding-window layers without a sliding_window are not supported", "complete config.json")
    # never narrower than the context is the same as full attention
    narrow = window if window < fields.integer("max_position_embeddings", 1, MAX_CONTEXT) else None
    if narrow is None and not options:
        return ()
    return tuple(LayerKind(narrow, **options) if slide else LayerKind() for slide in slides)


def typed_layers(fields: Fields, layers: int, default: list[bool]) -> list[bool]:
    """Whether each layer slides: by `layer_types` where config.json has them.

    Raises:
        UnsupportedArchitecture: a layer of another type. The fields' error: another number of layers.
    """
    types = fields.texts("layer_types", MAX_LAYERS)
    other = sorted(set(types) - {FULL, SLIDING})
    if other:
        raise UnsupportedArchitecture(f"layers of type {shown(other[0])} are not supported", f"supported: {FULL}, {SLIDING}")
    if types and len(types) != layers:
        raise fields.refuse("layer_types", f"there are {layers} layers")
    return [kind == SLIDING for kind in types] if types else default
