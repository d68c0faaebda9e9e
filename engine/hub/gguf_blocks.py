"""A GGUF file's quantised tensors as they are stored, by their Hugging Face names: for weights that stay quantised in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from engine.hub.gguf import GgufFile, GgufTensor
from engine.hub.gguf_families import family_of, hf_config


class GgufBlocks(Mapping[str, tuple[int, tuple[int, ...]]]):
    """Hugging Face name -> (number of the format, shape) of the matrices whose blocks can be multiplied as they are. Close it.

    formats: the numbers of formats that can, by name (`kernels.cpu_decode.file_blocks.formats`).

    Raises:
        ModelNotFound, UnsupportedArchitecture: as `GgufFile` and `hf_config`.
    """

    def __init__(self, path: Path, formats: Mapping[str, int]) -> None:
        self._formats = formats
        self._file = GgufFile(path)
        try:
            self._family, self._config = family_of(self._file), hf_config(self._file)
            self._held: dict[str, GgufTensor] = {}
            for name, tensor in self._file.tensors.items():
                own = self._family.hf_name(name)
                if own is not None and len(tensor.shape) == 2 and tensor.kind.name in formats and not self._family.offset(tensor):
                    self._held[own] = tensor
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> tuple[int, tuple[int, ...]]:
        tensor = self._held[name]
        return self._formats[tensor.kind.name], tuple(tensor.shape)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def read(self, name: str, out: torch.Tensor) -> None:
        """A matrix's blocks, rows in Hugging Face's order, to out uint8 [rows, bytes of a row]."""
        tensor = self._held[name]
        order = self._family.row_order(tensor, self._config)
        if order is not None:  # heads of a few hundred rows: whole
            out.copy_(torch.from_numpy(np.ascontiguousarray(self._file.rows(tensor, 0, tensor.num_rows)[order])))
            return
        step = max(1, (1 << 20) // tensor.row_bytes)
        for first in range(0, tensor.num_rows, step):
            last = min(first + step, tensor.num_rows)
            out[first:last] = torch.from_numpy(self._file.rows(tensor, first, last))

    def close(self) -> None:
        """Close the file."""
        self._file.__exit__()
