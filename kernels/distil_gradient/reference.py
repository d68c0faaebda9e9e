"""Gradient of a distillation's loss in the draft's logits, and what the two distributions have in common, row by row.

p is the target's distribution, given by its logits at R of its tokens and the logarithm of the sum of all exponentials; q is the draft's, over the R
tokens alone. The loss is (1 - mix) KL + mix TV with KL = sum of p (log p - log q), and TV = 1 - sum of min(p, q), whose gradients are closed forms:
d KL / d z_i = m q_i - p_i with m = sum of p;   d TV / d z_i = q_i (S - 1[q_i < p_i]) with S = sum of q over q < p.

Axes: C rows, R tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DistilRows(NamedTuple):
    """Of each row, [C]."""

    accepted: Tensor  # float32: sum of min(p, q)
    divergence: Tensor  # float32, nats: KL
    covered: Tensor  # float32: m
    best: Tensor  # int64: place of the draft's largest logit, the first of equal ones


def distil_gradient(draft: Tensor, target: Tensor, log_sum: Tensor, mix: float, weight: Tensor | None = None) -> DistilRows:
    """Turn the draft's logits into the loss's gradient in them, in place.

    draft: [C, R] logits, contiguous. target: [C, R], contiguous, of the same dtype. log_sum: [C] float32. mix: 0 to 1. weight: [C] float32 factors of
    the rows' gradients; None: 1.
    """
    log_p, log_q = target.float() - log_sum[:, None], torch.log_softmax(draft, -1, dtype=torch.float32)
    p, q, best = log_p.exp(), log_q.exp(), draft.argmax(-1)
    below = torch.where(q < p, q, 0.0)
    mass, accepted = p.sum(-1), torch.minimum(p, q).sum(-1)
    gradient = q * torch.lerp(mass, below.sum(-1), mix)[:, None] - (1 - mix) * p - mix * below
    draft.copy_(gradient if weight is None else gradient * weight[:, None])
    return DistilRows(accepted, (p * (log_p - log_q)).sum(-1), mass, best)
