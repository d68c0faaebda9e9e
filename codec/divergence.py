"""What a coded cache does to the target's output: divergence as a function of weighted distortion, measured once for a pair.

The distortion of a span is its mean squared weighted error an element, each token's share multiplied by how much errors in it matter. The divergence of
the target's output grows about in proportion to it, by a factor that differs from one kind of text to another. What the target's own arithmetic causes
adds to that: of SmolLM2 in bfloat16, divergence less that of recomputing is the divergence in float32, to within 5%.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from codec.errors import BadInput, CorruptedCode

_FIELDS = ("distortion", "divergence")
_STEEPEST = 2.0  # beyond the measured range: of the logarithms
_LEAST_SHARE = 0.25
"""Of a promised divergence that is left to the code where rounding takes the rest, or more than all of it."""


@dataclass(frozen=True)
class DivergenceCurve:
    """Mean KL(untouched || restored), nats a position, over the weighted distortion of the cache before it: the part that the code causes, straight
    between the logarithms, and `rounding`.

    distortion, divergence: at least two points, both positive and rising; divergence with what rounding adds.
    rounding: part of `divergence` that the target's own arithmetic causes, nats a position: of two computations of the same text in other passes. No
        code that stores less than every bit gets below it. None where it was not measured, as in packs of earlier versions.
    """

    distortion: tuple[float, ...]
    divergence: tuple[float, ...]
    rounding: float | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for values in (self.distortion, self.divergence) for a, b in pairwise(values))
        finite = all(0 < x < math.inf for x in (*self.distortion, *self.divergence))
        finite = finite and (self.rounding is None or 0 <= self.rounding < min(self.divergence, default=0.0))
        if len(self.distortion) != len(self.divergence) or len(self.distortion) < 2 or not rising or not finite:
            raise BadInput(
                "a divergence curve that does not rise", "give at least two points of positive, rising distortion and divergence"
            )

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]], rounding: float | None = None) -> DivergenceCurve:
        """Through measured (distortion, divergence): points that do not rise above those before, or above `rounding`, are left out. Raises BadInput
        for fewer than two."""
        kept: list[tuple[float, float]] = []
        for point in sorted(points):
            if min(point) > 0 and point[1] > (rounding or 0.0) and (not kept or (point[0] > 1.01 * kept[-1][0] and point[1] > kept[-1][1])):
                kept.append(point)
        return cls(tuple(x for x, _ in kept), tuple(y for _, y in kept), rounding)

    @property
    def _of_code(self) -> tuple[float, ...]:
        return tuple(y - (self.rounding or 0.0) for y in self.divergence)

    def exact(self) -> DivergenceCurve:
        """Of a target whose arithmetic adds nothing, as in float32."""
        return DivergenceCurve(self.distortion, self._of_code, None if self.rounding is None else 0.0)

    def divergence_of(self, distortion: float) -> float:
        """Expected divergence, nats a position."""
        return (self.rounding or 0.0) + _along(self.distortion, self._of_code, distortion)

    def distortion_of(self, divergence: float) -> float:
        """The distortion that causes a divergence; where rounding alone causes it, or nearly, one that adds _LEAST_SHARE of it."""
        return _along(self._of_code, self.distortion, max(divergence - (self.rounding or 0.0), _LEAST_SHARE * divergence))

    def as_info(self) -> dict[str, Any]:
        """For a pack's figures; inverse of `from_info`."""
        points = {name: [float(f"{x:.6g}") for x in getattr(self, name)] for name in _FIELDS}
        return points if self.rounding is None else points | {"rounding": float(f"{self.rounding:.6g}")}

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> DivergenceCurve | None:
        """Of a pack; None when it states none. Raises CorruptedCode when what it states is no curve."""
        stated = info.get("divergence")
        if stated is None:
            return None
        try:
            distortion, divergence = (tuple(float(x) for x in stated[name] if not isinstance(x, (bool, str))) for name in _FIELDS)
            rounding = stated.get("rounding")
            if rounding is not None:
                rounding = math.nan if isinstance(rounding, (bool, str)) else float(rounding)
                if not rounding < min(divergence, default=0.0):  # packs of earlier versions kept such points, and may hold nothing else
                    cls(distortion, divergence, 0.0 if 0 <= rounding < math.inf else rounding)
                    above = [n for n, y in enumerate(divergence) if y > rounding]
                    if len(above) < 2:
                        return cls(distortion, divergence)
                    distortion, divergence = tuple(distortion[n] for n in above), tuple(divergence[n] for n in above)
            return cls(distortion, divergence, rounding)
        except (AttributeError, BadInput, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptedCode("the pack's divergence curve is none", "calibrate it again with scripts/calibrate.py") from error


def _along(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Straight in the logarithms; beyond the ends as the last piece goes on, between the identity and `_STEEPEST` (or its inverse)."""
    if x <= 0:
        return 0.0
    right = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    slope = math.log(ys[right] / ys[right - 1]) / math.log(xs[right] / xs[right - 1])
    start = right - 1
    if x < xs[0] or x > xs[-1]:
        slope, start = min(max(slope, 1 / _STEEPEST), _STEEPEST), 0 if x < xs[0] else len(xs) - 1
    return ys[start] * math.exp(min(slope * math.log(x / xs[start]), 300.0))
