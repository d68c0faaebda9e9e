"""Meaning of `residual_decode_pages` in plain PyTorch: integers and prediction back to KV, straight into the pool.

Axes: T tokens, K components, r rank of the prediction, D = coded layers * 2 * G * d.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from kernels.rope.reference import apply_rope

REST_MULTIPLE = 64
"""Of a layer's columns in `Rest.rows`."""


class Rest(NamedTuple):
    """What is added to each layer by a product of its own.

    rows: [T, R] in weight's dtype, rows dense; columns starts[n] .. starts[n + 1] - 1 are the n-th layer's, unused ones among them zero.
    basis: [R, W] in weight's dtype, W = 2 * G * d.
    starts: int32 [layers + 1], multiples of REST_MULTIPLE, the last R.
    """

    rows: torch.Tensor
    basis: torch.Tensor
    starts: torch.Tensor


def residual_decode_pages(
    q: torch.Tensor,
    step: torch.Tensor,
    latents: torch.Tensor | None,
    weight: torch.Tensor,
    mean: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    first_layer: int = 0,
    *,
    rest: Rest | None = None,
) -> None:
    """KV rows y = [q * step, latents] @ weight + mean, keys rotated to their positions, all scattered into the pool, in place.

    q * step is rounded to weight's dtype before the product.

    Args:
        q: [T, K] int16 or int8 integers, or their reconstruction points in weight's dtype.
        step: [T] float32, each token's quantiser step.
        latents: [T, r] in weight's dtype, or None when nothing predicts.
        weight: [K + r, D]: [[U^T S^-1], [A]].
        mean: [D] float32, added to every row.
        kv: [L, 2, P, S, G, d] contiguous pool, of which layers first_layer .. L - 1 are written.
        slots: [T] int64, slot = page * S + offset, no slot twice.
        cos, sin: [T, d/2] float32 of the tokens' angles.
        rest: added to y, layer by layer.
    """
    rows = (q.float() * step[:, None]).to(weight.dtype)
    if latents is not None:
        rows = torch.cat([rows, latents], 1)
    y = rows.float() @ weight.float() + mean
    layers, _, _, _, heads, head_dim = kv.shape
    if rest is not None:
        width = rest.basis.shape[1]
        for n, (start, end) in enumerate(pairwise(rest.starts.tolist())):
            y[:, n * width : (n + 1) * width] += rest.rows[:, start:end].float() @ rest.basis[start:end].float()
    y = y.unflatten(1, (layers - first_layer, 2, heads, head_dim))  # [T, L', 2, G, d]
    flat = kv.flatten(2, 3)
    for layer in range(first_layer, layers):
        flat[layer, 0, slots] = apply_rope(y[:, layer - first_layer, 0], cos, sin).to(kv.dtype)
        flat[layer, 1, slots] = y[:, layer - first_layer, 1].to(kv.dtype)
