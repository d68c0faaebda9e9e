"""Converting a GGUF file to a plain Hugging Face folder, a few rows of one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.hub.gguf import GgufFile, GgufTensor, dequantize_rows
from engine.hub.gguf_families import GgufFamily, family_of, hf_config
from engine.hub.gguf_tokenizer import write_tokenizer
from engine.hub.progress import Progress, silent
from engine.model.config import DecoderConfig
from engine.model.weights import expected_shapes
from kernels.dequantize import dequantize_available, dequantize_to_bf16

_CHUNK_ELEMENTS = 1 << 22
_WORKERS = 1  # threads that turn chunks into numbers; one more where that is not compiled and takes longest
_WAITING = 2  # chunks that wait for the next thread
_TOO_LARGE = 3.3961775292304601e38  # the least float32 that rounds to infinity in bfloat16
_FLOATS = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def convert_gguf(file: Path | GgufFile, folder: Path, progress: Progress = silent) -> str:
    """Writes config.json, generation_config.json, the tokenizer files and model.safetensors (Hugging Face tensor names).

    Weights are dequantised to float32 and rounded to bfloat16. A file that quantises nothing keeps its own dtype for tensors that bfloat16 does not
    hold exactly. A head tied to the embeddings is not written twice. What was written is not yet synced to the disk.

    Args:
        file: GGUF file of an architecture of `gguf_families.FAMILIES`, or one that is open, and stays so.
        folder: existing empty folder.
        progress: called with bytes of the safetensors file.

    Returns:
        SHA-256 (hex) of model.safetensors.

    Raises:
        UnsupportedArchitecture: another family, tokenizer or tensor.
        ModelNotFound: the file is broken, or its metadata and tensors do not fit each other or are not finite.
    """
    with nullcontext(file) if isinstance(file, GgufFile) else GgufFile(file) as source:
        family, config = family_of(source), hf_config(source)
        names = _check_tensors(source, family, config)
        _write_json(folder / "config.json", config)
        generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        _write_json(folder / "generation_config.json", generation)
        with open(folder / "model.safetensors", "wb", buffering=0) as out, ThreadPoolExecutor(1) as beside:
            tokenizer = beside.submit(write_tokenizer, source.metadata, folder)  # as much work as the weights of a small model
            writer = _WeightWriter(source, family, config, names, tokenizer)
            digest = writer.write(out, progress, f"converting {folder.name.removesuffix('.tmp')}")
            tokenizer.result()
            return digest


def _check_tensors(source: GgufFile, family: GgufFamily, config: dict[str, Any]) -> dict[str, str]:
    """GGUF name -> Hugging Face name, of all tensors to convert, in file order.

    Raises:
        ModelNotFound, UnsupportedArchitecture: unless the file holds the tensors that a decoder of this config has, and no other.
    """
    shape = DecoderConfig.from_hf(SimpleNamespace(**config))
    names = {name: own for name in source.tensors if (own := family.hf_name(name)) is not None}
    held = {own: source.tensors[name].shape for name, own in names.items()}
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
    return names


class _WeightWriter:
    """Writes model.safetensors of a GGUF file, as it is made: a few chunks of rows are in memory at a time.

    Reading and writing, turning into numbers, and taking the digest are done at the same time.

    Args:
        source, family, config: of the file.
        names: GGUF name -> Hugging Face name of the tensors to write, in order.
        tokenizer: work done at the same time; when it fails, so does the writing, early.
    """

    def __init__(
        self, source: GgufFile, family: GgufFamily, config: dict[str, Any], names: dict[str, str], tokenizer: Future[None] | None = None
    ) -> None:
        self._source, self._family, self._config, self._names, self._tokenizer = source, family, config, names, tokenizer
        self._exact = all(tensor.kind in _FLOATS for tensor in source.tensors.values())
        self._dtypes = {name: self._dtype(source.tensors[name]) for name in names}
        self._compiled = {kind for kind in {tensor.kind for tensor in source.tensors.values()} if dequantize_available(kind.name)}

    def write(self, out: BinaryIO, progress: Progress, label: str) -> str:
        """SHA-256 (hex) of what was written: the safetensors layout (8 bytes header length, JSON header, tensors back to back). out: unbuffered."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, own in self._names.items():
            tensor, dtype = self._source.tensors[name], self._dtypes[name]
            start, end = end, end + dtype.itemsize * math.prod(tensor.shape)
            header[own] = {"dtype": _STORED[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        beginning = len(encoded).to_bytes(8, "little") + encoded
        digest, done, first = hashlib.sha256(), 0, len(beginning)
        with ThreadPoolExecutor(1) as hashing:
            behind: deque[Future[None]] = deque()
            for content in chain((memoryview(beginning),), self._contents()):
                behind.append(hashing.submit(digest.update, content))
                if len(behind) > _WAITING:
                    behind.popleft().result()
                left = content
                while left:  # a write takes 2 GiB at most
                    left = left[out.write(left) :]
                done += len(content)
                progress(label, max(0, done - first), end)
                if self._tokenizer is not None and self._tokenizer.done():
                    self._tokenizer.result()
        return digest.hexdigest()

    def _contents(self) -> Iterator[memoryview]:
        """The tensors' bytes in order; chunks are read here, and turned into numbers by a thread."""
        with ThreadPoolExecutor(_WORKERS if self._compiled else 1 + _WORKERS) as pool:
            waiting: deque[Future[memoryview]] = deque()
            for name in self._names:
                tensor = self._source.tensors[name]
                for raw in self._chunks(tensor):
                    waiting.append(pool.submit(self._content, raw, tensor, self._dtypes[name]))
                    if len(waiting) > _WAITING:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _chunks(self, tensor: GgufTensor) -> Iterator[np.ndarray]:
        """The tensor's rows in Hugging Face's order, uint8 [rows, row_bytes], some at a time."""
        order = self._family.row_order(tensor, self._config) if len(tensor.shape) > 1 else None
        if order is not None:  # heads of a few hundred rows: whole
            yield self._source.rows(tensor, 0, tensor.num_rows)[order]
            return
        for first, last in _row_ranges(tensor):
            yield self._source.rows(tensor, first, last)

    def _content(self, raw: np.ndarray, tensor: GgufTensor, dtype: torch.dtype) -> memoryview:
        offset = self._family.offset(tensor)
        if tensor.kind in self._compiled and dtype == torch.bfloat16 and len(tensor.shape) > 1 and not offset:
            rounded, greatest = dequantize_to_bf16(raw, tensor.kind.name)
            self._check_finite(tensor, dtype, -greatest, greatest)
            return rounded.view(np.uint8).data
        values = dequantize_rows(raw, tensor.kind)
        if len(tensor.shape) == 1 and (order := self._family.row_order(tensor, self._config)) is not None:
            values = values[:, order]
        numbers = torch.from_numpy(values).sub_(offset) if offset else torch.from_numpy(values)
        low, high = (float(value) for value in numbers.aminmax())  # NaN if any value is
        self._check_finite(tensor, dtype, low, high)
        return numbers.to(dtype).view(-1).view(torch.uint8).numpy().data

    @staticmethod
    def _check_finite(tensor: GgufTensor, dtype: torch.dtype, low: float, high: float) -> None:
        """ModelNotFound unless numbers from low to high are finite in the dtype."""
        limit = _TOO_LARGE if dtype == torch.bfloat16 else math.inf
        if not -limit < low <= high < limit:
            raise ModelNotFound(f"the GGUF file holds numbers in {tensor.name} that are not finite in {dtype}", "fetch the file again")

    def _dtype(self, tensor: GgufTensor) -> torch.dtype:
        """What the tensor is stored in."""
        own = _FLOATS[tensor.kind] if self._exact else torch.bfloat16
        if own == torch.bfloat16 or self._family.offset(tensor):
            return torch.bfloat16
        for first, last in _row_ranges(tensor):
            numbers = torch.from_numpy(self._source.rows(tensor, first, last)).view(own)
            # what is not finite is refused by name when it is written
            if not torch.equal(numbers, numbers.to(torch.bfloat16).to(own)):
                return own
        return torch.bfloat16


def _row_ranges(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    """First row and end of each chunk; whole groups of 64 rows, whose blocks are turned into numbers the fastest."""
    step = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
    step = max(step // 64 * 64, min(step, 64))
    for first in range(0, tensor.num_rows, step):
        yield first, min(first + step, tensor.num_rows)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
