"""When a block of drafts that a compiled call makes ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_ALWAYS = 1e30  # worth of a draft that is wanted whatever it costs


class Stopping(NamedTuple):
    """When drafting ends, in expected tokens; one number a request where it is an array.

    The chance of a draft, given those before, is height + slope times its probability. A request goes on while the product of its chances, times rate,
    is above `row`; all that go on together while what they gain beyond that is above passes[so many].
    """

    heights: np.ndarray  # float32 [B]
    slopes: np.ndarray  # float32 [B]
    rates: np.ndarray  # float32 [B]
    row: float
    passes: np.ndarray  # float32 [B + 1]

    @classmethod
    def never(cls, batch: int) -> Stopping:
        """All drafts that are asked for are made."""
        ones, nothing = np.ones(batch, np.float32), np.zeros(batch, np.float32)
        return cls(ones, nothing, ones * np.float32(_ALWAYS), 0.0, np.zeros(batch + 1, np.float32))
