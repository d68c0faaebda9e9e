"""Meaning of `residual_encode` and `gather_kv` in plain PyTorch: what of a token's KV its prediction missed, as small integers.

Weighting, transform and prediction are folded into one matrix.
Axes: T tokens, D = coded layers * 2 * G * d, r rank of the prediction, K kept components.
"""

from __future__ import annotations

import torch

from kernels.rope.reference import apply_rope

ROUNDING = 0.42
SYMBOL_LIMIT = 32767


def gather_kv(
    kv: torch.Tensor, slots: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mean: torch.Tensor, first_layer: int = 0
) -> torch.Tensor:
    """KV rows out of a pool, keys turned back, minus their mean.

    Args:
        kv: [L, 2, P, S, G, d] pool of rotated keys and of values.
        slots: [T] int64, slot = page * S + offset.
        cos, sin: [T, d/2] float32 of the tokens' angles.
        mean: [D] float32 in (layer, K|V, head, channel) order.
        first_layer: layers below it are left out.

    Returns:
        [T, D] in kv's dtype, D = (L - first_layer) * 2 * G * d. The mean is taken off in float32, before rounding: a key channel's mean
        may be a hundred times its spread.
    """
    coded = kv[first_layer:].flatten(2, 3)[:, :, slots].float()  # [L', 2, T, G, d]
    keys = torch.stack([apply_rope(layer, cos, -sin) for layer in coded[:, 0]])
    rows = torch.stack([keys, coded[:, 1]], 1).permute(2, 0, 1, 3, 4).flatten(1)  # [T, D]
    return (rows - mean).to(kv.dtype)


def residual_encode(
    y: torch.Tensor,
    latents: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    inverse_step: torch.Tensor,
    *,
    rounding: float = ROUNDING,
    limit: int = SYMBOL_LIMIT,
) -> torch.Tensor:
    """Quantised components of c = [y, latents] @ weight + bias.

    Args:
        y: [T, D] KV rows minus their mean, as `gather_kv` returns them.
        latents: [T, r] of the same dtype, or None when nothing predicts.
        weight: [D + r, K], the same dtype: [[S U], [-A S U]].
        bias: [K] float32.
        inverse_step: [T] float32, one over each token's quantiser step.
        rounding: q = sign(c) floor(|c| / step + rounding).
        limit: q is clamped to -limit..limit.

    Returns:
        [T, K] int16.
    """
    x = y if latents is None else torch.cat([y, latents], 1)
    c = (x.float() @ weight.float() + bias) * inverse_step[:, None]
    return (torch.sign(c) * torch.floor(c.abs() + rounding).clamp_max(limit)).to(torch.int16)
