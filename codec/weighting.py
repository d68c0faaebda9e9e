"""What an error in the cache does to the target: block-diagonal weights S, one d x d block per (layer, K|V, KV head).

|S e|^2 estimates the relative squared error that an error e of the cache causes in the layer's output:
values:  e changes the output by (attention weight) * W_o e, so S^2 is the sum over the group's query heads of W_o^T W_o;
keys:    e changes a logit by q.e / sqrt(d), which moves the output along the spread of W_o v, so S^2 = sum over heads of
         E|W_o (v - mean v)|^2 * E[q q^T] / d, q turned to where the key, stored without RoPE, meets it.
Both are divided by the residual stream's energy at that layer. "unit" weights are the usual alternative: every layer's K and V at unit variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from codec.spec import KvLayout

RELATIVE_FLOOR = 1e-4
"""Smallest eigenvalue of a block's metric relative to its largest: keeps S invertible."""


@dataclass
class Weighting:
    """Blocks of S and of its inverse.

    Args:
        sensitivity_sqrt: S, float32 [blocks, d, d], symmetric.
        inverse: float32 [blocks, d, d].
    """

    sensitivity_sqrt: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def from_sensitivity_sqrt(cls, sensitivity_sqrt: torch.Tensor) -> Weighting:
        """Weights from stored blocks; the inverse is recomputed in float64."""
        return cls(sensitivity_sqrt.float(), torch.linalg.inv(sensitivity_sqrt.double()).float())

    @classmethod
    def from_metric(cls, metric: torch.Tensor) -> Weighting:
        """S with S^2 the given symmetric blocks [blocks, d, d], up to a factor; small eigenvalues are lifted to RELATIVE_FLOOR of a block's largest.

        A block that says nothing (a head nothing looks at) weighs RELATIVE_FLOOR of the mean; a metric that says nothing at all is the identity.
        """
        metric = metric.double()
        mean = metric.diagonal(dim1=-2, dim2=-1).mean()
        metric = metric / mean if mean > 0 else torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device).expand_as(metric)
        values, vectors = torch.linalg.eigh(metric)
        values = values.clamp_min(values.amax(-1, keepdim=True).clamp_min(RELATIVE_FLOOR) * RELATIVE_FLOOR)
        root = vectors * values.sqrt()[..., None, :] @ vectors.transpose(-1, -2)
        inverse = vectors * values.rsqrt()[..., None, :] @ vectors.transpose(-1, -2)
        return cls(root.float(), inverse.float())

    def scaled(self, factor: float) -> Weighting:
        return Weighting(self.sensitivity_sqrt * factor, self.inverse / factor)

    def to(self, device: torch.device | str) -> Weighting:
        return Weighting(self.sensitivity_sqrt.to(device), self.inverse.to(device))

    def whiten(self, y: torch.Tensor) -> torch.Tensor:
        """S y of rows y [T, D], float32 [T, D]."""
        return apply_blocks(y, self.sensitivity_sqrt)

    def unwhiten(self, z: torch.Tensor) -> torch.Tensor:
        """S^-1 z of rows z [T, D], float32 [T, D]."""
        return apply_blocks(z, self.inverse)

    def whiten_covariance(self, cov: torch.Tensor) -> torch.Tensor:
        """S cov S, float32 [D, D], of a symmetric cov."""
        return self.whiten(self.whiten(cov).T.contiguous())


def apply_blocks(y: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """y [T, D] times the block-diagonal matrix with blocks [blocks, d, d], float32 [T, D]."""
    d = blocks.shape[-1]
    return torch.bmm(y.reshape(len(y), -1, d).transpose(0, 1), blocks).transpose(0, 1).reshape(len(y), -1)


def unit_weighting(layout: KvLayout, variance: torch.Tensor) -> Weighting:
    """Every (layer, K|V) scaled to unit mean variance. variance: float32 [D], per channel."""
    d, per_kind = layout.head_dim, layout.num_kv_heads * layout.head_dim
    mean = variance.reshape(-1, per_kind).mean(1).clamp_min(1e-12)  # [layers * 2]
    scale = mean.rsqrt().repeat_interleave(layout.num_kv_heads)  # [blocks]
    eye = torch.eye(d, dtype=torch.float32, device=variance.device)
    return Weighting(scale[:, None, None] * eye, eye / scale[:, None, None])


def attention_weighting(
    layout: KvLayout, output_weights: list[torch.Tensor], query_moments: torch.Tensor, value_covariance: torch.Tensor, energy: torch.Tensor
) -> Weighting:
    """The metric of this module's heading, over the coded layers.

    Args:
        output_weights: per coded layer W_o [E, H * d].
        query_moments: float32 [layers, H, d, d], E[q q^T] of queries turned to the key's frame.
        value_covariance: float32 [layers, G, d, d], of the values.
        energy: float32 [layers], E|x|^2 of the residual stream after the layer.
    """
    g, d = layout.num_kv_heads, layout.head_dim
    blocks = []
    for i, w_o in enumerate(output_weights):
        heads = w_o.shape[1] // d
        w = w_o.float().reshape(-1, heads, d).permute(1, 2, 0)  # [H, d, E]
        gram = (w @ w.transpose(1, 2)).reshape(g, heads // g, d, d)
        spread = torch.einsum("ghij,gji->gh", gram, value_covariance[i])
        moments = query_moments[i].reshape(g, heads // g, d, d)
        keys = (spread[..., None, None] * moments).sum(1) / d
        blocks += [torch.cat([keys, gram.sum(1)]) / energy[i]]
    return Weighting.from_metric(torch.cat(blocks))


def normalised(weighting: Weighting, block_covariance: torch.Tensor) -> Weighting:
    """Scaled so that the weighted KV has unit mean variance: steps then mean the same for every pair.

    block_covariance: float32 [blocks, d, d], the diagonal blocks of Cov(y).
    """
    variance = (
        torch.einsum("bij,bjk,bki->b", weighting.sensitivity_sqrt, block_covariance, weighting.sensitivity_sqrt).mean()
        / weighting.sensitivity_sqrt.shape[-1]
    )
    return weighting.scaled(float(variance.clamp_min(1e-20).rsqrt()))


def blended(first: Weighting, second: Weighting, block_covariance: torch.Tensor) -> Weighting:
    """Normalised weights whose metric S^2 is the mean of two normalised metrics: one that is exact but estimated from few noisy samples, steadied by
    one that is modelled but smooth.

    block_covariance: float32 [blocks, d, d], as for `normalised`.
    """
    metric = (
        first.sensitivity_sqrt.double() @ first.sensitivity_sqrt.double()
        + second.sensitivity_sqrt.double() @ second.sensitivity_sqrt.double()
    )
    return normalised(Weighting.from_metric(metric), block_covariance)
