"""Meaning of `greedy_head` in plain PyTorch: final norm, output projection and the most likely token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.skinny_linear.reference import inverse_rms


def greedy_head(
    scaled: torch.Tensor,
    squares: torch.Tensor,
    parts: int,
    eps: float,
    weight: torch.Tensor,
    logits: torch.Tensor | None,
    tokens: torch.Tensor,
) -> None:
    """tokens = argmax of the logits, the smallest index among equals; -1 where a logit is NaN or infinite.

    Args:
        scaled: [N, E] residual stream times the final norm's weight; squares: [P, N] float32, of which `parts` rows count.
        eps: of the norm.
        weight: [V, E].
        logits: [N, V] float32, written if given; rounded to the dtype of `scaled`, as a product in that dtype rounds them.
        tokens: [N] int64, written.
    """
    factor = inverse_rms(squares, parts, scaled.shape[1], eps)
    result = (F.linear(scaled.float(), weight.float()) * factor[:, None]).to(scaled.dtype).float()
    if logits is not None:
        logits.copy_(result)
    best = (result == result.amax(1, keepdim=True)).int().argmax(1)
    tokens.copy_(torch.where(result.isfinite().all(1), best, -1))
