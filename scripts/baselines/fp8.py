"""fp8 e4m3 with one float32 scale per (layer, K|V), round to nearest: what serving engines call an fp8 cache.

Source: Finn, "Speculative KV coding" (fp8 target: one scale per (layer, K|V)); vLLM's default compressed cache. The scale comes from
the sequence itself (largest magnitude to 448), not from calibration, which favours the baseline.
"""

from __future__ import annotations

import numpy as np
import torch

from baselines.base import Baseline
from baselines.packing import unpack_codes
from codec.errors import CorruptedCode

FP8_MAX = 448.0


class Fp8(Baseline):
    method = "fp8"

    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        x = self.layers(kv)
        scale = x.abs().amax((0, 3)).clamp_min(1e-12) / FP8_MAX  # [L, 2]
        codes = (x / scale[:, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return [scale.cpu().numpy().astype("<f4").tobytes(), codes.view(torch.uint8).cpu().numpy().tobytes()]

    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        layers = self.layout.coded_layers
        if len(sections[0]) != layers * 8:
            raise CorruptedCode("the scales have the wrong length", "restore the bytes from a copy")
        scale = torch.from_numpy(np.frombuffer(sections[0], "<f4").copy()).reshape(layers, 2, 1).to(self.device)
        codes = torch.from_numpy(unpack_codes(sections[1], 8, num_tokens * self.layout.dim)).to(self.device)
        x = codes.view(torch.float8_e4m3fn).float().reshape(num_tokens, layers, 2, -1)
        return (x * scale).reshape(num_tokens, -1)
