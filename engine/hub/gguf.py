"""Reading a GGUF file: metadata at once, tensors a few rows at a time.

Format: the GGUF specification, versions 2 and 3, little-endian. The `gguf` package's reader makes several array objects per
vocabulary entry (seconds and hundreds of MB for 150,000 tokens), so the metadata is parsed here; its block dequantisers are used.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ModelNotFound, UnsupportedArchitecture
from engine.inputs import is_lfs_pointer, is_whole, lfs_pointer, open_regular, shown

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
MAX_KEYS, MAX_TENSORS, MAX_AXES = 1 << 16, 1 << 18, 4
MAX_STRINGS = 1 << 21  # in all arrays together; vocabularies and merges have some hundred thousand
MAX_NUMBERS = 1 << 24
MAX_ALIGNMENT = 1 << 16
MAX_TRAILING_BYTES = 1 << 20


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
        return math.prod(self.shape[:-1])  # of Python's integers: axes of 2^63 must not wrap

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
        ModelNotFound: the file is no GGUF file or ends early, has counts beyond all bounds or nested arrays, or its tensors are unaligned,
            overlap or leave the file, or end long before it.
        UnsupportedArchitecture: a format version or block format that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path, ModelNotFound, "fetch the file again")
        try:
            if is_lfs_pointer(path):
                raise lfs_pointer(path, ModelNotFound)
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at, self._strings, self._numbers = 0, 0, 0
            self.metadata, self.tensors = self._parse()
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
            self._file.close()
            raise ModelNotFound(f"{path.name} is not a readable GGUF file: {error}", "fetch the file again") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()
        self._file.close()

    @property
    def num_float_bytes(self) -> int:
        """Bytes of all tensors as floats: 4 a number of float32 tensors, 2 of others."""
        return sum(math.prod(t.shape) * (4 if t.kind == GGMLQuantizationType.F32 else 2) for t in self.tensors.values())

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
            return self._take_array()
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self._take(_SCALARS[kind])

    def _take_array(self) -> list[Any]:
        """A flat list; counts are looked at before anything is read, so that memory stays a small multiple of the file."""
        element, count = self._take("<I"), self._take("<Q")
        if element == _STRING:
            self._strings += count
            if 8 * count > len(self._map) - self._at or self._strings > MAX_STRINGS:
                raise ValueError(f"an array of {count} strings")
            return [self._take_string() for _ in range(count)]
        if element not in _SCALARS:
            raise ValueError("an array within an array" if element == _ARRAY else f"an array of elements of type {element}")
        self._numbers += count
        if count * struct.calcsize(_SCALARS[element]) > len(self._map) - self._at or self._numbers > MAX_NUMBERS:
            raise ValueError(f"an array of {count} numbers")
        layout = f"<{count}{_SCALARS[element][1]}"
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return list(values)

    def _parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._map[:4] != b"GGUF":
            raise ValueError("it does not begin with the GGUF magic")
        self._at = 4
        version = self._take("<I")
        if version not in (2, 3):
            raise UnsupportedArchitecture(f"GGUF version {version}", "versions 2 and 3, little-endian, are read")
        num_tensors, num_keys = self._take("<Q"), self._take("<Q")
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise ValueError(f"{num_tensors} tensors and {num_keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._take_string()
            if key in metadata:
                raise ValueError(f"the key {shown(key)} comes twice")
            metadata[key] = self._take_value(self._take("<I"))
        placed: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(num_tensors):
            name = self._take_string()
            if name in placed:
                raise ValueError(f"the tensor {shown(name)} comes twice")
            num_axes = self._take("<I")
            if not 1 <= num_axes <= MAX_AXES:
                raise ValueError(f"{shown(name)} has {num_axes} axes")
            axes = [self._take("<Q") for _ in range(num_axes)]
            kind, offset = self._take("<I"), self._take("<Q")
            placed[name] = tuple(reversed(axes)), GGMLQuantizationType(kind), offset
        alignment = metadata.get("general.alignment", 32)
        if not is_whole(alignment) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {shown(alignment)}")
        data_start = -(-self._at // alignment) * alignment
        tensors = {name: GgufTensor(name, shape, kind, data_start + offset) for name, (shape, kind, offset) in placed.items()}
        self._check_places(tensors, alignment)
        return metadata, tensors

    def _check_places(self, tensors: dict[str, GgufTensor], alignment: int) -> None:
        """ValueError unless every tensor lies whole, aligned and alone within the file; UnsupportedArchitecture for blocks not read here."""
        for kind in {tensor.kind for tensor in tensors.values()}:
            if kind not in GGML_QUANT_SIZES or not _dequantisable(kind):
                raise UnsupportedArchitecture(f"GGUF tensors of type {kind.name}", "use a file quantised in another format")
        end = 0
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if min(tensor.shape) < 1 or tensor.shape[-1] % GGML_QUANT_SIZES[tensor.kind][0]:
                raise ValueError(f"{shown(tensor.name)} of shape {list(tensor.shape)} is not made of whole blocks of {tensor.kind.name}")
            if tensor.offset % alignment:
                raise ValueError(f"{shown(tensor.name)} is not aligned to {alignment} bytes")
            if tensor.offset < end:
                raise ValueError(f"{shown(tensor.name)} overlaps another tensor")
            end = tensor.offset + tensor.num_rows * tensor.row_bytes
            if end > len(self._map):
                raise ValueError(f"{shown(tensor.name)} runs past the end of the file")
        if tensors and len(self._map) - end > MAX_TRAILING_BYTES:  # it would be hashed to its end
            raise ValueError(f"{len(self._map) - end:,} bytes follow its last tensor")


def _dequantisable(kind: GGMLQuantizationType) -> bool:
    """Whether the `gguf` package can turn blocks of this kind into numbers."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except Exception:  # NotImplementedError for most, other errors for kinds that are no storage formats
        return False
    return True


_GROUP_ELEMENTS = 1 << 12  # of a row, as the package works on 16 rows at a time and these should stay in a core's cache


def dequantize_rows(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Stored rows uint8 [rows, row_bytes] to float32 [rows, columns]."""
    if kind == GGMLQuantizationType.F32:
        return raw.view(np.float32)
    if kind == GGMLQuantizationType.F16:
        return raw.view(np.float16).astype(np.float32)
    if kind == GGMLQuantizationType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.size // block_bytes
    grouped = math.gcd(blocks, _GROUP_ELEMENTS // block_elements)
    values = dequantize(raw.reshape(-1, grouped * block_bytes), kind)
    return np.ascontiguousarray(values, dtype=np.float32).reshape(len(raw), -1)
