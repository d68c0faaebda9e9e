"""Sampling values of generation_config.json: what transformers' `generate` would use, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from engine.errors import ForetoldError, ModelNotFound
from engine.runtime.sampling import SamplingParams
from engine.runtime.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from engine.server.protocol import read_params


def as_transformers(file: dict, given_values: dict) -> SamplingParams:
    """What `generate` samples with: the file's values over the library's, the call's over both; nothing but the penalty counts where it is greedy."""
    config = GenerationConfig(**file)
    library = config._get_default_generation_params() if hasattr(config, "_get_default_generation_params") else {}
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    used = {name: library.get(name) for name in names} | {
        name: getattr(config, name) for name in names if getattr(config, name) is not None
    }
    used |= given_values
    penalty = used["repetition_penalty"] or 1.0
    if not used["do_sample"]:
        return SamplingParams(repetition_penalty=penalty)
    sampled = {"temperature": used["temperature"], "top_k": used["top_k"], "top_p": used["top_p"], "min_p": used["min_p"] or 0.0}
    return SamplingParams(repetition_penalty=penalty, **sampled)


@pytest.mark.parametrize(
    "file",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},  # Qwen2.5's
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},  # Llama 3's
        {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
        {"temperature": 0.7, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_the_same_values_as_transformers(file):
    defaults = SamplingDefaults.of(file, "x")
    assert defaults.params() == as_transformers(file, {})
    if file.get("do_sample"):
        assert defaults.params({"temperature": 0.5, "top_p": None}) == as_transformers(file, {"temperature": 0.5})
        assert defaults.params({"top_k": 7, "repetition_penalty": 1.0}) == as_transformers(file, {"top_k": 7, "repetition_penalty": 1.0})
    greedy = defaults.params({"temperature": 0.0})
    assert greedy == as_transformers(file, {"do_sample": False})


def test_a_temperature_alone_samples_with_what_the_file_names():
    defaults = SamplingDefaults.of({"top_k": 20, "repetition_penalty": 1.1}, "x")
    assert defaults.params({"temperature": 0.5}) == SamplingParams(temperature=0.5, top_k=20, repetition_penalty=1.1)
    assert NO_DEFAULTS.params({"temperature": 0.5}) == SamplingParams(temperature=0.5)


def test_requests_to_the_server_take_the_models_values_and_else_openais():
    assert read_params({}) == SamplingParams(temperature=1.0)
    assert read_params({}, SamplingDefaults.of({"repetition_penalty": 1.1}, "x")) == SamplingParams(temperature=1.0, repetition_penalty=1.1)
    qwen = SamplingDefaults.of({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}, "x")
    assert read_params({"top_p": 0.5}, qwen) == SamplingParams(temperature=0.7, top_k=20, top_p=0.5)
    assert read_params({"temperature": 0}, qwen) == SamplingParams()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.dictionaries(
        st.sampled_from(["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]),
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=2) | st.lists(st.integers(), max_size=1),
    )
)
def test_any_values_are_taken_or_named(file):
    try:
        defaults = SamplingDefaults.of(file, "generation_config.json")
    except ForetoldError as error:
        assert isinstance(error, ModelNotFound) and "generation_config.json" in str(error)
        return
    defaults.params()
    defaults.params({"temperature": 1.0})
