"""What GGUF calls a model's options and tensors, and what a Hugging Face folder calls them: an entry of `FAMILIES` for each architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.hub.gguf import GgufFile, GgufTensor, dequantize_rows
from engine.hub.gguf_tokenizer import end_token_ids
from engine.inputs import Fields, shown
from engine.model.config import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH
from engine.model.rope import RopeConfig, inverse_frequencies

_REMEDY = "fetch the file again, or use the model's Hugging Face folder"
_USE_FOLDER = "use the model's Hugging Face folder"
ROPE_FACTORS = "rope_freqs.weight"
_DROPPED = re.compile(r"rope_freqs\.weight|blk\.\d{1,6}\.attn_rot_embd\.(weight|bias)")  # derived from the options, which are checked
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# options that change what a model computes and that no family here has
_REFUSED = (
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.layer_norm_epsilon",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "expert_count",
    "nextn_predict_layers",
)
_LLAMA3_ORIGINAL_CONTEXT = 8192  # of Llama 3.1 to 3.3; a GGUF file keeps the factors only, and these are compared


@dataclass(frozen=True)
class GgufFamily:
    """One architecture's names.

    Attributes:
        hf_class, model_type: of config.json.
        options: config.json's further options, from the file and what is common to all.
        layer_names: GGUF's name of a layer's tensor -> Hugging Face's.
        interleaved: q and k rows hold the two numbers of a rotated pair side by side, (i, i + d/2) in Hugging Face's order.
        norm_offset: what GGUF adds to the weights of norms.
        windows: `options` reads the sliding window; that of another family is refused where it is narrower than the context.
    """

    hf_class: str
    model_type: str
    options: Callable[[GgufFile, Fields, Mapping[str, Any]], dict[str, Any]]
    layer_names: Mapping[str, str] = field(default_factory=lambda: _LAYER_NAMES)
    interleaved: bool = False
    norm_offset: float = 0.0
    windows: bool = False

    def hf_name(self, name: str) -> str | None:
        """Hugging Face's name of a tensor; None for one that holds nothing the config does not.

        Raises:
            UnsupportedArchitecture: a tensor that such a model does not have.
        """
        if name in _TOP_NAMES:
            return _TOP_NAMES[name]
        if _DROPPED.fullmatch(name):
            return None
        match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in self.layer_names:
            raise UnsupportedArchitecture(f"the GGUF tensor {shown(name)} is none of a {self.model_type} model", _USE_FOLDER)
        return f"model.layers.{match[1]}.{self.layer_names[match[2]]}.{match[3]}"

    def row_order(self, tensor: GgufTensor, config: Mapping[str, Any]) -> np.ndarray | None:
        """Order of the stored rows (of a bias: numbers) that gives Hugging Face's; None where they are in it."""
        part = tensor.name.split(".")[-2]
        if not self.interleaved or part not in ("attn_q", "attn_k"):
            return None
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        rows = int(tensor.shape[0])
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)

    def offset(self, tensor: GgufTensor) -> float:
        """What GGUF added to this tensor's numbers."""
        return self.norm_offset if tensor.name.endswith("norm.weight") else 0.0


def _llama(source: GgufFile, fields: Fields, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in source.tensors, "mlp_bias": False}


def _qwen2(source: GgufFile, fields: Fields, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3(source: GgufFile, fields: Fields, common: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in source.tensors}


def _gemma3(source: GgufFile, fields: Fields, common: Mapping[str, Any]) -> dict[str, Any]:
    """Text models of Gemma 3 (Gemma Team, 2025, arXiv 2503.19786): every sixth layer attends to everything, the others to a window."""
    layers, pattern = common["num_hidden_layers"], fields.integer("attention.sliding_window_pattern", 1, MAX_LAYERS, 6)
    heads, head_dim = common["num_attention_heads"], common["head_dim"]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": fields.integer("attention.sliding_window", 1, MAX_CONTEXT),
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        # the 27B model alone divides by the width over the heads, as its heads are narrower than that; GGUF does not keep it
        "query_pre_attn_scalar": common["hidden_size"] // heads if layers == 62 else head_dim,
        "rope_parameters": {
            "full_attention": common["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": _shortest(fields.number("rope.freq_base_swa", 1.0, 1e15, 10_000.0)),
            },
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
    }


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("LlamaForCausalLM", "llama", _llama, interleaved=True),
    "qwen2": GgufFamily("Qwen2ForCausalLM", "qwen2", _qwen2),
    "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3", _qwen3, _LAYER_NAMES | _QK_NORMS),
    "gemma3": GgufFamily(
        "Gemma3ForCausalLM", "gemma3_text", _gemma3, _LAYER_NAMES | _QK_NORMS | _GEMMA_NORMS, norm_offset=1.0, windows=True
    ),
}


