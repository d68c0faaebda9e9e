"""Sampling within captured steps: parameters lie in tensors that stay where they are, and nothing is read back.

What is drawn is what `engine.runtime.sampling.BatchSampler` draws for requests without penalties: the same distributions, by the same noise.

Axes: B requests of a step; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.runtime.filters import FilterRows, Filters, device_cuts
from engine.runtime.sampling import SamplingParams, tempered
from kernels.accept import COUNTER_SAMPLE, sample_rows
from kernels.philox import philox_uniform
from kernels.race import race
from kernels.upload import fill

_NONE = Filters()


@dataclass(frozen=True)
class Drawing:
    """How a captured step draws. race: some request under a seed; inverse: some without one, by the cumulative sum; neither: all are greedy."""

    race: bool = False
    inverse: bool = False
    filters: Filters = _NONE

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> Drawing:
        """Of requests with these parameters."""
        drawn = [p for p in params if not p.greedy]
        return cls(any(p.coupled for p in drawn), any(not p.coupled for p in drawn), Filters.of(params, vocab_size))

    @property
    def greedy(self) -> bool:
        """Whether most likely tokens alone are taken."""
        return not self.race and not self.inverse


class SamplingState:
    """Parameters of the requests of a step, in its order.

    temperature [rows] float32, 1 for greedy ones; greedy, coupled [rows] bool; seed [rows] int64; filters.

    Args:
        rows: most requests of a step.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.temperature = torch.ones(rows, dtype=torch.float32, device=device)
        self.greedy = torch.ones(rows, dtype=torch.bool, device=device)
        self.coupled = torch.zeros(rows, dtype=torch.bool, device=device)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.filters = FilterRows(
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.ones(rows, dtype=torch.float64, device=device),
            torch.full((rows,), -torch.inf, dtype=torch.float32, device=device),
        )
        self._sent: tuple[list[SamplingParams], list[int]] = ([], [])
        self._drawing: tuple[Drawing, int] = (Drawing(), 0)  # of these, and the size of the vocabulary

    def set(self, params: Sequence[SamplingParams], seeds: Sequence[int], vocab_size: int) -> Drawing:
        """Bring the device's parameters up to those of a step's requests, and say how they draw."""
        sent = list(params), list(seeds)
        if sent == self._sent and self._drawing[1] == vocab_size:
            return self._drawing[0]
        drawing = Drawing.of(params, vocab_size)
        self._drawing = drawing, vocab_size
        if sent != self._sent:
            self._sent = sent
            top_k, top_p, log_min_p = FilterRows.values(params)
            columns = (
                (self.temperature, [p.temperature or 1.0 for p in params]),
                (self.greedy, [p.greedy for p in params]),
                (self.coupled, [p.coupled for p in params]),
                (self.seed, sent[1]),
                (self.filters.top_k, top_k),
                (self.filters.top_p, top_p),
                (self.filters.log_min_p, log_min_p),
            )
            for column, values in columns:
                fill(column[: len(values)], values)
        return drawing

    def distributions(self, logits: Tensor, drawing: Drawing, batch: int, each: int = 1) -> Tensor:
        """[B each, V] float32 of logits [B each, V], each request's rows one after another; a greedy request's at temperature 1."""
        scaled = tempered(logits, self.temperature[:batch].repeat_interleave(each))
        if drawing.filters.any:
            cuts = device_cuts(scaled, self.filters[:batch].repeat(each), drawing.filters)
            scaled = scaled.masked_fill(scaled < cuts[:, None], -torch.inf)
        return torch.softmax(scaled, -1)

    def draw(self, logits: Tensor, best: Tensor, positions: Tensor, drawing: Drawing) -> Tensor:
        """Tokens [B] int64 at `positions` [B] from logits [B, V]; `best` [B] int64: the most likely ones, taken where a request is greedy, and -1 where
        logits are not finite, which it stays."""
        batch = len(logits)
        probs, seeds, drawn = self.distributions(logits, drawing, batch), self.seed[:batch], best
        if drawing.inverse:
            drawn = sample_rows(probs, philox_uniform(seeds, positions, COUNTER_SAMPLE))
        if drawing.race:
            raced = race(probs, seeds, positions)
            drawn = torch.where(self.coupled[:batch], raced, drawn)
        return torch.where(self.greedy[:batch] | (best < 0), best, drawn)
