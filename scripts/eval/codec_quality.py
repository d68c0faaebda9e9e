"""The quality protocol: the first three quarters of each sequence's cache replaced by a decoded one, the last quarter scored against
the untouched target.

KL is KL(untouched || replaced) in nats per scored position; NLL is of the text's next tokens; agreement is of the most probable
tokens. Sequences run in batches, the untouched ones and their replacements in the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from engine.errors import InvalidOption
from engine.kv.pool import KvSequence
from engine.model.decoder import Decoder

_PAGE = 64
_GPU_BATCH, _CPU_BATCH = 8, 2


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
        self.batch = _GPU_BATCH if target.device.type == "cuda" else _CPU_BATCH
        self.pool = target.new_pool(self.batch * (-(-context // _PAGE)) + 1, _PAGE)

    @torch.inference_mode()
    def untouched(self, token_ids: Sequence[list[int]]) -> list[Case]:
        """Prefixes and continuations of sequences, the continuations reading the target's own cache."""
        cases = []
        for start in range(0, len(token_ids), self.batch):
            ids = torch.tensor(token_ids[start : start + self.batch], device=self.target.device)
            sequences = [self.pool.new_sequence(self.context) for _ in ids]
            try:
                self.target(ids[:, : self.prefix].flatten(), sequences, [self.prefix] * len(ids), logits="none")
                for sequence in sequences:
                    sequence.advance(self.prefix)
                kv = [self.target.read_kv(sequence, 0, self.prefix).to(self.keep_on) for sequence in sequences]
                log_probs = self._log_probs(ids, sequences)
            finally:
                _free(sequences)
            cases += [Case(one, self.prefix, own, p.to(self.keep_on)) for one, own, p in zip(ids, kv, log_probs, strict=True)]
        return cases

    @torch.inference_mode()
    def score(self, cases: Sequence[Case], decoded: Sequence[torch.Tensor], scores: Scores) -> None:
        """Adds sequences whose prefix KV is `decoded`, float32 [P, D] each (pre-RoPE), to the sums."""
        for start in range(0, len(cases), self.batch):
            some = cases[start : start + self.batch]
            sequences = [self.pool.new_sequence(self.context) for _ in some]
            try:
                for sequence, kv in zip(sequences, decoded[start : start + self.batch], strict=True):
                    self.target.write_kv(sequence, 0, kv)
                    sequence.advance(self.prefix)
                log_probs = self._log_probs(torch.stack([case.token_ids for case in some]), sequences)
            finally:
                _free(sequences)
            for case, r in zip(some, log_probs, strict=True):
                p = case.log_probs.to(r.device)
                following = case.token_ids[case.prefix + 1 :, None]
                scores.kl_by_case.append((p.exp() * (p - r)).sum(dtype=torch.float64).item())
                scores.nll -= r[:-1].gather(-1, following).sum().item()
                scores.nll_untouched -= p[:-1].gather(-1, following).sum().item()
                scores.agree += int((p.argmax(-1) == r.argmax(-1)).sum())
                scores.positions += len(p)
                scores.predictions += len(following)

    def _log_probs(self, ids: torch.Tensor, sequences: list[KvSequence]) -> torch.Tensor:
        """float32 [B, context - P, V] of the continuations of ids [B, context]."""
        rest = self.context - self.prefix
        logits = self.target(ids[:, self.prefix :].flatten(), sequences, [rest] * len(ids)).logits
        return logits.log_softmax(-1).reshape(len(ids), rest, -1)

    @torch.inference_mode()
    def calibration_rows(self, sequences: Sequence[list[int]], skip: int) -> Iterator[torch.Tensor]:
        """KV float32 [context - skip, D] of each calibration sequence, its first `skip` tokens left out."""
        for start in range(0, len(sequences), self.batch):
            some = sequences[start : start + self.batch]
            own = [self.pool.new_sequence(len(token_ids)) for token_ids in some]
            try:
                ids = torch.tensor([t for s in some for t in s], device=self.target.device)
                self.target(ids, own, [len(s) for s in some], logits="none")
                for sequence, token_ids in zip(own, some, strict=True):
                    yield self.target.read_kv(sequence, skip, len(token_ids))
            finally:
                _free(own)


def _free(sequences: Sequence[KvSequence]) -> None:
    for sequence in sequences:
        sequence.free()


@torch.inference_mode()
def hidden_states(
    decoder: Decoder,
    token_ids: Sequence[torch.Tensor],
    taps: tuple[int, ...],
    last_layer: int | None = None,
    head_layers: Decoder | None = None,
) -> list[torch.Tensor]:
    """Residual streams [T, taps, E] of a prefill of each of token_ids, int64 [T], through layers [0, last_layer). Taps beyond last_layer are those of
    a draft head, whose layers go on from there."""
    batch, found = _GPU_BATCH if decoder.device.type == "cuda" else 1, []
    last = decoder.config.num_layers if last_layer is None else last_layer
    beyond = tuple(i - last for i in taps if i > last)
    own = tuple(sorted({min(i, last) for i in taps}))
    for start in range(0, len(token_ids), batch):
        lengths = [len(ids) for ids in token_ids[start : start + batch]]
        ids = torch.cat(list(token_ids[start : start + batch])).to(decoder.device).clamp_max(decoder.config.vocab_size - 1)
        states = decoder(ids, _scratch(decoder, lengths), lengths, taps=own, logits="none", last_layer=last).taps
        if beyond:
            if head_layers is None:
                what = f"the pack's features lie beyond the {last} layers of an early exit"
                raise InvalidOption(what, "give the draft head it was made with as --draft")
            more = head_layers(None, _scratch(head_layers, lengths), lengths, hidden=states[last], taps=beyond, logits="none").taps
            states = states | {last + i: rows for i, rows in more.items()}
        found += list(torch.stack([states[i] for i in taps], 1).split(lengths))
    return found


def _scratch(decoder: Decoder, lengths: Sequence[int]) -> list[KvSequence]:
    pool = decoder.new_pool(sum(-(-n // _PAGE) for n in lengths) + 1, _PAGE)
    return [pool.new_sequence(n) for n in lengths]
