"""AQUA-KV-style: each layer's keys and values predicted from the previous layer's reconstruction, the residual in 2 bits.

Source: "Cache Me If You Must" (AQUA-KV, arXiv 2501.19392): pre-RoPE, all heads together, K_l from K^_{l-1}, V_l from [K^_l,
V^_{l-1}], closed-form ridge (damping 1e-3) fitted layer by layer on reconstructed inputs; residual by HIGGS (randomised Hadamard,
two-dimensional grid of 16 points at 2 bits); first layer at 4 bits without a predictor. Simplified: a 16-bit norm per (token, layer,
K|V) in place of one per 1,024 numbers (2.06 to 2.08 bits against 2.09); the Hadamard size is the largest power of two that divides G
* d, up to 1,024; the first layer uses a Lloyd-Max scalar; no recent window.
"""

from __future__ import annotations

import torch

from baselines.base import Baseline
from baselines.calibration import Calibration
from baselines.gaussian_grids import lloyd_max, nearest_pair, nearest_scalar, plane_grid
from baselines.packing import from_bytes, pack_codes, to_bytes, unpack_codes
from codec.errors import BadInput
from codec.spec import KvLayout

_DAMPING = 1e-3
_FIRST_LAYER_BITS = 4
_SEED = 2501
_MAX_FIT_TOKENS = 8192


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's orthonormal Hadamard matrix, float32 [size, size], size a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


class Aqua(Baseline):
    """bits per element of the residual: 2 (the paper's), 3, or 1 to continue its curve."""

    method = "aqua-kv"
    needs_calibration = True

    def __init__(self, layout: KvLayout, bits: int = 2):
        super().__init__(layout, f"{bits}bit")
        self.bits, self.width = bits, layout.layer_dim // 2
        self.block = min(1024, self.width & -self.width)
        if self.width % 2:
            raise BadInput("an odd number of channels in a layer", "AQUA-KV codes channels in pairs")

    def _fit(self, calibration: Calibration) -> None:
        sample = calibration.require_sample(2, "AQUA-KV's predictors")[:_MAX_FIT_TOKENS].to(self.device)
        signs = torch.randint(0, 2, (self.width,), generator=torch.Generator().manual_seed(_SEED)).to(self.device) * 2.0 - 1
        self.fitted = {
            "hadamard": hadamard(self.block).to(self.device),
            "signs": signs,
            "mean": calibration.mean.to(self.device),
            "grid": plane_grid(self.bits).to(self.device),
            "scalar": lloyd_max(_FIRST_LAYER_BITS).to(self.device),
        }
        x = self.layers(sample - self.fitted["mean"])
        key = value = x.new_zeros(len(x), 0)
        for layer in range(self.layout.coded_layers):
            previous_value = value
            if layer:
                self.fitted[f"key.{layer}"] = _ridge(key, x[:, layer, 0])
            key = self._roundtrip(x[:, layer, 0], key, layer, 0)
            value_inputs = torch.cat([key, previous_value], 1)
            if layer:
                self.fitted[f"value.{layer}"] = _ridge(value_inputs, x[:, layer, 1])
            value = self._roundtrip(x[:, layer, 1], value_inputs, layer, 1)

    def _roundtrip(self, truth: torch.Tensor, inputs: torch.Tensor, layer: int, part: int) -> torch.Tensor:
        predicted = self._predict(inputs, layer, part)
        norm, codes = self._quantise(truth - predicted, layer)
        return predicted + self._dequantise(norm.half().float(), codes, layer)

    def _predict(self, inputs: torch.Tensor, layer: int, part: int) -> torch.Tensor:
        if not layer:
            return inputs.new_zeros(len(inputs), self.width)
        return inputs @ self.fitted[f"{('key', 'value')[part]}.{layer}"]

    def _quantise(self, residual: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, M] to root mean square [T, 1] and uint8 codes [T, M or M/2]."""
        norm = residual.pow(2).mean(1, keepdim=True).sqrt()
        y = (residual * self.fitted["signs"] / norm.clamp_min(1e-12)).reshape(len(residual), -1, self.block) @ self.fitted["hadamard"]
        y = y.reshape(len(residual), -1)
        return norm, nearest_pair(y, self.fitted["grid"]) if layer else nearest_scalar(y, self.fitted["scalar"])

    def _dequantise(self, norm: torch.Tensor, codes: torch.Tensor, layer: int) -> torch.Tensor:
        table = self.fitted["grid" if layer else "scalar"]
        y = table[codes.long()].reshape(len(codes), -1, self.block) @ self.fitted["hadamard"]
        return y.reshape(len(codes), -1) * self.fitted["signs"] * norm

    def _encode(self, kv: torch.Tensor) -> list[bytes]:
        x = self.layers(kv - self.fitted["mean"])
        key = value = x.new_zeros(len(x), 0)
        norms: list[torch.Tensor] = []
        first: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for layer in range(self.layout.coded_layers):
            for part in (0, 1):
                inputs = torch.cat([key, value], 1) if part else key
                predicted = self._predict(inputs, layer, part)
                norm, codes = self._quantise(x[:, layer, part] - predicted, layer)
                decoded = predicted + self._dequantise(norm.half().float(), codes, layer)
                key, value = (key, decoded) if part else (decoded, value)
                norms.append(norm)
                (rest if layer else first).append(codes)
        return [
            to_bytes(torch.cat(norms, 1), torch.float16),
            pack_codes(torch.cat(first, 1).cpu().numpy(), _FIRST_LAYER_BITS),
            pack_codes(torch.cat(rest, 1).cpu().numpy() if rest else torch.empty(0).numpy(), 2 * self.bits),
        ]

    def _decode(self, sections: list[bytes], num_tokens: int) -> torch.Tensor:
        layers = self.layout.coded_layers
        norms = from_bytes(sections[0], torch.float16, (num_tokens, layers * 2), self.device)
        first = unpack_codes(sections[1], _FIRST_LAYER_BITS, num_tokens * 2 * self.width).reshape(num_tokens, 2, -1)
        rest = unpack_codes(sections[2], 2 * self.bits, num_tokens * (layers - 1) * self.width).reshape(num_tokens, (layers - 1) * 2, -1)
        key = value = torch.zeros(num_tokens, 0, device=self.device)
        out = []
        for layer in range(layers):
            for part in (0, 1):
                codes = torch.from_numpy(first[:, part] if not layer else rest[:, 2 * layer - 2 + part]).to(self.device)
                inputs = torch.cat([key, value], 1) if part else key
                decoded = self._predict(inputs, layer, part) + self._dequantise(norms[:, 2 * layer + part, None], codes, layer)
                key, value = (key, decoded) if part else (decoded, value)
                out.append(decoded)
        return torch.cat(out, 1) + self.fitted["mean"]


def _ridge(inputs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Weights [inputs, M] of the least-squares fit, damped by 1e-3 of the mean input energy (inputs and truth are centred)."""
    gram = inputs.T @ inputs
    gram += _DAMPING * torch.diagonal(gram).mean().clamp_min(1e-12) * torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve(gram, inputs.T @ truth)
