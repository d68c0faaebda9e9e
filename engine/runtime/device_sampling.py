"""Sampling within captured steps: parameters lie in tensors that stay where they are, and nothing is read back.

What is drawn is what `engine.runtime.sampling.BatchSampler` draws for requests without penalties: the same distributions, by the same noise.

Axes: B requests of a step; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.runtime.filters import FilterRows, Filters, device_cuts
from engine.runtime.sampling import SamplingParams, tempered
from kernels.accept import COUNTER_SAMPLE, sample_rows
from kernels.philox import philox_uniform
from kernels.race import race

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


class _Row(NamedTuple):
    """A request's parameters as captured steps read them."""

    seed: int
    top_k: int
    top_p: float
    temperature: float
    log_min_p: float
    greedy: bool
    coupled: bool

    @classmethod
    def of(cls, params: SamplingParams, seed: int) -> _Row:
        """Of a request that is not greedy."""
        top_k, top_p, log_min_p = FilterRows.of(params)
        return cls(seed, top_k, top_p, params.temperature, log_min_p, False, params.coupled)


# the widest first, so that each column begins where its type may
_DTYPES = (torch.int64, torch.int64, torch.float64, torch.float32, torch.float32, torch.bool, torch.bool)
_GREEDY = _Row(0, 0, 1.0, 1.0, -math.inf, True, False)


def _columns(buffer: Tensor, rows: int) -> list[Tensor]:
    """The columns of `_Row` of so many rows that lie in a buffer [bytes] uint8: views."""
    parts = buffer.split([rows * dtype.itemsize for dtype in _DTYPES])
    return [part.view(dtype) for part, dtype in zip(parts, _DTYPES, strict=True)]


class SamplingState:
    """Parameters of the requests of a step, in its order.

    temperature [rows] float32; greedy, coupled [rows] bool; seed [rows] int64; filters. Of a greedy request nothing but that it is greedy is known:
    temperature 1, seed 0, not coupled, no filters. All of them lie in one buffer, so that one copy brings them up to date.

    Args:
        rows: most requests of a step.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows = [_GREEDY] * rows  # what the device has of each
        self._host = torch.zeros(rows * sum(dtype.itemsize for dtype in _DTYPES), dtype=torch.uint8)
        self._host_columns = [column.numpy() for column in _columns(self._host, rows)]
        self._write(self._rows)
        self._device = self._host.to(device, copy=True)
        self.seed, top_k, top_p, self.temperature, log_min_p, self.greedy, self.coupled = _columns(self._device, rows)
        self.filters = FilterRows(top_k, top_p, log_min_p)
        self._sent: tuple[list[SamplingParams], list[int]] = ([], [])
        self._drawing: tuple[Drawing, int] = (Drawing(), 0)  # of these, and the size of the vocabulary

    def set(self, params: Sequence[SamplingParams], seeds: Sequence[int], vocab_size: int) -> Drawing:
        """Bring the device's parameters up to those of a step's requests, and say how they draw."""
        sent = list(params), list(seeds)
        if sent == self._sent and self._drawing[1] == vocab_size:
            return self._drawing[0]
        drawing = Drawing.of(params, vocab_size)
        self._sent, self._drawing = sent, (drawing, vocab_size)
        rows = [_GREEDY if p.greedy else _Row.of(p, seed) for p, seed in zip(params, seeds, strict=True)]
        if rows != self._rows[: len(rows)]:
            self._rows[: len(rows)] = rows
            self._write(rows)
            self._device.copy_(self._host.pin_memory() if self._device.is_cuda else self._host, non_blocking=True)
        return drawing

    def _write(self, rows: Sequence[_Row]) -> None:
        for column, values in zip(self._host_columns, zip(*rows, strict=True), strict=True):
            column[: len(rows)] = values

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
