"""Penalties and biases behind captured steps: what they count lies on the device and follows the tokens drawn there, so that nothing is read back.

What results is what `engine.runtime.sampling.TokenHistory` makes of the same tokens. A format (`Constraint`) needs the tokens on the host and has no
place here.

Axes: B requests of a step; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.runtime.sampling import SamplingParams, TokenHistory
from kernels.upload import upload


class PenaltyRows:
    """Penalties of a step's requests, in its order, those without any included.

    Args:
        params: of the requests.
        histories: of those with penalties, which have counted all tokens before the next one; None for others. At least one is there.
    """

    def __init__(self, params: Sequence[SamplingParams], histories: Sequence[TokenHistory | None]) -> None:
        known = next(history for history in histories if history is not None)
        device, none = known.seen.device, torch.zeros_like(known.counts)

        def column(values: list[float]) -> Tensor:
            return upload(values, device, torch.float32)[:, None]

        self._seen = torch.stack([none.bool() if own is None else own.seen for own in histories])  # [B, V]
        self._counts = torch.stack([none if own is None else own.counts for own in histories])  # [B, V] float32
        biases = [None if own is None else own.bias for own in histories]
        self._bias = torch.stack([none if own is None else own for own in biases]) if any(own is not None for own in biases) else None
        self._repetition = column([p.repetition_penalty for p in params])
        self._frequency = column([p.frequency_penalty for p in params])
        self._presence = column([p.presence_penalty for p in params])

    def penalise(self, logits: Tensor, rows: slice) -> Tensor:
        """Logits [n, V] float32 of the requests `rows` with their biases and penalties."""
        logits = logits.float()
        if self._bias is not None:
            logits = logits + self._bias[rows]
        repetition, counts = self._repetition[rows], self._counts[rows]
        logits = torch.where(self._seen[rows], torch.where(logits < 0, logits * repetition, logits / repetition), logits)
        return logits - self._frequency[rows] * counts - self._presence[rows] * (counts > 0)

    def count(self, tokens: Tensor, rows: slice) -> None:
        """Tokens [n] int64 joined the new text of the requests `rows`; one below 0 is none."""
        at = tokens.clamp_min(0)[:, None]
        drawn = (tokens >= 0)[:, None]
        self._counts[rows].scatter_add_(1, at, drawn.float())
        seen = self._seen[rows]
        seen.scatter_(1, at, drawn | seen.gather(1, at))
