"""What config.json leaves out, and how it spells RoPE: read as transformers' own config classes read it."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.errors import ForetoldError
from engine.model.config import _KEYS, SUPPORTED_ARCHITECTURES, DecoderConfig, read_config
from engine.model.families import FAMILIES

_ROPE = [
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 3.0},
    {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {}},
    {"rope_parameters": None, "rope_theta": 3.0},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "rope_theta": 5e5,
        "max_position_embeddings": 4096,
    },
]
_VALUES = {
    "hidden_size": [64, 96, 100],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [2, 4, 6],
    "num_key_value_heads": [1, 2, None],
    "head_dim": [16, 32, None],
    "sliding_window": [None, 128, 1 << 20],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2, 40],
    "attention_bias": [True, False],
    "mlp_bias": [False],
    "tie_word_embeddings": [True, False],
    "eos_token_id": [None, 3, [3, 4]],
    "hidden_act": ["silu", "gelu"],
    "sliding_window_pattern": [1, 3],
    "rope_local_base_freq": [500.0],
    "query_pre_attn_scalar": [64, 144],
    "final_logit_softcapping": [None, 20.0],
    "attn_logit_softcapping": [None, 30.0],
    "hidden_activation": ["gelu_pytorch_tanh", "gelu"],
    "num_local_experts": [2, 4],
    "num_experts_per_tok": [1, 2],
    "moe_intermediate_size": [8],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [0], None],
    "layer_types": [None, ["full_attention"], ["full_attention"] * 3, ["sliding_attention"] * 3],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "max_position_embeddings": [256, 4096],
}


def compare(folder, raw: dict) -> DecoderConfig | None:
    """Our reading, which must be transformers'; None where both refuse."""
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        theirs = DecoderConfig.from_hf(CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw)))
    except Exception:
        theirs = None
    try:
        ours = DecoderConfig.from_hf(read_config(folder))
    except ForetoldError:
        ours = None
    assert ours == theirs
    return ours


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_defaults_are_those_of_transformers(architecture, tmp_path):
    theirs = CONFIG_MAPPING[architecture]()
    for name, value in FAMILIES[architecture].defaults.items():
        if name != "sliding_window" or "qwen" not in architecture:  # Qwen's classes give it up where it is not used
            assert getattr(theirs, name) == value, name
    assert compare(tmp_path, {"model_type": architecture}) is not None


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_a_value_left_out_or_null(architecture, tmp_path):
    window = {} if "gemma" in architecture else {"sliding_window": None}  # a Gemma's layers slide whatever else is said
    whole = {"model_type": architecture, **window} | {
        name: value for name, value in FAMILIES[architecture].defaults.items() if name != "sliding_window"
    }
    assert compare(tmp_path, whole) is not None
    for name in _KEYS[1:]:
        compare(tmp_path, {key: value for key, value in whole.items() if key != name})
        compare(tmp_path, whole | {name: None})


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_every_spelling_of_rope(architecture, tmp_path):
    for options in _ROPE:
        understood = architecture != "gemma3_text" or len(options.keys() & {"rope_parameters", "rope_scaling"}) < 2
        assert (compare(tmp_path, {"model_type": architecture} | options) is not None) == understood, options


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(SUPPORTED_ARCHITECTURES),
    st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in _VALUES.items()}),
    st.sampled_from([{}, *_ROPE]),
)
def test_any_options_together(tmp_path_factory, architecture, values, rope):
    folder = tmp_path_factory.getbasetemp()
    compare(folder, {"model_type": architecture} | rope | values)
