"""The encoder's choices by rate, and what follows from integers in their classes, as tensors on any device.

Code lengths that are compared are summed as whole numbers, so that every device, and every order of summation, chooses the same gains.
Axes: T tokens, K components, C scale classes.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from codec.quantize import LEVELS_PER_OCTAVE, MAX_LEVEL, MIN_LEVEL
from codec.rate import CLASSES_PER_GAIN, CLASSES_PER_OCTAVE, ESCAPE_BITS, GAIN_ZERO, NUM_CLASSES, NUM_GAINS, RATE_WEIGHT, EntropyModel
from kernels.choose_gains import Prices, choose_gains
from kernels.choose_gains.reference import SAMPLE
from kernels.cpu_decode import compiled_available, compiled_loads
from kernels.dispatch import use_triton
from kernels.reconstruct import Points

if TYPE_CHECKING:
    from kernels.cpu_decode.coded import ComponentTables, PriceTables

CLASSES_PER_LEVEL = CLASSES_PER_OCTAVE // LEVELS_PER_OCTAVE

_UNITS_PER_BIT = 4096


class _Nonzeros(NamedTuple):
    """Nonzero integers, token after token: their token int64 [n], size int32 [n], class before the gain int32 [n]; ends int64 [T + 1] of each
    token's share; zeros int64 [T, gains], what a token of zeros alone would cost."""

    row: torch.Tensor
    size: torch.Tensor
    own: torch.Tensor
    ends: torch.Tensor
    zeros: torch.Tensor


