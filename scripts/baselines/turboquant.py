"""TurboQuant-MSE: random rotation of each head's vector, Lloyd-Max of every coordinate, the norm in 16 bits.

Source: TurboQuant (arXiv 2504.19874), Algorithm 1. Cost b + 16/d bits per element. The rotation is the orthogonal factor of a
Gaussian matrix, one per (layer, K|V, head), from a fixed seed; the codebook is Lloyd-Max for N(0, 1/d), the limit of the coordinates'
Beta density. Left out: the inner-product variant (a 1-bit residual sketch, which vLLM dropped), outlier channels with more bits,
exact first and last layers, indices' entropy coding (about 5%). `remove_mean` subtracts the calibrated pre-RoPE channel mean first:
not in the paper, but models with key biases collapse without it.
"""

from __future__ import annotations

import torch

from baselines.base import Baseline
from baselines.calibration import Calibration
from baselines.gaussian_grids import lloyd_max, nearest_scalar
from baselines.packing import from_bytes, pack_codes, to_bytes, unpack_codes
from codec.spec import KvLayout

_SEED = 2504


def random_rotations(count: int, size: int, seed: int) -> torch.Tensor:
    """`count` random orthogonal matrices, float32 [count, size, size], the same for the same seed."""
    normal = torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(normal)
    return q * torch.diagonal(r, dim1=-2, dim2=-1).sign()[:, None]  # signs fixed: Haar, and independent of the QR's convention


class TurboQuant(Baseline):
    """bits 1..8 per coordinate."""

    method = "turboquant"

    def __init__(self, layout: KvLayout, bits: int, remove_mean: bool = False):
        super().__init__(layout, f"{bits}bit")
        self.bits = bits
        self.needs_calibration = remove_mean
        if remove_mean:
            self.method = "turboquant-mean"
        self._state: dict[str, torch.Tensor] = {}

    def to(self, device: torch.device | str) -> TurboQuant:
        super().to(device)
        self._state = {key: value.to(self.device) for key, value in self._state.items()}
        return self

    def _fit(self, calibration: Calibration) -> None:
        if self.needs_calibration:
            self.fitted = {"mean": calibration.mean.to(self.device)}

    def _constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotations [blocks, d, d] and centroids [2**b], made once from the seed."""
        if not self._state:
            d = self.layout.head_dim
            self._state = {
                "rotation": random_rotations(self.layout.num_blocks, d, _SEED).to(self.device),
                "centroids": (lloyd_max(self.bits) / d**0.5).to(self.device),
            }
        return self._state["rotation"], self._state["centroids"]

    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        rotation, centroids = self._constants()
        if self.needs_calibration:
            kv = kv - self.fitted["mean"]
        x = kv.reshape(len(kv), -1, self.layout.head_dim)
        norm = x.norm(dim=-1, keepdim=True)
        y = torch.einsum("tbi,bij->tbj", x / norm.clamp_min(1e-12), rotation)
        return [to_bytes(norm, torch.float16), pack_codes(nearest_scalar(y, centroids).cpu().numpy(), self.bits)]

    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        rotation, centroids = self._constants()
        blocks, d = self.layout.num_blocks, self.layout.head_dim
        norm = from_bytes(sections[0], torch.float16, (num_tokens, blocks, 1), self.device)
        codes = torch.from_numpy(unpack_codes(sections[1], self.bits, num_tokens * blocks * d)).to(self.device)
        y = centroids[codes.long()].reshape(num_tokens, blocks, d)
        kv = (torch.einsum("tbj,bij->tbi", y, rotation) * norm).reshape(num_tokens, -1)
        return kv + self.fitted["mean"] if self.needs_calibration else kv
