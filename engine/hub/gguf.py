"""Reading a GGUF file: metadata at once, tensors a few rows at a time.

Format: the GGUF specification, versions 2 and 3, little-endian. The `gguf` package's reader makes several array objects per
vocabulary entry (seconds and hundreds of MB for 150,000 tokens), so the metadata is parsed here; its block dequantisers are used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ModelNotFound, UnsupportedArchitecture

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place in the file.

    Attributes:
        name: GGUF name.
        shape: PyTorch order, (rows, columns) or (columns,).
        kind: block format.
        offset: first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def num_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        block_elements, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block_elements * block_bytes


class GgufFile:
    """A GGUF file opened for reading; use as a context manager.

    Attributes:
        metadata: every key with its value (numbers, strings, flat lists).
        tensors: by GGUF name, in file order.

    Raises:
        ModelNotFound: the file is no GGUF file or ends early.
        UnsupportedArchitecture: a format version or block format that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        try:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self.metadata, self.tensors = self._parse()
        except (struct.error, ValueError, UnicodeDecodeError, KeyError) as error:
            self._file.close()
            raise ModelNotFound(f"{path.name} is not a readable GGUF file: {error}", "fetch the file again") from error

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()
        self._file.close()

    def rows(self, tensor: GgufTensor, start: int, end: int) -> np.ndarray:
        """Rows [start, end) as stored, uint8 [end - start, row_bytes]; read from the file, not mapped, so that memory stays low."""
        self._file.seek(tensor.offset + start * tensor.row_bytes)
        raw = np.fromfile(self._file, dtype=np.uint8, count=(end - start) * tensor.row_bytes)
        return raw.reshape(end - start, tensor.row_bytes)

    def _take(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return value

    def _take_string(self) -> str:
        length = self._take("<Q")
        if self._at + length > len(self._map):
            raise ValueError("a string runs past the end of the file")
        self._at += length
        return self._map[self._at - length : self._at].decode("utf-8")

    def _take_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._take_string()
        if kind == _ARRAY:
            element, count = self._take("<I"), self._take("<Q")
            if element in (_STRING, _ARRAY):
                return [self._take_value(element) for _ in range(count)]
            layout = f"<{count}{_SCALARS[element][1]}"
            values = struct.unpack_from(layout, self._map, self._at)
            self._at += struct.calcsize(layout)
            return list(values)
        return self._take(_SCALARS[kind])

    def _parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._map[:4] != b"GGUF":
            raise ValueError("it does not begin with the GGUF magic")
        self._at = 4
        version = self._take("<I")
        if version not in (2, 3):
            raise UnsupportedArchitecture(f"GGUF version {version}", "versions 2 and 3, little-endian, are read")
        num_tensors, num_keys = self._take("<Q"), self._take("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._take_string()
            metadata[key] = self._take_value(self._take("<I"))
        placed = []
        for _ in range(num_tensors):
            name = self._take_string()
            num_axes = self._take("<I")
            axes = [self._take("<Q") for _ in range(num_axes)]
            kind, offset = self._take("<I"), self._take("<Q")
            placed.append((name, tuple(reversed(axes)), GGMLQuantizationType(kind), offset))
        alignment = metadata.get("general.alignment", 32)
        data_start = -(-self._at // alignment) * alignment
        tensors = {name: GgufTensor(name, shape, kind, data_start + offset) for name, shape, kind, offset in placed}
        for tensor in tensors.values():
            if tensor.offset + tensor.num_rows * tensor.row_bytes > len(self._map):
                raise ValueError(f"{tensor.name} runs past the end of the file")
        return metadata, tensors


def dequantize_rows(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Stored rows uint8 [rows, row_bytes] to float32 [rows, columns]."""
    return np.ascontiguousarray(dequantize(raw, kind), dtype=np.float32)
