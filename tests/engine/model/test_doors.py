"""Model folders that others wrote: whatever config.json, the index and the safetensors headers hold, loading ends as a model or one named error."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.errors import ForetoldError, ModelNotFound, UnsupportedArchitecture
from engine.model.config import _KEYS, DecoderConfig, read_config
from engine.model.decoder import Decoder, forward_reserved
from engine.model.rope import inverse_frequencies
from engine.model.weights import expected_shapes, index_file, open_checkpoint, read_into, weight_files

BOUNDED = settings(max_examples=150, deadline=10_000, derandomize=True, database=None)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**9, 10**400])
    | st.floats()
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8
)
ROPE_KEYS = ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "mscale", "mscale_all_dim")


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of a tiny tied model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model("qwen3").folder, tmp_path / "model"))


def load(folder: Path) -> Decoder:
    return Decoder.from_pretrained(folder, dtype=torch.float32)


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_header(path: Path, header: object, data: bytes = bytes(8)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
def test_expected_shapes_are_the_decoder_s(tiny_model, family):
    decoder = tiny_model(family).decoder
    assert expected_shapes(decoder.config) == {name: tuple(tensor.shape) for name, tensor in decoder.hf_tensors().items()}


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size", "head_dim"]
)
@pytest.mark.parametrize("value", ["64", 64.5, [], {}, float("nan"), -1, 0, 10**5, 10**9, 10**30, True])
def test_sizes_of_a_wrong_kind_are_named_before_anything_is_allocated(folder, key, value, takes_less):
    edit_config(folder, **{key: value})

    def refused():
        with pytest.raises((ModelNotFound, UnsupportedArchitecture)):
            load(folder)

    takes_less(2, refused)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        {"rope_parameters": None, "rope_theta": float("inf")},
        {"rope_parameters": None, "rope_scaling": {"factor": 2.0, "type": []}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"rope_parameters": []},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": -1.0},
        {"eos_token_id": "end"},
        {"eos_token_id": [5, None]},
        {"tie_word_embeddings": "yes"},
        {"layer_types": "full_attention"},
        {"layer_types": ["full_attention"]},
        {"max_position_embeddings": 0},
    ],
)
def test_other_values_of_a_wrong_kind_are_named(folder, values):
    edit_config(folder, **values)
    with pytest.raises((ModelNotFound, UnsupportedArchitecture)):
        load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "null", "[]", '"x"', "\xff", "{} {}", "1" * 5000])
def test_texts_that_are_no_config(tmp_path, text):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(ForetoldError):
            load(tmp_path)


@BOUNDED
@given(st.dictionaries(st.sampled_from(_KEYS), JSON, max_size=6), st.dictionaries(st.sampled_from(ROPE_KEYS), JSON, max_size=3))
def test_any_json_in_a_config_gives_a_config_or_a_named_error(tiny_model, tmp_path_factory, values, rope):
    config = json.loads((tiny_model("qwen3").folder / "config.json").read_text())
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(config | ({"rope_parameters": rope} if rope else {}) | values))
    try:
        read = DecoderConfig.from_hf(read_config(folder))
    except ForetoldError:
        return
    assert inverse_frequencies(read.rope, read.head_dim).isfinite().all()


@BOUNDED
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_the_files_of_a_folder_give_a_named_error(tiny_model, tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        (folder / "config.json").write_bytes((tiny_model("qwen3").folder / "config.json").read_bytes())
        (folder / name).write_bytes(content)
        with pytest.raises(ForetoldError):
            load(folder)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        "text",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        {"a": {}},
        {"a": ENTRY | {"dtype": None}},
        {"a": ENTRY | {"shape": None}},
        {"a": ENTRY | {"shape": [-2]}},
        {"a": ENTRY | {"shape": [2.0]}},
        {"a": ENTRY | {"shape": [1 << 62, 1 << 62]}},
        {"a": ENTRY | {"data_offsets": [0]}},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
        {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY | {"data_offsets": [0, 16], "shape": [4]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY | {"data_offsets": [4, 8], "shape": [1]}},
        {"__metadata__": 5, "a": ENTRY},
    ],
)
def test_headers_that_are_none(tmp_path, header):
    write_header(tmp_path / "x.safetensors", header)
    with pytest.raises(ModelNotFound):
        index_file(tmp_path / "x.safetensors")


@BOUNDED
@given(
    st.dictionaries(
        st.text(max_size=4) | st.just("__metadata__"),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "x"]),
                "shape": st.lists(st.integers(-2, 3), max_size=3),
                "data_offsets": st.lists(st.integers(-8, 16), max_size=3),
            }
        ),
        max_size=3,
    )
)
def test_any_json_in_a_header_gives_tensors_inside_the_file_or_a_named_error(tmp_path_factory, header):
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    write_header(path, header)
    try:
        tensors = index_file(path)
    except ForetoldError:
        return
    for tensor in tensors.values():
        assert 0 <= tensor.offset <= path.stat().st_size - torch.empty(tensor.shape, dtype=tensor.dtype).nbytes


def test_pipes_devices_pointers_and_names_that_are_none(folder):
    weights = folder / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelNotFound, match="git-lfs pointer"):
        load(folder)
    weights.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(weights)
        with pytest.raises(ModelNotFound):
            index_file(weights)
    with pytest.raises(ModelNotFound):
        load(folder / ("x" * 5000))
    with pytest.raises(ModelNotFound):
        load(folder / "a\0b")


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {"weight_map": None},
        {"weight_map": {}},
        {"weight_map": {"x": None}},
        {"weight_map": {"x": 5}},
        {"weight_map": {"x": "../model.safetensors"}},
        {"weight_map": {"x": "/etc/passwd"}},
        {"weight_map": {"x": "shards/../../y"}},
        {"weight_map": {"x": "n" * 300}},
        {"weight_map": {"x": "a\0b"}},
        {"weight_map": {"x": "."}},
    ],
)
def test_an_index_stays_inside_its_folder(folder, index):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound):
        load(folder)


def test_names_in_errors_cannot_reach_the_terminal_as_commands():
    error = ModelNotFound("there is no \x1b[31mfolder\x07 \ud800 é\n", "look")
    assert str(error) == "there is no \\x1b[31mfolder\\x07 \\ud800 é (look)"


def test_a_stale_index_beside_a_whole_file_and_shards_in_a_subfolder(folder, tiny_model):
    expected = tiny_model("qwen3").decoder.embed_tokens.weight
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    assert torch.equal(load(folder).embed_tokens.weight, expected)
    (folder / "shards").mkdir()
    (folder / "model.safetensors").rename(folder / "shards" / "a.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "shards/a.safetensors"}}))
    assert weight_files(folder) == [folder / "shards" / "a.safetensors"]
    assert torch.equal(load(folder).embed_tokens.weight, expected)


def test_tensors_saved_without_the_prefix(folder, tiny_model):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    assert torch.equal(load(folder).layers[1].o_proj.weight, tiny_model("qwen3").decoder.layers[1].o_proj.weight)


@torch.inference_mode()
def test_a_head_that_differs_from_the_embeddings_is_used_though_the_config_ties_them(folder):
    from transformers import AutoModelForCausalLM

    head = torch.randn(97, 48, generator=torch.Generator().manual_seed(1))
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    decoder = load(folder)
    assert torch.equal(decoder.hf_tensors()["lm_head.weight"], head)
    ids = torch.arange(12)
    ours = forward_reserved(decoder, ids, [decoder.new_pool(1).new_sequence()], [12]).logits
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids[None]).logits[0]
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_rotary_frequencies_are_dropped_only_where_the_config_gives_them(folder, tiny_model):
    config = tiny_model("qwen3").decoder.config
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    right = inverse_frequencies(config.rope, config.head_dim)
    for stored in (right, right.half(), right.bfloat16()):
        edit_tensors(folder, lambda tensors, stored=stored: tensors.update({name: stored}))
        assert name not in open_checkpoint(folder)[1]
    for wrong in (right * 2, right[:-1], torch.full_like(right, 0.5)):
        edit_tensors(folder, lambda tensors, wrong=wrong: tensors.update({name: wrong.contiguous()}))
        with pytest.raises(UnsupportedArchitecture, match="rotary frequencies"):
            load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(folder, value, dtype):
    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    edit_tensors(folder, spoil)
    with pytest.raises(ModelNotFound, match=r"layers\.1\.mlp\.down_proj.*not finite"):
        Decoder.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bf16_number_that_is_finite_is_taken_and_no_other(tmp_path, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    save_file({"numbers": every}, tmp_path / "numbers.safetensors")
    [stored] = index_file(tmp_path / "numbers.safetensors").values()
    fits = every.to(dtype).isfinite()  # all finite ones, but in float16
    for place in range(0, 2**16, 61):
        one = replace(stored, shape=(1,), offset=stored.offset + 2 * place)
        found = torch.empty(1, dtype=dtype)
        if fits[place]:
            read_into(one, found)
            assert found.item() == every[place].to(dtype).item()
        else:
            with pytest.raises(ModelNotFound, match="not finite"):
                read_into(one, found)


def test_a_sum_and_its_tensor_do_not_depend_on_pieces(tmp_path, monkeypatch):
    numbers = torch.randn(3001, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({"numbers": numbers}, tmp_path / "numbers.safetensors")
    [stored] = index_file(tmp_path / "numbers.safetensors").values()
    whole, found = torch.empty(3001, dtype=torch.bfloat16), torch.full((3001,), torch.nan)
    expected = read_into(stored, whole)
    monkeypatch.setattr("engine.model.weights._PIECE_BYTES", 64)
    assert read_into(stored, found) == expected and torch.equal(found, numbers.float()) and torch.equal(whole, numbers)


def test_weights_that_overflow_the_dtype_asked_for_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load(folder)
    with pytest.raises(ModelNotFound, match=r"not finite in torch\.float16"):
        Decoder.from_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}),
        ("llama", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_windows_that_no_layer_uses_are_no_reason_to_refuse(tiny_model, tmp_path, family, values):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_model(family).folder / "config.json").read_text()) | values))
    if "layer_types" not in values:
        raw = json.loads((tmp_path / "config.json").read_text())
        raw.pop("layer_types", None)
        (tmp_path / "config.json").write_text(json.dumps(raw))
    assert DecoderConfig.from_hf(read_config(tmp_path)).num_layers == 3
