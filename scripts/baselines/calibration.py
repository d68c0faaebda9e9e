"""What the baselines learn from calibration text: mean, covariances of K and of V, their principal components, a sample of tokens.

One accumulator can feed all baselines (and, on a GPU, runs beside our own calibration): its memory does not grow with the text.
"""

from __future__ import annotations

import torch

from baselines.errors import TooLittleCalibration
from codec.errors import BadInput
from codec.spec import KvLayout

PARTS = ("key", "value")


def part_of(kv: torch.Tensor, layout: KvLayout, part: int) -> torch.Tensor:
    """[T, D] -> [T, D/2]: the keys (part 0) or values (part 1) of all coded layers, in (layer, head, channel) order."""
    return kv.reshape(len(kv), layout.coded_layers, 2, -1)[:, :, part].reshape(len(kv), -1)


def join_parts(key: torch.Tensor, value: torch.Tensor, layout: KvLayout) -> torch.Tensor:
    """Inverse of part_of for both parts: two [T, D/2] -> [T, D]."""
    shape = (len(key), layout.coded_layers, 1, -1)
    return torch.cat([key.reshape(shape), value.reshape(shape)], 2).reshape(len(key), layout.dim)


class Calibration:
    """Statistics of n calibration tokens.

    Attributes:
        mean: float32 [D].
        covariances: K's and V's, float32 [D/2, D/2] each, or None: then spectrum() works from the sample.
        sample: float32 [m, D], some of the tokens (uncentred), or None.
    """

    def __init__(
        self, layout: KvLayout, mean: torch.Tensor, covariances: tuple[torch.Tensor, torch.Tensor] | None, sample: torch.Tensor | None
    ):
        if mean.shape != (layout.dim,):
            raise BadInput(f"a calibration mean of shape {list(mean.shape)}", f"give [{layout.dim}]")
        self.layout, self.mean, self.covariances, self.sample = layout, mean, covariances, sample
        self._spectra: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def from_sample(cls, layout: KvLayout, kv: torch.Tensor) -> Calibration:
        """kv float32 [n, D], n >= 2, sinks left out."""
        if kv.ndim != 2 or kv.shape[1] != layout.dim:
            raise BadInput(f"a calibration sample of shape {list(kv.shape)}", f"give [n, {layout.dim}]")
        if len(kv) < 2:
            raise TooLittleCalibration(f"{len(kv)} calibration tokens", "give at least 2, better thousands")
        return cls(layout, kv.mean(0), None, kv)

    def scale(self, part: int) -> torch.Tensor:
        """Root mean variance of each layer's K (or V), spread over its channels: float32 [D/2]."""
        if self.covariances is not None:
            variance = torch.diagonal(self.covariances[part])
        else:
            variance = self._centred(part).var(0)
        per_layer = variance.reshape(self.layout.coded_layers, -1).mean(1).clamp_min(1e-12).sqrt()
        return per_layer.repeat_interleave(self.layout.layer_dim // 2)

    def spectrum(self, part: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Principal components of K (part 0) or V (part 1) over all layers and heads, largest variance first.

        Args:
            normalise: divide each layer by scale(part) before the decomposition.

        Returns:
            variances float32 [R], basis float32 [D/2, R]; R = D/2, or at most m - 1 from a sample of m < D/2 tokens. Cached.
        """
        key = (part, normalise)
        if key not in self._spectra:
            inverse = 1 / self.scale(part) if normalise else torch.ones_like(self.scale(part))
            half = self.layout.dim // 2
            if self.covariances is None and len(self._centred(part)) <= half:
                x = self._centred(part) * inverse
                values, left = torch.linalg.eigh(x @ x.T)  # the dual problem: n x n instead of D/2 x D/2
                keep = values > values[-1] * 1e-6
                values, left = values[keep].flip(0), left[:, keep].flip(1)
                basis, variances = x.T @ left / values.sqrt(), values / (len(x) - 1)
            else:
                if self.covariances is None:
                    x = self._centred(part)
                    covariance = x.T @ x / (len(x) - 1)
                else:
                    covariance = self.covariances[part]
                values, vectors = torch.linalg.eigh(covariance * inverse[:, None] * inverse)
                variances, basis = values.flip(0).clamp_min(0), vectors.flip(1)
            self._spectra[key] = (variances, basis.contiguous())
        return self._spectra[key]

    def require_sample(self, tokens: int, why: str) -> torch.Tensor:
        """The sample, at least `tokens` long; TooLittleCalibration otherwise."""
        if self.sample is None or len(self.sample) < tokens:
            have = 0 if self.sample is None else len(self.sample)
            raise TooLittleCalibration(f"a sample of {have} tokens, {why} takes {tokens}", "calibrate on more text")
        return self.sample

    def _centred(self, part: int) -> torch.Tensor:
        sample = self.require_sample(2, "a covariance")
        return part_of(sample - self.mean, self.layout, part)


class CalibrationAccumulator:
    """Streams KV rows into a Calibration; memory: two [D/2, D/2] matrices (if asked for) and the sample, whatever the text's length.

    Args:
        sample_tokens: how many rows to keep, evenly spread over `expected_tokens`.
        covariances: False skips the matrices (only KVTC needs them).
    """

    def __init__(self, layout: KvLayout, *, sample_tokens: int, expected_tokens: int, covariances: bool = True):
        self.layout, self.sample_tokens = layout, sample_tokens
        self._stride = max(1, expected_tokens // max(1, sample_tokens))
        self._want_covariances, self._count = covariances, 0
        self._sample: list[torch.Tensor] = []
        self._sampled = 0
        self._shift = self._sum = torch.empty(0)
        self._products: list[torch.Tensor] = []

    def update(self, kv: torch.Tensor) -> None:
        """kv float32 [n, D], sinks left out. The first call's mean is subtracted from all sums: keys have large means."""
        if not self._count:
            self._shift = kv.mean(0)
            self._sum = torch.zeros_like(self._shift)
            half = self.layout.dim // 2
            self._products = [kv.new_zeros(half, half) for _ in PARTS] if self._want_covariances else []
        centred = kv - self._shift
        self._sum += centred.sum(0)
        for part, product in enumerate(self._products):
            x = part_of(centred, self.layout, part)
            product.addmm_(x.T, x)
        chosen = kv[(-self._count) % self._stride :: self._stride][: self.sample_tokens - self._sampled]
        self._sample.append(chosen.clone())
        self._sampled += len(chosen)
        self._count += len(kv)

    @property
    def count(self) -> int:
        return self._count

    def finish(self) -> Calibration:
        """The statistics so far; the accumulator must not be used afterwards (its matrices are normalised in place)."""
        if self._count < 2:
            raise TooLittleCalibration(f"{self._count} calibration tokens", "give at least 2, better thousands")
        offset = self._sum / self._count
        for part, product in enumerate(self._products):
            mean = part_of(offset[None], self.layout, part)[0]
            product.div_(self._count).sub_(torch.outer(mean, mean))
        covariances = (self._products[0], self._products[1]) if self._products else None
        return Calibration(self.layout, self._shift + offset, covariances, torch.cat(self._sample))
