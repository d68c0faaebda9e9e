"""Log probabilities of a text's tokens under the target, for callers that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.upload import upload


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's natural log probability under the target's own distribution, before temperature, filters, penalties and constraints.

    top: (token id, log probability) of the most probable tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Of token_ids[i], which followed row i of logits [n, V]; num_top alternatives each."""
    table = torch.log_softmax(logits.float(), -1)
    own = table.gather(1, upload(token_ids, logits.device)[:, None])[:, 0].tolist()
    if not num_top:
        return [TokenLogprobs(token, value) for token, value in zip(token_ids, own, strict=True)]
    best = table.topk(min(num_top, table.shape[-1]))
    return [
        TokenLogprobs(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, ids, values in zip(token_ids, own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
