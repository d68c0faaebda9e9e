"""Entropy tables from held-out components: one histogram per scale class, mixed with the Laplace density by its weight of evidence."""

from __future__ import annotations

import numpy as np
import torch

from codec.quantize import quantise
from codec.rate import NUM_CLASSES, NUM_GAINS, EntropyModel, class_of, class_scale, final_classes, laplace_probabilities
from codec.spec import KEEP_FACTOR, QUALITIES

PRIOR_COUNT = 256.0
"""How many observations the prior of a class counts for."""

CENTROID_COUNT = 30.0
"""Observations at the integer itself that a reconstruction point starts from."""

SWEEP = tuple(2.0 ** (n / 2) for n in range(-3, 5))
"""Steps, relative to balanced, at which tables are counted: classes between those that a named quality meets are filled too."""


def fit_entropy_model(components: torch.Tensor, variance: torch.Tensor, rounds: int = 3, max_tokens: int = 2048) -> EntropyModel:
    """Tables for components float32 [n, K] of held-out tokens, whose variances are variance float32 [K].

    Gains and histograms depend on each other, so they are found in turns. Classes without data keep the Laplace density, narrowed
    or widened as little as the neighbouring classes tell.
    """
    stride = max(1, len(components) // max_tokens)
    components, sigma = components[::stride].cpu(), variance.clamp_min(1e-12).sqrt().cpu()
    steps = sorted(set(QUALITIES.values()) | {QUALITIES["balanced"] * s for s in SWEEP})
    coded = []
    for step in steps:
        k = int((sigma > KEEP_FACTOR * step).sum())
        if k:
            scaled = components[:, :k] / step
            coded.append((scaled.numpy(), quantise(scaled).numpy(), class_of(sigma[:k].numpy(), step)))
    model = EntropyModel.laplace()
    for turn in range(rounds):
        counts, gain_counts = np.zeros(int(model.offset[-1])), np.full(NUM_GAINS, 0.25)
        sums, sizes = np.zeros(3 * NUM_CLASSES), np.zeros(3 * NUM_CLASSES)
        for x, q, base in coded:
            gains = model.choose_gains(q, base)
            classes = final_classes(base[None], gains)
            # the first turn's Laplace tables are too far off to choose by
            q = q if turn == 0 else model.refine(x, q, classes)
            counts += np.bincount(model.symbols(q, classes).ravel(), minlength=len(counts))
            gain_counts += np.bincount(gains, minlength=NUM_GAINS)
            at = np.nonzero(q)
            magnitude = np.abs(q[at])
            cell = 3 * classes[at] + np.minimum(magnitude, 3) - 1
            sums += np.bincount(cell, np.abs(x[at]) - magnitude, minlength=len(sums))
            sizes += np.bincount(cell, minlength=len(sums))
        centroids = np.clip(sums / (sizes + CENTROID_COUNT), -0.5, 0.5).reshape(-1, 3).astype(np.float32)
        model = _mix(model, counts, gain_counts, centroids)
    return model


def _mix(model: EntropyModel, counts: np.ndarray, gain_counts: np.ndarray, centroids: np.ndarray) -> EntropyModel:
    """Posterior mean of each class's table under its Laplace prior; both sides of zero share their counts."""
    probs = []
    for c in range(NUM_CLASSES):
        limit = int(model.limit[c])
        prior = laplace_probabilities(float(class_scale(c)), limit)
        seen = counts[model.offset[c] : model.offset[c + 1]].copy()
        seen[:-1] = 0.5 * (seen[:-1] + seen[:-1][::-1])
        probs.append((seen + PRIOR_COUNT * prior) / (seen.sum() + PRIOR_COUNT))
    return EntropyModel.from_probs(probs, gain_counts / gain_counts.sum(), centroids)
