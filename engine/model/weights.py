"""Weights of a Hugging Face folder, read tensor by tensor from safetensors files straight into the decoder's parameters.

The files are read, not mapped: a mapped file would stay resident beside the parameters, and that is a second copy of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.inputs import is_file, is_lfs_pointer, lfs_pointer, open_regular, read_json_object, shown
from engine.model.config import DecoderConfig, read_config, read_end_tokens
from engine.model.rope import inverse_frequencies

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CHUNK_BYTES = 16 << 20  # that a sum is carried over
_PIECE_BYTES = 1 << 20  # read at a time, that a core's cache holds while it is looked at
_READERS = 2  # tensors read at a time: memory that is touched for the first time costs more than reading
_BF16_INFINITY = 0x7F80
_AGAIN = "download or convert the model again"
_SAME_MODEL = "config.json and weights must come from the same model"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder is loaded from: `model.safetensors`, or else the shards its index names, in order of name.

    Other safetensors files beside them, and an index beside a whole file, are no part of the model.

    Raises:
        ModelNotFound: there are neither, a shard is missing, or the index is malformed or names a file outside the folder.
    """
    single, index = folder / SINGLE, folder / INDEX
    if is_file(single) and not _is_first_shard(index):
        return [single]
    if not is_file(index):
        raise ModelNotFound(f"{folder} has no {SINGLE} and no {INDEX}", "convert the weights to safetensors")
    names = read_json_object(index, ModelNotFound, _AGAIN).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and name for name in names.values()):
        raise ModelNotFound(f"{index} has no weight_map from tensors to files", _AGAIN)
    shards = sorted(set(names.values()))
    for name in shards:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or ":" in name:
            raise ModelNotFound(f"{index} names {shown(name)}, which is outside the folder", _AGAIN)
    missing = [name for name in shards if not is_file(folder / name)]
    if missing:
        what = f"{folder} lacks {len(missing)} of {len(shards)} weight files, {shown(missing[0])[1:-1]} first"
        raise ModelNotFound(what, "download the model again")
    return [folder / name for name in shards]


def _is_first_shard(index: Path) -> bool:
    """Whether an index names `model.safetensors` among other files; one that does not, or cannot be read, is a left-over beside it."""
    try:
        names = read_json_object(index, ModelNotFound, _AGAIN).get("weight_map")
    except ModelNotFound:
        return False
    return isinstance(names, dict) and SINGLE in names.values() and any(name != SINGLE for name in names.values())