def own_classes(base: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Classes before the gain: base int32, moved down by whole classes where a token's step is coarser (levels int32, of a shape that fits)."""
    return (base - CLASSES_PER_LEVEL * levels).clamp_(0, NUM_CLASSES - 1)


def classes_before_gain(base: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """`own_classes` int32 [T, K] of base [K] and levels [T], or [1, K] where they are the same for all tokens."""
    return own_classes(base[None], levels[:, None]) if bool(levels.any()) else base[None]


def final_classes(base: torch.Tensor, levels: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Classes int32 [T, K] after the gain, from the components' base int32 [K], levels int32 [T] and gain symbols uint8 [T]."""
    return _gained(own_classes(base[None], levels[:, None]), gains.to(torch.int32)[:, None])


def _gained(own: torch.Tensor, gains: torch.Tensor | int) -> torch.Tensor:
    return (own + CLASSES_PER_GAIN * (gains - GAIN_ZERO)).clamp_(0, NUM_CLASSES - 1)


class RateChoice:
    """An entropy model's code lengths and reconstruction points on a device."""

    def __init__(self, model: EntropyModel, device: torch.device | str = "cpu"):
        limit = model.limit.astype(np.int64)
        centre = model.offset[:-1] + limit
        bits = model.bits.astype(np.float64).copy()
        bits[model.offset[1:] - 1] += ESCAPE_BITS
        price = np.rint(bits * _UNITS_PER_BIT).astype(np.int64)
        excess = price - np.repeat(price[centre], np.diff(model.offset))
        points = np.concatenate([np.zeros((NUM_CLASSES, 1), np.float32), model.centroids.astype(np.float32)], 1)

        def tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

        self.device, self.num_entries = torch.device(device), len(bits)
        self.limit, self.centre = tensor(limit, torch.int32), tensor(centre, torch.int32)
        self.bits, self._escape = tensor(bits, torch.float32), self.limit + 1
        self.gain_bits = tensor(model.gain_bits, torch.float32)
        # excess: over the price of a zero in the same class
        self._excess, self._zero_price = tensor(excess, torch.int32), tensor(price[centre], torch.int64)
        self._gain_price = tensor(np.rint(model.gain_bits * float(_UNITS_PER_BIT)), torch.int64)
        self._offset = tensor(points, torch.float32).reshape(-1)

    @property
    def prices(self) -> Prices:
        """Code lengths as `kernels.choose_gains` takes them."""
        return Prices(self.limit, self.centre, self._zero_price, self._excess, self._gain_price)

    @property
    def points(self) -> Points:
        """Limits and reconstruction points as `kernels.reconstruct` takes them."""
        return Points(self.limit, self._offset)

    @cached_property
    def component_tables(self) -> ComponentTables:
        """Limits and reconstruction points as the compiled `components` takes them; on a CPU."""
        from kernels.cpu_decode.coded import ComponentTables

        return ComponentTables(self.limit.numpy(), self._offset.view(-1, 4).numpy())

    def symbols(self, q: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Table index, int32, of integers q in final classes of the same shape."""
        escape = self._escape[classes]
        return self.centre[classes] + torch.where(q.abs() >= escape, escape, q)

    def code_lengths(self, q: torch.Tensor, classes: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        """Ideal bits, float64 [T], of q [T, K] in final classes [T, K] with gain symbols uint8 [T]; an escape's remainder counts ESCAPE_BITS."""
        return self.bits[self.symbols(q, classes)].sum(1, dtype=torch.float64) + self.gain_bits[gains.long()]

    def choose_gains(self, q: torch.Tensor, base: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Gain symbols, uint8 [T], with a shortest code for each token's integers q int32 [T, K], components' classes base [K] and levels [T].

        Most integers are zero, and their share of the cost is the same for every token of a level: only the others are looked at one by one.
        All gains are tried on every fourth component, the best one and its neighbours on all.
        """
        if use_triton(q):
            return choose_gains(q, base, -CLASSES_PER_LEVEL * levels, self.prices)
        if self._runs_compiled(q):
            from kernels.cpu_decode import coded

            shifts, at = (-CLASSES_PER_LEVEL * levels).numpy(), levels.long() - MIN_LEVEL
            few, every = (self._zero_costs(part)[at].numpy() for part in (base[::SAMPLE], base))
            return torch.from_numpy(coded.choose_gains(self.price_tables, q.numpy(), base.numpy(), shifts, few, every, SAMPLE))
        some = self._nonzeros(q[:, ::SAMPLE], base[::SAMPLE], levels)
        cost = torch.stack([self._gain_cost(some, torch.full_like(levels, gain)) for gain in range(NUM_GAINS)])
        best = cost.argmin(0)
        near = torch.stack([(best + step).clamp_(0, NUM_GAINS - 1) for step in (-1, 0, 1)])
        whole = self._nonzeros(q, base, levels)
        cost = torch.stack([self._gain_cost(whole, gains) for gains in near])
        return near.gather(0, cost.argmin(0, keepdim=True))[0].to(torch.uint8)

    @staticmethod
    def _runs_compiled(q: torch.Tensor) -> bool:
        return q.device.type == "cpu" and q.numel() > 0 and compiled_available() and compiled_loads()

    @cached_property
    def price_tables(self) -> PriceTables:
        """What the compiled choices take; on a CPU."""
        from kernels.cpu_decode.coded import PriceTables

        return PriceTables(*(part.numpy() for part in (self.limit, self.centre, self._excess, self.bits, self._offset.view(-1, 4))))

    def _zero_costs(self, base: torch.Tensor) -> torch.Tensor:
        """What a token of zeros takes, its gain's symbol included, int64 [levels, gains], of components of classes base int32 [K]."""
        counts = torch.bincount(base, minlength=NUM_CLASSES)
        every_level = torch.arange(MIN_LEVEL, MAX_LEVEL + 1, dtype=torch.int32, device=base.device)[:, None, None]
        every_gain = torch.arange(NUM_GAINS, dtype=torch.int32, device=base.device)[None, :, None]
        every_class = torch.arange(NUM_CLASSES, dtype=torch.int32, device=base.device)[None, None]
        return (counts * self._zero_price[_gained(own_classes(every_class, every_level), every_gain)]).sum(-1) + self._gain_price

    def _nonzeros(self, q: torch.Tensor, base: torch.Tensor, levels: torch.Tensor) -> _Nonzeros:
        row, column = q.nonzero(as_tuple=True)
        zeros = self._zero_costs(base)
        ends = torch.searchsorted(row, torch.arange(len(q) + 1, device=q.device))
        return _Nonzeros(row, q[row, column].abs(), own_classes(base[column], levels[row]), ends, zeros[levels.long() - MIN_LEVEL])

    def _gain_cost(self, part: _Nonzeros, gains: torch.Tensor) -> torch.Tensor:
        """Code length, int64 [T] in units, under each token's gain [T]."""
        classes = _gained(part.own, gains.to(torch.int32)[part.row])
        entry = self.centre[classes] + torch.minimum(part.size, self._escape[classes])
        total = torch.nn.functional.pad(self._excess[entry].cumsum(0), (1, 0))[part.ends].diff()
        return total + part.zeros.gather(1, gains.long()[:, None])[:, 0]

    def refine(
        self, x: torch.Tensor, q: torch.Tensor, base: torch.Tensor, levels: torch.Tensor, gains: torch.Tensor, weight: float = RATE_WEIGHT
    ) -> torch.Tensor:
        """Integers, int32 [T, K], that minimise squared error + weight * bits, in steps and in their final classes.

        Candidates for each x float32 [T, K] (already divided by the step) are the nearest integer, the next one towards zero, and zero; q is
        kept where it is an escape. base, levels and gains as for `final_classes`.
        """
        if self._runs_compiled(q):
            from kernels.cpu_decode import coded

            shifts = (-CLASSES_PER_LEVEL * levels).numpy()
            return torch.from_numpy(coded.refine(self.price_tables, x.numpy(), q.numpy(), base.numpy(), shifts, gains.numpy(), weight))
        row, column = (x.abs() >= 0.5).nonzero(as_tuple=True)
        value, old = x[row, column], q[row, column]
        classes = _gained(own_classes(base[column], levels[row]), gains.to(torch.int32)[row])
        size, limit, centre = value.abs(), self.limit[classes], self.centre[classes]
        nearest = torch.minimum(torch.floor(size + 0.5), limit.float()).to(torch.int32)
        best, chosen = torch.full_like(size, torch.inf), nearest
        for candidate in (nearest, (nearest - 1).clamp_min_(0), torch.zeros_like(nearest)):
            error = size - (candidate + self._offset[4 * classes + candidate.clamp(max=3)])
            cost = error * error + weight * self.bits[centre + candidate]
            chosen = torch.where(cost < best, candidate, chosen)
            best = torch.minimum(cost, best)
        out = torch.zeros_like(q)
        out[row, column] = torch.where(old.abs() > limit, old, torch.where(value < 0, -chosen, chosen))
        return out

    def reconstruct(self, q: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Reconstruction points, float32 in steps, of integers q in their final classes: the mean of what falls into the cell."""
        return q + q.sign() * self._offset[4 * classes + q.abs().clamp_(max=3)]