def family_of(source: GgufFile) -> GgufFamily:
    """The file's entry in `FAMILIES`.

    Raises:
        UnsupportedArchitecture: an architecture that is none of them, or no model at all.
        ModelNotFound: one part of a model that was split into several files.
    """
    kind, name = source.metadata.get("general.type", "model"), source.metadata.get("general.architecture")
    if kind != "model":
        raise UnsupportedArchitecture(f"the GGUF file holds no model but {shown(kind)}", "name the model's own file")
    if (parts := source.metadata.get("split.count", 1)) not in (0, 1):
        raise ModelNotFound(f"the GGUF file is one of {shown(parts)} parts of a model", "join them with: llama-gguf-split --merge")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedArchitecture(f"GGUF files of the {shown(name)} family", f"readable: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def hf_config(source: GgufFile) -> dict[str, Any]:
    """What config.json says of the model in a GGUF file.

    Raises:
        UnsupportedArchitecture: an architecture or an option that is not read here.
        ModelNotFound: an option is missing, of another type or out of all bounds.
    """
    family, metadata = family_of(source), source.metadata
    name = metadata["general.architecture"]
    named = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    _refuse_options(named)
    if isinstance(kv_heads := named.get("attention.head_count_kv"), list):  # one number a layer
        if len(set(kv_heads)) != 1:
            raise UnsupportedArchitecture("a GGUF model whose layers have different numbers of heads", _USE_FOLDER)
        named["attention.head_count_kv"] = kv_heads[0]
    fields = Fields(named, "the GGUF file", ModelNotFound, _REMEDY)
    tokens = Fields(metadata, "the GGUF file", ModelNotFound, _REMEDY)
    if "token_embd.weight" not in source.tensors:
        raise ModelNotFound("the GGUF file lacks the tensor 'token_embd.weight'", _REMEDY)
    heads, hidden = fields.integer("attention.head_count", 1, MAX_HEADS), fields.integer("embedding_length", 1, MAX_WIDTH)
    head_dim = fields.integer("attention.key_length", 2, MAX_HEAD_DIM, hidden // heads)
    for option in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(option, 1, MAX_HEAD_DIM, head_dim) != head_dim:
            what = f"a GGUF model whose {option} {fields.get(option)} is not its heads' size {head_dim}"
            raise UnsupportedArchitecture(what, _USE_FOLDER)
    context = fields.integer("context_length", 1, MAX_CONTEXT)
    if not family.windows and 0 < fields.integer("attention.sliding_window", 0, MAX_CONTEXT, 0) < context:
        raise UnsupportedArchitecture(f"a GGUF model of the {shown(name)} family with sliding windows", _USE_FOLDER)
    config: dict[str, Any] = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length", 1, 4 * MAX_WIDTH),
        "num_hidden_layers": fields.integer("block_count", 1, MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", 1, MAX_HEADS, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": _shortest(fields.number("attention.layer_norm_rms_epsilon", 0.0, 1.0)),
        "rope_parameters": _rope(source, fields, head_dim, context),
        "vocab_size": source.tensors["token_embd.weight"].num_rows,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": tokens.integer("tokenizer.ggml.bos_token_id", 0, MAX_VOCAB, -1),
        "eos_token_id": end_token_ids(metadata),
        "pad_token_id": tokens.integer("tokenizer.ggml.padding_token_id", 0, MAX_VOCAB, -1),
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    config |= family.options(source, fields, config)
    # the oldest release that reads this form; without it 5.17 takes every folder for an early Mistral and warns of its tokenizer
    config["transformers_version"] = "5.17.0"
    return {key: item for key, item in config.items() if item != -1}


def _refuse_options(named: Mapping[str, Any]) -> None:
    """UnsupportedArchitecture for an option that changes the model; 0 and absence say that it is not used."""
    refused = next((option for option in _REFUSED if named.get(option)), None)
    if refused is not None:
        raise UnsupportedArchitecture(f"a GGUF model with {refused} {shown(named[refused])}", _USE_FOLDER)
    if named.get("attention.causal", True) is not True:
        raise UnsupportedArchitecture("a GGUF model whose attention is not causal", "use a model that generates text")


def _rope(source: GgufFile, fields: Fields, head_dim: int, context: int) -> dict[str, Any]:
    """config.json's rope_parameters. Raises UnsupportedArchitecture for a scaling that is not run, ModelNotFound for a bad option."""
    theta = _shortest(fields.number("rope.freq_base", 1.0, 1e15, 10_000.0))
    kind = fields.text("rope.scaling.type", "none")
    factor = _shortest(fields.number("rope.scaling.factor", 0.0, 1e6, fields.number("rope.scale_linear", 0.0, 1e6, 0.0)))
    if ROPE_FACTORS in source.tensors:
        return _llama3(source, theta, head_dim)
    if kind == "none" and factor > 1:  # the oldest files name the factor alone
        kind = "linear"
    if kind in ("none", "linear") and factor <= 1:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    strange = [
        key for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor") if fields.get(f"rope.scaling.{key}") not in (None, 1.0)
    ]
    if kind != "yarn" or factor <= 1 or strange or fields.get("rope.scaling.yarn_log_multiplier"):
        raise UnsupportedArchitecture(f"a GGUF model with RoPE scaling {shown(kind)} and options of it", _USE_FOLDER)
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, context),
        "beta_fast": _shortest(fields.number("rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0)),
        "beta_slow": _shortest(fields.number("rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0)),
    }


def _llama3(source: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, of which GGUF keeps what each frequency is divided by; compared with the published options, as those are no numbers of it."""
    tensor = source.tensors[ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,):
        raise ModelNotFound(f"the GGUF file holds {ROPE_FACTORS} of shape {list(tensor.shape)} for heads of {head_dim}", _REMEDY)
    stored = torch.from_numpy(dequantize_rows(source.rows(tensor, 0, 1), tensor.kind)[0])
    factor = _shortest(float(stored.max()))
    options = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    options["original_max_position_embeddings"] = _LLAMA3_ORIGINAL_CONTEXT
    if 1 < factor <= 1e6 and theta > 1:
        scaled = RopeConfig("llama3", theta, factor, _LLAMA3_ORIGINAL_CONTEXT)
        wanted = inverse_frequencies(RopeConfig("default", theta), head_dim) / inverse_frequencies(scaled, head_dim)
        if torch.allclose(stored, wanted, rtol=1e-4):
            return options
    raise UnsupportedArchitecture(f"a GGUF model with frequency factors ({ROPE_FACTORS}) that are not those of Llama 3.1", _USE_FOLDER)


def _shortest(number: float) -> float:
    """GGUF stores 1e-6 as a float32; the shortest decimal of that float32 is the number the model's authors wrote."""
    return float(str(np.float32(number)))