def index_file(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file, from its header; no value is read. The header is checked by the safetensors library.

    Raises:
        ModelNotFound: the file is cut short, is not a safetensors file, or its tensors overlap or leave it.
        UnsupportedArchitecture: a tensor is stored in a dtype that is no float.
    """
    with open_regular(path, ModelNotFound, _AGAIN) as file:
        first = 8 + int.from_bytes(file.read(8), "little")
    if is_lfs_pointer(path):
        raise lfs_pointer(path, ModelNotFound)
    tensors = {}
    try:
        with safe_open(path, "np") as header:
            at = first
            for name in header.offset_keys():  # in the order of their bytes, which the library has found to be without gaps
                entry = header.get_slice(name)
                dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
                if dtype not in _DTYPES:
                    raise UnsupportedArchitecture(f"{path.name} stores {shown(name)} as {dtype}", "use a bf16, f16 or f32 checkpoint")
                tensors[name] = StoredTensor(path, _DTYPES[dtype], shape, at)
                at += math.prod(shape) * _DTYPES[dtype].itemsize
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise ModelNotFound(f"{path} is not a complete safetensors file: {shown(str(error), 160)[1:-1]}", _AGAIN) from error
    return tensors


def index_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder's weight files, by their Hugging Face names.

    Raises:
        ModelNotFound: there are no weight files, one is missing or broken, or two hold a tensor of one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        own = index_file(path)
        twice = next((name for name in own if name in tensors), None)
        if twice is not None:
            raise ModelNotFound(f"{folder} holds {shown(twice)} in two files", _AGAIN)
        tensors |= own
    if "embed_tokens.weight" in tensors:  # saved from the model without its head
        tensors = {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape, of all tensors that a decoder of this shape has; nothing is allocated."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    for number in range(config.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in _layer_shapes(config, number).items()}
    return shapes


def _layer_shapes(config: DecoderConfig, number: int) -> dict[str, tuple[int, ...]]:
    """The same of one layer, by the names within it."""
    width, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,) for name in norms}
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        layer[f"self_attn.{name}_proj.weight"] = (rows, width)
        if config.qkv_bias:
            layer[f"self_attn.{name}_proj.bias"] = (rows,)
    if config.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in "qk"}
    layer["self_attn.o_proj.weight"] = (width, q)
    if config.o_bias:
        layer["self_attn.o_proj.bias"] = (width,)
    experts = config.layer_shape(number).expert_names
    if experts is None:
        inner = config.intermediate_size
        return layer | {
            "mlp.gate_proj.weight": (inner, width),
            "mlp.up_proj.weight": (inner, width),
            "mlp.down_proj.weight": (width, inner),
        }
    layer[experts.router] = (config.num_experts, width)
    for expert in range(config.num_experts):
        inner = config.expert_size
        layer |= dict(zip(experts.matrices(expert), ((inner, width), (inner, width), (width, inner)), strict=True))
    return layer


def open_checkpoint(folder: Path) -> tuple[DecoderConfig, dict[str, StoredTensor]]:
    """A model folder's config and tensors, found to fit each other before anything is allocated.

    A head stored beside a tied flag is dropped when it equals the embeddings, and used when it differs, as transformers does. Rotary
    frequencies, which old checkpoints store, are dropped when they are those of the config.

    Returns:
        The config, with the end tokens of generation_config.json and tied exactly when the head is, and the tensors by name.

    Raises:
        ModelNotFound: a file is missing or broken, or a tensor is missing or has another shape than the config asks for.
        UnsupportedArchitecture: the model is one our decoder does not run, or holds tensors it has no use for.
    """
    config = DecoderConfig.from_hf(read_config(folder))
    config = replace(config, eos_token_ids=read_end_tokens(folder) or config.eos_token_ids)
    stored = index_folder(folder)
    depth = 1 + max((int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d{1,6})\.", name))), default=-1)
    if config.num_layers > depth:  # looked at first, as the names to expect grow with it
        missing = f"model.layers.{depth}"
        raise ModelNotFound(f"{folder} lacks the layers from {missing!r} on: config.json asks for {config.num_layers}", _SAME_MODEL)
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        if same_values(stored["lm_head.weight"], stored.get("model.embed_tokens.weight")):
            del stored["lm_head.weight"]
        else:
            config = replace(config, tie_word_embeddings=False)
    _drop_rotary(stored, config)
    expected = expected_shapes(config)
    _check_fit(folder, expected, stored)
    return config, stored


def _check_fit(folder: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelNotFound(f"{folder} lacks {len(missing)} tensors, first {missing[0]!r}", _SAME_MODEL)
    extra = [name for name in stored if name not in expected]
    if extra:
        what = f"{folder} holds {len(extra)} tensors our decoder has no use for, first {shown(extra[0])}"
        raise UnsupportedArchitecture(what, "use a plain checkpoint")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            what = f"{stored[name].path.name} holds {name} of shape {list(stored[name].shape)} where config.json asks for {list(shape)}"
            raise ModelNotFound(what, _SAME_MODEL)


def _drop_rotary(stored: dict[str, StoredTensor], config: DecoderConfig) -> None:
    """Forget stored rotary frequencies; UnsupportedArchitecture where they are not the config's, with or without its scaling."""
    names = [name for name in stored if name.endswith("rotary_emb.inv_freq")]
    if not names:
        return
    scaled = inverse_frequencies(config.rope, config.head_dim)
    plain = inverse_frequencies(replace(config.rope, kind="default"), config.head_dim)
    for name in names:
        source = stored.pop(name)
        right = source.shape == tuple(plain.shape)
        if right:
            found = torch.empty(source.shape, dtype=torch.float32)
            read_into(source, found)
            # half precision keeps slow frequencies to a few percent
            right = any(torch.allclose(found, own.float(), rtol=0.04, atol=1e-6) for own in (plain, scaled))
        if not right:
            raise UnsupportedArchitecture(
                f"{source.path.name} stores rotary frequencies {shown(name)} that config.json does not give",
                "set rope_theta and rope_scaling in config.json to what the model was trained with",
            )


def same_values(one: StoredTensor, other: StoredTensor | None) -> bool:
    """Whether two stored tensors hold the same bytes in the same dtype and shape; a chunk of each in memory at a time."""
    if other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    left = math.prod(one.shape) * one.dtype.itemsize
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        while left:
            count = min(left, _CHUNK_BYTES)
            block = first.read(count)
            if len(block) != count or block != second.read(count):
                return False
            left -= count
    return True


def read_into(source: StoredTensor, target: torch.Tensor, file: BinaryIO | None = None, name: str = "a tensor") -> int:
    """Fill `target` (contiguous, the stored shape, any float dtype and device) through a small buffer; returns a sum over the bytes read.

    Raises:
        ModelNotFound: the shapes differ, the file ends early, or a value is NaN or infinite, as stored or in the target's dtype.
    """
    if tuple(target.shape) != source.shape:
        raise ModelNotFound(
            f"{source.path.name} holds a tensor of shape {list(source.shape)} where config.json asks for {list(target.shape)}",
            _SAME_MODEL,
        )
    if file is None:
        with source.path.open("rb", buffering=0) as opened:
            return read_into(source, target, opened, name)
    flat = target.view(-1)
    file.seek(source.offset)
    direct = target.device.type == "cpu" and target.dtype == source.dtype
    chunk_elements, piece_elements = _CHUNK_BYTES // source.dtype.itemsize, _PIECE_BYTES // source.dtype.itemsize
    buffer = None if direct else torch.empty(min(piece_elements, flat.numel()), dtype=source.dtype)
    total = 0
    for chunk in flat.split(chunk_elements):
        chunk_sum = 0
        for place in chunk.split(piece_elements):
            piece = place if buffer is None else buffer[: len(place)]
            content = piece.view(torch.uint8).numpy()
            _read_exactly(file, memoryview(content), source.path)  # type: ignore[arg-type]
            chunk_sum += _sum(content)
            if not _all_finite(piece, target.dtype):
                raise ModelNotFound(f"{source.path.name} holds numbers in {name} that are not finite in {target.dtype}", _AGAIN)
            if buffer is not None:
                place.copy_(piece)
        total = (total * 0x9E3779B97F4A7C15 + chunk_sum) % 2**64
    return total


def _all_finite(numbers: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers, of a CPU, are finite, and are in another dtype, too."""
    if not numbers.numel():
        return True
    if numbers.dtype == torch.bfloat16 and dtype in (torch.bfloat16, torch.float32):
        # by their bits, which takes half the time: infinities and NaN are the greatest of each sign
        bits = numbers.view(torch.int16).numpy()
        return bool(bits.max() < _BF16_INFINITY and bits.view(np.uint16).max() < 0x8000 + _BF16_INFINITY)
    low, high = (float(value) for value in numbers.aminmax())  # NaN if any value is
    limit = torch.finfo(dtype).max
    return -limit <= low <= high <= limit


def _read_exactly(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise ModelNotFound(f"{path} ends early", "download or convert the model again")
        done += count


def load_tensors(stored: Mapping[str, StoredTensor], targets: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Fill every target from the stored tensor of its name.

    Args:
        stored: tensors of an `open_checkpoint`.
        targets: Hugging Face tensor name -> destination (a view of a fused parameter counts, as long as it is contiguous).

    Returns:
        A sum over each tensor's bytes, 64 bits, by name; `sum_of_all` joins them.

    Raises:
        ModelNotFound: a file ends early, or a weight is not finite.
    """
    names = [name for _, own in _by_file(targets, stored) for name in own]
    inference = torch.is_inference_mode_enabled()  # threads have modes of their own

    def read(name: str) -> int:
        with torch.inference_mode(inference):
            return read_into(stored[name], targets[name], name=name)

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def sum_of_all(stored: Mapping[str, StoredTensor], sums: Mapping[str, int]) -> int:
    """One sum of 64 bits over all tensors of a model, the same for every dtype and device they were read into, and every order of reading.

    Any one changed byte changes it; it is no digest (`engine.hub.fingerprint` says what it serves for).
    """
    total = 0
    for _, names in _by_file(sums, stored):
        for name in names:
            # odd factors, so that no exchange of two tensors goes unseen
            total = (total * 0x9E3779B97F4A7C15 + sums[name]) % 2**64
    return total


def _sum(content: np.ndarray) -> int:
    """Sum of the bytes uint8 [n] taken as 64-bit words, modulo 2^64."""
    words = content[: len(content) // 8 * 8].view(np.uint64)
    return (int(words.sum()) + int.from_bytes(content[words.nbytes :].tobytes(), "little")) % 2**64


def _by_file(targets: Iterable[str], stored: Mapping[str, StoredTensor]) -> Iterator[tuple[Path, list[str]]]:
    """Names of each file in the order of their bytes, so that a disk reads forward."""
    for path in sorted({stored[name].path for name in targets}):
        yield path, sorted((name for name in targets if stored[name].path == path), key=lambda name: stored[name].offset)
