"""Entropy model: which frequency table codes which integer, and how long the ideal code is.

A component with standard deviation sigma, quantised with a step, belongs to the scale class round(8 log2(sigma / step)). One table per class serves
all components, qualities and token steps: halving the step moves every component eight classes up. A token's gain (how much larger or smaller
than usual its residual is) moves all its components by 2 * gain classes; the encoder picks it, and it is coded ahead of the token.

Tables start as discretised Laplace densities and are then mixed with histograms
measured on held-out calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from codec.errors import CorruptedCode
from codec.quantize import ROUNDING

PRECISION_BITS = 14
TOTAL = 1 << PRECISION_BITS

CLASSES_PER_OCTAVE = 8
MIN_OCTAVE, MAX_OCTAVE = -4, 9
NUM_CLASSES = (MAX_OCTAVE - MIN_OCTAVE) * CLASSES_PER_OCTAVE + 1

NUM_GAINS = 16
GAIN_ZERO = 8
CLASSES_PER_GAIN = 2
"""A token's gain symbol g in 0..15 means a scale 2 ** ((g - 8) / 4) times the usual one."""

MAX_LIMIT = 2047
ESCAPE_BITS = 12.0
"""What an escape's remainder is counted as."""

RATE_WEIGHT = 0.08
"""Squared error, in steps, that one bit is worth to the encoder. The slope of a uniform quantiser, 2 ln 2 / 12 = 0.12, saves most bits at equal
squared error; at equal divergence of the target's output (SmolLM2) half to two thirds of it does better: what is zeroed out is a bias, not a noise."""


def class_of(sigma: np.ndarray, step: float) -> np.ndarray:
    """Scale class, int32, of components with standard deviation sigma, float [K]."""
    octave = np.log2(np.maximum(np.asarray(sigma, dtype=np.float64), 1e-12) / step)
    return np.clip(np.rint((octave - MIN_OCTAVE) * CLASSES_PER_OCTAVE), 0, NUM_CLASSES - 1).astype(np.int32)


def class_scale(index: np.ndarray | int) -> np.ndarray:
    """sigma / step at the middle of a class."""
    return np.exp2(np.asarray(index) / CLASSES_PER_OCTAVE + MIN_OCTAVE)


def limits() -> np.ndarray:
    """A [classes] int32: a class's table covers -A..A and an escape; A reaches about six standard deviations."""
    return np.clip(np.ceil(6.0 * class_scale(np.arange(NUM_CLASSES))) + 1, 2, MAX_LIMIT).astype(np.int32)


def laplace_probabilities(scale: float, limit: int) -> np.ndarray:
    """Probabilities, float64 [2 * limit + 2], of -limit..limit and the escape under a Laplace density.

    scale is sigma / step. The quantiser's cells are its own: zero covers |x| < 1 - ROUNDING, n covers n - ROUNDING <= |x| < n + 1 - ROUNDING.
    """
    b = scale / np.sqrt(2.0)
    edges = np.exp(-(np.arange(1, limit + 2) - ROUNDING) / b)  # P(|x| > edge)
    positive = 0.5 * (edges[:-1] - edges[1:])
    return np.concatenate([positive[::-1], [1.0 - edges[0]], positive, [edges[-1]]])


def normalise(probabilities: np.ndarray) -> np.ndarray:
    """Integer frequencies, uint32, every one at least 1, summing to TOTAL, near-optimal for the code length."""
    p = np.maximum(probabilities, 1e-12) / np.maximum(probabilities, 1e-12).sum()
    freq = np.maximum(np.rint(p * TOTAL), 1).astype(np.int64)
    excess = int(freq.sum() - TOTAL)
    while excess != 0:
        # take from (give to) the symbols whose code length suffers least (gains most) per unit
        change = 1 if excess < 0 else -1
        cost = np.where(freq + change >= 1, p * np.log2(freq / np.maximum(freq + change, 1)), np.inf)
        order = np.argsort(cost, kind="stable")
        take = min(abs(excess), max(1, int((freq > 2).sum()) // 4), len(order))
        usable = order[:take][np.isfinite(cost[order[:take]])]
        freq[usable] += change
        excess += change * len(usable)
    return freq.astype(np.uint32)


@dataclass
class EntropyModel:
    """Tables of all classes, flat: class c occupies [offset[c], offset[c + 1]) of probs and freqs, its escape last.

    Args:
        probs: float64 [sum(2 A + 2)], the model before rounding (defines the ideal code length).
        freqs: uint16 [sum(2 A + 2)], what the coder uses.
        gain_probs: float64 [16], gain_freqs: uint16 [16], for the per-token gain symbol.
        centroids: float32 [classes, 3], reconstruction of |q| = 1, 2 and above (offset from |q|), in steps.
    """

    probs: np.ndarray
    freqs: np.ndarray
    gain_probs: np.ndarray
    gain_freqs: np.ndarray
    centroids: np.ndarray
    limit: np.ndarray = field(default_factory=limits)

    @cached_property
    def offset(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(2 * self.limit.astype(np.int64) + 2)])

    @classmethod
    def laplace(cls) -> EntropyModel:
        """The model without calibration data."""
        limit = limits()
        probs = [laplace_probabilities(float(class_scale(c)), int(a)) for c, a in enumerate(limit)]
        gain = np.exp(-0.5 * ((np.arange(NUM_GAINS) - GAIN_ZERO) / 1.5) ** 2)
        return cls.from_probs(probs, gain / gain.sum(), np.zeros((NUM_CLASSES, 3), np.float32))

    @classmethod
    def from_probs(cls, probs: list[np.ndarray], gain: np.ndarray, centroids: np.ndarray) -> EntropyModel:
        freqs = np.concatenate([normalise(p) for p in probs]).astype(np.uint16)
        return cls(np.concatenate(probs), freqs, gain, normalise(gain).astype(np.uint16), centroids)

    def check(self) -> None:
        """CorruptedCode unless every table is complete, finite and positive, and the frequencies sum to TOTAL."""
        size = int(self.offset[-1])
        right = len(self.probs) == len(self.freqs) == size and len(self.gain_freqs) == NUM_GAINS and self.freqs.min(initial=1) > 0
        if right:
            sums = np.add.reduceat(self.freqs.astype(np.int64), self.offset[:-1])
            right = bool((sums == TOTAL).all()) and int(self.gain_freqs.sum(dtype=np.int64)) == TOTAL and int(self.gain_freqs.min()) > 0
        right = right and len(self.gain_probs) == NUM_GAINS and all(t.min(initial=0) >= 0 for t in (self.probs, self.gain_probs))
        right = right and all(np.isfinite(t).all() for t in (self.probs, self.gain_probs, self.centroids))
        if not right or self.centroids.shape != (NUM_CLASSES, 3):
            raise CorruptedCode("the pack's frequency tables are inconsistent", "calibrate the pack again")

    @cached_property
    def bits(self) -> np.ndarray:
        """Ideal code length, float32, of every table entry; the escape's excludes its remainder."""
        return -np.log2(np.maximum(self.probs, 1e-12)).astype(np.float32)

    @cached_property
    def gain_bits(self) -> np.ndarray:
        return -np.log2(np.maximum(self.gain_probs, 1e-12)).astype(np.float32)
