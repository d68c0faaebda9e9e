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
    rows = logprob_rows(logits, upload(token_ids, logits.device), num_top).tolist()
    return [from_row(row, token, num_top) for row, token in zip(rows, token_ids, strict=True)]


def logprob_rows(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """[n, 1 + 2 k] float64, of tokens [n] int64 that followed logits [n, V]: the token's log probability, those of the k most probable ones, and their
    ids; k is num_top, or the vocabulary. Nothing is read back."""
    table = torch.log_softmax(logits.float(), -1)
    best = table.topk(min(num_top, table.shape[-1]))
    parts = (table.gather(1, token_ids.clamp_min(0)[:, None]), best.values, best.indices)
    return torch.cat([part.double() for part in parts], 1)


def from_row(row: Sequence[float], token_id: int, num_top: int) -> TokenLogprobs:
    """A row of `logprob_rows`, which may have more alternatives, on the host."""
    most = (len(row) - 1) // 2
    count = min(num_top, most)
    ids, values = row[1 + most : 1 + most + count], row[1 : 1 + count]
    return TokenLogprobs(token_id, row[0], tuple((int(token), value) for token, value in zip(ids, values, strict=True)))
