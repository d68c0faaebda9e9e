"""The quality protocol: the first three quarters of each sequence's cache replaced by a decoded one, the last quarter scored against
the untouched target.

KL is KL(untouched || replaced) in nats per scored position; NLL is of the text's next tokens; agreement is of the most probable
tokens.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from engine.decoder import Decoder
from engine.pool import PagedPool

_PAGE = 64


@dataclass
class Case:
    """One test sequence: token ids int64 [context], the untouched prefix KV float32 [P, D], log-probabilities float32 [context - P, V]."""

    token_ids: torch.Tensor
    prefix: int
    kv: torch.Tensor
    log_probs: torch.Tensor


@dataclass
class Scores:
    """Sums over scored positions; properties are means."""

    kl_by_case: list[float] = field(default_factory=list)
    nll: float = 0.0
    nll_untouched: float = 0.0
    agree: int = 0
    positions: int = 0
    predictions: int = 0

    @property
    def kl(self) -> float:
        return sum(self.kl_by_case) / self.positions

    @property
    def kl_standard_error(self) -> float:
        """Of the mean over sequences, which are the independent units."""
        per_case = torch.tensor(self.kl_by_case) * len(self.kl_by_case) / self.positions
        return float(per_case.std() / len(per_case) ** 0.5) if len(per_case) > 1 else 0.0


class Quality:
    """Runs the target.

    Args:
        target: the decoder.
        context: tokens of a sequence; the prefix is three quarters of it.
        keep_on: where the untouched log-probabilities and KV wait ("cpu" when they do not fit beside the model).
    """

    def __init__(self, target: Decoder, context: int, keep_on: torch.device | str):
        self.target, self.context, self.prefix, self.keep_on = target, context, context * 3 // 4, keep_on
        self.pool: PagedPool = target.new_pool(-(-context // _PAGE) + 1, _PAGE)

    @torch.inference_mode()
    def untouched(self, token_ids: list[int]) -> Case:
        """Prefix and continuation of one sequence, the continuation reading the target's own cache."""
        ids = torch.tensor(token_ids, device=self.target.device)
        sequence = self.pool.new_sequence()
        try:
            self.target(ids[:self.prefix], [sequence], [self.prefix], logits="none")
            sequence.advance(self.prefix)
            kv = self.target.read_kv(sequence, 0, self.prefix)
            logits = self.target(ids[self.prefix:], [sequence], [self.context - self.prefix]).logits
        finally:
            sequence.free()
        return Case(ids, self.prefix, kv.to(self.keep_on), logits.log_softmax(-1).to(self.keep_on))

    @torch.inference_mode()
    def score(self, case: Case, decoded: torch.Tensor, scores: Scores) -> None:
        """Adds one sequence whose prefix KV is `decoded`, float32 [P, D] (pre-RoPE), to the sums."""
        sequence = self.pool.new_sequence()
        try:
            self.target.write_kv(sequence, 0, decoded)
            sequence.advance(case.prefix)
            logits = self.target(case.token_ids[case.prefix:], [sequence], [self.context - case.prefix]).logits
        finally:
            sequence.free()
        p, r = case.log_probs.to(logits.device), logits.log_softmax(-1)
        following = case.token_ids[case.prefix + 1:, None]
        scores.kl_by_case.append((p.exp() * (p - r)).sum(dtype=torch.float64).item())
        scores.nll -= r[:-1].gather(-1, following).sum().item()
        scores.nll_untouched -= p[:-1].gather(-1, following).sum().item()
        scores.agree += int((p.argmax(-1) == r.argmax(-1)).sum())
        scores.positions += len(p)
        scores.predictions += len(following)

    @torch.inference_mode()
    def calibration_rows(self, sequences: list[list[int]], skip: int) -> Iterator[torch.Tensor]:
        """KV float32 [context - skip, D] of each calibration sequence, its first `skip` tokens left out."""
        for token_ids in sequences:
            sequence = self.pool.new_sequence()
            try:
                self.target(torch.tensor(token_ids, device=self.target.device), [sequence], [len(token_ids)], logits="none")
                kv = self.target.read_kv(sequence, skip, len(token_ids))
            finally:
                sequence.free()
            yield kv


@torch.inference_mode()
def hidden_states(decoder: Decoder, token_ids: torch.Tensor, taps: tuple[int, ...], last_layer: int | None) -> torch.Tensor:
    """Residual streams [T, taps, E] of a prefill of token_ids int64 [T] through layers [0, last_layer)."""
    sequence = decoder.new_pool(-(-len(token_ids) // _PAGE) + 1, _PAGE).new_sequence()
    try:
        out = decoder(token_ids.to(decoder.device), [sequence], [len(token_ids)], taps=taps, logits="none", last_layer=last_layer)
    finally:
        sequence.free()
    return torch.stack([out.taps[i] for i in taps], 1)

