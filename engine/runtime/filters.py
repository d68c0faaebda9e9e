"""top-k, top-p and min-p as thresholds: the smallest scaled logit that each row keeps.

Axes: n rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.upload import upload

NUCLEUS_CANDIDATES = 1024  # largest logits tried first for top-p; a full sort of the vocabulary only when they do not hold the mass


class FilterParams(Protocol):
    """What filters need to know of a request's parameters (`engine.runtime.sampling.SamplingParams`)."""

    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def filtered(self) -> bool: ...


@dataclass(frozen=True)
class Filters:
    """What the host knows of the filters of some rows, and a captured step is made for.

    candidates: largest logits of a row that are looked at, a power of two or V; 0: no row has top-k or top-p. nucleus: some row has top-p. any: some
    row has a filter at all.
    """

    candidates: int = 0
    nucleus: bool = False
    any: bool = False

    @classmethod
    def of(cls, params: Sequence[FilterParams], vocab_size: int) -> Filters:
        """Of rows over a vocabulary of V."""
        filtered = [p for p in params if p.filtered]
        limits = [p.top_k for p in filtered if 0 < p.top_k < vocab_size]
        nucleus = [p for p in filtered if p.top_p < 1]
        if any(not 0 < p.top_k < vocab_size for p in nucleus):
            count = vocab_size
        else:
            count = min(vocab_size, 1 << (max(limits) - 1).bit_length()) if limits else 0
        return cls(count, bool(nucleus), bool(filtered))


@dataclass(frozen=True)
class FilterRows:
    """The filters of each row, on a device. top_k: [n] int64, 0 for none; top_p: [n] float64, 1 for none; log_min_p: [n] float32, -inf for none."""

    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor

    def __getitem__(self, rows: slice) -> FilterRows:
        return FilterRows(self.top_k[rows], self.top_p[rows], self.log_min_p[rows])

    def repeat(self, count: int) -> FilterRows:
        """Each row `count` times, one after another."""
        if count == 1:
            return self
        return FilterRows(*(values.repeat_interleave(count) for values in (self.top_k, self.top_p, self.log_min_p)))

    @staticmethod
    def of(params: FilterParams) -> tuple[int, float, float]:
        """A row as the host has it; a greedy one has no filter."""
        return (params.top_k, params.top_p, _log(params.min_p)) if params.filtered else (0, 1.0, -math.inf)

    @classmethod
    def values(cls, params: Sequence[FilterParams]) -> tuple[list[int], list[float], list[float]]:
        """The three columns of several."""
        own = [cls.of(p) for p in params]
        return [k for k, _, _ in own], [p for _, p, _ in own], [m for _, _, m in own]


def device_cuts(scaled: Tensor, rows: FilterRows, filters: Filters) -> Tensor:
    """Smallest scaled logit [n] float32 that each row of scaled [n, V] float32 keeps, without anything being read back; `filters` covers all rows.

    A nucleus without a top-k beside it sorts the row: whether fewer candidates hold its mass is known to the device alone.
    """
    cuts = rows.log_min_p
    if not filters.candidates:
        return cuts
    vocab_size = scaled.shape[-1]
    whole = filters.candidates >= vocab_size
    largest = scaled.sort(-1, descending=True).values if whole else scaled.topk(filters.candidates).values
    last = rows.top_k.clamp(1, largest.shape[-1])[:, None] - 1
    floor = torch.where(rows.top_k > 0, largest.gather(1, last)[:, 0], -math.inf)
    if filters.nucleus:
        nucleus, _ = _mass_cuts(largest, floor, rows.top_p * _mass(scaled, floor))
        floor = torch.where(rows.top_p < 1, torch.maximum(floor, nucleus), floor)
    return torch.maximum(cuts, floor)


def cuts_of(scaled: Tensor, params: Sequence[FilterParams]) -> Tensor | None:
    """Smallest scaled logit that each row of scaled [n, V] float32 keeps, [n] float32, or None when no row has a filter."""
    vocab, device = scaled.shape[-1], scaled.device
    limits = [p.top_k if 0 < p.top_k < vocab else 0 for p in params]
    filtered = [i for i, p in enumerate(params) if limits[i] or p.top_p < 1]
    if not filtered and all(p.min_p == 0 for p in params):
        return None
    if scaled.is_cuda:
        top_k, top_p, log_min_p = FilterRows.values(params)
        rows = FilterRows(upload(top_k, device), upload(top_p, device, torch.float64), upload(log_min_p, device, torch.float32))
        return device_cuts(scaled, rows, Filters.of(params, vocab))
    cuts = torch.tensor([_log(p.min_p) for p in params], dtype=torch.float32)
    if not filtered:
        return cuts
    # Enough of the largest logits for every row's k, and for the nucleus of rows that have no k.
    count = min(vocab, max(limits[i] or NUCLEUS_CANDIDATES for i in filtered))
    chosen = scaled if len(filtered) == scaled.shape[0] else scaled[torch.tensor(filtered)]
    largest = chosen.topk(count).values  # [m, count], descending
    floor = torch.full((len(filtered),), -math.inf, dtype=torch.float32)
    has_k = torch.tensor([limits[i] > 0 for i in filtered])
    kth = largest.gather(1, torch.tensor([[max(limits[i], 1) - 1] for i in filtered]))[:, 0]
    floor = torch.where(has_k, kth, floor)
    nucleus = [j for j, i in enumerate(filtered) if params[i].top_p < 1]
    if nucleus:
        own = torch.tensor(nucleus)
        share = torch.tensor([params[filtered[j]].top_p for j in nucleus], dtype=torch.float64)
        floor[own] = torch.maximum(floor[own], _nucleus_cuts(chosen[own], largest[own], floor[own], share))
    rows_at = torch.tensor(filtered)
    cuts[rows_at] = torch.maximum(cuts[rows_at], floor)
    return cuts


def _log(min_p: float) -> float:
    return math.log(min_p) if min_p > 0 else -math.inf


def _mass(scaled: Tensor, floor: Tensor) -> Tensor:
    """Sum of the weights at or above each row's floor, [n] float64."""
    return scaled.exp().masked_fill_(scaled < floor[:, None], 0.0).sum(-1, dtype=torch.float64)


def _nucleus_cuts(scaled: Tensor, largest: Tensor, floor: Tensor, share: Tensor) -> Tensor:
    """Smallest scaled logit in each row's smallest set of largest ones that holds the given share of what lies at or above the row's floor.

    scaled [m, V] and its largest [m, count] (descending), floor [m] float32, share [m] float64. Returns [m] float32.
    """
    wanted = share * _mass(scaled, floor)
    cuts, reached = _mass_cuts(largest, floor, wanted)
    # Without a floor the candidates may hold too little (a flat distribution): then, and only then, the row is sorted.
    short = (~reached & (floor == -math.inf)).nonzero()[:, 0]
    if short.numel():
        cuts[short] = _mass_cuts(scaled[short].sort(-1, descending=True).values, floor[short], wanted[short])[0]
    return cuts


def _mass_cuts(values: Tensor, floor: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """First value of each descending row at which the summed weights reach `wanted`, and whether they do (else the row's last value)."""
    ends = values.exp().masked_fill_(values < floor[:, None], 0.0).double().cumsum(-1)
    last = (ends < wanted[:, None]).sum(-1).clamp_max(values.shape[-1] - 1)
    return values.gather(1, last[:, None])[:, 0], ends[:, -1] >= wanted
