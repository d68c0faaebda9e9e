"""CacheGen-style: uniform quantisation with fewer levels in later layers, arithmetic coding with one histogram per (layer, channel).

Source: CacheGen (arXiv 2310.07240, SIGCOMM'24) and its serde in LMCache. As in LMCache: symmetric max-abs scale per (layer, token,
K|V) over all channels, the finer bins for the first third of the key layers and the first three value layers (LMCache: 0-10 of 32 and
0-2), the coarser for the rest, no deltas. As in the paper: the histograms are profiled offline (LMCache measures them on every
256-token chunk, which would add about 2 bits per element to store), and `anchors=True` codes groups of 10 tokens as an int8 anchor
plus deltas from it. Simplified: keys before RoPE; one token a lane in place of one bitstream per (layer, token), which saves padding;
int8 anchors under DEFLATE rather than under a histogram of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from baselines.base import Baseline
from baselines.calibration import Calibration
from baselines.histogram_coder import decode, encode, frequencies
from baselines.packing import deflate, from_bytes, inflate, to_bytes
from codec.spec import KvLayout

LEVELS = {"finest": (64, 32), "fine": (32, 16), "medium": (16, 8), "coarse": (8, 4)}
"""Bins of the finer and the coarser layers; "fine" is LMCache's; "finest" continues the curve."""
ANCHOR_GROUP = 10
_ANCHOR_LEVELS = 127


class CacheGen(Baseline):
    """quality: finest, fine, medium or coarse."""

    method = "cachegen"
    needs_calibration = True

    def __init__(self, layout: KvLayout, quality: str = "fine", anchors: bool = False):
        super().__init__(layout, quality)
        fine, coarse = LEVELS[quality]
        layers = layout.coded_layers
        bins = torch.full((layers, 2), coarse)
        bins[: max(1, round(layers * 11 / 32)), 0] = fine
        bins[: max(1, round(layers * 3 / 32)), 1] = fine
        self.half_levels = (bins // 2 - 1).clamp_min(1)  # symbols -h..h, as LMCache's max_bins // 2 - 1
        self.anchors = anchors
        if anchors:
            self.method = "cachegen-anchors"

    def _fit(self, calibration: Calibration) -> None:
        sample = calibration.require_sample(2, "CacheGen's histograms").to(self.device)
        symbols = self._quantise(sample)[-1]
        half = self.half_levels.reshape(-1, 1).expand(-1, self.layout.layer_dim // 2).reshape(-1).numpy()
        alphabet = 2 * int(half.max()) + 1
        counts = np.stack([(symbols == a).sum(0).cpu().numpy() for a in range(alphabet)], 1)
        freqs = frequencies(counts, np.arange(alphabet)[None] <= 2 * half[:, None])
        self.fitted = {"freqs": torch.from_numpy(freqs.astype(np.int32)).to(self.device)}

    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        return self._encode_many([kv])[0]

    def _encode_many(self, kvs: Sequence[torch.Tensor], workers: int = 1) -> list[list[bytes]]:
        """All sequences' tokens are lanes of one coder: a step costs the same for one sequence as for many."""
        quantised = [self._quantise(kv) for kv in kvs]
        streams = iter(encode([parts[-1] for parts in quantised if len(parts[-1])], self.fitted["freqs"]))
        result = []
        for *anchored, scale, symbols in quantised:
            sections = [to_bytes(scale, torch.float16), next(streams)] if len(symbols) else [b"", b""]
            if self.anchors:
                anchor_scale, anchor = anchored
                sections += [to_bytes(anchor_scale, torch.float16), deflate(anchor.T.contiguous().cpu().numpy().tobytes())]
            result.append(sections)
        return result

    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        return self._decode_many([sections], [num_tokens])[0]

    def _decode_many(self, sections: Sequence[list[bytes]], num_tokens: Sequence[int], workers: int = 1) -> list[torch.Tensor]:
        coded = [n - (-(-n // ANCHOR_GROUP) if self.anchors else 0) for n in num_tokens]
        streams = iter(decode([own[1] for own, n in zip(sections, coded, strict=True) if n], self.fitted["freqs"], [n for n in coded if n]))
        return [
            self._dequantised(own, next(streams) if n else None, total) for own, n, total in zip(sections, coded, num_tokens, strict=True)
        ]

    def _dequantised(self, sections: list[bytes], symbols: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
        """float32 [num_tokens, D] from a sequence's sections and its decoded symbols uint8 [coded, D]."""
        layers, dim = self.layout.coded_layers, self.layout.dim
        is_anchor = (
            torch.arange(num_tokens, device=self.device) % ANCHOR_GROUP == 0
            if self.anchors
            else torch.zeros(num_tokens, dtype=torch.bool, device=self.device)
        )
        x = torch.zeros(num_tokens, layers, 2, dim // layers // 2, device=self.device)
        if symbols is not None:
            x[~is_anchor] = self._dequantise(symbols, from_bytes(sections[0], torch.float16, (len(symbols), layers, 2, 1), self.device))
        if self.anchors:
            count = int(is_anchor.sum())
            scale = from_bytes(sections[2], torch.float16, (count, layers, 2, 1), self.device)
            raw = np.frombuffer(inflate(sections[3], count * dim), np.int8).reshape(dim, count)
            anchor = torch.from_numpy(raw.copy()).T.to(self.device).float().reshape(count, layers, 2, -1) * scale
            owner = torch.arange(num_tokens, device=self.device) // ANCHOR_GROUP
            x += anchor[owner]
        return x.reshape(num_tokens, dim)

    def _quantise(self, kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, D] to scale float32 [coded, L, 2, 1] and symbols uint8 [coded, D]; before them the anchors' scale and int8 codes, if any."""
        x = self.layers(kv)
        front: tuple[torch.Tensor, ...] = ()
        if self.anchors:
            anchor = x[::ANCHOR_GROUP]
            anchor_scale = (anchor.abs().amax(-1, keepdim=True) / _ANCHOR_LEVELS).half().float().clamp_min(1e-7)
            codes = (anchor / anchor_scale).round().clamp(-_ANCHOR_LEVELS, _ANCHOR_LEVELS)
            position = torch.arange(len(x), device=x.device)
            x = (x - (codes * anchor_scale)[position // ANCHOR_GROUP])[position % ANCHOR_GROUP != 0]
            front = (anchor_scale, codes.to(torch.int8).reshape(len(codes), -1))
        half = self.half_levels.to(x.device)[:, :, None]
        scale = (x.abs().amax(-1, keepdim=True) / half).half().float().clamp_min(1e-7)
        symbols = (x / scale).round().clamp(-half, half) + half
        return (*front, scale, symbols.to(torch.uint8).reshape(len(x), self.layout.dim))

    def _dequantise(self, symbols: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """uint8 [T, D], scale [T, L, 2, 1] to float32 [T, L, 2, M]."""
        half = self.half_levels.to(symbols.device)[:, :, None]
        return (symbols.float().reshape(len(symbols), *half.shape[:2], -1) - half) * scale.clamp_min(1e-7)
