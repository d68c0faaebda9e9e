"""KIVI-style asymmetric integers: keys per channel in groups of 32 tokens, values per token in groups of 32 channels.

Source: KIVI (arXiv 2402.02750): group 32, 16-bit scale and zero per group, the most recent 128 tokens in 16 bits (counted here as
bytes). Simplified: keys are quantised before RoPE (KVQuant, 2401.18079, found that better; it favours the baseline). `window=0` drops the
recent window and lets the last key group be shorter, so that a cache at rest is not judged by 16-bit tokens.
"""

from __future__ import annotations

import torch

from baselines.base import Baseline
from baselines.packing import from_bytes, pack_codes, to_bytes, unpack_codes
from codec.spec import KvLayout

GROUP = 32
WINDOW = 128


class Kivi(Baseline):
    """bits 2 or 4; window: recent tokens kept in bf16 (the quantised part of the keys is then a multiple of the group)."""

    method = "kivi"

    def __init__(self, layout: KvLayout, bits: int, window: int = WINDOW):
        super().__init__(layout, f"{bits}bit")
        self.bits, self.window = bits, window
        if not window:
            self.method = "kivi-nowindow"

    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        n = self._num_quantised(len(kv))
        sections = [to_bytes(kv[n:], torch.bfloat16)]
        if n:
            x = self.layers(kv[:n])
            key, value = x[:, :, 0].reshape(n, -1), x[:, :, 1].reshape(n, -1)
            sections += self._quantise(key.T) + self._quantise(value)
        return sections

    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        n, half, layers = self._num_quantised(num_tokens), self.layout.dim // 2, self.layout.coded_layers
        recent = from_bytes(sections[0], torch.bfloat16, (num_tokens - n, self.layout.dim), self.device)
        if not n:
            return recent
        key = self._dequantise(sections[1:3], half, n).T.reshape(n, layers, 1, -1)
        value = self._dequantise(sections[3:5], n, half).reshape(n, layers, 1, -1)
        return torch.cat([torch.cat([key, value], 2).reshape(n, -1), recent])

    def _num_quantised(self, num_tokens: int) -> int:
        if not self.window:
            return num_tokens
        return max(0, num_tokens - self.window) // GROUP * GROUP

    def _quantise(self, rows: torch.Tensor) -> list[bytes]:
        """[R, n] in groups of 32 along n (the last may be shorter) to [offsets and scales, codes]."""
        levels = (1 << self.bits) - 1
        offsets, scales, codes = [], [], []
        for group in _groups(rows):
            low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
            offset = low.half().float()
            scale = ((high - offset) / levels).half().float().clamp_min(1e-7)
            codes.append(((group - offset) / scale).round().clamp(0, levels).to(torch.uint8).reshape(len(rows), -1))
            offsets.append(offset.reshape(len(rows), -1))
            scales.append(scale.reshape(len(rows), -1))
        numbers = torch.stack([torch.cat(offsets, 1), torch.cat(scales, 1)])
        return [to_bytes(numbers, torch.float16), pack_codes(torch.cat(codes, 1).cpu().numpy(), self.bits)]

    def _dequantise(self, sections: list[bytes], num_rows: int, length: int) -> torch.Tensor:
        num_groups = -(-length // GROUP)
        offset, scale = from_bytes(sections[0], torch.float16, (2, num_rows, num_groups), self.device)
        codes = torch.from_numpy(unpack_codes(sections[1], self.bits, num_rows * length)).to(self.device).reshape(num_rows, length)
        owner = torch.arange(length, device=self.device) // GROUP
        return codes.float() * scale.clamp_min(1e-7)[:, owner] + offset[:, owner]


def _groups(rows: torch.Tensor) -> list[torch.Tensor]:
    """[R, n] as [R, full groups, 32] and, if n is no multiple of 32, [R, 1, rest]."""
    full = rows.shape[1] // GROUP * GROUP
    parts = [rows[:, :full].reshape(len(rows), -1, GROUP)] if full else []
    return parts + ([rows[:, None, full:]] if full < rows.shape[1] else [])
