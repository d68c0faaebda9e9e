"""Weights of a Hugging Face folder, read tensor by tensor from safetensors files straight into the decoder's parameters.

The files are read, not mapped: a mapped file would stay resident beside the parameters, and that is a second copy of the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.model.config import SUPPORTED_ARCHITECTURES

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CHUNK_BYTES = 16 << 20
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder.

    Raises:
        ModelNotFound: no folder, or no readable config.json in it.
        UnsupportedArchitecture: transformers does not know the architecture either.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} has no config.json", "give a Hugging Face model folder")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelNotFound(f"{folder / 'config.json'} is not valid JSON", "download or convert the model again") from error
    if kind not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedArchitecture(f"architecture {kind!r} is not supported", f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """End-of-text ids of generation_config.json, where chat models name those that config.json leaves out; () without the file."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        ids = json.loads(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ModelNotFound(f"{path} is not valid JSON", "download or convert the model again") from error
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def index_file(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file (8 bytes little-endian length, then JSON).

    Raises:
        ModelNotFound: the file is cut short or is not a safetensors file.
        UnsupportedArchitecture: a tensor is stored in a dtype that is no float.
    """
    broken = ModelNotFound(f"{path} is not a complete safetensors file", "download or convert the model again")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= _MAX_HEADER_BYTES:
                raise broken
            header = json.loads(file.read(size))
            total = file.seek(0, 2)
    except (OSError, ValueError) as error:
        raise broken from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UnsupportedArchitecture(f"{path.name} stores {name!r} as {entry['dtype']}", "use a bf16, f16 or f32 checkpoint")
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if 8 + size + end > total or end - begin != math.prod(shape) * dtype.itemsize:
            raise broken
        tensors[name] = StoredTensor(path, dtype, shape, 8 + size + begin)
    return tensors


def index_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder: `model.safetensors`, or the shards of `model.safetensors.index.json`.

    Raises:
        ModelNotFound: there are no safetensors files, or a shard is missing or broken.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return index_file(single)
    if not index.is_file():
        raise ModelNotFound(f"{folder} has no model.safetensors and no model.safetensors.index.json", "convert the weights to safetensors")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ModelNotFound(f"{folder} lacks the shard {name}", "download the model again")
        tensors |= index_file(folder / name)
    return tensors


def read_into(source: StoredTensor, target: torch.Tensor, file: BinaryIO | None = None) -> None:
    """Fill `target` (contiguous, the stored shape, any float dtype and device) through a small buffer.

    Raises:
        ModelNotFound: the shapes differ, or the file ends early.
    """
    if tuple(target.shape) != source.shape:
        raise ModelNotFound(
            f"{source.path.name} holds a tensor of shape {list(source.shape)} where config.json asks for {list(target.shape)}",
            "config.json and weights must come from the same model",
        )
    if file is None:
        with source.path.open("rb", buffering=0) as opened:
            return read_into(source, target, opened)
    flat = target.view(-1)
    file.seek(source.offset)
    direct = target.device.type == "cpu" and target.dtype == source.dtype
    step = _CHUNK_BYTES // source.dtype.itemsize
    buffer = flat if direct else torch.empty(min(step, flat.numel()), dtype=source.dtype)
    for start in range(0, flat.numel(), step):
        count = min(step, flat.numel() - start)
        piece = flat[start : start + count] if direct else buffer[:count]
        _read_exactly(file, memoryview(piece.view(torch.uint8).numpy()), source.path)  # type: ignore[arg-type]
        if not direct:
            flat[start : start + count].copy_(piece)


def _read_exactly(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise ModelNotFound(f"{path} ends early", "download or convert the model again")
        done += count


def load_folder(folder: Path, targets: dict[str, torch.Tensor], ignored: tuple[str, ...] = ()) -> None:
    """Fill every target from the folder's tensor of that name.

    Args:
        folder: model folder.
        targets: Hugging Face tensor name -> destination (a view of a fused parameter counts, as long as it is contiguous).
        ignored: name endings that may be in the files without a target.

    Raises:
        ModelNotFound: a tensor is missing, has another shape, or a file is broken.
        UnsupportedArchitecture: the files hold a tensor that has no place in our decoder.
    """
    stored = index_folder(folder)
    missing = [name for name in targets if name not in stored]
    if missing:
        what = f"{folder} lacks {len(missing)} tensors, first {missing[0]!r}"
        raise ModelNotFound(what, "config.json and weights must come from the same model")
    extra = [name for name in stored if name not in targets and not name.endswith(ignored)]
    if extra:
        what = f"{folder} holds {len(extra)} tensors our decoder has no use for, first {extra[0]!r}"
        raise UnsupportedArchitecture(what, "use a plain checkpoint")
    for path, names in _by_file(targets, stored):
        with path.open("rb", buffering=0) as file:
            for name in names:
                read_into(stored[name], targets[name], file)


def _by_file(targets: dict[str, torch.Tensor], stored: dict[str, StoredTensor]) -> Iterator[tuple[Path, list[str]]]:
    """Names of each file in the order of their bytes, so that a disk reads forward."""
    for path in sorted({stored[name].path for name in targets}):
        yield path, sorted((name for name in targets if stored[name].path == path), key=lambda name: stored[name].offset)
