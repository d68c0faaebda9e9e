"""Converting a GGUF file to a plain Hugging Face folder in bfloat16, a few rows of one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.hub.gguf import GgufFile, GgufTensor, dequantize_rows
from engine.hub.gguf_tokenizer import end_token_ids, write_tokenizer
from engine.hub.progress import Progress, silent
from engine.inputs import Fields, shown
from engine.model.config import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, DecoderConfig
from engine.model.weights import expected_shapes

_CHUNK_ELEMENTS = 1 << 22
_FAMILIES = {"llama": ("LlamaForCausalLM", "llama"), "qwen2": ("Qwen2ForCausalLM", "qwen2")}
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


def convert_gguf(path: Path, folder: Path, progress: Progress = silent) -> str:
    """Writes config.json, generation_config.json, the tokenizer files and model.safetensors (bf16, Hugging Face tensor names).

    Weights are dequantised to float32 and rounded to bfloat16, nothing else; a head tied to the embeddings is not written twice.

    Args:
        path: GGUF file of the Llama or Qwen2 family.
        folder: existing empty folder.
        progress: called with bytes of the safetensors file.

    Returns:
        SHA-256 (hex) of model.safetensors.

    Raises:
        UnsupportedArchitecture: another family, tokenizer or tensor.
        ModelNotFound: the file is broken, or its metadata and tensors do not fit each other or are not finite.
    """
    with GgufFile(path) as source:
        config = _hf_config(source)
        _write_json(folder / "config.json", config)
        generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        _write_json(folder / "generation_config.json", generation)
        write_tokenizer(source.metadata, folder)
        with open(folder / "model.safetensors", "wb") as out:
            return _write_weights(source, config, out, progress, f"converting {folder.name.removesuffix('.tmp')}")


def _hf_config(source: GgufFile) -> dict[str, Any]:
    metadata = source.metadata
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UnsupportedArchitecture(f"GGUF files of the {shown(family)} family", f"readable: {', '.join(sorted(_FAMILIES))}")
    scaling = [key for key in metadata if key.startswith(f"{family}.rope.scaling")]
    if scaling or f"{family}.attention.sliding_window" in metadata:
        raise UnsupportedArchitecture("GGUF files with RoPE scaling or sliding windows", "use the model's Hugging Face folder")
    architecture, model_type = _FAMILIES[family]
    remedy = "fetch the file again, or use the model's Hugging Face folder"
    named = {key.removeprefix(f"{family}."): value for key, value in metadata.items()}
    fields = Fields(named, "the GGUF file", ModelNotFound, remedy)
    tokens = Fields(metadata, "the GGUF file", ModelNotFound, remedy)
    if "token_embd.weight" not in source.tensors:
        raise ModelNotFound("the GGUF file lacks the tensor 'token_embd.weight'", remedy)
    heads, hidden = fields.integer("attention.head_count", 1, MAX_HEADS), fields.integer("embedding_length", 1, MAX_WIDTH)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length", 1, 4 * MAX_WIDTH),
        "num_hidden_layers": fields.integer("block_count", 1, MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", 1, MAX_HEADS, heads),
        "head_dim": fields.integer("attention.key_length", 2, MAX_HEAD_DIM, hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields.integer("context_length", 1, MAX_CONTEXT),
        "rms_norm_eps": _shortest(fields.number("attention.layer_norm_rms_epsilon", 0.0, 1.0)),
        "rope_parameters": {"rope_type": "default", "rope_theta": _shortest(fields.number("rope.freq_base", 1.0, 1e15, 10_000.0))},
        "vocab_size": source.tensors["token_embd.weight"].num_rows,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": tokens.integer("tokenizer.ggml.bos_token_id", 0, MAX_VOCAB, -1),
        "eos_token_id": end_token_ids(metadata),
        "pad_token_id": tokens.integer("tokenizer.ggml.padding_token_id", 0, MAX_VOCAB, -1),
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if family == "qwen2":
        config["use_sliding_window"] = False
    else:
        config |= {"attention_bias": False, "mlp_bias": False}
    # the oldest release that reads this form; without it 5.17 takes every folder for an early Mistral and warns of its tokenizer
    config["transformers_version"] = "5.17.0"
    config = {key: item for key, item in config.items() if item != -1}
    _check_tensors(source, config)
    return config


def _check_tensors(source: GgufFile, config: dict[str, Any]) -> None:
    """ModelNotFound or UnsupportedArchitecture unless the file holds the tensors that a decoder of this config has, and no other."""
    shape = DecoderConfig.from_hf(SimpleNamespace(**config))
    held = {_hf_name(tensor.name): tensor.shape for tensor in source.tensors.values()}
    depth = 1 + max((int(match[1]) for name in held if (match := re.match(r"model\.layers\.(\d{1,6})\.", name))), default=-1)
    if shape.num_layers > depth:  # looked at first, as the names to expect grow with it
        raise ModelNotFound(f"the GGUF file holds {depth} layers, its metadata speaks of {shape.num_layers}", "fetch the file again")
    expected = expected_shapes(shape)
    wrong = next((name for name in expected if held.get(name) != expected[name]), None)
    if wrong is not None:
        what = f"the GGUF file holds {wrong} of shape {list(held[wrong])}" if wrong in held else f"the GGUF file lacks {wrong}"
        raise ModelNotFound(f"{what}, its metadata speaks of {list(expected[wrong])}", "fetch the file again")
    extra = next((name for name in held if name not in expected), None)
    if extra is not None:
        raise UnsupportedArchitecture(f"the GGUF file holds {extra}, which such a model does not have", "use the Hugging Face folder")


def _shortest(number: float) -> float:
    """GGUF stores 1e-6 as a float32; the shortest decimal of that float32 is the number the model's authors wrote."""
    return float(str(np.float32(number)))


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UnsupportedArchitecture(f"the GGUF tensor {shown(name)}", "only plain Llama and Qwen2 layers are read")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _row_order(tensor: GgufTensor, config: dict[str, Any]) -> np.ndarray | None:
    """Order of the stored rows that gives Hugging Face's: GGUF keeps Llama's rotated pairs (i, i + d/2) side by side, Qwen2's apart."""
    part = tensor.name.split(".")[-2]
    if config["model_type"] != "llama" or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    rows = int(tensor.shape[0])
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _write_weights(source: GgufFile, config: dict[str, Any], out: BinaryIO, progress: Progress, label: str) -> str:
    """The safetensors layout (8 bytes header length, JSON header, tensors back to back), written as it is made."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in source.tensors.values():
        start, end = end, end + 2 * int(np.prod(tensor.shape, dtype=np.int64))
        header[_hf_name(tensor.name)] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()

    def write(piece: bytes | memoryview) -> None:
        out.write(piece)
        digest.update(piece)

    write(len(encoded).to_bytes(8, "little"))
    write(encoded)
    done = 0
    for tensor in source.tensors.values():
        order = _row_order(tensor, config)
        step = tensor.num_rows if order is not None else max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
        for first in range(0, tensor.num_rows, step):
            raw = source.rows(tensor, first, min(first + step, tensor.num_rows))
            values = dequantize_rows(raw if order is None else raw[order], tensor.kind)
            brain = torch.from_numpy(values).to(torch.bfloat16)
            if not brain.isfinite().all():  # the largest float32 numbers round to infinity as well
                raise ModelNotFound(f"the GGUF file holds numbers in {tensor.name} that are not finite in bfloat16", "fetch the file again")
            rounded = brain.view(torch.int16).numpy()
            write(rounded.reshape(-1).view(np.uint8).data)
            done += rounded.nbytes
            progress(label, done, end)
    out.flush()
    os.fsync(out.fileno())
    return digest.hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
