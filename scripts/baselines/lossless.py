"""bf16 + zstd: the floor of effort. Each channel's tokens side by side, high and low bytes apart, Zstandard over each plane.

Source: the usual practice for weights and checkpoints (byte planes before an LZ coder); "field-wise zstd" among the lossless KV
codecs surveyed. Exact with respect to a bf16 cache. Nothing simplified.
"""

from __future__ import annotations

import numpy as np
import torch
import zstandard

from baselines.base import Baseline
from baselines.packing import from_bytes, to_bytes
from codec.errors import CorruptedCode

_LEVEL = 9


class Bf16Zstd(Baseline):
    method = "bf16+zstd"

    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        raw = np.frombuffer(to_bytes(kv.T, torch.bfloat16), np.uint8).reshape(-1, 2)
        return [zstandard.ZstdCompressor(level=_LEVEL).compress(raw[:, plane].tobytes()) for plane in (0, 1)]

    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        count = num_tokens * self.layout.dim
        raw = np.empty((count, 2), np.uint8)
        for plane, section in enumerate(sections):
            try:
                data = zstandard.ZstdDecompressor().decompress(section, max_output_size=count)
            except zstandard.ZstdError as error:
                raise CorruptedCode(f"a zstd section does not decode: {error}", "restore the bytes from a copy") from None
            if len(data) != count:
                raise CorruptedCode("a zstd section has the wrong length", "restore the bytes from a copy")
            raw[:, plane] = np.frombuffer(data, np.uint8)
        return from_bytes(raw.tobytes(), torch.bfloat16, (self.layout.dim, num_tokens), self.device).T.contiguous()
