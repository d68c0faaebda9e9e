"""KVTC: one PCA over all layers and heads (keys and values apart), bits per component by dynamic programming, DEFLATE.

Source: "KV Cache Transform Coding" (arXiv 2511.01815, ICLR 2026), steps 1 to 6 of its pipeline; allocation in kvtc_allocation.py.
Each layer's keys and values are scaled to unit variance first (`normalise`), so that no layer is drowned by another. Simplified:
exact eigenvectors of the streamed covariance (or of the sample's Gram matrix) in place of a randomised SVD; no recent window; zlib in
place of nvCOMP's DEFLATE; shift and scale per token (sharing them among 16 tokens saved 5% of the bits on SmolLM2, scaling or not
changed nothing); the first four tokens in bf16 (paper: fp8), as for every baseline.
"""

from __future__ import annotations

import numpy as np
import torch

from baselines.base import Baseline
from baselines.calibration import Calibration, join_parts, part_of
from baselines.kvtc_allocation import BLOCK_SIZES, TYPE_BITS, Block, allocate, dequantise, options, quantise
from baselines.packing import deflate, from_bytes, inflate, pack_codes, to_bytes, unpack_codes
from codec.errors import BadInput
from codec.spec import KvLayout

_ALLOCATION_TOKENS = 256


class Kvtc(Baseline):
    """budget_bits: bits per element before DEFLATE (keys and values alike); group: tokens that share a shift and scale (paper: 1)."""

    method = "kvtc"
    needs_calibration = True

    def __init__(
        self, layout: KvLayout, budget_bits: float, *, group: int = 1, normalise: bool = True, block_sizes: tuple[int, ...] = BLOCK_SIZES
    ):
        super().__init__(layout, f"{budget_bits:g}bit")
        if budget_bits <= 0 or group < 1:
            raise BadInput(f"a KVTC budget of {budget_bits} bits, groups of {group} tokens", "give positive numbers")
        self.budget_bits, self.group, self.normalise, self.block_sizes = budget_bits, group, normalise, block_sizes
        if group > 1:
            self.method = f"kvtc-group{group}"
        if not normalise:
            self.method += "-unscaled"
        self.blocks: tuple[list[Block], list[Block]] = ([], [])

    def _fit(self, calibration: Calibration) -> None:
        fitted = {"mean": calibration.mean.to(self.device)}
        plans = []
        half = self.layout.dim // 2
        for part in (0, 1):
            variances, basis = calibration.spectrum(part, self.normalise)
            budget = int(self.budget_bits * half * self.group)
            affordable = budget // (TYPE_BITS["int2"] * self.group) + 1  # components at the cheapest type
            reach = min(len(variances), -(-affordable // 1024) * 1024)
            coefficients = self._sample_coefficients(calibration, part, variances[:reach], basis[:, :reach])
            choices = options(coefficients, self.group, self.block_sizes)
            kept = len(coefficients) // min(self.group, len(coefficients)) * min(self.group, len(coefficients))
            blocks = allocate(choices, coefficients[:kept].pow(2).sum(0).tolist(), budget)
            plans.append(blocks)
            used = max((b.start + b.size for b in blocks), default=0)
            scale = calibration.scale(part) if self.normalise else torch.ones(half)
            fitted[f"basis.{part}"] = basis[:, :used].to(self.device).clone()
            fitted[f"scale.{part}"] = scale.to(self.device)
            table = [[b.start, b.size, TYPE_BITS[b.kind]] for b in blocks]
            fitted[f"plan.{part}"] = torch.tensor(table, dtype=torch.int64, device=self.device).reshape(-1, 3)
        self.fitted, self.blocks = fitted, (plans[0], plans[1])

    def _sample_coefficients(self, calibration: Calibration, part: int, variances: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """Calibration coefficients [n, r]; normal ones of the same variances when only moments were given."""
        if calibration.sample is None:
            generator = torch.Generator().manual_seed(0)
            count = max(_ALLOCATION_TOKENS, self.group)
            return torch.randn(count, len(variances), generator=generator).to(variances.device) * variances.sqrt()
        stride = max(1, len(calibration.sample) // max(_ALLOCATION_TOKENS, self.group)) if self.group == 1 else 1
        rows = calibration.sample[::stride][: max(_ALLOCATION_TOKENS, self.group)]
        x = part_of(rows - calibration.mean, self.layout, part)
        return (x / calibration.scale(part) if self.normalise else x) @ basis

    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        centred = kv - self.fitted["mean"]
        sections = []
        for part in (0, 1):
            c = (part_of(centred, self.layout, part) / self.fitted[f"scale.{part}"]) @ self.fitted[f"basis.{part}"]
            numbers = b""
            codes = {kind: [np.zeros(0, np.uint8)] for kind in TYPE_BITS}
            for kind, channels in self._channels(part):
                for first, last, rows in _token_groups(len(kv), self.group):
                    x = c[first:last, channels].reshape(-1, rows, *channels.shape).transpose(1, 2)  # [spans, blocks, rows, size]
                    shift, scale, q = quantise(x.flatten(2), kind)
                    numbers += to_bytes(torch.cat([shift, scale], 2).permute(1, 2, 0), torch.float16)
                    codes[kind].append(q.view_as(x).permute(1, 3, 0, 2).flatten().cpu().numpy())  # a component's tokens side by side
            sections.append(deflate(numbers))
            sections += [deflate(pack_codes(np.concatenate(codes[kind]), bits)) for kind, bits in TYPE_BITS.items()]
        return sections

    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        spans = sum((last - first) // rows for first, last, rows in _token_groups(num_tokens, self.group))
        parts = []
        for part, blocks in enumerate(self.blocks):
            data = sections[4 * part : 4 * part + 4]
            basis, count = self.fitted[f"basis.{part}"], 2 * len(blocks) * spans
            numbers = from_bytes(inflate(data[0], 2 * count), torch.float16, (count,), self.device)
            codes = {}
            for section, (kind, bits) in zip(data[1:], TYPE_BITS.items(), strict=True):
                total = sum(b.size for b in blocks if b.kind == kind) * num_tokens
                codes[kind] = torch.from_numpy(unpack_codes(inflate(section, -(-total * bits // 8)), bits, total)).to(self.device)
            used = dict.fromkeys(TYPE_BITS, 0)
            c = torch.zeros(num_tokens, basis.shape[1], device=self.device)
            at = 0
            for kind, channels in self._channels(part):
                for first, last, rows in _token_groups(num_tokens, self.group):
                    n, size = (last - first) // rows, (last - first) * channels.numel()
                    shift, scale = numbers[at : at + 2 * n * len(channels)].reshape(len(channels), 2, n).permute(1, 2, 0)[..., None]
                    q = codes[kind][used[kind] : used[kind] + size].reshape(*channels.shape, n, rows).permute(2, 0, 3, 1)
                    x = dequantise(shift, scale, q.flatten(2).contiguous(), kind).reshape(n, len(channels), rows, -1)
                    c[first:last, channels] = x.transpose(1, 2).reshape(last - first, *channels.shape)
                    at, used[kind] = at + 2 * n * len(channels), used[kind] + size
            parts.append((c @ basis.T) * self.fitted[f"scale.{part}"])
        return join_parts(parts[0], parts[1], self.layout) + self.fitted["mean"]

    def _channels(self, part: int) -> list[tuple[str, torch.Tensor]]:
        """Blocks of one type and size together, as they are quantised and stored: (type, components int64 [blocks, size])."""
        found: dict[tuple[str, int], list[int]] = {}
        for block in self.blocks[part]:
            found.setdefault((block.kind, block.size), []).append(block.start)
        return [
            (kind, torch.tensor(starts, device=self.device)[:, None] + torch.arange(size, device=self.device))
            for (kind, size), starts in sorted(found.items())
        ]


def _token_groups(num_tokens: int, group: int) -> list[tuple[int, int, int]]:
    """(first, last, rows): tokens [first, last) in groups of `rows`; what is left over is a shorter group of its own."""
    full = num_tokens // group * group
    return [g for g in ((0, full, group), (full, num_tokens, num_tokens - full)) if g[1] > g[0]]
