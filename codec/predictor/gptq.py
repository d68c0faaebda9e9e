"""Rounding a linear map to few bits so that its *output* changes least, given the covariance of its inputs.

Rows are rounded one after another, and each row's error is pushed onto the rows still to come through the inputs' inverse covariance (GPTQ: Frantar
et al. 2023, arXiv 2210.17323, section 3). A predictor's features are strongly correlated, so plain rounding to 4 bits would cost many times more.

Axes: F inputs (features), D outputs, groups of `group` consecutive inputs share one scale an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codec.errors import PredictorError

GROUP = 128
CLIPS = (1.0, 0.92, 0.84, 0.75)
"""Candidate scales relative to a group's largest weight: cutting the largest may pay for finer steps."""


@dataclass
class LowBitWeights:
    """codes int8 [F, D] in [-2^(bits-1), 2^(bits-1) - 1]; scale float16 [ceil(F / group), D]; weight = code * scale of its group."""

    codes: Tensor
    scale: Tensor
    bits: int
    group: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[F, D]."""
        scale = self.scale.to(dtype).repeat_interleave(self.group, 0)[: len(self.codes)]
        return self.codes.to(dtype) * scale


def round_weights(weights: Tensor, covariance: Tensor, *, bits: int = 4, group: int = GROUP, damping: float = 1e-2) -> LowBitWeights:
    """Low-bit form of weights float32 [F, D] for inputs of the given covariance [F, F].

    Args:
        damping: added to the covariance's diagonal, relative to its mean, so that it can be inverted.

    Raises:
        PredictorError: the covariance is not positive definite even then.
    """
    if not 2 <= bits <= 8:
        raise PredictorError(f"weights of {bits} bits", "choose 2 to 8")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    inverse = _inverse_root(covariance, damping)
    weights = weights.clone()
    num_features, dim = weights.shape
    codes = torch.empty(num_features, dim, dtype=torch.int8, device=weights.device)
    scales = torch.empty(-(-num_features // group), dim, dtype=torch.float16, device=weights.device)
    for number, start in enumerate(range(0, num_features, group)):
        end = min(start + group, num_features)
        block, root = weights[start:end], inverse[start:end, start:end]
        scale = _best_scale(block, low, high)
        scales[number] = scale
        scale = scales[number].float()
        errors = torch.empty_like(block)
        for i in range(end - start):
            code = torch.round(block[i] / scale).clamp_(low, high)
            codes[start + i] = code.to(torch.int8)
            errors[i] = (block[i] - code * scale) / root[i, i]
            if i + 1 < end - start:
                block[i + 1 :].addr_(root[i, i + 1 :], errors[i], alpha=-1)
        if end < num_features:
            weights[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return LowBitWeights(codes, scales, bits, group)


def _inverse_root(covariance: Tensor, damping: float) -> Tensor:
    """Upper triangular R with R^T R = (covariance + damping)^-1."""
    damped = covariance.clone()
    damped.diagonal().add_(damping * covariance.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise PredictorError("the features' covariance is not positive definite", "calibrate on more text, or use a larger damping")
    del damped
    inverse = torch.cholesky_inverse(factor)
    del factor
    root, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(info) != 0:
        raise PredictorError("the features' covariance cannot be inverted in float32", "use a larger damping")
    return root


def _best_scale(block: Tensor, low: int, high: int) -> Tensor:
    """Of the candidate scales, each output's with the least squared rounding error, float32 [D]."""
    full = block.abs().amax(0).clamp_min(1e-8) / high
    best = error = None
    for clip in CLIPS:
        # half precision is what is stored: judge what will be used
        scale = (full * clip).clamp(6e-8, 6e4).half().float().clamp_min(6e-8)
        missed = (block - torch.round(block / scale).clamp_(low, high) * scale).pow(2).sum(0)
        if best is None or error is None:
            best, error = scale, missed
        else:
            better = missed < error
            best, error = torch.where(better, scale, best), torch.where(better, missed, error)
    assert best is not None
    return best


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes int8 [F, D] in [-8, 7] -> uint8 [F, ceil(D / 2)], the even column in the low half."""
    shifted = (codes + 8).to(torch.uint8)
    if shifted.shape[1] % 2:
        shifted = torch.cat([shifted, shifted.new_zeros(len(shifted), 1)], 1)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, dim: int) -> Tensor:
    """Inverse of `pack_nibbles`: int8 [F, dim]."""
    codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :dim]
    return codes.to(torch.int8) - 8
